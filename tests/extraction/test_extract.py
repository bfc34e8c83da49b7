"""An adapter made from a fully fine-tuned checkpoint: what it holds, what it comes back as, and from which sources."""

from __future__ import annotations

import copy
import json
import math
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
import transformers as hf
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_dst import DSTConfig
from peft_dst.core import DISTANCES, SILOINGS
from peft_dst.core.constraint import Constraint
from peft_dst.core.reference import reference_step
from peft_dst.delta import SparseDelta, read_metadata
from peft_dst.extraction import extract
from tests.extraction.runs import run
from tests.models import assert_same, bert, logits, train, weights
from tests.normalized import NORMALIZED, divisors_of


def reference(base, tuned, **options):
    """What the plain reference makes of the two, with the silos and budgets of a DSTModel."""
    constraint = get_peft_model(copy.deepcopy(base), DSTConfig(**options)).constraint()
    silos = {silo.name: [w.name for w in silo.weights] for silo in constraint.silos}
    budgets = {silo.name: silo.budget for silo in constraint.silos}
    divisors = divisors_of(weights(base), constraint) if constraint.normalization else None
    return reference_step(weights(base), weights(tuned), silos, budgets, constraint.distance, divisors)


# T5 and GPT-2 tie their embeddings.
@pytest.mark.parametrize(("name", "turn"), [("bert", 0), ("llama", 1), ("t5", 2), ("gpt2", 3)])
def test_equals_the_dense_reference_and_comes_back(name, turn, pair, tmp_path):
    """Every siloing with every distance, in two architectures with two epsilons; and every pair of these four."""
    load, base, tuned = pair(name)
    epsilons = (0.001, 0.05, 0.4)
    for s, siloing in enumerate(SILOINGS):
        for d, distance in enumerate(DISTANCES):
            if (s + d + turn) % 2:
                continue
            options = {"epsilon": epsilons[(s + d + turn) % 3], "siloing": siloing, "distance": distance}
            expected, subset = reference(base, tuned, **options)
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            report = run(tmp_path, **options)
            records = SparseDelta.load(tmp_path / "out")
            assert {n: r.indices.tolist() for n, r in records.items()} == {
                n: indices.tolist() for n, indices in subset.items() if len(indices)
            }
            assert report.total.free == sum(len(i) for i in subset.values()) > 0
        loaded = PeftModel.from_pretrained(load(), tmp_path / "out")
        assert_same(weights(loaded.get_base_model()), weights(base) | expected)
        with loaded.disable_adapter():
            assert_same(weights(loaded.get_base_model()), weights(base))


@pytest.mark.parametrize(("siloing", "kind"), NORMALIZED)
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_normalised_distances_equal_the_dense_reference(name, siloing, kind, pair, tmp_path):
    load, base, tuned = pair(name)
    options = {"epsilon": 0.02, "siloing": siloing}
    expected, subset = reference(base, tuned, distance_normalization=kind, **options)
    plain, _ = reference(base, tuned, **options)
    # Layers of one kind are alike here, so within that normalisation may change nothing.
    assert siloing == "module" or any(not torch.equal(plain[n], expected[n]) for n in expected)
    report = run(tmp_path, distance_normalization=kind, **options)
    assert {n: r.indices.tolist() for n, r in SparseDelta.load(tmp_path / "out").items()} == {
        n: indices.tolist() for n, indices in subset.items() if len(indices)
    }
    loaded = PeftModel.from_pretrained(load(), tmp_path / "out")
    assert_same(weights(loaded.get_base_model()), weights(base) | expected)
    # Both are what the silo compared.
    assert all(0 < silo.largest_reset <= silo.threshold for silo in report.silos)


@pytest.mark.parametrize("siloing", SILOINGS)
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_epsilon_one_is_the_tuned_model(name, siloing, pair, tmp_path):
    load, _, tuned = pair(name)
    report = run(tmp_path, epsilon=1.0, siloing=siloing)
    loaded = PeftModel.from_pretrained(load(), tmp_path / "out")
    assert_same(weights(loaded.get_base_model()), weights(tuned))
    assert torch.equal(logits(loaded, name), logits(tuned, name))
    assert report.total.reset == 0
    assert (report.total.share_of_absolute, report.total.share_of_squares) == pytest.approx((1.0, 1.0), rel=1e-12)


def test_a_hand_computed_case(tmp_path):
    class Net(nn.Module):
        def __init__(self, mixer, embed):
            super().__init__()
            self.mixer, self.embed = nn.Module(), nn.Module()
            self.mixer.weight = nn.Parameter(torch.tensor(mixer))
            self.embed.weight = nn.Parameter(torch.tensor([embed]))

    base = Net([4.0, 1.0, -2.0, 0.0], [1.0, 1.0])
    # Δ = |seed · change|: 4, 3, 4, 0; the second 4 loses the tie to the first. In the other silo 1 and 2.
    tuned = Net([5.0, 4.0, 0.0, 9.0], [0.0, 3.0])
    report = run(tmp_path, base, tuned, num_free_parameters=2, siloing="parameter")
    assert {n: (r.indices.tolist(), r.values.tolist()) for n, r in SparseDelta.load(tmp_path / "out").items()} == {
        "mixer.weight": ([0], [5.0]),
        "embed.weight": ([1], [3.0]),
    }
    mixer, embed = report.silos
    assert (mixer.size, mixer.budget, mixer.free, mixer.changed, mixer.reset) == (4, 1, 1, 4, 3)
    assert (mixer.threshold, mixer.largest_reset) == (4.0, 4.0)
    assert (mixer.absolute_kept, mixer.absolute) == (1.0, 1 + 3 + 2 + 9)
    assert (mixer.squares_kept, mixer.squares) == (1.0, 1 + 9 + 4 + 81)
    assert (embed.threshold, embed.largest_reset, embed.share_of_absolute) == (2.0, 1.0, 2 / 3)
    total = report.total
    assert (total.size, total.budget, total.free, total.reset, total.largest_reset) == (6, 2, 2, 4, 4.0)
    assert total.share_of_squares == (1 + 4) / (95 + 5)
    assert math.isnan(total.threshold)
    lines = str(report).splitlines()
    assert lines[2].split() == ["mixer.weight", "4", "1", "4", "3", "4", "6.67%", "1.05%"]
    assert lines[-1].split() == ["total", "6", "2", "4", "4", "16.67%", "5.00%"]


def test_figures_of_tensors_longer_than_a_tile(tmp_path, monkeypatch):
    monkeypatch.setattr("peft_dst.extraction.figures.TILE", 7)
    torch.manual_seed(0)
    seed = {"a.weight": torch.randn(9, 5), "b.bias": torch.randn(11)}
    tuned = {n: t + torch.randn_like(t) * (torch.rand_like(t) > 0.3) for n, t in seed.items()}

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 9, bias=False), nn.Module()
            self.b.bias = nn.Parameter(torch.zeros(11))

    base = Net()
    base.load_state_dict(seed)
    figures = run(tmp_path, base, tuned, siloing="none", distance="absolute", num_free_parameters=10).silos[0]
    change = torch.cat([(tuned[n].double() - seed[n].double()).flatten().abs() for n in seed])
    order = change.sort(descending=True).values
    assert figures.changed == int((change > 0).sum()) < 56
    assert figures.absolute == pytest.approx(float(change.sum()), rel=1e-12)
    assert figures.squares_kept == pytest.approx(float(order[:10].square().sum()), rel=1e-12)
    assert figures.largest_reset == pytest.approx(float(order[10]), rel=1e-6)
    assert figures.threshold == pytest.approx(float(order[9]), rel=1e-6)


def test_the_folder_is_what_save_pretrained_writes(pair, tmp_path):
    """Key for key and field for field, but for the values: compared with an adapter trained on the same base."""
    load, _, _ = pair()
    config = DSTConfig(epsilon=0.02, modules_to_save=["classifier"])
    model = get_peft_model(load(), config)
    train(model, "bert")
    model.save_pretrained(tmp_path / "trained")
    run(tmp_path, modules_to_save=["classifier"])
    ours, theirs = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("out", "trained"))
    # At this budget one small matrix or another may have no entries.
    assert len(ours.keys() & theirs.keys()) > 30
    assert all(ours[n].dtype == theirs[n].dtype for n in ours.keys() & theirs.keys())
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "trained").iterdir()}
    for read in (lambda f: json.loads((f / "adapter_config.json").read_text()), metadata):
        one, other = (read(tmp_path / folder) for folder in ("out", "trained"))
        both = one["records"].keys() & other["records"].keys()
        assert all([type(v) for v in one["records"][n]] == [type(v) for v in other["records"][n]] for n in both)
        assert all(one["records"][n][2].keys() == other["records"][n][2].keys() for n in both)
        assert {**one, "records": 0} == {**other, "records": 0}
    cards = [(tmp_path / folder / "README.md").read_text() for folder in ("out", "trained")]
    assert cards[0] == cards[1]
    assert str(tmp_path / "tuned") not in cards[0]


def metadata(folder):
    return read_metadata(folder / "adapter_model.safetensors")


def test_an_extracted_adapter_is_trained_on(pair, tmp_path):
    load, _, _ = pair()
    run(tmp_path)
    model = PeftModel.from_pretrained(load(), tmp_path / "out", is_trainable=True)
    train(model, "bert", first=5)
    model.save_pretrained(tmp_path / "later")
    assert torch.equal(logits(PeftModel.from_pretrained(load(), tmp_path / "later"), "bert"), logits(model, "bert"))


def test_shards(pair, tmp_path):
    _, base, tuned = pair(max_shard_size="5KB")
    assert (tmp_path / "tuned" / "model.safetensors.index.json").is_file()
    report = run(tmp_path)
    sharded = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert report.silos == run(tmp_path, base, tuned).silos
    assert_same(sharded, load_file(tmp_path / "out" / "adapter_model.safetensors"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, pair, tmp_path):
    load, base, tuned = pair("llama", dtype=dtype)
    expected, _ = reference(base, tuned, epsilon=0.05)
    run(tmp_path, epsilon=0.05)
    assert {r.values.dtype for r in SparseDelta.load(tmp_path / "out").values()} == {dtype}
    loaded = PeftModel.from_pretrained(load(), tmp_path / "out")
    assert_same(weights(loaded.get_base_model()), expected)
    run(tmp_path, epsilon=1.0)
    loaded = PeftModel.from_pretrained(load(), tmp_path / "out")
    assert_same(weights(loaded.get_base_model()), weights(tuned))


def test_values_are_rounded_to_the_base_before_they_are_compared(pair, tmp_path):
    """A change that rounds to nothing takes no place of the budget."""
    _, base, tuned = pair()
    base.to(torch.bfloat16)
    run(tmp_path, base, tuned, epsilon=0.3)
    exact = load_file(tmp_path / "out" / "adapter_model.safetensors")
    run(tmp_path, base, tuned.to(torch.bfloat16), epsilon=0.3)
    assert_same(exact, load_file(tmp_path / "out" / "adapter_model.safetensors"))


def test_models_are_left_as_they_were(pair, tmp_path):
    _, base, tuned = pair("t5")
    before, live = [weights(m) for m in (base, tuned)], len(Constraint.live)
    base.encoder.requires_grad_(False)
    run(tmp_path, base, tuned)
    for model, copies in zip((base, tuned), before, strict=True):
        assert_same(weights(model), copies)
        assert not any("_sparse" in name for name, _ in model.named_modules())
        assert not hasattr(model, "peft_config")
    assert not any(p.requires_grad for p in base.encoder.parameters())
    assert base.decoder.block[0].layer[0].SelfAttention.q.weight.requires_grad
    assert len(Constraint.live) <= live


@pytest.mark.parametrize(
    "kinds", ["model+folder", "folder+model", "dict+model", "model+dict", "folder+dict", "dict+folder"]
)
def test_any_mixture_of_sources(kinds, pair, tmp_path):
    _, base, tuned = pair("gpt2")
    run(tmp_path)
    expected = load_file(tmp_path / "out" / "adapter_model.safetensors")
    made = {
        "model": lambda which, model: model,
        "folder": lambda which, model: tmp_path / which,
        "dict": lambda which, model: model.state_dict(),
    }
    one, other = kinds.split("+")
    run(tmp_path, made[one]("base", base), made[other]("tuned", tuned))
    assert_same(load_file(tmp_path / "out" / "adapter_model.safetensors"), expected)


def test_what_transformers_converts_on_loading(pair, tmp_path):
    """Mixtral's experts are joined into one tensor while they are loaded: folders are refused, models are the remedy."""
    load, base, tuned = pair("mixtral")
    with pytest.raises(
        ValueError, match=r"has no tensor for 'model.layers.0.mlp.*but holds.*pass these instead of folders"
    ):
        run(tmp_path)
    assert not (tmp_path / "out").exists()
    run(tmp_path, load("base"), load("tuned"), epsilon=0.05)
    expected, _ = reference(base, tuned, epsilon=0.05)
    loaded = PeftModel.from_pretrained(load(), tmp_path / "out")
    assert_same(weights(loaded.get_base_model()), expected)


def test_the_config_is_left_alone(pair, tmp_path):
    pair()
    config = DSTConfig(epsilon=0.02, modules_to_save=["classifier"], task_type="SEQ_CLS")
    before = copy.deepcopy(config.__dict__)
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", config, progress=False)
    assert config.__dict__ == before


def own_memory_of_extract(folder: Path) -> float:
    """By how many MiB the process' own memory is larger at its peak; in a process that does nothing else."""

    def anonymous() -> float:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) / 1024

    def watch() -> None:
        while not done.wait(0.001):
            peak.append(anonymous())

    small = bert()
    moved = {n: t + 1 for n, t in small.state_dict().items()}
    extract(small, moved, folder / "small", DSTConfig(epsilon=0.1), progress=False)
    before, peak, done = anonymous(), [0.0], threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    config = DSTConfig(epsilon=1e-4, siloing="none")
    extract(folder / "base", folder / "tuned", folder / "out", config, progress=False)
    done.set()
    thread.join()
    return max(peak) - before


def test_a_tensor_of_a_checkpoint_is_not_in_the_process_own_memory(tmp_path, apart):
    """The whole pair is looked at, with one silo over all of it; what the process holds for itself is a fraction of it."""
    if not sys.platform.startswith("linux"):
        pytest.skip("RssAnon is Linux's")
    shapes = {"hidden_size": 512, "intermediate_size": 4096, "vocab_size": 4000}
    config = hf.LlamaConfig(
        num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=4, dtype="bfloat16", **shapes
    )
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        names = {n: p.shape for n, p in hf.LlamaForCausalLM(config).named_parameters()}
    for i, folder in enumerate(("base", "tuned")):
        tensors = {n: torch.full(shape, 1 + i / 64, dtype=torch.bfloat16) for n, shape in names.items()}
        config.save_pretrained(tmp_path / folder)
        save_file(tensors, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
    # What else a process takes meanwhile comes on top, now and then: the smaller one of two.
    grown = min(apart(own_memory_of_extract, tmp_path) for _ in range(2))
    size = sum((tmp_path / folder / "model.safetensors").stat().st_size for folder in ("base", "tuned")) / 2**20
    assert size > 180
    assert grown < size / 2
