"""What trained adapters look like, without running them.

* `overlap`  how much two subsets have in common, beside what chance would give
"""

from .overlap import Count, Overlap, overlap


__all__ = ["Count", "Overlap", "overlap"]
