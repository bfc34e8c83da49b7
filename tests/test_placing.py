"""DST as a PEFT method: where adapters are placed, what is tuned and counted, and what one added later leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from peft_dst import DSTConfig
from peft_dst.core import Constraint
from tests.models import assert_same, bert, logits, train, tuned_model, weights


def test_counts_tell_the_budget(build, capsys):
    base = build("bert")
    size = sum(p.numel() for p in base.parameters())
    model = get_peft_model(base, DSTConfig(epsilon=0.01))
    assert model.get_nb_trainable_parameters() == (round(0.01 * size), size)
    model.print_trainable_parameters()
    assert f"trainable params: {round(0.01 * size):,} || all params: {size:,}" in capsys.readouterr().out
    model.set_adapter("default", inference_mode=True)
    assert model.get_nb_trainable_parameters() == (0, size)
    train_head = get_peft_model(build("bert"), DSTConfig(epsilon=0.01, modules_to_save=["classifier"]))
    head = 16 * 3 + 3
    assert train_head.get_nb_trainable_parameters() == (round(0.01 * (size - head)) + head, size + head)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_heads_that_peft_adds_for_a_task_are_dense(task, tmp_path):
    """Of some tasks PEFT names the head after it has placed the adapter: it is no part of the subset all the same."""
    kinds = {
        "SEQ_CLS": hf.BertForSequenceClassification,
        "TOKEN_CLS": hf.BertForTokenClassification,
        "QUESTION_ANS": hf.BertForQuestionAnswering,
    }
    config = bert().config
    config.num_labels = 2
    base = kinds[task](config).eval()
    seed = copy.deepcopy(base)
    model = get_peft_model(base, DSTConfig(epsilon=0.01, task_type=task))
    model.add_adapter("other", DSTConfig(epsilon=0.02, task_type=task))
    body = sum(p.numel() for n, p in seed.named_parameters() if not n.startswith(("classifier", "qa_outputs")))
    assert model.constraint().budget == round(0.01 * body)
    ids = torch.arange(16).reshape(2, 8)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        sum(output.square().sum() for output in model(input_ids=ids).to_tuple()).backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(seed, tmp_path)
    for one, other in zip(model(input_ids=ids).to_tuple(), again(input_ids=ids).to_tuple(), strict=True):
        assert torch.equal(one, other)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert [name for name in saved if "dst_" not in name]
    assert sum(t.numel() for name, t in saved.items() if "dst_indices" in name) == round(0.01 * body)


def test_silos_and_their_table(build, capsys):
    model = get_peft_model(build("gpt2"), DSTConfig(epsilon=0.01))
    silos = model.silos("default")
    assert list(silos) == [s.name for s in model.constraint().silos]
    assert silos["transformer.h.1.feed_forward"] == [
        f"transformer.h.1.{name}.{kind}" for name in ("ln_2", "mlp.c_fc", "mlp.c_proj") for kind in ("weight", "bias")
    ]
    # Tied embeddings count once, under the name that comes first.
    members = [name for names in silos.values() for name in names]
    assert "lm_head.weight" not in members
    model.print_silos()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["silo", "tensors", "size", "budget"]
    assert len(lines) == len(silos) + 4
    total = sum(p.numel() for p in model.get_base_model().parameters() if p.requires_grad)
    assert lines[-1].split() == ["total", str(len(members)), f"{total:,}", str(round(0.01 * total))]
    with pytest.raises(ValueError, match="adapter 'other' does not exist; there are default"):
        model.silos("other")


def test_nothing_is_wrapped_and_nothing_added_to_the_forward_pass(architecture, build):
    plain, base = build(architecture), build(architecture)
    get_peft_model(base, DSTConfig(epsilon=0.02))
    assert [type(m) for n, m in base.named_modules() if "_sparse" not in n] == [type(m) for m in plain.modules()]
    names = [n for n, _ in plain.named_parameters()]
    assert [n for n, _ in base.named_parameters() if "_sparse" not in n] == names
    assert torch.equal(logits(base, architecture), logits(plain, architecture))


def test_everything_is_tuned_by_default(architecture, build):
    base = build(architecture)
    names = {n for n, _ in base.named_parameters()}
    model = get_peft_model(base, DSTConfig(epsilon=0.02))
    assert {n for members in model.silos().values() for n in members} == names
    assert all(p.requires_grad for n, p in base.named_parameters() if "_sparse" not in n)


def test_an_adapter_added_later_starts_from_the_seed(build):
    model, _ = tuned_model(build)
    model.add_adapter("fresh", DSTConfig(epsilon=0.02))
    model.set_adapter("fresh")
    assert torch.equal(logits(model, "bert"), logits(build("bert"), "bert"))
    # Adding it did not disturb what could be trained.
    assert all(p.requires_grad for n, p in model.get_base_model().named_parameters() if "_sparse" not in n)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["query"]}, {"attention.self.query"}),
        ({"target_modules": ["attention"], "layers_to_transform": [1]}, {"attention.self", "attention.output"}),
        ({"target_modules": r".*\.(key|value)"}, {"attention.self.key", "attention.self.value"}),
        ({"exclude_modules": ["encoder", "pooler", "classifier"]}, {"bert.embeddings"}),
        ({"layers_to_transform": 0}, {"bert.encoder.layer.0"}),
        ({"target_parameters": ["key.bias"]}, {"attention.self.key.bias"}),
        ({"target_modules": "all-linear", "task_type": "SEQ_CLS"}, {"query", "key", "value", "dense"}),
    ],
)
def test_targets(options, expected, build):
    base = build("bert")
    names = {n for n, _ in base.named_parameters()}
    model = get_peft_model(base, DSTConfig(epsilon=0.05, **options))
    targeted = {n for members in model.silos().values() for n in members}
    assert targeted == {n for n in names if any(part in n for part in expected) and _in_layers(n, options)}
    trainable = {n for n, p in base.named_parameters() if p.requires_grad and "modules_to_save" not in n}
    assert trainable == targeted


def _in_layers(name, options):
    if options.get("target_modules") == "all-linear":
        return "classifier" not in name and "LayerNorm" not in name and "embeddings" not in name
    return "layer.1." in name if options.get("layers_to_transform") == [1] else True


def test_adapters_with_different_targets(build):
    base = build("bert")
    seed = weights(base)
    model = get_peft_model(base, DSTConfig(epsilon=0.05, target_modules=["attention"]), "a")
    train(model, "bert")
    tuned = weights(base)
    model.add_adapter("b", DSTConfig(epsilon=0.05, target_modules=["intermediate"]))
    model.set_adapter("b")
    assert_same(weights(base), seed)
    assert {n for n, p in base.named_parameters() if p.requires_grad} == {n for n in seed if "intermediate" in n}
    train(model, "bert")
    model.set_adapter("a")
    assert_same(weights(base), tuned)
    assert {n for n, p in base.named_parameters() if p.requires_grad} == {n for n in seed if "attention" in n}


class Scaled(nn.Module):
    """With a parameter of the model itself."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(20))
        self.linear = nn.Linear(20, 20)

    def forward(self, x):
        return self.linear(x * self.scale)


def test_parameters_of_the_model_itself():
    base = Scaled()
    seed = weights(base)
    model = get_peft_model(base, DSTConfig(num_free_parameters=5, siloing="none", distance="absolute"))
    assert model.silos() == {"model": ["scale", "linear.weight", "linear.bias"]}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(torch.randn(4, 20)).square().sum().backward()
    optimizer.step()
    assert sum(int((base.get_parameter(n) != v).sum()) for n, v in seed.items()) == 5
    assert_same(weights(model.unload()), seed)


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad and "_sparse" not in name}


@pytest.mark.parametrize("trained", [True, False], ids=["frozen beside trained", "trainable beside frozen"])
@pytest.mark.parametrize(
    ("name", "targets", "adapter"),
    [
        ("root", None, "b"),
        # Whose weight is the embedding's too.
        ("gpt2", ["lm_head"], "b"),
        # The name of a module, by which PEFT takes its parameters for the adapter's.
        ("bert", None, "encoder"),
    ],
)
def test_adding_an_adapter_leaves_alone_what_is_trained(name, targets, adapter, trained, build):
    base = Scaled() if name == "root" else build(name)
    options = {"epsilon": 0.05, "target_modules": targets}
    model = get_peft_model(base, DSTConfig(**options, inference_mode=not trained))
    before = trainable(base)
    assert bool(before) == trained
    model.add_adapter(adapter, DSTConfig(**options, inference_mode=trained))
    assert trainable(base) == before
    model.set_adapter(adapter)
    assert trainable(base) == (before or {n for n in weights(base) if targets is None or "wte" in n})


def test_combining_and_loading_adapters_leaves_alone_what_is_trained(build, tmp_path):
    base = build("gpt2")
    model = get_peft_model(base, DSTConfig(epsilon=0.05, target_modules=["lm_head"]))
    before = trainable(base)
    train(model, "gpt2")
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    model.load_adapter(tmp_path, "loaded")
    assert trainable(base) == before
    model.add_weighted_adapter(["default", "loaded"], [0.5, 0.5], "mean")
    assert trainable(base) == before
    tuned = weights(base)
    train(model, "gpt2", first=10)
    assert not torch.equal(base.lm_head.weight, tuned["transformer.wte.weight"])


def test_a_module_is_copied_without_the_model(build):
    """PEFT copies a head with the marker that an adapter has left there."""
    model = get_peft_model(build("bert"), DSTConfig(epsilon=0.05))
    model.add_adapter("b", DSTConfig(epsilon=0.05, exclude_modules=["classifier"]))
    model.set_adapter("b")
    model.delete_adapter("default")
    before = set(Constraint.live)
    model.add_adapter("c", DSTConfig(epsilon=0.05, modules_to_save=["classifier"]))
    assert set(Constraint.live) - before == {model.base_model.constraint("c")}
    # A copy of the whole model has constraints of its own, and lets go of those alone.
    copied = copy.deepcopy(model)
    copied.set_adapter("c")
    own = copied.base_model.constraint("b")
    copied.delete_adapter("b")
    assert own not in Constraint.live
    assert model.base_model.constraint("b") in Constraint.live
