"""A tiny T5 1.1 and its tokenizer, both learned from JSON lines in two minutes: to try a recipe on, before the real model.

    python examples/tiny_t5.py DIR/gsm8k/train.jsonl DIR/multi30k_de_en/train.jsonl --output runs/tiny_t5
    peft-dst train configs/tiny/gsm8k_t5.yaml --output runs/gsm8k

Every text of the files counts, whatever its column. The model learns to go on with a text of which it reads the first half;
it is far too small to know anything. 1.3 MB.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration


PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def texts(files: Iterable[Path], rows: int) -> Iterator[str]:
    """The texts of the first rows of each file."""
    for file in files:
        with file.open() as lines:
            for _, line in zip(range(rows), lines, strict=False):
                yield from (value for value in json.loads(line).values() if isinstance(value, str))


def make_tokenizer(data: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """T5's kind of tokenizer: pieces of words with a mark for spaces, and an end token."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Digits(True)])
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=[PAD, END, UNKNOWN], unk_token=UNKNOWN, show_progress=False
    )
    made.train_from_iterator(data, trainer)
    made.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, made.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=PAD, eos_token=END, unk_token=UNKNOWN)


def pretrain(
    model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, data: list[str], steps: int
) -> float:
    """The second half of each text from its first; the mean loss of the last steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    order = random.Random(0)
    losses = []
    for _ in range(steps):
        batch = tokenizer(order.sample(data, 32), truncation=True, max_length=64, add_special_tokens=False)["input_ids"]
        halves = [(ids[: len(ids) // 2], [*ids[len(ids) // 2 :], tokenizer.eos_token_id]) for ids in batch]
        read, said = (
            pad_sequence([torch.tensor(half) for half in side], True, 0) for side in zip(*halves, strict=True)
        )
        # 0 is padding.
        loss = model(input_ids=read, attention_mask=(read > 0).long(), labels=said.masked_fill(said == 0, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-20:]) / max(1, len(losses[-20:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "data", type=Path, nargs="+", help="files of JSON lines, from whose texts the tokenizer is learned"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the model")
    parser.add_argument("--vocabulary", type=int, default=2000, help="number of tokens, at most")
    parser.add_argument("--rows", type=int, default=3000, help="rows that are read of each file")
    parser.add_argument("--width", type=int, default=64, help="of the model, four heads and two layers a side")
    parser.add_argument("--steps", type=int, default=500, help="of pretraining; 0 leaves the weights random")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    options = parser.parse_args()
    data = list(texts(options.data, options.rows))
    tokenizer = make_tokenizer(data, options.vocabulary)
    torch.manual_seed(options.seed)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=options.width,
        d_kv=options.width // 4,
        d_ff=2 * options.width,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=tokenizer.pad_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        # Drawn at 1, for models that are pretrained for long; so large, it is mostly sure of the wrong token.
        model.lm_head.weight.mul_(options.width**-0.5)
    loss = pretrain(model, tokenizer, [text for text in data if len(text) >= 20], options.steps)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{options.output}: {size:,} parameters, {len(tokenizer):,} tokens, loss {loss:.2f}")


if __name__ == "__main__":
    main()
