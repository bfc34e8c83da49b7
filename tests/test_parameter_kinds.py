"""Every kind of parameter: trained as a dense reference would, swapped out bit for bit, saved and loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import transformers as hf
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from peft_dst import DSTConfig, DSTOptimizer
from peft_dst.core.reference import reference_step
from tests.models import BUILDERS, VOCABULARY, assert_same, logits, train, weights


class First(nn.Module):
    """The first of what a module returns; attention gets its input three times."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(*[x] * (3 if isinstance(self.inner, nn.MultiheadAttention) else 1))[0]


class Bare(nn.Module):
    """Parameters of the model itself, in lists and dictionaries, of no dimension, transposed, and empty."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.transposed = nn.Parameter(torch.randn(6, 8).t())
        self.strided = nn.Parameter(torch.randn(8, 12)[:, ::2])
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.listed = nn.ParameterList([torch.randn(8, 8), torch.randn(8)])
        self.named = nn.ParameterDict({"left": torch.randn(6, 8), "right": torch.randn(8)})

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.listed[0] + self.listed[1]
        return self.scale * torch.tanh(x @ (self.transposed + self.strided)) @ self.named["left"] * self.named["right"]


class Scaled(nn.Sequential):
    """A container that calls its children in turn, with a parameter of its own."""

    def __init__(self):
        super().__init__(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.scale = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


TOKENS = torch.arange(24).remainder(11).view(4, 6)
ROWS = torch.linspace(-1, 1, 32).view(4, 8).sin()
TIME = torch.linspace(-1, 1, 96).view(4, 8, 3).cos()
IMAGE = torch.linspace(-1, 1, 384).view(2, 4, 6, 8).cos()
VOLUME = torch.linspace(-1, 1, 512).view(2, 4, 4, 4, 4).cos()

KINDS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear, LayerNorm": (lambda: nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)), ROWS),
    "RMSNorm, PReLU": (lambda: nn.Sequential(nn.RMSNorm(8), nn.PReLU(8), nn.Linear(8, 4, bias=False)), ROWS),
    "BatchNorm": (lambda: nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)), ROWS),
    "GroupNorm, InstanceNorm": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)),
        IMAGE,
    ),
    "embedding": (lambda: nn.Sequential(nn.Embedding(12, 8, padding_idx=0), nn.Linear(8, 4)), TOKENS),
    "embedding bag": (lambda: nn.Sequential(nn.EmbeddingBag(12, 8), nn.Linear(8, 4)), TOKENS),
    "bilinear": (lambda: nn.Sequential(Pair(nn.Bilinear(8, 8, 5))), ROWS),
    "transformers' Conv1D": (lambda: nn.Sequential(Conv1D(16, 8), nn.Tanh(), Conv1D(4, 16)), ROWS),
    "conv 1d": (lambda: nn.Sequential(nn.Conv1d(8, 6, 2), nn.Tanh(), nn.ConvTranspose1d(6, 4, 2)), TIME),
    "conv 2d": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.Tanh(), nn.ConvTranspose2d(8, 4, 2, stride=2)), IMAGE),
    "conv 2d, channels last": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.Tanh(), nn.Conv2d(8, 4, 2)).to(memory_format=torch.channels_last),
        IMAGE.to(memory_format=torch.channels_last),
    ),
    "conv 2d, depthwise": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 4, 1)), IMAGE),
    "conv 3d": (lambda: nn.Sequential(nn.Conv3d(4, 4, 2), nn.Tanh(), nn.ConvTranspose3d(4, 2, 2)), VOLUME),
    "multi-head attention": (lambda: First(nn.MultiheadAttention(8, 2, bias=True, add_bias_kv=True)), ROWS),
    "multi-head attention, other widths": (lambda: First(nn.MultiheadAttention(8, 2, kdim=8, vdim=8)), ROWS),
    "LSTM": (lambda: First(nn.LSTM(3, 5, 2, bidirectional=True, batch_first=True)), TIME),
    "GRU": (lambda: First(nn.GRU(3, 5, 2)), TIME),
    "RNN cell": (lambda: nn.Sequential(nn.RNNCell(8, 6), nn.Linear(6, 3)), ROWS),
    "weight norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 6)), nn.Linear(6, 3)), ROWS),
    "spectral norm": (lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 6)), nn.Linear(6, 3)), ROWS),
    "orthogonal": (lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(8, 6)), nn.Linear(6, 3)), ROWS),
    "bare parameters": (Bare, ROWS),
    "a Sequential of its own": (Scaled, ROWS),
    "complex result": (lambda: nn.Sequential(nn.Linear(8, 6), Spectrum(), nn.Linear(4, 3)), ROWS),
}


class Pair(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x.flip(1))


class Spectrum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(x).abs()


def make(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, x = KINDS[kind]
    base = build()
    with torch.no_grad():
        for parameter in base.parameters():
            # No zero seeds, whose distance would be zero.
            parameter.add_(torch.randn_like(parameter) * 0.02 + 0.01)
    return base, x


def step(model: nn.Module, x: Tensor, number: int, optimizer: torch.optim.Optimizer) -> None:
    torch.manual_seed(number)
    output = model(x)
    (output - torch.randn_like(output)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


def copy_buffers(source: nn.Module, target: nn.Module) -> None:
    """Running statistics move in training and are no part of an adapter."""
    buffers = dict(source.named_buffers())
    for name, buffer in target.named_buffers():
        if "_sparse." not in name:
            buffer.copy_(buffers[name])


@pytest.mark.parametrize("how", ["hook", "DSTOptimizer", "static"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_parameter(kind, how, tmp_path):
    base, x = make(kind)
    fresh, dense = copy.deepcopy(base), copy.deepcopy(base)
    seed, modules = weights(base), [name for name, _ in base.named_modules()]
    model = get_peft_model(base, DSTConfig(epsilon=0.1, selection="random" if how == "static" else "dynamic"))
    constraint = model.constraint()
    assert {w.name for w in constraint.weights} == seed.keys()
    # The dense reference: the optimizer's full update, and the plain projection.
    silos = {silo.name: [w.name for w in silo.weights] for silo in constraint.silos}
    budgets = {silo.name: silo.budget for silo in constraint.silos}
    chosen = {w.name: w.indices.clone() for w in constraint.weights}
    optimizers = []
    for network in (model, dense):
        trained = [p for p in network.parameters() if p.requires_grad]
        adam = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.0)
        optimizers.append(adam)
    if how == "DSTOptimizer":
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizers[0] = DSTOptimizer(trained, torch.optim.AdamW, lr=0.05, weight_decay=0.0, kernels=False)
    for number in range(3):
        step(model, x, number, optimizers[0])
        step(dense, x, number, optimizers[1])
        if how == "static":
            parameters = {name: value.clone() for name, value in seed.items()}
            for name, at in chosen.items():
                flat = parameters[name].reshape(-1).clone()
                flat[at] = dense.get_parameter(name).detach().reshape(-1)[at]
                parameters[name] = flat.view(parameters[name].shape)
        else:
            parameters, _ = reference_step(seed, weights(dense), silos, budgets, "inverse_relative")
        with torch.no_grad():
            for name, value in parameters.items():
                dense.get_parameter(name).copy_(value)
        assert_same(weights(base), weights(dense))
    changed = sum(int((value != seed[name]).sum()) for name, value in weights(base).items())
    assert 0 < changed <= constraint.budget
    # Of a static subset some components have no gradient (an unused row of an embedding, a second bias).
    assert changed == constraint.budget or how == "static"
    tuned, expected = weights(base), output(model, x)
    assert torch.equal(expected, output(dense, x))
    # Swaps.
    with model.disable_adapter():
        assert_same(weights(base), seed)
    assert_same(weights(base), tuned)
    # On disk.
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        copy_buffers(base, loaded.get_base_model())
        assert torch.equal(output(loaded, x), expected)
        assert_same(weights(loaded.get_base_model()), tuned)
    # And gone.
    base = model.unload()
    assert_same(weights(base), seed)
    assert [name for name, _ in base.named_modules()] == modules
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert type(base) is type(fresh)


@pytest.mark.parametrize("how", ["hook", "DSTOptimizer", "released gradients", "SparseAdam"])
def test_sparse_gradients_of_embeddings(how):
    """The same as with dense ones, for optimizers that take them."""
    trained = []
    for sparse in (True, False):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Embedding(30, 8, sparse=sparse), nn.Flatten())
        seed = weights(base)
        model = get_peft_model(base, DSTConfig(epsilon=0.05))
        parameters = [p for p in model.parameters() if p.requires_grad]
        if how == "hook":
            optimizer = torch.optim.SGD(parameters, lr=0.1)
        elif how == "SparseAdam":
            optimizer = torch.optim.SparseAdam(parameters, lr=0.1) if sparse else torch.optim.Adam(parameters, lr=0.1)
        else:
            release = how == "released gradients"
            optimizer = DSTOptimizer(parameters, torch.optim.SGD, lr=0.1, release_gradients=release)
        for number in range(2):
            step(model, TOKENS, number, optimizer)
        changed = int((base[0].weight != seed["0.weight"]).sum())
        assert changed == model.constraint().budget == 12
        trained.append(base[0].weight.detach())
    assert torch.allclose(*trained)


def test_buffers_and_what_the_user_froze():
    """Running statistics move as in any training; frozen parameters are tuned, and frozen again afterwards."""
    base, x = make("BatchNorm")
    base.register_parameter("own", nn.Parameter(torch.ones(())))
    base[0].weight.requires_grad_(False)
    seed = weights(base)
    dense = copy.deepcopy(base)
    model = get_peft_model(base, DSTConfig(epsilon=0.1))
    assert base[0].weight.requires_grad
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    step(model, x, 0, optimizer)
    dense(x)
    for name, buffer in dense.named_buffers():
        assert torch.equal(buffer, base.get_buffer(name))
    assert not torch.equal(base[0].weight, seed["0.weight"])
    statistics = base[1].running_mean.clone()
    base = model.unload()
    assert_same(weights(base), seed)
    assert {name for name, p in base.named_parameters() if not p.requires_grad} == {"0.weight"}
    assert torch.equal(base[1].running_mean, statistics)


def test_a_list_with_parameters_of_its_own_says_what_may_not_be_called():
    class Layers(nn.ModuleList):
        def __init__(self):
            super().__init__([nn.Linear(8, 8)])
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, x):
            for layer in self:
                x = layer(x)
            return x * self.scale

    model = get_peft_model(nn.Sequential(Layers()), DSTConfig(epsilon=0.1))
    with pytest.raises(TypeError, match=r"'0' is a Layers with parameters of its own.*'_sparse'.*exclude_modules"):
        model(ROWS)
    model = get_peft_model(nn.Sequential(Layers()), DSTConfig(epsilon=0.1, target_modules=["0.0"]))
    model(ROWS)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda m: setattr(m, "phase", nn.Parameter(torch.zeros(4, dtype=torch.complex64))),
            "'phase' is torch.complex64",
        ),
        (lambda m: m.add_module("lazy", nn.LazyLinear(3)), "'lazy.weight' has no shape yet. Call the base model once"),
        (
            lambda m: setattr(
                m[0], "weight", nn.Parameter(m[0].weight.data.to(torch.float8_e4m3fn), requires_grad=False)
            ),
            "'0.weight' is Parameter of torch.float8_e4m3fn",
        ),
    ],
    ids=["complex", "lazy", "float8"],
)
def test_kinds_that_are_refused(change, match):
    base, _ = make("linear, LayerNorm")
    change(base)
    modules = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=match):
        get_peft_model(base, DSTConfig(epsilon=0.1))
    assert [name for name, _ in base.named_modules()] == modules
    # What is not tuned may be anything.
    get_peft_model(base, DSTConfig(epsilon=0.1, target_modules=["2"]))


# Models of transformers, with several adapters


def albert() -> nn.Module:
    """One layer, called three times."""
    config = hf.AlbertConfig(
        vocab_size=VOCABULARY, embedding_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=40, num_labels=3, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, classifier_dropout_prob=0.0,
    )  # fmt: skip
    return hf.AlbertForSequenceClassification(config)


def bart() -> nn.Module:
    """One embedding of encoder, decoder and head."""
    config = hf.BartConfig(
        vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=40, dropout=0.0,
        pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    return hf.BartForConditionalGeneration(config)


MODELS = {**BUILDERS, "albert": albert, "bart": bart}
# Which batch each is given.
BATCH = {"albert": "bert", "bart": "t5"}


# transformers makes a tuner anew for every adapter; PEFT saves targeted embeddings whole where it wraps them.
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(
    ("name", "options", "tuned"),
    [
        ("mixtral", {"target_parameters": ["experts.gate_up_proj"]}, "experts.gate_up_proj"),
        ("mixtral", {"target_parameters": ["experts.down_proj"], "target_modules": ["q_proj"]}, "q_proj"),
        ("qwen_moe", {"target_parameters": ["experts.gate_up_proj"]}, "experts.gate_up_proj"),
        ("qwen_moe", {"target_modules": ["mlp"]}, "shared_expert_gate"),
        ("albert", {}, "attention.query"),
        ("albert", {"target_modules": ["query"]}, "attention.query"),
        ("bart", {"target_modules": ["encoder.embed_tokens"]}, "model.shared"),
        ("bart", {"target_modules": ["lm_head"]}, "model.shared"),
        ("gpt2", {"target_modules": ["lm_head"]}, "transformer.wte"),
        ("t5", {"target_modules": ["decoder.embed_tokens"]}, "shared"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(name for names in value.values() for name in names),
)
def test_experts_and_shared_parameters(name, options, tuned, tmp_path):
    """Next to an adapter that tunes everything: swapped, saved, loaded by PEFT and by transformers, and removed."""
    torch.manual_seed(0)
    source, data = MODELS[name](), BATCH.get(name, name)
    source.save_pretrained(tmp_path / "base")

    def load() -> nn.Module:
        return type(source).from_pretrained(tmp_path / "base")

    base = load()
    seed = weights(base)
    model = get_peft_model(base, DSTConfig(epsilon=0.05, **options), "one")
    assert any(tuned in n for names in model.base_model.silos("one").values() for n in names)
    outputs = {}
    for adapter in ("one", "all"):
        if adapter == "all":
            model.add_adapter(adapter, DSTConfig(epsilon=0.05))
            model.set_adapter(adapter)
        train(model, data)
        now, constraint = weights(base), model.base_model.constraint(adapter)
        assert 0 < sum(int((now[n] != seed[n]).sum()) for n in seed) <= constraint.budget
        outputs[adapter] = logits(model, data)
    model.save_pretrained(tmp_path)
    folders = {adapter: tmp_path / adapter for adapter in outputs}
    for low_cpu_mem_usage in (False, True):
        low = {"low_cpu_mem_usage": low_cpu_mem_usage}
        loaded = PeftModel.from_pretrained(load(), folders["one"], adapter_name="one", **low)
        loaded.load_adapter(folders["all"], "all", **low)
        for adapter, expected in outputs.items():
            loaded.set_adapter(adapter)
            assert torch.equal(logits(loaded, data), expected)
    native = load()
    for adapter, folder in folders.items():
        native.load_adapter(folder, adapter)
        native.set_adapter(adapter)
        assert torch.equal(logits(native, data), outputs[adapter])
    for adapter, expected in outputs.items():
        model.set_adapter(adapter)
        assert torch.equal(logits(model, data), expected)
    with model.disable_adapter():
        assert_same(weights(base), seed)
    assert_same(weights(model.unload()), seed)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_output_head_is_no_tuner_layer(name, build):
    """TRL refuses heads that are; ours is what it was, with a marker beside its weight."""
    model = get_peft_model(build(name), DSTConfig(epsilon=0.05, target_modules=["lm_head"]))
    head = model.get_base_model().lm_head
    assert type(head) is nn.Linear
    assert not isinstance(head, BaseTunerLayer)
    assert model.get_output_embeddings() is head


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_dense_copies_of_tied_embeddings(name, tmp_path, build):
    """Both become dense, are no longer tied (as with PEFT's other methods), and nothing of them is in the subset."""
    embedding = {"gpt2": "wte", "t5": "shared"}[name]
    model = get_peft_model(build(name), DSTConfig(epsilon=0.05, modules_to_save=["lm_head", embedding]))
    assert not any(part in n for names in model.silos().values() for n in names for part in ("lm_head", embedding))
    train(model, name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(name), tmp_path)
    assert torch.equal(logits(loaded, name), logits(model, name))


def test_trainable_token_indices_are_not_an_option():
    config = DSTConfig()
    # TRL asks, and sets it if a chat template adds tokens.
    assert config.trainable_token_indices is None
    assert "trainable_token_indices" not in config.to_dict()
    with pytest.raises(ValueError, match=r"trainable_token_indices=.*modules_to_save=\['embed_tokens', 'lm_head'\]"):
        config.trainable_token_indices = {"embed_tokens": [3]}
