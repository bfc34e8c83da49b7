"""Metrics against cases worked out by hand, and against the libraries that they stand on."""

from __future__ import annotations

import sys
from decimal import Decimal

import pytest
import sacrebleu

from peft_dst.recipes import metrics
from peft_dst.recipes.tasks.superglue import part_scores


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The Beatles", "beatles"),
        ("  A   man, a plan: an ARTICLE!  ", "man plan article"),
        ("rock'n'roll", "rock n roll"),
        ("‘Quoted’ `text´", "quoted text"),
        ("under_score", "under score"),
        ("Theatre of another era", "theatre of another era"),
        ("a", ""),
        ("1,000.5", "1 000 5"),
        # Their dashes and accents are not in the official list: they stay.
        ("Jean–Paul Sartre’s", "jean–paul sartre s"),
        ("Beyoncé", "beyoncé"),
        ("A.A. Milne", "milne"),
        ("An_the_a", ""),
    ],
)
def test_triviaqa_normalises(text, normalised):
    assert metrics.normalise_answer(text) == normalised


@pytest.mark.parametrize(
    ("text", "normalised"),
    [("The U.S.", "us"), ("rock'n'roll", "rocknroll"), ("A.A. Milne", "aa milne"), ("the ‘Quoted’", "‘quoted’")],
)
def test_squad_normalises_without_spaces(text, normalised):
    assert metrics.normalise_squad(text) == normalised


def test_an_answer_may_be_any_alias():
    aliases = [["Sam Clemens", "Mark Twain"], ["Paris"], ["The Who"], ["Anna"]]
    assert metrics.answer_match(["mark twain.", "London", "who", "Anna K"], aliases) == 2 / 4
    # Token F1: 1, 0, 1, and 2 · 1 / (2 + 1) of the best alias.
    assert metrics.answer_f1(["mark twain.", "London", "who", "Anna K"], aliases) == pytest.approx(
        (1 + 0 + 1 + 2 / 3) / 4
    )
    # A repeated word counts once where the reference has it once.
    assert metrics.answer_f1(["anna anna"], [["anna"]]) == pytest.approx(2 / 3)
    # An article is nothing, and so is an empty answer: an exact match, but the official F1 wants a word in common.
    assert metrics.answer_match([""], [["a"]]) == 1.0
    assert metrics.answer_f1([""], [["a"]]) == 0.0
    assert metrics.answer_match([], []) == metrics.answer_f1([], []) == 0.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("He has 3 and 4.\n#### 18", "18"),
        ("#### 1,234", "1234"),
        ("#### -5", "-5"),
        ("#### $70.50 a day 3", "70.5"),
        # As in GSM8K's own script, which searches for the first mark.
        ("first #### 4 then #### 8", "4"),
        ("#### 3\nquestion: and 9 more", "3"),
        ("#### 1,234,567.50", "1234567.5"),
        ("#### +7", "7"),
        ("of 5, none ####", None),
        ("The answer is 12.", "12"),
        ("12 eggs at $2 make 24.00", "24"),
        ("so it is .5", "0.5"),
        ("#### 100", "100"),
        ("#### 0.0", "0"),
        ("none", None),
        ("####", None),
    ],
)
def test_gsm8k_finds_the_final_number(text, number):
    assert metrics.final_number(text) == (None if number is None else Decimal(number))


def test_gsm8k_compares_numbers():
    references = ["… #### 18", "#### 1000", "#### 3", "#### 7"]
    assert metrics.number_match(["#### 18.00", "it is 1,000", "three", "#### 17"], references) == 2 / 4
    assert metrics.number_match(["none"], ["none"]) == 0.0


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("so $4^2 = 16$.The answer is: 16", True),
        ("The answer is: 16.", True),
        ("The answer is: 16.00", True),
        ("The answer is: $16", True),
        ("The answer is: 32/2", True),
        ("The final answer is 16!", True),
        ("#### 16", True),
        ("The answer is: 15\n…\nThe answer is: 16\nThe cat has 3", True),
        ("The answer is: 3 #### 16", False),  # the announcement that comes first in the rule's list, not in the text
        ("16", False),
        ("The answer is: 16 apples", False),
        ("The answer is: 16/0", False),
        ("The answer is: 1/2/3", False),
        ("####16", False),
        ("", False),
    ],
)
def test_peft_counts_what_is_stated(prediction, right):
    assert metrics.stated_match([prediction], ["She eats 3.\n#### 16"]) == right


def test_peft_compares_words_as_they_are():
    assert metrics.stated_match(["The answer is: x+1", "#### 1,000"], ["The answer is: x+1.", "#### 1000"]) == 1 / 2


def test_bleu_is_sacrebleus():
    predictions = ["the cat sat on the mat today", "a dog runs in the green park"]
    references = [["the cat sat on the mat", "a cat is on the mat today"], ["a dog runs in a green park"]]
    streams = [["the cat sat on the mat", "a dog runs in a green park"], ["a cat is on the mat today", None]]
    assert metrics.bleu(predictions, references) == sacrebleu.corpus_bleu(predictions, streams).score
    assert metrics.bleu(predictions, [[p] for p in predictions]) == pytest.approx(100)
    assert metrics.bleu(["", ""], references) == 0
    assert metrics.bleu(predictions, references) > metrics.bleu(predictions, [r[:1] for r in references])


def test_bleurt_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "bleurt", None)
    with pytest.raises(ValueError, match=r"asks for BLEURT, which is not installed\. Install it .*bleurt"):
        metrics.bleurt(["a"], ["a"], "BLEURT-20")


def test_spans_count_whole():
    truth = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG"]]
    found = [["B-PER", "O", "O", "B-LOC"], ["B-LOC", "B-ORG"]]
    # Two of four found are right (a cut person is wrong), two of three are found.
    assert metrics.span_scores(found, truth) == pytest.approx({"f1": 4 / 7, "precision": 2 / 4, "recall": 2 / 3})
    assert metrics.span_scores([["O"]], [["O"]]) == {"f1": 0, "precision": 0, "recall": 0}


def test_f1_of_labels():
    # Of label a: precision 1/2, recall 1; of b: 1, 1/2; of c: 1, 1. An answer that is no label is wrong everywhere.
    assert metrics.macro_f1(list("aabc"), list("abbc")) == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert metrics.macro_f1(["a", "nonsense"], ["a", "b"]) == pytest.approx((1 + 0) / 2)
    assert metrics.binary_f1(["True", "False", "True"], ["True", "True", "False"], "True") == pytest.approx(0.5)


def rows(part, targets, groups=None, references=None):
    return [
        {"part": part, "references": references[i] if references else [t], "group": groups[i] if groups else ""}
        for i, t in enumerate(targets)
    ]


def test_superglue_averages_first_within_tasks():
    cb = part_scores("CB", rows("CB", ["neutral", "entailment"]), ["neutral", "neutral"])
    assert cb == pytest.approx({"accuracy": 1 / 2, "f1": (2 / 3 + 0) / 2})
    multirc = part_scores(
        "MultiRC", rows("MultiRC", ["True", "False", "True"], ["q1", "q1", "q2"]), ["True", "False", "False"]
    )
    # The first question is right as a whole, the second is not.
    assert multirc == pytest.approx({"f1": 2 / 3, "exact_match": 1 / 2})
    record = part_scores("ReCoRD", rows("ReCoRD", ["x"], references=[["Paris", "the city"]]), ["city"])
    assert record == {"f1": 1.0, "exact_match": 1.0}
    copa = part_scores("COPA", rows("COPA", ["choice1"] * 4), ["choice1"] * 3 + ["choice2"])
    assert copa == {"accuracy": 3 / 4}
    average = metrics.superglue_average({"CB": cb, "MultiRC": multirc, "ReCoRD": record, "COPA": copa})
    assert average == pytest.approx(((1 / 2 + 1 / 3) / 2 + (2 / 3 + 1 / 2) / 2 + 1 + 3 / 4) / 4)
