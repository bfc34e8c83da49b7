"""What is refused on quantised bases, and leaves them as they were."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_dst import DSTConfig
from peft_dst.delta import DeltaError
from tests.models import logits
from tests.quantised.bases import HEAD, StandIn, serve, stand_in


def test_the_unquantised_rest_still_knows_its_base(kind, base, adapter):
    folder, _ = adapter()
    other = base(kind)
    with torch.no_grad():
        other.bert.embeddings.LayerNorm.weight.add_(1e-3)
    before = logits(other, "bert")
    with (
        pytest.warns(UserWarning, match="quantised here"),
        pytest.raises(DeltaError, match=r"'bert.embeddings.LayerNorm.weight': the base model's values differ"),
    ):
        PeftModel.from_pretrained(other, folder)
    assert torch.equal(logits(other, "bert"), before)
    assert not any(m._forward_hooks for m in other.modules())


def test_damaged_entries_of_a_quantised_weight_are_refused(base, adapter):
    folder, _ = adapter()
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if k.endswith("query._sparse.dst_indices.weight"))
    tensors[key][-1] += 1
    save_file(tensors, path, {"format": "pt"})
    with (
        pytest.warns(UserWarning, match="quantised here"),
        pytest.raises(DeltaError, match=r"query.weight': the entries .* are not those"),
    ):
        PeftModel.from_pretrained(base("stand-in"), folder)


REFUSED = r"'bert.*weight' is .*Train the adapter on the base model in float32.*for inference"


def test_training_is_refused(kind, base, adapter):
    folder, _ = adapter()
    model = base(kind)
    names, seed = [n for n, _ in model.named_modules()], logits(model, "bert")
    with pytest.raises(ValueError, match=REFUSED):
        get_peft_model(model, DSTConfig(epsilon=0.1))
    with pytest.raises(ValueError, match=REFUSED):
        get_peft_model(model, DSTConfig(epsilon=0.1, inference_mode=True))
    with pytest.raises(ValueError, match=REFUSED):
        PeftModel.from_pretrained(model, folder, is_trainable=True)
    assert [n for n, _ in model.named_modules()] == names
    assert torch.equal(logits(model, "bert"), seed)
    served = serve(model, folder)
    with pytest.raises(ValueError, match="adapter 'default' has values for quantised weights, which cannot be trained"):
        served.set_requires_grad("default")
    with pytest.raises(ValueError, match=REFUSED):
        served.load_adapter(folder, "other", is_trainable=True)
    with pytest.raises(ValueError, match=REFUSED):
        served.add_adapter("other", DSTConfig(epsilon=0.1))


def test_merging_is_refused(base, adapter):
    folder, _ = adapter()
    model = serve(base("stand-in"), folder)
    before = logits(model, "bert")
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match=r"weight' is quantised.*Merge into the base model in float32"):
            merge()
    assert torch.equal(logits(model, "bert"), before)


class Unknown(StandIn):
    __module__ = "elsewhere"


def test_other_quantised_parameters_are_refused(base, adapter):
    folder, _ = adapter()
    model = base()
    embedding = model.bert.embeddings.word_embeddings
    embedding.weight = nn.Parameter(embedding.weight.detach().as_subclass(StandIn), requires_grad=False)
    with pytest.raises(ValueError, match=r"word_embeddings.weight' is .*Nor is it the weight of a linear layer"):
        PeftModel.from_pretrained(model, folder)
    model = base()
    dense = model.bert.pooler.dense
    dense.weight = nn.Parameter(dense.weight.detach().as_subclass(Unknown), requires_grad=False)
    with pytest.raises(ValueError, match=r"pooler.dense.weight' is .*Nor is it the weight"):
        PeftModel.from_pretrained(model, folder)


def test_a_quantised_head_that_was_tied_is_refused(base, adapter):
    folder, _ = adapter("gpt2")
    model = base("stand-in", "gpt2")
    model.lm_head.weight = stand_in(model.lm_head.weight)
    with pytest.raises(ValueError, match=r"'lm_head.weight' is .* one parameter with another module's"):
        PeftModel.from_pretrained(model, folder)


def test_a_quantised_dense_copy_is_refused(base, adapter):
    folder, _ = adapter(modules_to_save=HEAD)
    model = base("stand-in")
    model.classifier.weight = stand_in(model.classifier.weight)
    with pytest.raises(
        ValueError, match=r"'classifier' is quantised, but the adapter keeps a dense copy.*skip_modules"
    ):
        PeftModel.from_pretrained(model, folder)
