"""Texts classified together get what each gets alone, whatever the model knows of padding; and what is said of them."""

from __future__ import annotations

import asyncio
import math

import httpx
import pytest
import torch
import transformers as hf

from benchmarks.load import served
from peft_dst.server.classifier import classify
from peft_dst.server.labels import verdict
from peft_dst.server.service import Service
from tests.models import bert
from tests.server.servers import classifier_of


SMALL = {"vocab_size": 61, "num_labels": 3, "bos_token_id": None, "eos_token_id": None}
LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LOG3 = math.log(3)
# The first tokens are at the ends of some, as a padding token would be.
TEXTS = [[5, 6, 7], [8, 0], [9, 10, 11, 12, 13, 1], [2], [0, 0], [3, 4, 1, 1]]


def gpt2(**options):
    return hf.GPT2ForSequenceClassification(
        hf.GPT2Config(**SMALL | options, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    )


def llama(**options):
    return hf.LlamaForSequenceClassification(hf.LlamaConfig(**SMALL | options, **LLAMA))


MODELS = {
    "bert": bert,
    "gpt2": gpt2,
    "llama": llama,
    "gpt2, padding": lambda: gpt2(pad_token_id=60),
    "llama, padding": lambda: llama(pad_token_id=60),
}


@pytest.mark.parametrize("name", MODELS)
def test_together_as_alone(name):
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    with torch.no_grad():
        want = torch.cat([model(input_ids=torch.tensor([text])).logits for text in TEXTS])
    before = model.config.pad_token_id
    torch.testing.assert_close(classify(model, TEXTS), want)
    for text, row in zip(TEXTS, want, strict=True):
        torch.testing.assert_close(classify(model, [text])[0], row)
    assert model.config.pad_token_id == before


@pytest.mark.parametrize(
    ("config", "logits", "want"),
    [
        ({"num_labels": 2}, [0.0, 0.0], {"label": "LABEL_0", "scores": {"LABEL_0": 0.5, "LABEL_1": 0.5}}),
        (
            {"id2label": {0: "no", 1: "yes"}, "problem_type": "single_label_classification"},
            [0.0, LOG3],
            {"label": "yes", "scores": {"no": 0.25, "yes": 0.75}},
        ),
        # One value, told as it is: all of one class is no probability.
        ({"num_labels": 1}, [-3.5], {"scores": {"LABEL_0": -3.5}}),
        ({"id2label": {0: "stars"}, "problem_type": "regression"}, [4.5], {"scores": {"stars": 4.5}}),
        ({"num_labels": 2, "problem_type": "regression"}, [4.5, -2.0], {"scores": {"LABEL_0": 4.5, "LABEL_1": -2.0}}),
        # Each by itself; the most probable first.
        (
            {"id2label": {0: "sport", 1: "home", 2: "news"}, "problem_type": "multi_label_classification"},
            [0.0, -LOG3, LOG3],
            {"labels": ["news", "sport"], "scores": {"sport": 0.5, "home": 0.25, "news": 0.75}},
        ),
        (
            {"num_labels": 1, "problem_type": "multi_label_classification"},
            [-LOG3],
            {"labels": [], "scores": {"LABEL_0": 0.25}},
        ),
        # Heads of deltas, as wide as the base's is not: numbers for names, and classes, but for one value.
        ({"id2label": {0: "no", 1: "yes"}}, [0.0, 0.0, LOG3], {"label": "2", "scores": {"0": 0.2, "1": 0.2, "2": 0.6}}),
        ({"id2label": {0: "no", 1: "yes"}}, [1.5], {"scores": {"0": 1.5}}),
        (
            {"num_labels": 1, "problem_type": "regression"},
            [0.0, LOG3],
            {"label": "1", "scores": {"0": 0.25, "1": 0.75}},
        ),
        (
            {"num_labels": 3, "problem_type": "multi_label_classification"},
            [0.0, -LOG3],
            {"labels": ["0"], "scores": {"0": 0.5, "1": 0.25}},
        ),
    ],
)
def test_what_is_said_of_a_text(config, logits, want):
    found = verdict(torch.tensor(logits), hf.BertConfig(**config))
    assert found.pop("scores") == pytest.approx(want.pop("scores"), abs=1e-6)
    assert found == want


def test_what_is_said_is_what_the_base_was_made_for(tmp_path):
    """A model without labels, and one whose labels are independent, as clients see them."""
    for options, form in (
        ({"num_labels": 1}, ["scores"]),
        ({"num_labels": 4, "problem_type": "multi_label_classification"}, ["labels", "scores"]),
        ({"num_labels": 4}, ["label", "scores"]),
    ):
        base, tokenizer = classifier_of(tmp_path, **options)
        with torch.no_grad():
            (logits,) = base(**tokenizer(["who is the cat"], return_tensors="pt")).logits.double()
        with served(Service(base, tokenizer, "base")) as url:
            answer = httpx.post(f"{url}/v1/classify", json={"model": "base", "input": "who is the cat"})
        (found,) = answer.json()["data"]
        assert list(found) == ["index", *form]
        probabilities = {1: logits, 4: logits.softmax(-1) if "label" in form else logits.sigmoid()}[len(logits)]
        assert list(found["scores"].values()) == pytest.approx(probabilities.tolist(), abs=1e-5)


def test_more_texts_than_may_wait(tmp_path):
    """A request is one, however many texts it has; but no more than 256."""
    base, tokenizer = classifier_of(tmp_path, num_labels=3)
    service = Service(base, tokenizer, "base", capacity=4, queue=2)
    assert len(asyncio.run(service.classify(None, ["who is the cat"] * 50))) == 50
    with served(service) as url:
        for count, status in ((257, 400), (0, 400), (256, 200)):
            answer = httpx.post(f"{url}/v1/classify", json={"model": "base", "input": ["cat"] * count}, timeout=60)
            assert answer.status_code == status
            if status == 200:
                assert [one["index"] for one in answer.json()["data"]] == [*range(count)]
