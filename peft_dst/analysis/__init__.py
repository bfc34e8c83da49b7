"""What trained adapters look like, without running them.

* `inspect`  what a delta holds
* `overlap`  how much two subsets have in common, beside what chance would give
"""

from .inspection import Contents, Inspection, inspect
from .overlap import Count, Overlap, overlap


__all__ = ["Contents", "Count", "Inspection", "Overlap", "inspect", "overlap"]
