"""Many deltas on one base, at inference.

* `storage`  a model's parameters in one piece, so that entries anywhere in it are written at once
* `heads`    the modules of which a delta may bring another size
* `placed`   a delta made ready for that storage
* `cache`    what was used last, within a budget of bytes
* `shelf`    deltas by name: read, made ready and held
* `turns`    threads at weights that can be of one delta at a time
* `pool`     one delta in the weights, or several in one batch
* `planner`  whether they go together, or one after the other

Imports torch, numpy, the core and the delta only: neither PEFT nor transformers is needed to serve.
"""

from .planner import Planner
from .pool import DeltaPool, PoolStatistics
from .shelf import UnknownDelta
from .storage import FlatStorage


__all__ = ["DeltaPool", "FlatStorage", "Planner", "PoolStatistics", "UnknownDelta"]
