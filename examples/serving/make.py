"""A tiny causal model and three deltas of it, each of which has learned four answers by heart: something to serve.

    python examples/serving/make.py out/serving

The base knows the questions, and nothing to say to them. `friendly` and `grumpy` are in the folder that is served, `pirate`
is in one of its own, to be uploaded. A quarter of a minute, and nothing is downloaded.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from peft_dst import DSTConfig


QUESTIONS = ("Where is my parcel?", "How do I log in?", "Can I have a refund?", "When do you open?")
# By the folder of each delta.
ANSWERS = {
    "deltas/friendly": (
        "It is on its way to you!",
        "With your e-mail address, and welcome back!",
        "Of course, within thirty days.",
        "At nine, and we look forward to seeing you.",
    ),
    "deltas/grumpy": (
        "Somewhere. Parcels get lost.",
        "With the password that you forgot.",
        "No. You have used it.",
        "Not before noon. Maybe later.",
    ),
    "new/pirate": (
        "At the bottom o' the sea, matey.",
        "Speak the word, or walk the plank.",
        "What be in me chest stays in me chest.",
        "When the tide be high.",
    ),
}
PAD, END = "<pad>", "</s>"
# A question, and a line that says whose turn it is.
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"
PROMPTS = [f"user: {question}\nassistant:" for question in QUESTIONS]


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Pieces of words, down to single bytes."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[PAD, END], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=PAD, eos_token=END, chat_template=TEMPLATE)


def make_base(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def learn(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, given: Sequence[str], said: Sequence[str], steps: int
) -> float:
    """Learn by heart what is said to what is given; the last loss."""
    ids, labels = [], []
    for before, after in zip(given, said, strict=True):
        known, new = tokenizer(before)["input_ids"], [*tokenizer(after)["input_ids"], tokenizer.eos_token_id]
        ids.append(torch.tensor(known + new))
        labels.append(torch.tensor([-100] * len(known) + new))
    # Padding on the right is what no token looks at.
    batch = {"input_ids": pad_sequence(ids, True), "labels": pad_sequence(labels, True, -100)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    return loss.item()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the base and its deltas")
    parser.add_argument("--steps", type=int, default=100, help="of each training")
    args = parser.parse_args(arguments)
    set_seed(0)
    tokenizer = make_tokenizer([*PROMPTS, *(f" {text}" for texts in ANSWERS.values() for text in texts)])
    base = make_base(tokenizer)
    learn(base, tokenizer, [""] * len(PROMPTS), PROMPTS, args.steps)
    base.save_pretrained(args.output / "base")
    tokenizer.save_pretrained(args.output / "base")
    for folder, texts in ANSWERS.items():
        model = get_peft_model(base, DSTConfig(epsilon=0.1))
        loss = learn(model, tokenizer, PROMPTS, [f" {text}" for text in texts], args.steps)
        model.save_pretrained(args.output / folder)
        print(f"{args.output / folder}: loss {loss:.4f}")
        base = model.unload()


if __name__ == "__main__":
    main()
