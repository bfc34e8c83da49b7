"""Unusual uses and accidents: shared parameters, second wraps, interrupted steps. The seed is never lost."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from peft_dst import DSTConfig, DSTOptimizer
from peft_dst.core import SparseWeight
from peft_dst.core import choice as choice_module
from peft_dst.core import constraint as constraint_module
from tests.models import assert_same, bert, logits, loss, train, tuned_model, weights


def test_merging_one_adapter_leaves_the_others_out(build):
    base = build("bert")
    seed = weights(base)
    model = get_peft_model(base, DSTConfig(epsilon=0.05, target_modules=["attention"]), "a")
    train(model, "bert")
    model.add_adapter("b", DSTConfig(epsilon=0.05, target_modules=["intermediate"]))
    model.set_adapter("b")
    train(model, "bert")
    tuned = weights(base)
    model.set_adapter("a")
    with pytest.raises(ValueError, match="adapter 'typo' does not exist; there are a, b"):
        model.merge_adapter(["typo"])
    with pytest.raises(ValueError, match="adapter 'typo' does not exist"):
        model.merge_and_unload(adapter_names=["typo"])
    model.merge_adapter(["b"])
    assert_same(weights(base), tuned)
    model.unmerge_adapter()
    assert_same(weights(model.merge_and_unload(adapter_names=["b"])), tuned)
    assert any(not torch.equal(tuned[n], seed[n]) for n in seed if "intermediate" in n)


def test_merging_for_good_while_disabled_merges(build):
    model, outputs = tuned_model(build)
    with model.disable_adapter():
        merged = model.base_model.merge_and_unload()
    assert torch.equal(logits(merged, "bert"), outputs["default"])


def test_wrapping_again_starts_anew(build):
    """A notebook's cell run twice."""
    base = build("bert")
    seed = weights(base)
    model = get_peft_model(base, DSTConfig(epsilon=0.05))
    train(model, "bert")
    with pytest.warns(UserWarning, match=r"second time|Already found"):
        model = get_peft_model(base, DSTConfig(epsilon=0.01, target_modules=["query"]))
    assert_same(weights(base), seed)
    assert {n for n, p in base.named_parameters() if p.requires_grad} == {n for n in seed if "query" in n}
    train(model, "bert")
    now = weights(base)
    assert sum(int((now[n] != seed[n]).sum()) for n in seed) == model.constraint().budget
    assert_same(weights(model.unload()), seed)


def test_a_merged_or_deleted_adapter_no_longer_constrains(build):
    model, _ = tuned_model(build)
    constraint = model.constraint()
    merged = model.merge_and_unload()
    assert all(p.requires_grad for p in merged.parameters())
    # Nothing of ours is in it, for who saves it whole.
    assert b"peft_dst" not in pickle.dumps(merged)
    before = weights(merged)
    train(merged, "bert", steps=1)
    assert sum(int((p != before[n]).sum()) for n, p in weights(merged).items()) > 10 * constraint.budget


@pytest.mark.parametrize("back", ["a", "b"])
def test_an_interrupted_switch_is_made_up_for_by_the_next(back, build, monkeypatch):
    """Ctrl-C, or memory that ran out, between two weights of a layer."""
    base = build("bert")
    seed = weights(base)
    model = get_peft_model(base, DSTConfig(epsilon=0.05), "a")
    train(model, "bert")
    tuned = {"a": weights(base)}
    model.add_adapter("b", DSTConfig(epsilon=0.2))
    model.set_adapter("b")
    train(model, "bert")
    tuned["b"] = weights(base)
    model.set_adapter("a")
    apply = SparseWeight.apply

    def interrupted(weight, *args):
        if weight.name == "bert.encoder.layer.0.output.dense.bias":
            raise KeyboardInterrupt
        apply(weight, *args)

    with monkeypatch.context() as patch:
        patch.setattr(SparseWeight, "apply", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.set_adapter("b")
    model.set_adapter(back)
    assert_same(weights(base), tuned[back])
    with model.disable_adapter():
        assert_same(weights(base), seed)


@pytest.mark.parametrize("make", [torch.optim.SGD, functools.partial(DSTOptimizer, optimizer_cls=torch.optim.SGD)])
def test_gradients_from_before_a_switch_are_not_stepped(make, build):
    """The weights that they belong to are the seed now."""
    model = get_peft_model(build("bert"), DSTConfig(epsilon=0.02, target_modules=["query"]))
    optimizer = make([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.add_adapter("b", DSTConfig(epsilon=0.02, target_modules=["key"]))
    seed = weights(model.get_base_model())
    loss(model, "bert").backward()
    model.set_adapter("b")
    with pytest.raises(RuntimeError, match=r"query\.weight', whose adapter 'default' is not active.*zero_grad"):
        optimizer.step()
    assert_same(weights(model.get_base_model()), seed)
    optimizer.zero_grad()
    optimizer.step()


def test_a_state_dict_of_other_shapes_leaves_the_seed(build):
    """What does not fit keeps its adapter and its seed: torch loads none of it, and raises at the end."""
    seed = weights(build("bert"))
    model, _ = tuned_model(build)
    base = model.get_base_model()
    before = weights(base)
    name = "bert.embeddings.word_embeddings.weight"
    with pytest.raises(RuntimeError, match="size mismatch"):
        base.bert.embeddings.word_embeddings.load_state_dict({"weight": torch.zeros(7, 16)}, strict=False)
    assert torch.equal(weights(base)[name], before[name])
    with model.disable_adapter():
        assert torch.equal(weights(base)[name], seed[name])
    assert not torch.equal(before[name], seed[name])


def test_freezing_after_the_backward_pass(build):
    """Torch steps whatever has a gradient; so must the constraint."""
    base = build("bert")
    seed = weights(base)
    model = get_peft_model(base, DSTConfig(epsilon=0.05))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss(model, "bert").backward()
    for parameter in base.bert.encoder.parameters():
        parameter.requires_grad_(False)
    optimizer.step()
    now = weights(base)
    assert 0 < sum(int((now[n] != seed[n]).sum()) for n in seed) <= model.constraint().budget


def test_training_beside_another_active_adapter_is_kept(build):
    base = build("bert")
    model = get_peft_model(base, DSTConfig(epsilon=0.5, target_parameters=["key.weight"]), "a")
    model.add_adapter("b", DSTConfig(epsilon=0.5, target_parameters=["key.bias"]))
    model.base_model.set_adapter(["a", "b"])
    train(model, "bert")
    tuned = weights(base)
    with model.disable_adapter():
        pass
    assert_same(weights(base), tuned)


def test_exclusion_reaches_a_shared_parameter_under_any_name(build):
    for options in ({"exclude_modules": ["wte"]}, {"exclude_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}):
        base = build("gpt2")
        with warnings.catch_warnings():
            # PEFT remarks that a dense copy of a tied head is no longer tied.
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
            model = get_peft_model(base, DSTConfig(epsilon=0.05, **options))
        assert not any("wte" in n or "lm_head" in n for names in model.silos().values() for n in names)
        assert not base.transformer.wte.weight.requires_grad
    model = get_peft_model(build("t5"), DSTConfig(epsilon=0.05, exclude_modules=["shared"]))
    assert not any("embed_tokens" in n or "shared" in n for names in model.silos().values() for n in names)


def test_heads_whose_names_end_alike():
    """PEFT keeps a dense copy of every module whose name ends in one of modules_to_save."""
    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=61, dim=16, n_layers=1, n_heads=2, hidden_dim=32, num_labels=3)
    model = get_peft_model(DistilBertForSequenceClassification(config), DSTConfig(epsilon=0.01, task_type="SEQ_CLS"))
    assert not any("classifier" in n for names in model.silos().values() for n in names)
    train(model, "bert")


def test_parameters_with_names_of_container_methods(tmp_path):
    class Memory(nn.Module):
        def __init__(self):
            super().__init__()
            self.store = nn.Module()
            self.store.keys = nn.Parameter(torch.randn(8, 8))
            self.store.values = nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            return (x @ self.store.keys @ self.store.values).square().sum()

    base = Memory()
    seed = copy.deepcopy(base)
    model = get_peft_model(base, DSTConfig(epsilon=0.1))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(2, 8)).backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(seed, tmp_path)
    assert_same(weights(loaded.get_base_model()), weights(base))


def test_a_base_without_memory_can_be_wrapped():
    with torch.device("meta"):
        base = bert()
    model = get_peft_model(base, DSTConfig(epsilon=0.01))
    assert model.constraint().budget == 65


def test_interrupted_steps_are_undone(build, tmp_path):
    """Ctrl-C or a closure that fails in the middle of a step: the seed and the last good weights are kept."""

    class Half(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"][::2]:
                    parameter.data.add_(1.0)
            raise KeyboardInterrupt

    base = build("bert")
    seed = weights(base)
    model = get_peft_model(base, DSTConfig(epsilon=0.05))
    train(model, "bert")
    tuned = weights(base)
    half = Half([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def interrupt():
        with pytest.raises(KeyboardInterrupt):
            half.step()
        assert not torch.equal(
            weights(base)["bert.embeddings.word_embeddings.weight"], tuned["bert.embeddings.word_embeddings.weight"]
        )

    interrupt()
    model.save_pretrained(tmp_path)
    assert_same(weights(base), tuned)
    interrupt()
    model.set_adapter("default")
    assert_same(weights(base), tuned)
    interrupt()
    with model.disable_adapter():
        assert_same(weights(base), seed)
    assert_same(weights(base), tuned)
    # Another optimizer goes on from where the interrupted one left off; what it makes is kept.
    interrupt()
    train(model, "bert", first=30)
    later = weights(base)
    assert sum(int((later[n] != seed[n]).sum()) for n in seed) <= model.constraint().budget
    with model.disable_adapter():
        assert_same(weights(base), seed)
    assert_same(weights(base), later)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_whole_state_dicts_with_shared_parameters(name, build):
    """Loaded in another state than they were taken in; the other owners of a shared weight load after the first."""
    seed = weights(build(name))
    model, _ = tuned_model(build, name, ("a", "b"), epsilon=0.05)
    base = model.base_model.model
    tuned = {}
    for adapter in ("a", "b"):
        model.set_adapter(adapter)
        tuned[adapter] = weights(base)
    model.set_adapter("a")
    with_a = copy.deepcopy(model.state_dict())
    with model.disable_adapter():
        disabled = copy.deepcopy(model.state_dict())
    for state in (with_a, disabled):
        model.set_adapter("b")
        model.load_state_dict(state)
        assert_same(weights(base), tuned["b"])
        with model.disable_adapter():
            assert_same(weights(base), seed)
        model.set_adapter("a")
        assert_same(weights(base), tuned["a"])
    # New dense weights under one name of a shared parameter alone.
    new = torch.zeros_like(base.lm_head.weight)
    base.lm_head.load_state_dict({"weight": new}, strict=False)
    with model.disable_adapter():
        assert not base.lm_head.weight.any()
    assert base.lm_head.weight.any()


@pytest.mark.parametrize(
    ("name", "options", "tuned"),
    [
        ("gpt2", {"target_modules": ["lm_head"]}, {"transformer.wte.weight"}),
        ("gpt2", {"target_parameters": ["lm_head.weight"]}, {"transformer.wte.weight"}),
        ("t5", {"target_modules": ["lm_head"]}, {"shared.weight"}),
        ("t5", {"target_modules": ["decoder"]}, None),
    ],
)
def test_a_shared_parameter_is_tuned_by_any_of_its_names(name, options, tuned, build):
    base = build(name)
    seed = weights(base)
    model = get_peft_model(base, DSTConfig(epsilon=0.05, **options))
    targeted = {n for names in model.silos().values() for n in names}
    assert targeted == (tuned or {"shared.weight", *(n for n in seed if n.startswith("decoder."))})
    assert {n for n, p in base.named_parameters() if p.requires_grad} == targeted
    train(model, name)
    now = weights(base)
    assert 0 < sum(int((now[n] != seed[n]).sum()) for n in seed) <= model.constraint().budget
    assert_same(weights(model.unload()), seed)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["select", "take"])
def test_an_error_while_projecting_undoes_the_step(error, where, build, monkeypatch):
    base = build("bert")
    seed = weights(base)
    model = get_peft_model(base, DSTConfig(epsilon=0.05))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    loss(model, "bert").backward()
    optimizer.step()
    tuned = weights(base)
    owner = choice_module if where == "select" else constraint_module.Silo
    original, calls = getattr(owner, where), []

    def failing(*args):
        calls.append(args)
        if len(calls) == 3:
            raise error
        return original(*args)

    monkeypatch.setattr(owner, where, failing)
    loss(model, "bert", 1).backward()
    with pytest.raises(error):
        optimizer.step()
    assert_same(weights(base), tuned)
    with model.disable_adapter():
        assert_same(weights(base), seed)
    optimizer.step()
    with model.disable_adapter():
        assert_same(weights(base), seed)


def test_a_step_is_undone_only_once(build):
    class Half(torch.optim.SGD):
        failing = True

        def step(self, closure=None):
            if self.failing:
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.data.add_(1.0)
                raise RuntimeError
            super().step(closure)

    model, _ = tuned_model(build, "bert", ("a", "b"))
    base, seed = model.base_model.model, weights(build("bert"))
    half = Half([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss(model, "bert").backward()
    with pytest.raises(RuntimeError):
        half.step()
    model.set_adapter("a")
    half.failing = False
    half.step()
    with model.disable_adapter():
        assert_same(weights(base), seed)
    # Also when the optimizer that failed is gone.
    half.failing = True
    with pytest.raises(RuntimeError):
        half.step()
    del half
    with model.disable_adapter():
        assert_same(weights(base), seed)


def test_disabling_within_a_step_does_not_lose_the_seed(build):
    """A closure that looks at the seed (as DPO would), in an optimizer that calls it while it steps."""
    base = build("bert")
    seed = weights(base)
    model = get_peft_model(base, DSTConfig(epsilon=0.05))
    optimizer = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad], lr=0.1, max_iter=3)

    def closure():
        optimizer.zero_grad()
        with model.disable_adapter(), torch.no_grad():
            loss(model, "bert")
        value = loss(model, "bert")
        value.backward()
        return value

    for _ in range(2):
        optimizer.step(closure)
        now = weights(base)
        assert sum(int((now[n] != seed[n]).sum()) for n in seed) == model.constraint().budget
    with model.disable_adapter():
        assert_same(weights(base), seed)


def test_a_refused_second_wrap_leaves_the_first(build):
    model, output = tuned_model(build)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="nonsense"):
            get_peft_model(model.base_model.model, DSTConfig(epsilon=0.01, target_modules=["nonsense"]))
    assert torch.equal(logits(model.base_model.model, "bert"), output["default"])
