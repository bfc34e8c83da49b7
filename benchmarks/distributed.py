"""What the choice of the subset sends where several processes hold a model together, and the time that it takes.

    OMP_NUM_THREADS=1 python -m benchmarks.distributed --json benchmarks/results/distributed.json

Two and four processes on gloo train random models under FSDP2. Every collective that torch issues is seen by a dispatch
mode, whoever asked for it: those within `optimizer.step()` are the choice's (a plain optimizer issues none), all others are
FSDP's. `traffic` says beforehand what they are to be. Then two processes train a larger model by plain AdamW, through
the hook and through DSTOptimizer in turn: ratios within a round, medians over rounds. The two processes have as many
cores, and gloo works on the CPU: this is a slow network beside a slow computer.

At last the same formula for models and machines that were not run.
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from peft import get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing import start_processes
from torch.utils._python_dispatch import TorchDispatchMode

import peft_dst
from peft_dst.core.shards import Together
from peft_dst.core.silos import partition

from . import common


#: Counts of one round of the search, for one silo; of a key it settles as many bits as make so many.
BINS = 1 << 11
LEARNING_RATE = 1 / 128


@dataclass(frozen=True)
class Traffic:
    """What one process hands to torch.distributed in one step, and what a ring sends of it.

    Attributes:
        messages: number of collectives.
        payload: bytes handed over.
        sent: bytes that leave the process where an all-reduce goes round in a ring: 2 (W - 1) / W of the payload.
    """

    messages: int = 0
    payload: int = 0
    sent: float = 0.0


def traffic(
    silos: int, world: Sequence[int], *, free: int, largest: int = 0, ties: bool = False, wide: bool = False
) -> Traffic:
    """What the choice sends at a step.

    Args:
        silos: number of silos that are divided.
        world: number of processes along each dimension of the mesh that they are divided over.
        free: number of free parameters.
        largest: number of components of the largest silo, for ties.
        ties: whether in some silo more components tie at the threshold than may be kept.
        wide: whether any weight is float64.
    """
    rounds = -(-(63 if wide else 31) // 11) + (-(-largest.bit_length() // 11) if ties else 0)
    count = 4 if free * math.prod(world) < 2**31 else 8
    # Failures and emptiness of each silo, and whether anything moved; then the counts.
    payload = 4 * (2 * silos + 1) + rounds * silos * BINS * count
    sent = sum(2 * (size - 1) / size * payload for size in world)
    return Traffic((1 + rounds) * len(world), payload * len(world), sent)


# Counting

#: What of its input a process sends where each collective goes round in a ring of W.
_RINGS: dict[str, Callable[[int], float]] = {
    "c10d::allreduce_": lambda w: 2 * (w - 1) / w,
    "c10d::_allgather_base_": lambda w: w - 1,
    "c10d::allgather_": lambda w: w - 1,
    "c10d::_reduce_scatter_base_": lambda w: (w - 1) / w,
    "c10d::broadcast_": lambda w: 1,
}
#: Which argument is the input; of the others it is the first.
_INPUTS = {"c10d::_allgather_base_": 1, "c10d::allgather_": 1, "c10d::_reduce_scatter_base_": 1}


class Counter(TorchDispatchMode):
    """Counts the collectives of everything that runs while it lasts."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Traffic()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            # It is asked again for what that does with its parts.
            return NotImplemented
        name = func._schema.name
        if name.startswith("c10d::") and name != "c10d::barrier":
            self._count(name, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        tensors = args[_INPUTS.get(name, 0)]
        payload = sum(
            t.numel() * t.element_size() for t in ([tensors] if isinstance(tensors, torch.Tensor) else tensors)
        )
        group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject) and _is_group(a))
        sent = _RINGS[name](group.size()) * payload
        self.found = Traffic(self.found.messages + 1, self.found.payload + payload, self.found.sent + sent)


def _is_group(argument: torch.ScriptObject) -> bool:
    return argument._type().name() == "ProcessGroup"


@contextmanager
def counting(totals: list[Traffic]) -> Any:
    """Append what was sent while it lasted."""
    with Counter() as counter:
        yield
    totals.append(counter.found)


# What is run


@dataclass(frozen=True)
class Case:
    """A model, and how it is divided and trained.

    Attributes:
        layers: of a Llama.
        width: its hidden size.
        siloing: see `DSTConfig`.
        epsilon: likewise.
        through: "plain", "hook" or "DSTOptimizer".
        mesh: sizes of the mesh; of two, the first repeats what the second divides.
        ties: let every component move by as much.
        wide: in float64.
    """

    layers: int = 2
    width: int = 32
    siloing: str = "module_and_layer"
    epsilon: float = 1e-2
    through: str = "hook"
    mesh: tuple[int, ...] = ()
    ties: bool = False
    wide: bool = False


def llama(layers: int, width: int, vocabulary: int = 64) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    return transformers.LlamaForCausalLM(config)


class Trainer:
    """A model that several processes hold together, with its optimizer; a call makes one step.

    Attributes:
        model: under `through="plain"` without an adapter.
        ours: what each step sent from within `optimizer.step()`, where it was counted; `theirs`: from without.
    """

    def __init__(self, case: Case, base: nn.Module, rows: common.Batch, count: bool = True):
        self.case, self.rows, self.count = case, rows, count
        config = peft_dst.DSTConfig(
            epsilon=case.epsilon, siloing=case.siloing, distance="absolute", task_type="CAUSAL_LM"
        )
        self.model = base if case.through == "plain" else get_peft_model(base, config)
        sizes = case.mesh or (dist.get_world_size(),)
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicas", "data")[-len(sizes) :])
        for layer in base.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        kind: Any = torch.optim.SGD if case.ties else torch.optim.AdamW
        wrap = functools.partial(peft_dst.DSTOptimizer, optimizer_cls=kind) if case.through == "DSTOptimizer" else kind
        # torch's fused SGD cannot step DTensors.
        self.optimizer = wrap(parameters, lr=LEARNING_RATE, fused=not case.ties)
        self.ours: list[Traffic] = []
        self.theirs: list[Traffic] = []
        self.times: list[float] = []

    def __call__(self) -> None:
        if not self.count:
            self.model(**self.rows).loss.backward()
            self.times.append(common.seconds(self.optimizer.step))
            self.optimizer.zero_grad()
            return
        with counting(self.theirs):
            self.model(**self.rows).loss.backward()
        if self.case.ties:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(1)
        with counting(self.ours):
            self.optimizer.step()
        self.optimizer.zero_grad()


def count(rank: int, world: int, case: Case, steps: int = 3) -> dict[str, Any]:
    """Train, in each of some processes; what this one sent a step, and what it was to send."""
    torch.manual_seed(0)
    base = llama(case.layers, case.width)
    if case.ties:
        # Steps of 1 / 128 are then exact, and their distances equal.
        for parameter in base.parameters():
            parameter.data = (parameter.data * 128).round() / 128
    if case.wide:
        base = base.double()
    trainer = Trainer(case, base, common.language_batch(2, 16, 64))
    # After one step those that are free have moved further than all others, and nothing ties any more.
    for _ in range(1 if case.ties else steps):
        trainer()
    row: dict[str, Any] = {**asdict(case), "world": world, "processes": list(case.mesh or (world,))}
    row |= {"counted": asdict(trainer.ours[-1]), "fsdp": asdict(trainer.theirs[-1])}
    if case.through == "plain":
        return row
    silos = trainer.model.constraint().silos
    sizes = {"silos": len(silos), "free": trainer.model.constraint().budget, "largest": max(s.size for s in silos)}
    found = traffic(
        len(silos),
        [(case.mesh or (world,))[-1]],
        free=sizes["free"],
        largest=sizes["largest"],
        ties=case.ties,
        wide=case.wide,
    )
    row |= {**sizes, "n": sum(silo.size for silo in silos), "formula": asdict(found)}
    return row


@contextmanager
def timed(times: list[float]) -> Any:
    """Add up the time that goes by within `Together.reduce`, waiting for the others included."""
    original = Together.reduce

    def reduce(self: Together, *arguments: Any) -> torch.Tensor:
        found: list[torch.Tensor] = []
        times.append(common.seconds(lambda: found.append(original(self, *arguments))))
        return found[0]

    Together.reduce = reduce  # type: ignore[method-assign]
    try:
        yield
    finally:
        Together.reduce = original  # type: ignore[method-assign]


def clock(rank: int, world: int, case: Case, rounds: int, length: int) -> dict[str, Any]:
    """Time a step by plain AdamW, the hook and DSTOptimizer, in turn."""
    rows = common.language_batch(4, length, 4000)
    trainers = {}
    for through in ("plain", "hook", "DSTOptimizer"):
        torch.manual_seed(0)
        base = llama(case.layers, case.width, 4000)
        trainers[through] = Trainer(replace(case, through=through), base, rows, count=False)
    waits: dict[str, list[float]] = {name: [] for name in trainers}

    def stepped(name: str) -> None:
        here: list[float] = []
        with timed(here):
            trainers[name]()
        waits[name].append(sum(here))

    found: dict[str, Any] = common.interleaved({name: functools.partial(stepped, name) for name in trainers}, rounds)
    for name, trainer in trainers.items():
        found[name]["optimizer_ms"] = 1000 * statistics.median(trainer.times[-rounds:])
        found[name]["communication_ms"] = 1000 * statistics.median(waits[name][-rounds:])
    constraint = trainers["hook"].model.constraint()
    n = sum(silo.size for silo in constraint.silos)
    return {"world": world, "n": n, "silos": len(constraint.silos), "epsilon": case.epsilon, **found}


# What is not run


@dataclass(frozen=True)
class Machine:
    """Assumptions.

    Attributes:
        gpus: of all nodes; `nodes`: how many these are.
        bandwidth: bytes per second that a GPU sends, of the slowest link in the ring.
        latency: seconds of an all-reduce of nothing, by NCCL's own model of its ring (Simple, src/graph/tuning.cc).
    """

    gpus: int
    nodes: int
    bandwidth: float

    @property
    def latency(self) -> float:
        between = 2 * (self.nodes - 1)
        within = 2 * (self.gpus - 1) - between
        return (8.4 + 3.4 * within + 9.6 * between) * 1e-6 * (1.9 if self.nodes > 1 else 1)


#: Half of NVLink 4's 450 GB/s in one direction; half of 400 Gbit/s of InfiniBand for each GPU.
MACHINES = {"7 B": Machine(8, 1, 225e9), "70 B": Machine(64, 8, 25e9)}
#: 989 TFLOP/s dense bfloat16, of which 40 % are used; 3.35 TB/s.
FLOPS, MEMORY = 0.4 * 989e12, 3.35e12
TOKENS = 4096
SHAPES: dict[str, dict[str, int]] = {
    "7 B": {},
    "70 B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}


def project(name: str, epsilon: float = 1e-4) -> dict[str, Any]:
    """The share of a step's time that the choice's communication takes, by assumptions."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPES[name]))
    sizes = {parameter: tensor.numel() for parameter, tensor in model.named_parameters()}
    silos = partition([*sizes], "module_and_layer")
    n, machine = sum(sizes.values()), MACHINES[name]
    largest = max(sum(sizes[parameter] for parameter in members) for members in silos.values())
    usual, tied = (
        traffic(len(silos), [machine.gpus], free=round(epsilon * n), largest=largest, ties=ties)
        for ties in (False, True)
    )

    def lasts(found: Traffic) -> float:
        return found.messages * machine.latency + found.sent / machine.bandwidth

    step = 6 * n * TOKENS / FLOPS
    # Parameters gathered twice, gradients scattered once, in bfloat16.
    fsdp = 3 * 2 * n * (machine.gpus - 1) / machine.gpus
    return {
        "model": name,
        "n": n,
        "silos": len(silos),
        "gpus": machine.gpus,
        "nodes": machine.nodes,
        "latency_us": 1e6 * machine.latency,
        "bandwidth": machine.bandwidth,
        "usual": asdict(usual),
        "tied": asdict(tied),
        "fsdp_sent": fsdp,
        "step_s": step,
        "usual_ms": 1000 * lasts(usual),
        "tied_ms": 1000 * lasts(tied),
        "share": lasts(usual) / (step + lasts(usual)),
        "tied_share": lasts(tied) / (step + lasts(tied)),
        # What AdamW in float32 reads and writes of each component: 28 bytes.
        "adamw_ms": 1000 * 28 * n / machine.gpus / MEMORY,
    }


# Processes


def _serve(rank: int, world: int, folder: str, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> None:
    torch.set_num_threads(1)
    common.quiet()
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=300))
    try:
        answers = [function(rank, world, *call) for call in calls]
        if rank == 0:
            torch.save(answers, f"{folder}/answers")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def in_processes(world: int, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Call f(rank, world, *call) for each of some calls in some processes; the first one's results."""
    with tempfile.TemporaryDirectory() as folder:
        # One process imports everything, from which the others are forked.
        multiprocessing.set_forkserver_preload([__name__ if __name__ != "__main__" else "benchmarks.distributed"])
        start_processes(_serve, (world, folder, function, calls), nprocs=world, start_method="forkserver")
        return torch.load(Path(folder) / "answers", weights_only=True)


def cases(toy: bool = False) -> list[Case]:
    if toy:
        return [Case(layers=1, through="plain"), Case(layers=1), Case(layers=1, ties=True)]
    usual = [
        Case(layers, siloing=siloing, epsilon=epsilon)
        for layers, siloing, epsilon in (
            (2, "none", 1e-2), (2, "module_and_layer", 1e-2), (2, "module_and_layer", 1e-4), (2, "module_and_layer", 0.3),
            (8, "module_and_layer", 1e-2), (8, "parameter", 1e-2),
        )
    ]  # fmt: skip
    through = [replace(usual[1], through=name) for name in ("plain", "DSTOptimizer")]
    larger = [replace(usual[1], width=128)]
    return [*usual, *through, *larger, replace(usual[1], ties=True), replace(usual[1], wide=True)]


def main(arguments: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the timing")
    parser.add_argument("--length", type=int, default=128, help="tokens in each of a process's four samples, likewise")
    parser.add_argument(
        "--worlds", type=int, nargs="+", default=[2, 4], help="numbers of processes that are counted in"
    )
    parser.add_argument("--toy", action="store_true", help="tiny models, to try the program")
    args = parser.parse_args(arguments)
    common.quiet()
    record = common.Record(args)
    rows = []
    for world in args.worlds:
        rows += in_processes(world, count, [(case,) for case in cases(args.toy)])
    large = Case(1, 32, epsilon=1e-2) if args.toy else Case(4, 256, epsilon=1e-3)
    (timing,) = in_processes(2, clock, [(large, args.rounds, args.length)])
    for row in (row for row in rows if "formula" in row):
        error = row["counted"]["payload"] / row["formula"]["payload"] - 1
        print(f"{row['world']} processes, {row['silos']} silos: {row['counted']['payload']:,} bytes, {error:+.2%}")
    print(_said(timing))
    record.write(rows=rows, timing=timing, projections=[project(name) for name in SHAPES])


def _said(timing: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {timing[name]['ratio']:.3f} x plain FSDP2" for name in ("hook", "DSTOptimizer"))


if __name__ == "__main__":
    main()
