"""What predictions are worth. Functions on lists, on scikit-learn, seqeval and SacreBLEU; nothing is fetched from anywhere.

All are fractions between 0 and 1 but BLEU and BLEURT, which have their usual scales (BLEU 0 to 100).
"""

from __future__ import annotations

import re
import statistics
import string
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import sacrebleu
from seqeval.metrics import f1_score as seqeval_f1
from seqeval.metrics import precision_score as seqeval_precision
from seqeval.metrics import recall_score as seqeval_recall
from sklearn.metrics import accuracy_score
from sklearn.metrics import f1_score as sklearn_f1


# Beside ASCII's: typographic quotes and accents count as punctuation in TriviaQA.
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "‘’´`", " "))
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
# How MetaMathQA and GSM8K announce an answer, the longer ones first.
_ANNOUNCED = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NUMBER = re.compile(r"[-+]?\.?\d[\d,]*(?:\.\d+)?")


def accuracy(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """Share of predictions that equal their reference."""
    return float(accuracy_score(list(references), list(predictions)))


def macro_f1(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """Mean of the F1 scores of the labels that the references have."""
    labels = sorted(set(references))
    return float(sklearn_f1(references, predictions, labels=labels, average="macro", zero_division=0.0))


def binary_f1(predictions: Sequence[Any], references: Sequence[Any], positive: Any = 1) -> float:
    """F1 of one label."""
    return float(sklearn_f1(references, predictions, labels=[positive], average="macro", zero_division=0.0))


def normalise_answer(text: str) -> str:
    """An answer as TriviaQA compares it: lower case, without punctuation, articles and double spaces."""
    return _without_articles(text.lower().translate(_PUNCTUATION))


def normalise_squad(text: str) -> str:
    """An answer as SQuAD and ReCoRD compare it: where TriviaQA puts a space for punctuation, there is nothing."""
    return _without_articles(text.lower().translate(_ASCII_PUNCTUATION))


def _without_articles(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text).split())


def answer_match(
    predictions: Sequence[str], aliases: Sequence[Sequence[str]], normalise: Callable[[str], str] = normalise_answer
) -> float:
    """TriviaQA's exact match: share of predictions that are one of the accepted answers, both normalised."""
    pairs = zip(predictions, aliases, strict=True)
    return _mean([normalise(p) in {normalise(alias) for alias in accepted} for p, accepted in pairs])


def answer_f1(
    predictions: Sequence[str], aliases: Sequence[Sequence[str]], normalise: Callable[[str], str] = normalise_answer
) -> float:
    """Token F1 with the best of the accepted answers, normalised; as for TriviaQA, SQuAD and ReCoRD."""
    return _mean(
        [
            max((_token_f1(normalise(p), normalise(alias)) for alias in accepted), default=0.0)
            for p, accepted in zip(predictions, aliases, strict=True)
        ]
    )


def _token_f1(prediction: str, reference: str) -> float:
    one, other = prediction.split(), reference.split()
    common = sum(min(one.count(token), other.count(token)) for token in set(one))
    return 2 * common / (len(one) + len(other)) if common else 0.0


def final_number(text: str) -> Decimal | None:
    """GSM8K's answer in a chain of thought: the number after the first `####`, or else the last one there is."""
    _, marked, end = text.partition("####")
    found = _NUMBER.findall(end if marked else text)
    if not found:
        return None
    try:
        return Decimal((found[0] if marked else found[-1]).replace(",", "")).normalize()
    except InvalidOperation:
        return None


def number_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """GSM8K's accuracy: share of predictions whose final number is the reference's, whatever its notation."""
    pairs = [(final_number(p), final_number(r)) for p, r in zip(predictions, references, strict=True)]
    return _mean([one is not None and one == other for one, other in pairs])


def stated_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Accuracy by the rule of PEFT's comparison of methods: what is stated as the answer, and nothing else on that line.

    Stricter than `number_match`: no number counts that is not announced (`The answer is: `, `#### `, …), or has words
    after it. Fractions are divided.
    """
    pairs = [(_stated(p), _stated(r)) for p, r in zip(predictions, references, strict=True)]
    return _mean([one is not None and one == other for one, other in pairs])


def _stated(text: str) -> float | str | None:
    announced = next((words for words in _ANNOUNCED if words in text.strip().rstrip(".!?")), None)
    if announced is None:
        return None
    answer = text.strip().rstrip(".!?").rpartition(announced)[2].strip().split("\n", 1)[0].strip(" .!?$%")
    above, divided, below = answer.partition("/")
    try:
        return float(Decimal(above.strip()) / Decimal(below.strip() if divided else 1))
    except (ArithmeticError, ValueError):
        return answer


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """SacreBLEU's corpus BLEU with its default settings, 0 to 100, against all references of each prediction."""
    most = max(len(texts) for texts in references)
    streams = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    return float(sacrebleu.corpus_bleu(list(predictions), streams).score)


def bleurt(predictions: Sequence[str], references: Sequence[str], checkpoint: str) -> float:
    """BLEURT's mean score, with a checkpoint on this machine.

    Raises:
        ValueError: if BLEURT is not installed.
    """
    scorer = check_bleurt().BleurtScorer(checkpoint)
    return statistics.fmean(scorer.score(references=list(references), candidates=list(predictions)))


def check_bleurt() -> Any:
    """BLEURT's module of scores.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        from bleurt import score
    except ImportError:
        raise ValueError(
            "evaluation.bleurt asks for BLEURT, which is not installed. Install it from its repository (pip install "
            "git+https://github.com/google-research/bleurt), or leave evaluation.bleurt out."
        ) from None
    return score


def span_scores(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 of whole entities, as CoNLL counts them; tags are B-…, I-… and O, a list a sentence."""
    one, other = [list(tags) for tags in predictions], [list(tags) for tags in references]
    return {
        "f1": float(seqeval_f1(other, one, zero_division=0)),
        "precision": float(seqeval_precision(other, one, zero_division=0)),
        "recall": float(seqeval_recall(other, one, zero_division=0)),
    }


def grouped_match(predictions: Sequence[Any], references: Sequence[Any], groups: Sequence[Any]) -> float:
    """MultiRC's exact match: share of the questions (groups) all of whose answers are judged right."""
    right: dict[Any, bool] = {}
    for prediction, reference, group in zip(predictions, references, groups, strict=True):
        right[group] = right.get(group, True) and prediction == reference
    return _mean(list(right.values()))


def superglue_average(scores: Mapping[str, Mapping[str, float]]) -> float:
    """Mean over tasks, of tasks with several scores their mean (first paper, Appendix G).

    Args:
        scores: task → its scores by name.
    """
    return statistics.fmean(statistics.fmean(figures.values()) for figures in scores.values())


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0
