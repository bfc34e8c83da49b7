"""Adapters that were trained on float32 weights, served over quantised ones: accuracy, and the time of a forward pass.

    OMP_NUM_THREADS=1 python -m benchmarks.quantised --data DIR --json results/quantised/trec.json

Trains MiniLM-L6 as `benchmarks.precision` does, and loads each adapter onto the same base in float32, and with its linear
layers (all but pooler and classifier) quantised by torchao (int8, weights only) and bitsandbytes (LLM.int8, nf4). Beside it
stand the same without the corrections of the quantised layers' outputs (then only embeddings, norms and biases are
tuned), and the tuned model quantised as a whole, which needs a base of its own for each task. One wide layer is timed by
itself. Needs bitsandbytes and torchao.
"""

from __future__ import annotations

import functools
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import torchao
from peft import PeftModel
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, TorchAoConfig

from peft_dst.tuner.layer import markers
from peft_dst.tuner.overlay import OverlayWeight

from .common import Record, classification_batch, interleaved, minilm_folder, quiet, seconds
from .precision import accuracy, collate, rows, training_parser, tune


DENSE = ["classifier", "bert.pooler"]
BASES: dict[str, Callable[[], Any]] = {
    "float32": lambda: None,
    "torchao int8": lambda: TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=DENSE),
    "bitsandbytes 8-bit": lambda: BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=DENSE),
    "bitsandbytes nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=DENSE
    ),
}


def load(folder: Path | str, name: str, labels: int) -> nn.Module:
    """A base, in float32 or quantised, in evaluation mode."""
    config = BASES[name]()
    options = {} if config is None else {"quantization_config": config}
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels, **options).eval()


def overlays(model: nn.Module) -> list[OverlayWeight]:
    return [w for _, marker in markers(model) for w in marker.weights.values() if isinstance(w, OverlayWeight)]


def logits(model: nn.Module, test: list[dict[str, Any]]) -> torch.Tensor:
    batch = collate(test[:100])
    del batch["labels"]
    model.eval()
    with torch.no_grad():
        return model(**batch).logits


def serve(
    name: str, adapter: Path, labels: int, test: list[dict[str, Any]], expected: torch.Tensor | None
) -> tuple[dict[str, Any], torch.Tensor]:
    """What one adapter is worth over one base, and its logits for the first 100 rows."""
    model = PeftModel.from_pretrained(load(minilm_folder(), name, labels), adapter)
    found: dict[str, Any] = {"served": accuracy(model, test)}
    output = logits(model, test)
    switch = functools.partial(_switch_off_and_on, model)
    found["switch_off_and_on_ms"] = 1000 * statistics.median(seconds(switch) for _ in range(9))
    if expected is None:
        return found, output
    found["logits_mean_difference"] = float((output - expected).abs().mean())
    found["logits_mean"] = float(expected.abs().mean())
    for weight in overlays(model):
        weight.revert()
    found["without_corrections"] = accuracy(model, test)
    merged = PeftModel.from_pretrained(load(minilm_folder(), "float32", labels), adapter).merge_and_unload()
    with tempfile.TemporaryDirectory() as folder:
        merged.save_pretrained(folder)
        found["merged_then_quantised"] = accuracy(load(folder, name, labels), test)
    return found, output


def _switch_off_and_on(model: PeftModel) -> None:
    with model.disable_adapter():
        pass


def times(name: str, adapter: Path, labels: int, rounds: int) -> list[dict[str, Any]]:
    """A forward pass with the adapter, beside that of the same base without."""
    plain = load(minilm_folder(), name, labels)
    model = PeftModel.from_pretrained(load(minilm_folder(), name, labels), adapter).eval()
    found = []
    for batch in (1, 32):
        inputs = classification_batch(batch, 32)
        del inputs["labels"]
        with torch.no_grad():
            compared = {"untuned": functools.partial(plain, **inputs), "adapter": functools.partial(model, **inputs)}
            found.append({"batch": batch, **interleaved(compared, 3 * rounds if batch == 1 else rounds)})
    return found


def layer(name: str, width: int) -> nn.Module:
    """One quantised linear layer by itself, in evaluation mode."""
    linear = nn.Linear(width, width)
    if name == "torchao int8":
        quantize_(linear, Int8WeightOnlyConfig())
        return linear.eval()
    if name == "bitsandbytes 8-bit":
        quantised = bitsandbytes.nn.Linear8bitLt(width, width, has_fp16_weights=False, threshold=6.0)
    else:
        quantised = bitsandbytes.nn.Linear4bit(width, width, quant_type="nf4")
    quantised.load_state_dict(linear.state_dict())
    return quantised.to("cpu").eval()


def layer_times(name: str, epsilon: float, width: int, rounds: int) -> list[dict[str, Any]]:
    """A wide layer with random entries, beside one without."""
    torch.manual_seed(0)
    plain, tuned = layer(name, width), layer(name, width)
    indices = torch.randperm(width**2)[: round(epsilon * width**2)].sort().values
    OverlayWeight(tuned, "weight", "weight").apply(indices, torch.randn(indices.numel()))
    found = []
    for tokens in (1, 32, 1024):
        x = torch.randn(tokens, width)
        with torch.no_grad():
            compared = {"untuned": functools.partial(plain, x), "adapter": functools.partial(tuned, x)}
            found.append({"width": width, "tokens": tokens, **interleaved(compared, rounds)})
    return found


def main(argv: list[str] | None = None) -> None:
    arguments = training_parser(__doc__)
    arguments.add_argument("--epsilons", type=float, nargs="+", default=(1e-3, 1e-4))
    arguments.add_argument("--rounds", type=int, default=15, help="rounds of timing at batch 32; three times that at 1")
    arguments.add_argument("--width", type=int, default=4096, help="of the layer that is timed by itself")
    arguments.add_argument("--adapters", type=Path, help="folder to keep the trained adapters in, and take them from")
    options = arguments.parse_args(argv)
    if options.data is None:
        arguments.error("--data is needed: a folder with train.jsonl and test.jsonl, such as TREC's")
    quiet()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    record = Record(options)
    record.document["options"] |= {"data": options.data.name, "adapters": options.adapters and options.adapters.name}
    record.document["versions"] |= {module.__name__: module.__version__ for module in (bitsandbytes, torchao)}
    train, test, labels = rows(options.data, options.train_size)
    kept = tempfile.TemporaryDirectory()
    results: dict[str, list[dict[str, Any]]] = {"rows": [], "times": [], "layers": []}

    def note(kind: str, **row: Any) -> None:
        results[kind].append(row)
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
        record.write(**results, test_size=len(test))

    for epsilon in options.epsilons:
        for seed in range(options.seeds):
            adapter = (options.adapters or Path(kept.name)) / f"eps{epsilon:g}_seed{seed}"
            if not adapter.is_dir():
                options.epsilon = epsilon
                tune("float32, hook", seed, train, labels, options).save_pretrained(adapter)
            expected = None
            for name in BASES:
                found, output = serve(name, adapter, labels, test, expected)
                expected = output if expected is None else expected
                note("rows", epsilon=epsilon, seed=seed, base=name, **found)
        for name in BASES:
            for row in times(name, adapter, labels, options.rounds):
                note("times", epsilon=epsilon, base=name, **row)
            for row in layer_times(name, epsilon, options.width, options.rounds) if name != "float32" else ():
                note("layers", epsilon=epsilon, base=name, **row)
    kept.cleanup()


if __name__ == "__main__":
    main()
