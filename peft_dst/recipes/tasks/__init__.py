"""What is learned: where its rows come from, how they are encoded, and how answers are judged. One module a family.

* `data`           rows of a hub id or a local folder
* `base`           what every task can do
* `classification` a label a text, or a pair of texts
* `tagging`        a label a word
* `generation`     answers in words: questions, sums, translations
* `superglue`      eight tasks in one mix, as text
* `words`          masked words, also as a probe of an encoder
"""

from ..options import TaskOptions
from .base import Splits, Task
from .classification import Classification
from .data import first_rows, load_rows, local_folder
from .generation import Maths, QuestionAnswering, Translation
from .superglue import SuperGLUE
from .tagging import Tagging
from .words import MaskedWords


KINDS: dict[str, type[Task]] = {
    "classification": Classification,
    "tagging": Tagging,
    "translation": Translation,
    "question_answering": QuestionAnswering,
    "maths": Maths,
    "superglue": SuperGLUE,
    "masked_words": MaskedWords,
}


def make_task(options: TaskOptions) -> Task:
    """The task that the options name."""
    return KINDS[options.name](options)


__all__ = ["KINDS", "Splits", "Task", "first_rows", "load_rows", "local_folder", "make_task"]
