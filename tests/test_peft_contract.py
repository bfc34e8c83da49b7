"""What PEFT's own tests found missing (tests/peft_suite), and what they test with other methods only."""

from __future__ import annotations

import pytest
import torch
from peft import (
    PeftModel,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from torch import nn

from peft_dst import DSTConfig
from tests.models import assert_same, logits, tuned_model, weights


def test_markers_say_the_features_of_their_hosts(build):
    base = build("bert")
    get_peft_model(base, DSTConfig(epsilon=0.02))
    query = base.get_submodule("bert.encoder.layer.0.attention.self.query")
    assert (query._sparse.in_features, query._sparse.out_features) == (query.in_features, query.out_features)
    norm = base.get_submodule("bert.encoder.layer.0.output.LayerNorm")
    assert (norm._sparse.in_features, norm._sparse.out_features) == (None, None)


def test_the_base_state_dict_has_the_base_s_keys_only(build):
    """The markers' notes of sizes and seeds stand in the model's state dict, and are not the base's."""
    seed = weights(build("bert"))
    model, _ = tuned_model(build)
    tuned = weights(model.get_base_model())
    found = get_base_model_state_dict(model)
    assert found.keys() == build("bert").state_dict().keys()
    assert_same({name: found[name] for name in tuned}, tuned)
    with model.disable_adapter():
        assert_same({name: get_base_model_state_dict(model)[name] for name in seed}, seed)
    other = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in found.items()}
    with model.disable_adapter():
        assert set_base_model_state_dict(model, other) == ([], [])
        assert_same(weights(model.get_base_model()), {name: other[name] for name in tuned})


@pytest.mark.parametrize("selection", ["dynamic", "random", "magnitude", "fisher"])
def test_a_random_start_is_no_seed_and_comes_back(selection, build, tmp_path):
    """`init_weights=False` moves a fixed subset where it is, and nothing of a saved adapter, whose entries are loaded."""
    base = build("bert")
    seed = weights(base)
    model = get_peft_model(base, DSTConfig(epsilon=0.5, selection=selection, init_weights=False))
    tuned = weights(base)
    assert sum(int((tuned[n] != seed[n]).sum()) for n in seed) == model.constraint().budget
    outputs = logits(model, "bert")
    model.save_pretrained(tmp_path)
    base = build("bert")
    torch.manual_seed(1)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(loaded, "bert"), outputs)


@pytest.mark.parametrize("selection", ["dynamic", "random"])
def test_injected_without_memory_and_loaded(selection, build):
    """`low_cpu_mem_usage` of an adapter that no saved config announces, as diffusers loads one."""
    config = DSTConfig(epsilon=0.02, selection=selection, init_weights=False)
    model = get_peft_model(build("bert"), config)
    outputs, state = logits(model, "bert"), get_peft_model_state_dict(model)
    base = build("bert")
    inject_adapter_in_model(config, base, low_cpu_mem_usage=True)
    assert "meta" in {p.device.type for p in base.parameters()}
    assert torch.equal(logits(base, "bert"), logits(build("bert"), "bert"))
    set_peft_model_state_dict(base, state, low_cpu_mem_usage=True)
    assert "meta" not in {p.device.type for p in base.parameters()}
    assert torch.equal(logits(base, "bert"), outputs)


def test_a_module_named_like_the_prefix_is_the_base_s():
    model = nn.Sequential()
    model.lin0, model.dst_other = nn.Linear(5, 5), nn.Linear(5, 5)
    model = get_peft_model(model, DSTConfig(epsilon=0.5, target_modules=["lin0"], init_weights=False))
    other = model.base_model.model.dst_other
    assert not any(parameter.requires_grad for parameter in other.parameters())
    state = get_peft_model_state_dict(model)
    assert state
    assert not any("dst_other" in key for key in state)


def test_mixed_models_refuse_dst(build):
    with pytest.raises(ValueError, match="not compatible with the `PeftMixedModel`"):
        get_peft_model(build("bert"), DSTConfig(epsilon=0.02), mixed=True)
