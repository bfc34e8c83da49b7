"""Time to switch from one subset to another, beside a forward pass, a short generation, and how other methods switch.

    OMP_NUM_THREADS=1 python -m benchmarks.switching --json benchmarks/results/switching.json

The first paper's Figure 3, on a CPU: what a switch adds to a request. Two random subsets of a fraction epsilon each take
turns on one base; a switch takes one out and puts the other in. `DeltaPool` switches through one flat buffer, DST's
`set_adapter` in PEFT tensor by tensor; "scatter" are torch's two bare calls that write as many entries. The
same model also switches between two LoRA adapters (r = 8, all linear layers) by `set_adapter`, and by unmerging one and
merging the other; and between two adapters of SHiRA and of Super-Tuning, of LoRA's size. Each comes after a forward pass of
the model that it switches; ratios to a forward pass within a round, medians over rounds.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers
from torch import nn
from tqdm import tqdm

import peft_dst
from peft_dst.delta import SparseDelta, SparseTensor
from peft_dst.serving import DeltaPool

from . import common
from .memory import lora, shira, super_tuning


EPSILONS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
# Of a request: a sentence.
TOKENS = 24
NEW_TOKENS = 16


def random_delta(model: nn.Module, epsilon: float, seed: int, change: float = 0.01) -> SparseDelta:
    """A delta of round(epsilon · n) entries, uniform over the model, each of which it makes so much larger."""
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    sizes = torch.tensor([p.numel() for p in parameters.values()])
    total = int(sizes.sum())
    k = max(1, round(epsilon * total))
    chosen = torch.randint(0, total, (k,), generator=generator).unique()
    ends = sizes.cumsum(0)
    found = {}
    for name, p, low, high in zip(parameters, parameters.values(), ends - sizes, ends, strict=True):
        own = chosen[(chosen >= low) & (chosen < high)] - low
        values = p.detach().flatten()[own] + change
        found[name] = SparseTensor(tuple(p.shape), own, values)
    return SparseDelta(found)


def alternating(first: Any, second: Any, do: Callable[[Any], object]) -> Callable[[], None]:
    """A call switches to the one that is not there."""
    turns = itertools.cycle((second, first))
    do(first)
    return lambda: (do(next(turns)), None)[1]


class Way(NamedTuple):
    """A way to switch, and the model that it switches."""

    model: nn.Module
    switch: Callable[[], None]


def pooled(model: nn.Module, epsilon: float) -> dict[str, Way]:
    """The pool's switch, and bare scatters of as many entries into the same memory."""
    pool = DeltaPool(model)
    for seed, name in enumerate("ab"):
        pool.add(name, random_delta(model, epsilon, seed))

    def use(name: str) -> None:
        with pool.use(name):
            pass

    switch = alternating("a", "b", use)
    (buffer,) = pool.storage.buffers
    parts = [part for name in "ab" for part in pool.ready(name).parts]

    def scatter() -> None:
        for part in parts:
            buffer.scatter_(0, part.positions, part.values)

    return {"DeltaPool": Way(model, switch), "scatter": Way(model, scatter)}


def in_peft(model: nn.Module, epsilon: float) -> dict[str, Way]:
    """Between two of our adapters in PEFT."""
    config = [peft_dst.DSTConfig(epsilon=epsilon, selection="random", selection_seed=seed) for seed in range(2)]
    wrapped: Any = peft.get_peft_model(model, config[0], "a")
    wrapped.add_adapter("b", config[1])
    switch = alternating("a", "b", partial(wrapped.set_adapter, inference_mode=True))
    return {"DST in PEFT, set_adapter": Way(wrapped, switch)}


def others(model: nn.Module) -> dict[str, Way]:
    """How other methods switch, on models of their own."""
    found = {}
    for name, make in (("LoRA", lora), ("SHiRA", shira), ("Super-Tuning", super_tuning)):
        wrapped: Any = make(copy.deepcopy(model))
        wrapped.add_adapter("other", copy.deepcopy(wrapped.peft_config["default"]))
        switch = alternating("default", "other", partial(wrapped.set_adapter, inference_mode=True))
        found[f"{name}, set_adapter"] = Way(wrapped, switch)
    merged: Any = lora(copy.deepcopy(model))
    merged.add_adapter("other", copy.deepcopy(merged.peft_config["default"]))

    def merge(adapter: str) -> None:
        merged.unmerge_adapter()
        merged.merge_adapter([adapter])

    merged.merge_adapter(["other"])
    found["LoRA, unmerge and merge"] = Way(merged, alternating("default", "other", merge))
    return found


@torch.no_grad()
def measure(
    name: str, make: Callable[[], nn.Module], batch: common.Batch, generates: bool, rounds: int, bar: tqdm
) -> list[dict[str, Any]]:
    """A row for each epsilon, and one for the other methods."""
    rows = []
    for epsilon in (*EPSILONS, None):
        torch.manual_seed(0)
        model = make().eval().requires_grad_(False)
        size = sum(p.numel() for p in model.parameters())
        if epsilon is not None and round(epsilon * size) < 1:
            bar.update()
            continue
        functions: dict[str, Callable[[], Any]] = {"forward": partial(model, **batch)}
        if generates:
            functions["generate"] = partial(
                model.generate, **batch, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if epsilon is None:
                ways = others(model)
            else:
                ways = in_peft(copy.deepcopy(model), epsilon) | pooled(model, epsilon)
            # In what its own model leaves in the caches, as where it serves.
            before = {name: partial(way.model, **batch) for name, way in ways.items()}
            functions |= {name: way.switch for name, way in ways.items()}
            found = common.interleaved(functions, rounds, before=before)
        row: dict[str, Any] = {"model": name, "parameters": size, "epsilon": epsilon, **found}
        if epsilon is not None:
            row["entries"] = max(1, round(epsilon * size))
            row["of_scatter"] = found["DeltaPool"]["ms"] / found["scatter"]["ms"]
        rows.append(row)
        bar.update()
        bar.write(_line(row))
    return rows


def _line(row: dict[str, Any]) -> str:
    title = "others" if row["epsilon"] is None else f"epsilon {row['epsilon']:g}"
    parts = [
        f"{key} {value['ratio']:.2%}" for key, value in row.items() if isinstance(value, dict) and key != "forward"
    ]
    return f"{row['model']}, {title}: of a forward pass of {row['forward']['ms']:.1f} ms: {', '.join(parts)}"


def llama(folder: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def main(arguments: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--llama", type=Path, help="folder of a small causal model, measured too")
    parser.add_argument("--toy", action="store_true", help="a tiny model alone: to see whether it runs")
    args = parser.parse_args(arguments)
    common.quiet()
    record = common.Record(args)
    models: dict[str, tuple[Callable[[], nn.Module], int, bool]] = {}
    if not args.toy:
        models["MiniLM"] = (common.minilm, 20000, False)
    if args.llama:
        vocabulary = transformers.AutoConfig.from_pretrained(args.llama).vocab_size
        models[args.llama.name] = (partial(llama, args.llama), vocabulary, True)
    models["GPT-2 small's size"] = (partial(common.gpt2, args.toy), 90 if args.toy else 50000, True)
    rows = []
    with tqdm(total=len(models) * (len(EPSILONS) + 1), unit="row", disable=None) as bar:
        for name, (make, vocabulary, generates) in models.items():
            batch = {"input_ids": torch.randint(3, vocabulary, (1, TOKENS))}
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            rows += measure(name, make, batch, generates, args.rounds, bar)
    record.write(rows=rows)


if __name__ == "__main__":
    main()
