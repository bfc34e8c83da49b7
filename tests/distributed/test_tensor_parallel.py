"""Tensor parallelism by transformers' own plan, alone and with FSDP2 over it: as one process, saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from peft_dst import DSTConfig
from peft_dst.training import subset_metrics
from tests.distributed.accelerated import environment
from tests.distributed.sharded import assert_agree, optimizer_of, subsets
from tests.models import BUILDERS, batch


@pytest.fixture(scope="module")
def base(request, tmp_path_factory):
    """A folder whose name is the architecture's."""
    folder = tmp_path_factory.mktemp("base") / request.param
    torch.manual_seed(0)
    BUILDERS[request.param]().save_pretrained(folder)
    return str(folder)


def load(base, **layout):
    """A base on this process's part of a mesh; alone without a layout."""
    options = {"distributed_config": DistributedConfig(**layout)} if layout else {}
    return AutoModelForCausalLM.from_pretrained(base, **options)


def logits_of(model, base):
    with torch.no_grad():
        return model.eval()(**batch(Path(base).name, 9)).logits


def train(rank, world, base, kind, folder, layout):
    with environment(rank, world):
        model = get_peft_model(load(base, **layout), DSTConfig(epsilon=0.02))
    optimizer = optimizer_of(model, kind)
    shares = layout.get("fsdp_size", 1)
    for number in range(4):
        # All that divide a layer's computation among them see the same samples.
        share = rank // layout.get("tp_size", 1)
        rows = {k: v[share::shares].contiguous() for k, v in batch(Path(base).name, number).items()}
        model(**rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    divided = {len(weight.box.divided) for weight in model.constraint().weights}
    figures, counts = subset_metrics(model.constraint()), model.get_nb_trainable_parameters()
    model.save_pretrained(folder)
    return subsets(model), figures, counts, logits_of(model, base), divided


def serve(rank, world, base, folder, layout):
    with environment(rank, world):
        model = load(base, **layout)
    seed = logits_of(model, base)
    model = PeftModel.from_pretrained(model, folder)
    tuned = logits_of(model, base)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, base), seed)
    return tuned


# Sizes of the mesh, and over how many of its dimensions weights are divided.
TENSOR = {"tp_size": 2}, {0, 1}
FSDP = {"fsdp_size": 2}, {1}
BOTH = {"fsdp_size": 2, "tp_size": 2}, {1, 2}


# The other optimizer with either layout: test_meshes.py.
@pytest.mark.parametrize(
    ("base", "kind", "world", "layout", "dimensions"),
    # Mixtral's experts have two matrices joined in one.
    [
        ("llama", "AdamW", 2, *TENSOR),
        ("mixtral", "hook", 2, *TENSOR),
        ("llama", "hook", 2, *FSDP),
        ("llama", "hook", 4, *BOTH),
    ],
    ids=["AdamW-tensor", "hook-tensor-experts", "hook-fsdp", "hook-both"],
    indirect=["base"],
)
def test_agrees_with_one_process_and_is_loaded_by_any_number(together, tmp_path, base, kind, world, layout, dimensions):
    ((alone, figures, counts, logits, _),) = together(1, train, base, kind, str(tmp_path / "alone"), {})
    for found, own, counted, mine, divided in together(world, train, base, kind, str(tmp_path / "divided"), layout):
        assert divided == dimensions
        assert_agree(alone, found)
        assert own == pytest.approx(figures, rel=1e-3)
        assert counted == counts
        torch.testing.assert_close(mine, logits, rtol=1e-4, atol=1e-5)
    # What one process has saved several can serve, and the other way round.
    (served,) = together(1, serve, base, str(tmp_path / "divided"), {})
    for found in [served, *together(world, serve, base, str(tmp_path / "alone"), layout)]:
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
