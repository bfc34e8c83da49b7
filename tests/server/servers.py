"""What the tests over HTTP start from: tiny bases, folders of deltas, a server on the loopback, uploads."""

from __future__ import annotations

import httpx
import torch
import transformers as hf

from benchmarks import load
from tests import toys
from tests.server.engines import noisy


TOKEN = "s3cret"
AUTHORISED = {"Authorization": f"Bearer {TOKEN}"}
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}answer: "


def parts_of(folder, **options):
    """A tiny causal model, in evaluation mode, and its tokenizer, with a chat template."""
    toys.model(folder / "llama", "llama")
    base = hf.AutoModelForCausalLM.from_pretrained(folder / "llama", **options).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder / "llama")
    tokenizer.chat_template = TEMPLATE
    return base, tokenizer


def classifier_of(folder, **options):
    """A tiny classifier with a random head, in evaluation mode, and its tokenizer."""
    toys.model(folder / "bert", "bert")
    # Drawn anew, whatever else was random before.
    torch.manual_seed(0)
    base = hf.AutoModelForSequenceClassification.from_pretrained(folder / "bert", **options).eval()
    return base, hf.AutoTokenizer.from_pretrained(folder / "bert")


def write_deltas(base, folder, count=3, start=0):
    for i in range(start, start + count):
        noisy(base, i).described(base_model_name_or_path="toy").save(folder / f"task{i}")


def served(service, **options):
    """Its address, while it runs."""
    return load.served(service, token=TOKEN, **options)


def files(folder):
    return {path.name: (path.name, path.read_bytes()) for path in sorted(folder.glob("adapter_*"))}


def put(url, name, folder, token=TOKEN, **changed):
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.put(f"{url}/v1/deltas/{name}", files=files(folder) | changed, headers=headers, timeout=60)
