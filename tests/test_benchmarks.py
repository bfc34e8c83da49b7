"""The benchmarks run, at a toy size, and say what they promise; docs/performance.md says what their results say."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

from benchmarks import (
    RESULTS,
    codec,
    common,
    distributed,
    distributed_report,
    formulas,
    gpu_step,
    load,
    memory,
    mixing,
    report,
    scaling,
    selection,
    serving_report,
    step,
    switching,
)
from peft_dst.core import kernels
from tests.models import BUILDERS


def run(module, path, *arguments):
    """Run a benchmark's command line, and read what it wrote."""
    module.main([*map(str, arguments), "--json", str(path)])
    found = json.loads(path.read_text())
    assert {"commit", "dirty", "versions", "machine", "threads", "options", "seconds", "rows"} <= found.keys()
    assert "json" not in found["options"], "a path of this machine"
    return found


TIMES = {"ms", "ratio", "low", "high"}


def test_selection(tmp_path):
    found = run(selection, tmp_path / "selection.json", "--n", 4096, "--rounds", 3)
    assert {row["epsilon"] for row in found["rows"] if row["case"] == "training"} == set(selection.TARGETS)
    for row in found["rows"]:
        assert row.keys() == {"case", "n", "epsilon", "budget", "target", "step", "select", "topk"}
        assert all(row[name].keys() == TIMES for name in ("step", "select", "topk"))
        assert row["step"]["ratio"] == 1


def test_step(tmp_path):
    found = run(step, tmp_path / "step.json", "--toy", "--gpt2-rounds", 2)
    names = ["full", "hook", "DSTOptimizer"]
    assert [row["epsilon"] for row in found["rows"]] == [1e-4, 1e-3]
    for row in found["rows"]:
        assert row.keys() == {"case", "epsilon", "rounds", *names}
        assert all(row[name].keys() == TIMES | {"optimizer_ms"} for name in names)


def test_the_constrained_step_is_constrained():
    """A constraint dies with its model; a benchmark that lets go of it would time plain fine-tuning."""
    compared = step.steppers(lambda: common.gpt2(toy=True), common.language_batch(1, 4, 100), 0.01)
    for name, stepper in compared.items():
        before = [p.detach().clone() for p in stepper.model.parameters()]
        stepper()
        pairs = zip(before, stepper.model.parameters(), strict=True)
        changed = sum(int((old != new).sum()) for old, new in pairs if new.is_floating_point())
        free = round(0.01 * sum(p.numel() for p in compared["full"].model.parameters()))
        assert (changed > 10 * free) if name == "full" else (0 < changed <= 2 * free)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gpu_step(dtype, tmp_path):
    """Without a GPU: the kernels interpreted, or left out."""
    arguments = ("--device", "cpu", "--toy", "--epsilons", 0.005, "--dtypes", dtype)
    found = run(gpu_step, tmp_path / "gpu_step.json", *arguments)
    (row,) = found["training"]
    names = {"full", "hook", "DSTOptimizer", "DSTOptimizer, kernels=False"}
    assert row["step"].keys() == row["optimizer"].keys() == names
    assert all(times.keys() == TIMES for what in ("step", "optimizer") for times in row[what].values())
    assert row["n"] > 5000
    assert len(found["rows"]) == row["kernels"] == kernels.available(torch.empty(0))
    for kernel in found["rows"]:
        assert {"dtype", "epsilon", "last_churn", "dst_ms", "full_float32_ms", "ratio_to_full_float32"} <= kernel.keys()


def test_scaling(tmp_path):
    found = run(scaling, tmp_path / "scaling.json", "--sizes", 4096, "--silos", 1, 4, "--n", 4096, "--rounds", 1)
    assert [(row["varied"], row["silos"]) for row in found["rows"]] == [("size", 1), ("silos", 1), ("silos", 4)]
    assert all({"n", "plain_ms", "hook_ms", "cost_ms", "cost_ns"} <= row.keys() for row in found["rows"])


def test_memory(tmp_path):
    arguments = ("--toy", "--batch", 1, "--length", 8, "--dtypes", "float32", "--only", "full, AdamW")
    found = run(memory, tmp_path / "memory.json", *arguments)
    (row,) = found["rows"]
    assert row.keys() == {"row", "dtype", "bytes", "phases", "files", "trained", "predicted", "predicted_phases"}
    assert row["phases"].keys() == {"forward", "backward", "step"}
    assert row["trained"] == found["shapes"]["float32"]["n"]
    assert found["prediction"]["rows"].keys() == memory.ROWS.keys() == formulas.FORMULAS.keys()


def test_mixing(tmp_path):
    found = run(mixing, tmp_path / "mixing.json", "--toy", "--rounds", 1)
    assert [row["epsilon"] for row in found["rows"]] == list(mixing.EPSILONS)
    for row in found["rows"]:
        ways = {"mixed", "mixed, side by side", "switching"}
        assert row["throughput"].keys() == ways
        assert all(row[way].keys() == TIMES for way in ("one subset", *ways))


def test_switching(tmp_path):
    BUILDERS["llama"]().save_pretrained(tmp_path / "small")
    found = run(switching, tmp_path / "switching.json", "--toy", "--rounds", 1, "--llama", tmp_path / "small")
    assert found["options"]["llama"] == "small", "a folder by its name, not by where it is"
    small = [row for row in found["rows"] if row["model"] == "small"]
    others = [row for row in found["rows"] if row["model"] != "small"]
    assert small[-1]["epsilon"] is None
    assert [row["epsilon"] for row in others] == [1e-4, 1e-3, 1e-2, None]
    first, *_, last = others
    assert first["DeltaPool"]["ratio"] == pytest.approx(first["DeltaPool"]["ms"] / first["forward"]["ms"], rel=1e-3)
    assert {"LoRA, set_adapter", "LoRA, unmerge and merge", "SHiRA, set_adapter"} < last.keys()


def test_load(tmp_path):
    small = ("--subsets", 6, "--clients", 6, "--each", 1, "--rounds", 1, "--epsilon", 0.01, "--check", 6)
    found = run(load, tmp_path / "load.json", "--toy", *small)
    subsets, alone = found["rows"]
    assert (subsets["case"], alone["case"]) == ("6 subsets", "base alone")
    for row in found["rows"]:
        assert (row["requests"], row["errors"], row["checked"], row["wrong"]) == (6, 0, 6, 0)
        assert 0 < row["first_token"]["p50"] <= row["latency"]["p99"]
    # The subsets say something else than the base.
    assert subsets["unlike_base"] > 0 == alone["unlike_base"]
    assert subsets["switches"] + subsets["mixed_batches"] > 0 == alone["mixed_batches"]
    rates = [row["tokens_per_second"] for row in found["rows"]]
    assert subsets["throughput"] == pytest.approx(rates[0] / rates[1], rel=1e-3)


def test_codec(tmp_path):
    found = run(codec, tmp_path / "codec.json", "--k", 2000, "--rounds", 1)
    assert [row["epsilon"] for row in found["rows"] if row["case"] == "uniform"] == list(codec.EPSILONS)
    for row in found["rows"]:
        assert row.keys() == {"case", "epsilon", "k", "entropy", "bits", "ratio", "encoded_per_s", "decoded_per_s"}
        assert row["ratio"] == pytest.approx(row["bits"] / row["entropy"], rel=1e-3)


def test_distributed(forkserver, tmp_path):
    arguments = ("--toy", "--worlds", 2, "--rounds", 1, "--length", 8)
    found = run(distributed, tmp_path / "distributed.json", *arguments)
    assert len(found["rows"]) == len(distributed.cases(toy=True))
    for row in found["rows"]:
        assert ("formula" in row) == (row["through"] != "plain")
        assert row["counted"] == row.get("formula", {"messages": 0, "payload": 0, "sent": 0})
    for name in ("plain", "hook", "DSTOptimizer"):
        assert found["timing"][name].keys() == TIMES | {"optimizer_ms", "communication_ms"}
    assert found["timing"]["plain"]["communication_ms"] == 0 < found["timing"]["hook"]["communication_ms"]
    assert {row["model"] for row in found["projections"]} == distributed.SHAPES.keys()


@pytest.mark.parametrize("row", memory.rows())
def test_every_row_of_the_memory_benchmark_trains(row, recwarn):
    model, peaks = memory.train(row, torch.float32, {"batch": 1, "length": 8, "toy": 1}, 2, 0)
    recwarn.clear()  # SHiRA's and Super-Tuning's own
    assert peaks.keys() == {"forward", "backward", "step"}
    assert any(p.requires_grad for p in model.parameters())


def test_the_shape_is_that_of_the_model():
    shape = formulas.shape_of(lambda: common.gpt2(toy=True), torch.bfloat16, 2, 4, 8, 0.01)
    model = common.gpt2(toy=True)
    assert shape.n == sum(p.numel() for p in model.parameters())
    assert (shape.bytes, shape.tied, shape.logits) == (2, True, 2 * 4 * 100)
    # The rank times rows and columns, of four projections in each of two layers.
    assert shape.adapter == 8 * 2 * sum(w + h for w, h in ((32, 96), (32, 32), (32, 128), (128, 32)))
    assert shape.linear == 2 * 12 * 32 * 32


def test_what_is_saved_for_the_backward_pass_is_what_a_real_model_saves():
    """Counted on tensors without storage, and again on real ones."""
    shape = formulas.shape_of(lambda: common.gpt2(toy=True), torch.float32, 2, 8, 8, 0.01)
    model = common.gpt2(toy=True)
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    batch = common.language_batch(2, 8, 100)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(**batch)
    real = sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own)
    assert shape.saved == pytest.approx(real, rel=0.02)


def test_the_model_is_gpt2():
    """With `nn.Linear` for `Conv1D` it computes the same."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = common.gpt2(toy=True)
    torch.manual_seed(0)
    names = ("n_embd", "n_layer", "n_head", "vocab_size", "n_positions", "resid_pdrop", "embd_pdrop", "attn_pdrop")
    original = GPT2LMHeadModel(GPT2Config(**{name: getattr(model.config, name) for name in names}))
    assert not any(type(module).__name__ == "Conv1D" for module in model.modules())
    assert isinstance(model.transformer.h[0].mlp.c_fc, nn.Linear)
    tokens = torch.arange(10)[None]
    torch.testing.assert_close(model(tokens).logits, original(tokens).logits)


def test_ratios_are_taken_round_by_round(monkeypatch):
    clock = iter([1.0, 3.0, 20.0, 60.0, 1.0, 5.0])  # base and other in turn, the second round the other way round
    monkeypatch.setattr(common, "seconds", lambda function: function())
    order = {"base": lambda: next(clock), "other": lambda: next(clock)}
    found = common.interleaved(order, rounds=3, warmup=0)
    assert found["other"]["ratio"] == 3.0  # of 3, 1/3 and 5
    assert found["base"]["ratio"] == found["base"]["low"] == found["base"]["high"] == 1.0


def test_the_performance_page_is_up_to_date():
    assert report.PAGE.read_text() == report.render(report.load()), "run: python -m benchmarks.report"
    assert report.PLOT.is_file()


def test_the_measured_part_of_serving_is_up_to_date():
    page = serving_report.PAGE.read_text()
    measured = serving_report.render(serving_report.load())
    expected = report.with_part(page, serving_report.BEGIN, measured)
    assert page == expected, "run: python -m benchmarks.serving_report"
    assert serving_report.PLOT.is_file()


@pytest.mark.parametrize(
    ("options", "model"),
    [({}, "on a GPT-2-sized model"), ({"model": "stories260K"}, "on stories260K"), ({"toy": True}, "on a tiny model")],
)
def test_the_load_is_told_of_the_model_that_was_measured(options, model):
    results = serving_report.load()["load"]
    results["options"] |= options
    assert f" times, {model} with 100 subsets" in serving_report.load_text(results)


def test_the_counted_part_of_distributed_training_is_up_to_date():
    page, counted = distributed_report.PAGE.read_text(), distributed_report.render(distributed_report.load())
    expected = report.with_part(page, distributed_report.BEGIN, counted)
    assert page == expected, "run: python -m benchmarks.distributed_report"


def test_a_part_of_a_page_is_replaced():
    begin, end = "<!-- measured: here -->\n", report.END
    assert report.with_part(f"a\n{begin}old\n{end}b\n{end}", begin, "new") == f"a\n{begin}new\n{end}b\n{end}"
    for page in ("", begin, end, end + begin):
        with pytest.raises(ValueError, match="the page has no part from '<!-- measured: here -->' to"):
            report.with_part(page, begin, "new")


def test_every_letter_of_the_formulas_is_explained():
    fields = {field.name for field in dataclasses.fields(formulas.Shape)}
    assert {attribute for attribute, _ in formulas.LETTERS.values()} == fields
    ones = formulas.Shape(**dict.fromkeys(fields, 1))
    assert all(value > 0 for row in formulas.FORMULAS for value in formulas.phases(row, ones).values())


def test_a_missed_limit_is_reported():
    results = report.load()
    row = results["selection"]["rows"][0]
    row["select"]["ratio"] = 100 * row["target"]
    assert f"The choice at ε = {row['epsilon']:g} takes" in report.losses(results)
    assert "**missed**" in report.selection_table(results["selection"])


def test_the_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    report.plot(report.load(), tmp_path / "performance.svg")
    serving_report.plot(serving_report.load()["switching"], tmp_path / "serving.svg")
    for plot in ("performance.svg", "serving.svg"):
        assert (tmp_path / plot).read_text().startswith("<?xml")


def test_results_name_no_path_of_the_machine():
    assert {path.stem for path in RESULTS.glob("*.json")} >= set(report.NAMES)
    for path in RESULTS.glob("*.json"):
        assert '"/' not in path.read_text(), path.name
