"""What trained adapters look like, without running them.

* `inspect`  what a delta holds
* `overlap`  how much two subsets have in common, beside what chance would give
* `overlaps` the same of several, each with each
"""

from .inspection import Contents, Inspection, inspect
from .overlap import Count, Overlap, overlap
from .overlaps import Overlaps, overlaps


__all__ = ["Contents", "Count", "Inspection", "Overlap", "Overlaps", "inspect", "overlap", "overlaps"]
