"""From a fully fine-tuned checkpoint to an adapter: keep each silo's largest changes, put everything else back.

* `skeleton`   the tuned model's modules over the base's tensors, without a copy of either
* `figures`    what was kept and what was cut off
* `extract`    the choice, and the adapter that PEFT writes
"""

from .extract import extract
from .figures import Extraction, SiloFigures
from .skeleton import layout_of


__all__ = ["Extraction", "SiloFigures", "extract", "layout_of"]
