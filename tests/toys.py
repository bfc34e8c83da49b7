"""Toy data sets as JSON lines, and tiny random models with a tokenizer of their words, as folders that recipes name."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors


SPECIALS = ["<pad>", "</s>", "<unk>", "<mask>", "<s>"]
WORDS = """
who what where is was the a an in of and red green blue cat dog house city river runs sleeps paris rome anna paul
one two three 1 2 3 4 5 6 #### question: answer: der die katze hund haus rot entailment contradiction neutral
True False choice1 choice2
""".split()  # noqa: SIM905


def write_rows(folder: Path, **splits: list[dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def questions(count: int, start: int = 0) -> list[dict]:
    """Two labels that the first word tells apart."""
    pairs = [("who", "PERSON"), ("where", "PLACE")]
    things = ["cat", "dog", "house", "city", "river"]
    picked = [(*pairs[i % 2], things[i % 5], things[(i // 2) % 5]) for i in range(start, start + count)]
    return [{"text": f"{word} is the {a} of the {b}", "label": label} for word, label, a, b in picked]


def tokenizer(folder: Path, encoder: bool = True) -> None:
    """Words between spaces; for encoders with a beginning and an end."""
    vocabulary = {word: i for i, word in enumerate(SPECIALS + WORDS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = ("</s>", vocabulary["</s>"])
    if encoder:
        start = ("<s>", vocabulary["<s>"])
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[start, end]
        )
    else:
        made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[end])
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", mask_token="<mask>", bos_token="<s>",
        cls_token="<s>", sep_token="</s>",
    )  # fmt: skip
    fast.save_pretrained(folder)


def model(folder: Path, kind: str) -> Path:
    """A tiny random model in a folder of its own: bert, t5, gpt2 or llama. The first without any head."""
    torch.manual_seed(0)
    size = len(SPECIALS) + len(WORDS)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if kind == "bert":
        made = hf.BertModel(hf.BertConfig(vocab_size=size, max_position_embeddings=64, **sizes))
    elif kind == "t5":
        made = hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=size, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
                decoder_start_token_id=0, relative_attention_num_buckets=8,
            )
        )  # fmt: skip
    elif kind == "gpt2":
        made = hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=size, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1
            )
        )
    else:
        made = hf.LlamaForCausalLM(
            hf.LlamaConfig(
                vocab_size=size, num_key_value_heads=2, bos_token_id=4, eos_token_id=1, pad_token_id=0, **sizes
            )
        )
    made.save_pretrained(folder)
    if kind in ("gpt2", "llama"):
        causal_tokenizer(folder)
    else:
        tokenizer(folder, encoder=kind == "bert")
    return folder


def causal_tokenizer(folder: Path) -> None:
    """The same words, with nothing put around them."""
    tokenizer(folder)
    fast = hf.PreTrainedTokenizerFast.from_pretrained(folder)
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    fast.save_pretrained(folder)


def classification(folder: Path) -> dict:
    """A recipe on questions and a tiny BERT, as nested options."""
    write_rows(folder / "data", train=questions(40), test=questions(10, 40))
    return {
        "model": {"name": str(model(folder / "bert", "bert")), "head": ["pooler", "classifier"]},
        "task": {"name": "classification", "data": str(folder / "data"), "max_length": 16},
        "method": {"epsilon": 0.02},
        "training": {"max_steps": 4, "batch_size": 4},
    }
