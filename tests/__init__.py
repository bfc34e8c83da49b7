import os

import torch


# Without a GPU the kernels run in Triton's interpreter, which must be asked for before anything imports triton, as many
# a library does. This file is the first of the suite to be imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
