"""Tensor parallelism by transformers' own plan, alone and with FSDP2 over it: as one process, saved and loaded."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from peft_dst import DSTConfig
from peft_dst.training import subset_metrics
from tests.distributed.accelerated import environment
from tests.distributed.test_fsdp import assert_agree, optimizer_of, subsets
from tests.models import BUILDERS, batch


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("base"))
    torch.manual_seed(0)
    BUILDERS["llama"]().save_pretrained(folder)
    return folder


def load(world, base):
    options = {"tp_plan": "auto"} if world > 1 else {}
    model = AutoModelForCausalLM.from_pretrained(base, **options)
    return model


def logits_of(model):
    with torch.no_grad():
        return model.eval()(**batch("llama", 9)).logits


def train(rank, world, base, kind, folder):
    with environment(rank, world):
        model = get_peft_model(load(world, base), DSTConfig(epsilon=0.02))
    optimizer = optimizer_of(model, kind)
    for number in range(4):
        # All that divide a layer among them see the same samples.
        model(**batch("llama", number)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    constraint = model.constraint()
    divided = {len(weight.box.divided) for weight in constraint.weights}
    assert divided == ({0, 1} if world > 1 else {0})
    model.save_pretrained(folder)
    return subsets(model), subset_metrics(constraint), model.get_nb_trainable_parameters(), logits_of(model)


def serve(rank, world, base, folder):
    with environment(rank, world):
        model = load(world, base)
    seed = logits_of(model)
    model = PeftModel.from_pretrained(model, folder)
    tuned = logits_of(model)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), seed)
    return tuned


@pytest.mark.parametrize("kind", ["hook", "AdamW"])
def test_agrees_with_one_process_and_is_loaded_by_any_number(together, tmp_path, base, kind):
    ((alone, figures, counts, logits),) = together(1, train, base, kind, str(tmp_path / "1"))
    for found, own, counted, mine in together(2, train, base, kind, str(tmp_path / "2")):
        assert_agree(alone, found)
        assert own == pytest.approx(figures, rel=1e-3)
        assert counted == counts
        torch.testing.assert_close(mine, logits, rtol=1e-4, atol=1e-5)
    # What one process has saved two can serve, and the other way round.
    for world, saved in ((1, 2), (2, 1)):
        for found in together(world, serve, base, str(tmp_path / str(saved))):
            torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
