"""Where kernels run."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from peft_dst.core import kernels


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """On a GPU, or through Triton's interpreter, for which `tests/__init__.py` asks where there is no GPU."""
    pytest.importorskip(
        "triton", minversion="3.6", reason="triton is not installed (it is for Linux on x86-64), or is old"
    )
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if request.param == "cuda" and (interpreted or not torch.cuda.is_available()):
        pytest.skip("needs a CUDA device, and TRITON_INTERPRET not set")
    if request.param == "cpu" and not interpreted:
        pytest.skip("needs TRITON_INTERPRET=1 (not set by itself where there is a GPU)")
    assert kernels.available(torch.empty(0, device=request.param))
    # The interpreter's numpy warns where a GPU computes NaN or infinity silently.
    with np.errstate(all="ignore"):
        yield request.param
