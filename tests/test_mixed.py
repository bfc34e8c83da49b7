"""Several adapters in one batch, against one sample at a time with its adapter active."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from peft import get_peft_model
from torch import Tensor, nn

from peft_dst import DSTConfig, rescale_adapter_scale
from tests.models import assert_same, batch, train, tuned_model, weights


NAMES = ["a", "__base__", "b", "a"]


def inputs(name: str) -> dict[str, Tensor]:
    """The first batch without labels, in float64 where it is floating."""
    made = batch(name)
    labels = made.pop("labels")
    if name == "t5":
        made["decoder_input_ids"] = labels
    return {key: tensor.double() if tensor.is_floating_point() else tensor for key, tensor in made.items()}


def double(build):
    return lambda name: build(name).double()


def with_adapters(base: nn.Module, *adapters: str, **options) -> nn.Module:
    """A model with adapters that differ from the seed at random, everywhere."""
    options = {"epsilon": 0.2, "init_weights": False, **options}
    model = get_peft_model(base, DSTConfig(**options), adapters[0])
    for adapter in adapters[1:]:
        model.add_adapter(adapter, DSTConfig(**options))
    return model.eval()


def one_by_one(model: nn.Module, names: list[str], call) -> Tensor:
    """What `call(i)` makes of each sample while its adapter is the active one. The plain twin."""
    outputs = []
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                outputs.append(call(i))
        else:
            model.set_adapter(name, inference_mode=True)
            outputs.append(call(i))
    return torch.cat(outputs)


def check(model: nn.Module, names: list[str], forward, **tensors: Tensor) -> None:
    """A mixed batch equals one sample at a time, and leaves nothing behind."""
    with torch.no_grad():
        wanted = one_by_one(model, names, lambda i: forward(**{k: t[i : i + 1] for k, t in tensors.items()}))
        alike = [
            one_by_one(model, [name] * len(names), lambda i: forward(**{k: t[i : i + 1] for k, t in tensors.items()}))
            for name in set(names)
        ]
        assert not any(torch.allclose(wanted, other, rtol=1e-4) for other in alike), "the adapters make no difference"
        before, trace = weights(model), traces(model)
        found = forward(adapter_names=names, **tensors)
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-11)
    assert_same(before, weights(model))
    assert traces(model) == trace


def traces(model: nn.Module) -> list[object]:
    """Everything about a model that the mode changes."""
    return [
        (len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m)), [p.requires_grad for p in m.parameters()])
        for m in model.modules()
    ]


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "roberta", "t5", "vit"])
@pytest.mark.parametrize("names", [NAMES, ["b", "b", "a", "a"]], ids=["interleaved", "grouped"])
def test_equals_one_sample_at_a_time(build, name, names):
    model, _ = tuned_model(double(build), name, ("a", "b"), epsilon=0.1) if name != "vit" else (None, None)
    if model is None:
        model = with_adapters(build(name).double(), "a", "b")
    model.eval()
    check(model, names, lambda **kwargs: model(**kwargs).logits, **inputs(name))


class Net(nn.Module):
    """Convolutions and norms of every kind, an embedding that is scaled, and parameters of the model's own."""

    def __init__(self):
        super().__init__()
        self.conv, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=2)
        self.batch_norm, self.group_norm = nn.BatchNorm2d(8), nn.GroupNorm(2, 8)
        self.rms, self.linear = nn.RMSNorm(8), nn.Linear(8, 5)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.labels, self.scale = nn.Embedding(9, 8, padding_idx=0), nn.Parameter(torch.randn(8))
        self.register_buffer("running", torch.zeros(()))

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        hidden = self.group_norm(self.deep(self.batch_norm(self.conv(pixels)).relu())).flatten(2).transpose(1, 2)
        hidden = hidden + self.labels(ids)
        hidden = hidden + self.attention(hidden, hidden, hidden)[0]
        return self.linear(self.rms(hidden).mean(1) * self.scale)


def test_convolutions_norms_attention_and_parameters_of_the_model_itself():
    model = with_adapters(Net().double(), "a", "b")
    model(torch.randn(4, 3, 6, 6, dtype=torch.float64), torch.randint(9, (4, 1)))
    check(model, NAMES, model, pixels=torch.randn(4, 3, 6, 6, dtype=torch.float64), ids=torch.randint(9, (4, 1)))


def test_norms_and_convolutions_are_exact():
    model = with_adapters(nn.Sequential(nn.Conv1d(3, 4, 2), nn.LayerNorm(5)), "a", "b")
    pixels = torch.randn(4, 3, 6)
    with torch.no_grad():
        found = model(pixels, adapter_names=["a", "b", "b", "a"])
        model.set_adapter("a")
        assert torch.equal(found[[0, 3]], model(pixels[[0, 3]]))
        model.set_adapter("b")
        assert torch.equal(found[1:3], model(pixels[1:3]))


@pytest.mark.parametrize("fused", [True, False])
def test_torch_encoder_layers_whose_fused_form_calls_no_child(fused):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    base = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False) if fused else nn.Sequential(layer)
    model = with_adapters(base, "a", "b")
    hidden = torch.randn(4, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        wanted = one_by_one(model, NAMES, lambda i: model(hidden[i : i + 1]))
        assert torch.allclose(model(hidden, adapter_names=NAMES), wanted)


def test_embeddings_scaled_in_a_subclass_and_shared():
    torch.manual_seed(0)
    config = hf.BartConfig(
        vocab_size=31, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=20, scale_embedding=True, dropout=0.0,
    )  # fmt: skip
    model = with_adapters(hf.BartForConditionalGeneration(config).double(), "a", "b")
    assert model.get_base_model().lm_head.weight is model.get_base_model().get_input_embeddings().weight
    tokens = torch.randint(3, 31, (4, 6))
    check(model, NAMES, lambda **kwargs: model(**kwargs).logits, input_ids=tokens, decoder_input_ids=tokens.flip(1))


def test_embeddings_with_max_norm():
    """Looking up shortens rows in place: each adapter's own, and none that another reads."""
    model = with_adapters(nn.Sequential(nn.Embedding(9, 4, max_norm=1.0, dtype=torch.float64)), "a", "b")
    tokens = torch.randint(9, (2, 3))
    wanted = []
    for i, name in enumerate("ab"):
        fresh = copy.deepcopy(model)
        fresh.set_adapter(name)
        wanted.append(fresh(tokens[i : i + 1]))
    before = weights(model)
    assert torch.equal(model(tokens, adapter_names=["a", "b"]), torch.cat(wanted))
    assert_same(before, weights(model))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["gpt2", "t5", "llama"])
def test_generate(build, name, beams):
    model = with_adapters(build(name).double(), "a", "b")
    tokens = inputs(name)["input_ids"]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(tokens)

    def alone(i):
        return model.generate(input_ids=tokens[i : i + 1], **{**options, "attention_mask": torch.ones(1, 7).long()})

    wanted = one_by_one(model, NAMES, alone)
    before = weights(model)
    assert torch.equal(model.generate(input_ids=tokens, adapter_names=NAMES, **options), wanted)
    assert_same(before, weights(model))


def test_one_adapter_for_all_is_that_adapter_bit_for_bit(build):
    model, logits = tuned_model(build, "qwen_moe", ("a", "b"), epsilon=0.1)
    model.eval()
    model.set_adapter("b")
    tokens = batch("qwen_moe")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens, adapter_names=["a"] * 4).logits, logits["a"])
        assert torch.equal(model(input_ids=tokens).logits, logits["b"])
        base = model(input_ids=tokens, adapter_names=["__base__"] * 4).logits
        with model.disable_adapter():
            assert torch.equal(model(input_ids=tokens).logits, base)
            # Names choose among adapters that are enabled, as with PEFT's LoRA.
            assert torch.equal(model(input_ids=tokens, adapter_names=["a"] * 4).logits, base)


@pytest.mark.parametrize("saved", [["classifier"], ["pooler", "classifier"]])
def test_dense_copies_of_each_adapter(build, saved):
    model, _ = tuned_model(double(build), "bert", ("a", "b"), epsilon=0.1, modules_to_save=saved)
    model.eval()
    check(model, NAMES, lambda **kwargs: model(**kwargs).logits, **inputs("bert"))


def test_copies_of_different_width_are_refused(build):
    model, _ = tuned_model(build, "bert", ("a", "b"), modules_to_save=["classifier"])
    model.eval()
    model.base_model.model.classifier.modules_to_save["b"] = nn.Linear(16, 5)
    with pytest.raises(ValueError, match=r"'classifier' .* returns tensors of shapes \(2, 3\), \(2, 5\)"):
        model(**inputs("bert"), adapter_names=["a", "a", "b", "b"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(build, dtype, autocast):
    model, _ = tuned_model(build, "llama", ("a", "b"), epsilon=0.1)
    model.eval()
    tokens = batch("llama")["input_ids"]
    with torch.no_grad():
        exact = one_by_one(model, NAMES, lambda i: model(input_ids=tokens[i : i + 1]).logits)
        if not autocast:
            model = model.to(dtype)
        with torch.autocast("cpu", dtype, enabled=autocast):
            wanted = one_by_one(model, NAMES, lambda i: model(input_ids=tokens[i : i + 1]).logits)
            found = model(input_ids=tokens, adapter_names=NAMES).logits
    assert found.dtype == wanted.dtype
    # No further from the exact result than rounding takes the ordinary forward.
    assert (found - exact).abs().max() <= 2 * (wanted - exact).abs().max()


def test_no_gradients_are_recorded(build):
    """By the time of a backward pass the weights that it needs are gone: better none than wrong ones."""
    model, _ = tuned_model(build, "llama", ("a", "b"))
    model.eval()
    embeddings = torch.randn(4, 5, 16, requires_grad=True)
    assert model(inputs_embeds=embeddings).logits.requires_grad
    for names in (NAMES, ["a"] * 4):
        assert not model(inputs_embeds=embeddings, adapter_names=names).logits.requires_grad
    assert model(inputs_embeds=embeddings).logits.requires_grad


def test_a_forward_that_raises_leaves_nothing_behind(build):
    model = with_adapters(build("bert"), "a", "b")
    before, trace = weights(model), traces(model)
    model.get_base_model().classifier.register_forward_pre_hook(lambda *_: 1 / 0)
    trace = traces(model)
    with pytest.raises(ZeroDivisionError):
        model(**inputs("bert"), adapter_names=NAMES)
    assert_same(before, weights(model))
    assert traces(model) == trace


def test_training_goes_on_as_if_nothing_had_been(build):
    """In evaluation mode between two steps, with the adapter that is being trained."""
    model, _ = tuned_model(build, "bert", ("a", "b"))
    other = copy.deepcopy(model)
    other.eval()
    other(**inputs("bert"), adapter_names=NAMES)
    other.train()
    for one in (model, other):
        train(one, "bert", first=50)
    assert_same(weights(model), weights(other))


class Reader(nn.Module):
    """Reads a child's weight without calling the child."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, hidden: Tensor) -> Tensor:
        assert self.inner.weight.dtype == hidden.dtype
        return hidden @ self.inner.weight.t()


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.positions = nn.Embedding(4, 4)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.positions(torch.arange(hidden.shape[1]))


REFUSED = {
    "reads": (Reader(), r"a parameter of 'inner' \(Linear\) is read without calling that module"),
    "positions": (Positions(), r"'positions' \(Embedding\) was given an input of shape \(4,\)"),
    "flattened": (nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 4)), r"'1' \(Linear\) was given an input of shape \(16, 4"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_told_apart_is_refused_by_name(case):
    base, message = REFUSED[case]
    model = with_adapters(copy.deepcopy(base), "a", "b")
    before = weights(model)
    hidden = torch.randn(4, 4, 4)
    with pytest.raises((ValueError, NotImplementedError), match=message):
        model(hidden, adapter_names=NAMES)
    assert_same(before, weights(model))


@pytest.mark.parametrize("shape", [(3, 8), (3, 3, 8)], ids=["without batches", "batches second"])
def test_attention_without_batches_first_is_refused(shape):
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    model = with_adapters(Attending(), "a", "b")
    with pytest.raises(NotImplementedError, match=r"'attention' .*first dimension is not the sample.*batch_first=True"):
        model(torch.randn(shape), adapter_names=["a", "b", "b"])


@pytest.mark.parametrize("names", [["__base__"] * 5, ["a"] * 5, ["a", "b"]])
def test_as_many_names_as_samples(names):
    model = with_adapters(nn.Sequential(nn.Linear(4, 2)), "a", "b")
    with pytest.raises(ValueError, match="should be the same as the number of inputs, but got"):
        model(torch.randn(3, 4), adapter_names=names)


def test_experts_are_refused_by_name(build):
    model = with_adapters(build("mixtral"), "a", "b")
    with pytest.raises(ValueError, match=r"mlp.gate' \(MixtralTopKRouter\) was given an input of shape \(28, 16\)"):
        model(**inputs("mixtral"), adapter_names=NAMES)


class Cached(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, hidden: Tensor, cache: object) -> Tensor:
        return hidden * self.scale


def test_a_cache_cannot_be_divided():
    model = with_adapters(nn.ModuleDict({"attention": Cached()}), "a", "b")
    model.get_base_model().forward = lambda hidden, cache: model.get_base_model()["attention"](hidden, cache)
    with pytest.raises(NotImplementedError, match=r"'attention' \(Cached\).* was given a DynamicCache"):
        model(torch.ones(2, 4), hf.DynamicCache(), adapter_names=["a", "b"])


def test_bad_states_and_names_are_refused(build):
    model = with_adapters(build("bert"), "a", "b")
    tokens = inputs("bert")
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): c, d\. There are a, b\."):
        model(**tokens, adapter_names=["a", "d", "c", "b"])
    with pytest.raises(ValueError, match="should be the same as the number of inputs, but got 3 names"):
        model(**tokens, adapter_names=["a", "b", "b"])
    with pytest.raises(ValueError, match="training mode"):
        model.train()(**tokens, adapter_names=NAMES)
    model.eval().merge_adapter(["a"])
    with pytest.raises(ValueError, match="merged adapters, please call `unmerge_adapter` first"):
        model(**tokens, adapter_names=NAMES)


@pytest.mark.parametrize("part", ["base", "layers"])
def test_what_is_compiled_runs_uncompiled(build, part):
    torch.compiler.reset()
    model = with_adapters(build("llama"), "a", "b")
    tokens = batch("llama")["input_ids"]
    with torch.no_grad():
        wanted = model(input_ids=tokens, adapter_names=NAMES).logits
        model.set_adapter("a")
        alone = model(input_ids=tokens).logits
        base = model.get_base_model()
        for module in [base] if part == "base" else base.model.layers:
            module.compile(backend="eager")
        assert torch.equal(model(input_ids=tokens).logits, alone)
        assert torch.equal(model(input_ids=tokens, adapter_names=NAMES).logits, wanted)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert torch.equal(model(input_ids=tokens).logits, alone)
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["bert", "linear"])
def test_a_compiled_peft_model_is_refused(build, name):
    torch.compiler.reset()
    base, given = (
        (build("bert"), inputs("bert")["input_ids"][:2]) if name == "bert" else (nn.Linear(4, 4), torch.ones(2, 4))
    )
    model = with_adapters(nn.Sequential(base), "a", "b")
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"Give them to the PeftModel itself; its base may be compiled"):
        torch.compile(model, backend="eager")(given, adapter_names=["a", "b"])
    assert_same(before, weights(model))
    torch.compiler.reset()


def test_rescaled_adapters_are_rescaled_in_a_mixed_batch(build):
    model = with_adapters(build("bert").double(), "a", "b")
    with rescale_adapter_scale(model, 0.5):
        check(model, NAMES, lambda **kwargs: model(**kwargs).logits, **inputs("bert"))
