"""Several subsets in one batch, a name for each sample. The seed is in the weights, and no gradients are recorded.

Linear layers, embeddings and norms run once for the whole batch, and what a subset changes is corrected in the outputs of
its samples (`core.correction`). Any other module whose own parameters a subset changes (convolutions, attention with
parameters of its own, whole heads) runs once a subset, on its samples alone and with its values written in.

For that one must know which tensors have their samples along the first dimension, and a size does not tell: a batch may
have as many samples as its texts have tokens, or an expert tokens. So the first mixed batch of a model is also put through
the seed twice, as it is and with a sample more, before anything is corrected. What is then longer by one row has its
samples there; what has not changed is what all samples have in common. This is remembered for each module and kind of
input.

Served are modules that get their samples along the first dimension, or one row for all samples. Refused, by name:
- modules that get them along another dimension, or flattened with others (sequence-first layers, windows, routers);
- rows that were selected by their values (the tokens of an expert, unpadded texts), whatever their number is;
- images and sounds that are not one for each sample, as far as the placeholders in `input_ids` tell;
- caches handed to a module that would run more than once, and whatever else cannot be divided;
- parameters that somebody reads without calling the module that has them;
- a model that fails with a sample more, where that leaves a module unknown.
The model's own inputs are taken at their word: one with as many rows as there are names has a row for each sample.

* `inputs`      whether a model was given a sample for each name
* `layouts`     where tensors have their samples
* `corrections` of outputs, by kinds of modules
* `changes`     what a subset changes, module by module
* `batch`       whose sample is which
* `running`     modules that run once and are corrected, or once a subset
* `norms`       of the latter those that need not
* `hooks`       a model that does all this for a while

PEFT's models come here through `mixed`, pools through `serving`; neither is known here.
"""

from .batch import Host, Subsets
from .changes import BASE, Changes, Reader, Readers, Whole, changes_of
from .corrections import Entries
from .hooks import check_not_compiled, mixed
from .inputs import check_length, check_placeholders


__all__ = [
    "BASE",
    "Changes",
    "Entries",
    "Host",
    "Reader",
    "Readers",
    "Subsets",
    "Whole",
    "changes_of",
    "check_length",
    "check_not_compiled",
    "check_placeholders",
    "mixed",
]
