"""Texts classified together get what each gets alone, whatever the model knows of padding."""

from __future__ import annotations

import asyncio

import pytest
import torch
import transformers as hf

from peft_dst.server.classifier import classify
from peft_dst.server.service import Service
from tests import toys
from tests.models import bert


SMALL = {"vocab_size": 61, "num_labels": 3, "bos_token_id": None, "eos_token_id": None}
LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
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


def test_more_texts_than_may_wait(tmp_path):
    """A request is one, however many texts it has."""
    toys.model(tmp_path / "bert", "bert")
    torch.manual_seed(0)
    base = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert", num_labels=3).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "bert")
    service = Service(base, tokenizer, "base", capacity=4, queue=2)
    assert len(asyncio.run(service.classify(None, ["who is the cat"] * 50))) == 50
    assert service.close(60)
