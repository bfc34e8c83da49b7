"""Damaged and hostile adapters, any number of them, read and put into weights.

    python -m tests.delta.fuzzing --count 200000 --seed 1

Whatever the input, `SparseDelta.load` refuses it with a DeltaError, or what it read is well-formed and goes into weights
and out again bit for bit; a refusal leaves the weights as they were. The run has a gigabyte more than it starts with, and
no input may take more than ten seconds of computing. What fails is kept in a folder.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import resource
import shutil
import signal
import sys
import tempfile
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from peft_dst import DSTConfig
from peft_dst.delta import CONFIG_NAME, PARTS, WEIGHTS_NAME, DeltaError, SparseDelta, find_records, pair
from peft_dst.delta.files import replace_file
from peft_dst.delta.records import digest


SECONDS = 10
# Stands for eight hundred numbers of four thousand digits, which Python takes long to write in decimal: once is enough.
HUGE = "eight hundred huge numbers"
# JSON that some reader somewhere took for something else.
STRANGE: list[Any] = [
    None,
    True,
    0,
    -1,
    1,
    2**31,
    2**63,
    10**30,
    1.5,
    1e400,
    math.nan,
    "",
    "0",
    "00000000",
    "float32",
    "float8_e4m3fn",
    "../../etc/passwd",
    "a\0b",
    "\ud800",
    [],
    [[]],
    [2**40, 2**40],
    HUGE,
    [1] * 100,
    [0],
    {},
    {"float32": "00000000"},
]
NAMES = ["", ".", "0.weight", "0.bias", "0..weight", "../0.weight", "/etc/passwd", "0.weight\n", "1.weight", "x" * 5000]


@functools.cache
def _huge() -> str:
    return json.dumps([10**4000] * 800)


def written(value: Any) -> str:
    """JSON."""
    return json.dumps(value).replace(json.dumps(HUGE), _huge())


@functools.cache
def bomb(kind: int) -> bytes:
    """JSON that is small while compressed: nested, padded, or nested without an end."""
    text = ('{"a":[' + "[]," * 10**6 + "[]]}", "{" + " " * 10**8 + "}", "[" * 10**6)[kind]
    return zlib.compress(text.encode())


@functools.cache
def _base() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3).bfloat16(), nn.Embedding(7, 4))


def base() -> nn.Module:
    """A tiny model, always the same."""
    return copy.deepcopy(_base())


def state() -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in _base().named_parameters()}


def write_corpus(folder: Path) -> list[Path]:
    """Good adapters to damage: plain and packed, of one entry and of many, with and without dense tensors."""
    folders = []
    for number, (epsilon, packed, kept) in enumerate(
        [(0.3, False, None), (0.3, True, None), (0.3, False, ["3"]), (0.02, True, ["3"])]
    ):
        torch.manual_seed(number)
        options = {"modules_to_save": kept, "target_modules": None if kept is None else ["0", "2"]}
        model = get_peft_model(base(), DSTConfig(epsilon=epsilon, siloing="none", packed=packed, **options))
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()
        folders.append(folder / str(number))
        model.save_pretrained(folders[-1])
        (folders[-1] / "README.md").unlink(missing_ok=True)
    return folders


class Damage:
    """One way after another to make something else of a good adapter, in place."""

    def __init__(self, seed: int):
        self.random = np.random.default_rng(seed)

    def pick(self, choices: Any) -> Any:
        return choices[int(self.random.integers(len(choices)))]

    def apply(self, folder: Path) -> str:
        """Damage a folder; return what was done."""
        how = self.pick([self.bytes_of_tensors, self.header, self.tensors, self.metadata, self.config, self.swap])
        how(folder)
        return how.__name__

    def bytes_of_tensors(self, folder: Path) -> None:
        path = folder / WEIGHTS_NAME
        path.write_bytes(self.mutated(path.read_bytes()))

    def mutated(self, data: bytes) -> bytes:
        found = bytearray(data)
        for _ in range(int(self.random.integers(1, 4))):
            # Half of the time in the header, where the meaning is.
            at = int(self.random.integers(len(found) + 1 if self.random.random() < 0.5 else min(len(found), 200) + 1))
            match int(self.random.integers(6)):
                case 0 | 1 if at < len(found):
                    found[at] ^= 1 << int(self.random.integers(8))
                case 2 if at < len(found):
                    found[at] = int(self.random.integers(256))
                case 3:
                    del found[at:]
                case 4:
                    found[at:at] = self.random.bytes(int(self.random.integers(1, 9)))
                case _:
                    del found[at : at + int(self.random.integers(1, 9))]
        return bytes(found)

    def header(self, folder: Path) -> None:
        """Another word in the header: dtype, shape, offset, key."""
        path = folder / WEIGHTS_NAME
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        name = self.pick([key for key in header if key != "__metadata__"])
        match int(self.random.integers(5)):
            case 0:
                header[name]["dtype"] = self.pick(["F32", "I32", "I64", "U8", "BOOL", "BF16", "F8_E4M3", "C64", "X"])
            case 1:
                header[name]["shape"] = self.pick([[], [0], [1], [2**40], [2**62, 4], [-1], [1.5], "3"])
            case 2:
                start, end = header[name]["data_offsets"]
                shift = int(self.random.integers(-9, 10))
                header[name]["data_offsets"] = self.pick(
                    [[start + shift, end], [start, end + shift], [0, 2**62], [end, start]]
                )
            case 3:
                header[self.pick(NAMES)] = header.pop(name)
            case _:
                header[self.key()] = header.pop(name)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    def key(self) -> str:
        part = self.pick(["dst_indices", "dst_values", "dst_free", "seed_values", ""])
        host = self.pick(["0.", "", "..", "0.0.", "base_model.model.0."])
        parameter = self.pick(["weight", "bias", "default.weight", ""])
        return f"{self.pick(['base_model.model.', ''])}{host}_sparse.{part}.{parameter}"

    def tensors(self, folder: Path) -> None:
        """Other numbers, lengths and dtypes, the rest being as it was."""
        path = folder / WEIGHTS_NAME
        tensors, metadata = load_file(path), self._metadata(path)
        name = self.pick(sorted(tensors))
        tensor = tensors[name]
        at = int(self.random.integers(tensor.numel())) if tensor.numel() else 0
        match int(self.random.integers(9)):
            case 0 if tensor.numel():
                number = self.pick([0, 1, -1, 10, 2**31 - 1, -(2**31), 200])
                tensor.view(-1)[at] = number if tensor.dtype != torch.uint8 else number % 256
            case 1 if tensor.is_floating_point() and tensor.numel():
                tensor.view(-1)[at] = self.pick([math.nan, math.inf, -math.inf, 0.0, -0.0, 3e38])
            case 2:
                tensors[name] = tensor.flatten().flip(0).contiguous()
            case 3:
                tensors[name] = tensor.flatten()[:at].clone()
            case 4:
                tensors[name] = torch.cat([tensor.flatten(), tensor.flatten()])
            case 5:
                tensors[name] = tensor.to(
                    self.pick([torch.float64, torch.int64, torch.int8, torch.bool, torch.bfloat16])
                )
            case 6:
                del tensors[name]
            case 7:
                tensors[self.pick([self.key(), self.pick(NAMES) or "x"])] = tensor.clone()
            case _:
                tensors[name] = tensor.unsqueeze(0).clone()
        if "dst_records" in metadata and self.random.random() < 0.5:
            metadata["dst_records"] = json.dumps(described_anew(json.loads(metadata["dst_records"]), tensors))
        replace_file(path, tensors, metadata)

    def metadata(self, folder: Path) -> None:
        """Another description, in the file's metadata; for half of the time the config has the same."""
        path = folder / WEIGHTS_NAME
        tensors, metadata = load_file(path), self._metadata(path)
        records = json.loads(metadata["dst_records"]) if "dst_records" in metadata else {}
        match int(self.random.integers(5)):
            case 0:
                metadata[self.pick(["dst_records", "dst_config", "dst_format_version"])] = self.pick(
                    ["", "{", "null", "1e999", "[" * 100_000, "{}", '"', written(self.pick(STRANGE))]
                )
            case 1 | 2 if records:
                record = records[self.pick(sorted(records))]
                record[int(self.random.integers(len(record)))] = self.pick(STRANGE)
            case 3 if records:
                records[self.pick(NAMES)] = records.pop(self.pick(sorted(records)))
            case _:
                records[self.pick(NAMES)] = self.pick(
                    [*STRANGE, [1, "00000000", {"float32": "00000000"}, [4], "float32"]]
                )
        if records:
            metadata["dst_records"] = written(records)
            if self.random.random() < 0.5:
                self._write_config(folder, records=records)
        replace_file(path, tensors, metadata)

    def config(self, folder: Path) -> None:
        """Another adapter_config.json, for half of the time without metadata to correct it."""
        path = folder / CONFIG_NAME
        if self.random.random() < 0.3:
            path.write_bytes(self.mutated(path.read_bytes()))
            return
        config = json.loads(path.read_text())
        key = self.pick(sorted(config))
        self._write_config(folder, **{key: self.pick(STRANGE)})
        if self.random.random() < 0.5:
            weights = folder / WEIGHTS_NAME
            replace_file(weights, load_file(weights), {})

    def swap(self, folder: Path) -> None:
        """What comes from somewhere else."""
        path = folder / WEIGHTS_NAME
        match int(self.random.integers(6)):
            case 5 if "dst_packed_records" in load_file(path):
                code = torch.frombuffer(bytearray(bomb(self.pick([0, 1, 2]))), dtype=torch.uint8)
                replace_file(path, {**load_file(path), "dst_packed_records": code}, self._metadata(path))
            case 0:
                path.write_bytes(b"")
            case 1:
                torch.save({"0._sparse.dst_values.weight": torch.ones(3)}, path)
            case 2:
                path.write_bytes((2**40).to_bytes(8, "little") + b"{}")
            case 3:
                path.unlink()
            case _:
                (folder / CONFIG_NAME).unlink()

    @staticmethod
    def _metadata(path: Path) -> dict[str, str]:
        data = path.read_bytes()
        return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}

    @staticmethod
    def _write_config(folder: Path, **changed: Any) -> None:
        path = folder / CONFIG_NAME
        path.write_text(written({**json.loads(path.read_text()), **changed}))


def described_anew(records: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Descriptions that fit, as one would write them who knows the format."""
    for name, parts in find_records(tensors)[0].items():
        if name in records and parts.keys() == set(PARTS):
            record = pair(name, parts)
            dtype = str(record.values.dtype).removeprefix("torch.")
            records[name] = [record.indices.numel(), digest(record), records[name][2], records[name][3], dtype]
    return records


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[n].view(torch.uint8), other[n].view(torch.uint8)) for n in one
    )


def check(folder: Path) -> str:
    """Read an adapter and put it into weights; return what came of it.

    Raises:
        AssertionError: if something was changed that should not be.
    """
    weights = state()
    before = copy.deepcopy(weights)
    try:
        delta = SparseDelta.load(folder)
    except DeltaError:
        return "not read"
    try:
        undo = delta.apply(weights)
    except DeltaError:
        assert same_bits(weights, before)
        return "not applied"
    for name, tensor in delta.items():
        changed = weights[name].flatten()
        assert torch.isfinite(changed).all()
        assert torch.equal(changed[tensor.indices], tensor.values.to(changed))
        changed[tensor.indices] = before[name].flatten()[tensor.indices]
        assert same_bits({name: changed}, {name: before[name].flatten()})
        changed[tensor.indices] = tensor.values.to(changed)
    undo.apply(weights, check=False)
    assert same_bits(weights, before)
    return "applied"


def check_with_peft(folder: Path) -> str:
    """Load an adapter with PEFT beside one that is there; return what came of it.

    Raises:
        AssertionError: if a refusal changed something.
    """
    model = get_peft_model(base(), DSTConfig(epsilon=0.1), "mine")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        model.load_adapter(folder, "theirs")
    except (ValueError, TypeError, KeyError):
        # PEFT's own refusals of a config are TypeError, and KeyError where it does not know the method.
        after = {name: tensor for name, tensor in model.state_dict().items() if "theirs" not in name}
        assert same_bits(before, after)
        return "not loaded"
    model.set_adapter("theirs")
    model.set_adapter("mine")
    model = model.unload()
    assert same_bits({n: p.detach() for n, p in model.named_parameters()}, state())
    return "loaded"


def runs(seed: int, count: int, where: Path, checker: Any = check) -> Iterator[tuple[str, str]]:
    """Damage and check; yields what was done and what came of it.

    Raises:
        AssertionError: if something else than a refusal came of it; the input is kept beside `where`.
    """
    corpus, damage, folder = write_corpus(where / "corpus"), Damage(seed), where / "input"
    for number in range(count):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(damage.pick(corpus), folder)
        done = [damage.apply(folder)]
        try:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = checker(folder)
        except Exception as error:
            kept = where / f"failed_{seed}_{number}"
            shutil.copytree(folder, kept, dirs_exist_ok=True)
            raise AssertionError(f"{done} in {kept}: {type(error).__name__}: {error}") from error
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        yield done[0], result


def main(argv: list[str] | None = None) -> Counter[tuple[str, str]]:
    """Run many, and say what came of them: what was done and its outcome → how often."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--count", type=int, default=100_000)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--peft", action="store_true", help="load with PEFT, which takes longer")
    arguments.add_argument("--keep", type=Path, help="folder for inputs that fail")
    options = arguments.parse_args(argv)
    where = options.keep or Path(tempfile.mkdtemp())
    signal.signal(signal.SIGPROF, lambda *unused: (_ for _ in ()).throw(TimeoutError(f"more than {SECONDS} s")))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, resource.RLIM_INFINITY))
    checker = check_with_peft if options.peft else check
    done = runs(options.seed, options.count, where, checker)
    found = Counter(tqdm(done, total=options.count, disable=not sys.stderr.isatty()))
    for (how, result), number in sorted(found.items()):
        print(f"{how:20} {result:12} {number:9,}")  # noqa: T201
    return found


if __name__ == "__main__":
    main()
