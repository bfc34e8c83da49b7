"""Mixed batches, module by module: norms, caches, heads that share tensors, modules that run once a delta."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from peft_dst import DSTConfig
from peft_dst.delta import DeltaError, SparseDelta, SparseTensor
from peft_dst.mixing import batch as mixing_batch
from peft_dst.serving import DeltaPool
from tests.models import BUILDERS, VOCABULARY, train
from tests.serving.mixtures import NAMES, one_by_one


class Shifted(nn.Module):
    """Called a norm, but it uses its weight in a way that none does: a mean over everything."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * self.weight.mean()


class FakeNorm(Shifted):
    pass


class RealNorm(Shifted):
    calls = 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        type(self).calls += 1
        return hidden * self.weight


@pytest.mark.parametrize("kind", [FakeNorm, RealNorm])
def test_norms_run_once_where_that_is_the_same(kind, tmp_path, monkeypatch):
    model = nn.Sequential(nn.Linear(8, 8), kind()).double().eval()
    with DeltaPool(model) as pool:
        for i in range(3):
            values = torch.rand(3, dtype=torch.float64) + i
            pool.add(f"task{i}", SparseDelta({"1.weight": SparseTensor((8,), torch.tensor([0, 3, 5]), values)}))
        hidden = torch.randn(6, 4, 8, dtype=torch.float64)
        wanted = []
        for name, row in zip(NAMES, hidden, strict=True):
            with torch.no_grad(), pool.use(name):
                wanted.append(model(row[None]))
        for times in (4, 1, 1):
            RealNorm.calls = 0
            with pool.mix(NAMES):
                assert torch.equal(model(hidden), torch.cat(wanted))
            if kind is RealNorm and times == 1:
                assert RealNorm.calls == 1
        assert mixing_batch._AT_ONCE[model] == {"1": kind is RealNorm}


# Small subsets, which have something in other modules each


def changed(base: nn.Module, *names: str) -> SparseDelta:
    """A delta of every second entry of these parameters."""
    seeds = {name: base.get_parameter(name).detach() for name in names}
    tuned = {name: seed.clone() for name, seed in seeds.items()}
    for tensor in tuned.values():
        tensor.view(-1)[::2] += torch.randn(tensor.view(-1)[::2].shape, dtype=tensor.dtype)
    return SparseDelta.between(seeds, tuned)


LATE = (
    "model.layers.0.post_attention_layernorm.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
)


@pytest.fixture
def late():
    """A tiny Llama; deltas that change what comes after its first attention, and deltas of its embeddings."""
    base = BUILDERS["llama"]().double().eval()
    deltas = {f"late{i}": changed(base, *LATE[i:]) for i in range(2)} | {
        f"early{i}": changed(base, "model.embed_tokens.weight") for i in range(2)
    }
    plain = {None: copy.deepcopy(base)}
    for name, delta in deltas.items():
        plain[name] = copy.deepcopy(base)
        delta.apply(plain[name])
    with DeltaPool(base) as pool:
        for name, delta in deltas.items():
            pool.add(name, delta)
        yield pool, plain


def test_the_first_mixed_call_goes_on_with_a_cache(late):
    """Where samples are is found out when the first layer has added to the cache, and the second has not."""
    pool, plain = late
    names = ["late0", "late1", None]
    ids = torch.randint(3, 40, (3, 6))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    cache, wanted = DynamicCache(), []
    for i, name in enumerate(names):
        of_one = {"input_ids": ids[i : i + 1], "attention_mask": mask[i : i + 1]}
        with torch.no_grad():
            wanted.append(plain[name](**of_one).logits[:, 5:])
            own = plain[name](**{key: tensor[:, :5] for key, tensor in of_one.items()}).past_key_values
        for number, layer in enumerate(own.layers):
            cache.update(layer.keys, layer.values, number)
    for layer in cache.layers:
        # One below the other, where they came one after the other.
        layer.keys, layer.values = (torch.cat(kept.split(5, 2)) for kept in (layer.keys, layer.values))
    with pool.mix(names) as model, torch.no_grad():
        found = model(input_ids=ids[:, 5:], attention_mask=mask, past_key_values=cache).logits
    wanted = torch.cat(wanted)
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-11)
    assert len({float(row.sum()) for row in found}) == 3


def test_one_trial_is_enough(late, monkeypatch):
    """Also for subsets that come later and change other modules."""
    tried = []
    original = mixing_batch.Batch._try
    monkeypatch.setattr(mixing_batch.Batch, "_try", lambda self: (tried.append(self.rows), original(self))[1])
    pool, plain = late
    for count, names in enumerate((["early0", "early1"], ["late0", "late1", "early0"]), start=2):
        ids = torch.randint(3, 40, (count, 4))
        with pool.mix(names) as model, torch.no_grad():
            found = model(input_ids=ids).logits
        wanted = one_by_one(plain, names, {"input_ids": ids})
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-11)
    assert tried == [2]


CONFIG = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
TIED = {
    "bert": lambda: BertForMaskedLM(BertConfig(**CONFIG)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**CONFIG)),
    "albert": lambda: AlbertForMaskedLM(AlbertConfig(**CONFIG, embedding_size=8)),
}


@pytest.mark.parametrize("name", TIED)
def test_a_bias_that_a_head_shares_with_its_own_linear_layer_counts_once(name):
    """The head runs once a subset with its values written in; its layer is not to correct them again."""
    torch.manual_seed(0)
    base = TIED[name]().double().eval()
    shared = [n for n, p in base.named_parameters(remove_duplicate=False) if n.endswith("bias") and p.shape == (40,)]
    assert len(shared) == 2
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    deltas = {
        "bias": {n: p + torch.randn_like(p) * (n in shared) for n, p in before.items()},
        "all": {n: p + torch.randn_like(p) * (torch.rand_like(p) < 0.1) for n, p in before.items()},
    }
    plain = {None: copy.deepcopy(base)}
    ids = torch.randint(3, 40, (4, 7))
    with DeltaPool(base) as pool:
        for task, after in deltas.items():
            pool.add(task, delta := SparseDelta.between(before, after))
            delta.apply(twin := copy.deepcopy(plain[None]))
            plain[task] = twin
        names = ["bias", None, "all", "bias"]
        with pool.mix(names) as model:
            found = model(input_ids=ids).logits
    assert torch.allclose(found, one_by_one(plain, names, {"input_ids": ids}), rtol=1e-9, atol=1e-11)
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters())


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_a_whole_tensor_in_the_place_of_one_of_two_that_are_tied(module, tmp_path):
    torch.manual_seed(0)
    base = (
        LlamaForCausalLM(LlamaConfig(**CONFIG | {"vocab_size": VOCABULARY}, tie_word_embeddings=True)).double().eval()
    )
    model = get_peft_model(copy.deepcopy(base), DSTConfig(epsilon=0.05, modules_to_save=[module]))
    train(model, "llama")
    model.save_pretrained(tmp_path / "task")
    ids = torch.randint(3, 40, (2, 7))
    with torch.no_grad():
        seed = base(input_ids=ids).logits
        wanted = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "task").eval()(input_ids=ids).logits
    with DeltaPool(base) as pool, torch.no_grad():
        pool.add_folder(tmp_path)
        with pool.use("task"):
            assert torch.allclose(base(input_ids=ids).logits, wanted, rtol=1e-9)
        with pool.mix(["task", None]):
            found = base(input_ids=ids).logits
        assert torch.allclose(found[:1], wanted[:1], rtol=1e-9)
        assert torch.allclose(found[1:], seed[1:], rtol=1e-9)
        with pool.use(None):
            assert torch.equal(base(input_ids=ids).logits, seed)
    assert base.lm_head.weight is base.model.embed_tokens.weight


def test_a_delta_is_read_while_another_stands_in_a_module(tmp_path):
    """A convolution runs with a delta's values written in; the seed is not read meanwhile."""
    torch.manual_seed(0)

    class Convolution(nn.Conv1d):
        def forward(self, input):
            if not torch.equal(self.weight, before["0.weight"]):
                threads.append(threading.Thread(target=read))
                threads[-1].start()
                threads[-1].join(0.2)
            return super().forward(input)

    base = nn.Sequential(Convolution(4, 8, 3), nn.Flatten(), nn.Linear(8, 2)).eval()
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    for task in ("one", "two", "new"):
        after = {n: p + torch.randn_like(p) for n, p in before.items()}
        SparseDelta.between(before, after).described().save(tmp_path / task)
    errors, threads = [], []

    def read() -> None:
        try:
            pool.verify(SparseDelta.load(tmp_path / "new"))
        except DeltaError as error:
            errors.append(error)

    with DeltaPool(base) as pool:
        pool.add_folder(tmp_path)
        with pool.mix(["one", "two"]) as model:
            model(torch.randn(2, 4, 3))
        for thread in threads:
            thread.join(60)
    assert len(threads) == 2
    assert not errors
