"""FSDP2 through Accelerate: as one process, resumed to the same bits, in as many processes or in others."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate.utils import load_fsdp_model, load_fsdp_optimizer, save_fsdp_model, save_fsdp_optimizer
from peft import get_peft_model
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from peft_dst import DSTConfig
from tests.distributed.accelerated import accelerator
from tests.distributed.sharded import assert_agree, optimizer_of, subsets
from tests.models import BUILDERS, assert_same, batch


FULL, SHARDED = "FULL_STATE_DICT", "SHARDED_STATE_DICT"


def prepare(accelerator, kind, base_seed=0):
    torch.manual_seed(base_seed)
    model = get_peft_model(BUILDERS["bert"](), DSTConfig(epsilon=0.02, modules_to_save=["classifier"]))
    return accelerator.prepare(model, optimizer_of(model, kind))


def train(accelerator, model, optimizer, steps):
    """Steps on batches of which each process has its share, with clipped gradients."""
    for step in steps:
        rows = batch("bert", step)
        rows = {k: v[accelerator.process_index :: accelerator.num_processes].contiguous() for k, v in rows.items()}
        accelerator.backward(model(**rows).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def trained(model):
    """All that was trained: subsets, with positions in the whole tensors, and the dense head."""
    heads = {n: p for n, p in model.named_parameters() if ".modules_to_save." in n and p.requires_grad}
    assert len(heads) == 2
    # A head of three rows is divided unevenly.
    dense = {n: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for n, p in heads.items()}
    return subsets(model), dense


def through_accelerate(rank, world, kind, folder):
    with accelerator(rank, world, state_dict_type=FULL) as made:
        model, optimizer = prepare(made, kind)
        train(made, model, optimizer, range(5))
        if world > 1:
            assert all(weight.is_divided for weight in model.constraint().weights)
        model.save_pretrained(f"{folder}/all")
        state = made.get_state_dict(model)
        # As Accelerate's and transformers' own scripts do.
        made.unwrap_model(model).save_pretrained(
            f"{folder}/one", is_main_process=made.is_main_process, save_function=made.save, state_dict=state
        )
        if made.is_main_process:
            made.unwrap_model(model).save_pretrained(f"{folder}/main", state_dict=state)
        made.wait_for_everyone()
        counted = model.get_nb_trainable_parameters()
        with torch.no_grad():
            # FSDP leaves the outermost weights gathered.
            model(**batch("bert"))
        assert model.get_nb_trainable_parameters() == counted
        return trained(model), counted


@pytest.mark.parametrize("kind", ["hook", "AdamW"])
def test_agrees_with_one_process(together, tmp_path, kind):
    (((alone, dense), count),) = together(1, through_accelerate, kind, str(tmp_path / "1"))
    for (found, heads), counted in together(2, through_accelerate, kind, str(tmp_path / "2")):
        assert_agree(alone, found)
        torch.testing.assert_close(heads, dense)
        assert counted == count
    folders = [tmp_path / "2" / name for name in ("one", "main", "all")]
    one, main, everyone = (json.loads((folder / "adapter_config.json").read_text()) for folder in folders)
    assert one == main == everyone
    files = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    assert_same(*files[:2])
    assert_same(*files[1:])
    assert sum(tensor.numel() for name, tensor in files[0].items() if "dst_values" in name) > 0


def widened(rank, world, folder):
    """Accelerate has mixed precision's weights in float32, through `.data`, before it divides them."""
    with accelerator(rank, world, "bf16", state_dict_type=FULL, cpu_ram_efficient_loading=False) as made:
        torch.manual_seed(0)
        model = get_peft_model(BUILDERS["bert"]().bfloat16(), DSTConfig(epsilon=0.02))
        model, optimizer = made.prepare(model, optimizer_of(model, "hook"))
        train(made, model, optimizer, range(2))
        assert {weight.data.dtype for weight in model.constraint().weights} == {torch.float32}
        state = made.get_state_dict(model)
        model.save_pretrained(folder, is_main_process=made.is_main_process, state_dict=state)
        made.wait_for_everyone()
        if made.is_main_process:
            key = "base_model.model.bert.pooler.dense.weight"
            state[key] = state[key] * (1 + 2**-12)
            with pytest.raises(RuntimeError, match="weight' differs from the seed outside the subset"):
                model.save_pretrained(folder, state_dict=state)


def test_a_base_that_is_widened_before_it_is_divided(together, tmp_path):
    together(2, widened, str(tmp_path))
    assert len(load_file(tmp_path / "adapter_model.safetensors")) > 0


def begin(rank, world, kind, state_dict_type, folder, efficient):
    with accelerator(rank, world, state_dict_type=state_dict_type, cpu_ram_efficient_loading=efficient) as made:
        # Where only the first process loads the base, whatever the others have is to be replaced.
        model, optimizer = prepare(made, kind, base_seed=rank if efficient else 0)
        train(made, model, optimizer, range(3))
        made.save_state(folder)
        train(made, model, optimizer, range(3, 5))
        return trained(model)


def resume(rank, world, kind, state_dict_type, folder, efficient):
    with accelerator(rank, world, state_dict_type=state_dict_type, cpu_ram_efficient_loading=efficient) as made:
        model, optimizer = prepare(made, kind, base_seed=rank if efficient else 0)
        made.load_state(folder)
        train(made, model, optimizer, range(3, 5))
        return trained(model)


@pytest.mark.parametrize(
    ("kind", "state_dict_type", "efficient"),
    [("hook", SHARDED, False), ("AdamW", FULL, True)],
)
def test_resumed_in_fresh_processes_to_the_same_bits(together, afresh, tmp_path, kind, state_dict_type, efficient):
    arguments = kind, state_dict_type, str(tmp_path), efficient
    whole, other = together(2, begin, *arguments)
    for resumed in (other, *afresh(2, resume, *arguments)):
        for part, again in zip(whole, resumed, strict=True):
            torch.testing.assert_close(part, again, rtol=0, atol=0)


def begin_with_adapter_only(rank, world, kind, state_dict_type, folder):
    with accelerator(rank, world, state_dict_type=state_dict_type) as made:
        model, optimizer = prepare(made, kind)
        train(made, model, optimizer, range(3))
        plugin = made.state.fsdp_plugin
        save_fsdp_model(plugin, made, model, folder, adapter_only=True)
        save_fsdp_optimizer(plugin, made, optimizer, model, folder)
        train(made, model, optimizer, range(3, 5))
        return trained(model)


def resume_with_adapter_only(rank, world, kind, state_dict_type, folder):
    with accelerator(rank, world, state_dict_type=state_dict_type) as made:
        model, optimizer = prepare(made, kind)
        plugin = made.state.fsdp_plugin
        load_fsdp_model(plugin, made, model, folder, adapter_only=True)
        load_fsdp_optimizer(plugin, made, optimizer, model, folder)
        train(made, model, optimizer, range(3, 5))
        return trained(model)


@pytest.mark.parametrize(("kind", "state_dict_type"), [("hook", FULL), ("AdamW", SHARDED)])
def test_checkpoint_of_the_adapter_alone_goes_on_in_another_number_of_processes(
    together, tmp_path, kind, state_dict_type
):
    (alone, dense), _ = together(2, begin_with_adapter_only, kind, state_dict_type, str(tmp_path))
    for found, heads in together(4, resume_with_adapter_only, kind, state_dict_type, str(tmp_path)):
        assert_agree(alone, found)
        torch.testing.assert_close(heads, dense)
    if state_dict_type == SHARDED:
        # The adapter, not its base. Of a full one Accelerate saves whatever has a gradient: all of the model.
        saved = FileSystemReader(tmp_path / "pytorch_model_fsdp_0").read_metadata().state_dict_metadata
        assert {name.split(".")[3] for name in saved if "._sparse." not in name} == {"classifier"}
        assert any("._sparse." in name for name in saved)
