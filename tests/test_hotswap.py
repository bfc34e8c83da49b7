"""An adapter replaced in place, also in a compiled model."""

from __future__ import annotations

import copy
import json

import peft.utils.hotswap
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.save_and_load import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

import peft_dst
from peft_dst import DSTConfig, DSTOptimizer, hotswap_adapter, set_training_steps
from peft_dst.tuner import hotswap
from peft_dst.tuner.records import HostRecords
from tests.models import assert_same, batch, bert, logits, loss, train, trainable, weights


@pytest.fixture
def saved(build, tmp_path):
    """A maker of saved adapters: folder and logits."""

    def make(name: str, architecture: str = "bert", first: int = 0, base: nn.Module | None = None, **options):
        options = {"epsilon": 0.02, **options}
        model = get_peft_model(base or build(architecture), DSTConfig(**options))
        train(model, architecture, first=first)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name, logits(model, architecture)

    return make


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama", "t5"])
def test_the_active_adapter_is_replaced(build, saved, architecture):
    (one, first), (two, second) = saved("one", architecture), saved("two", architecture, first=9, epsilon=0.05)
    model = PeftModel.from_pretrained(build(architecture), one)
    base = weights(build(architecture))
    parameters = {name: parameter.data_ptr() for name, parameter in model.named_parameters() if "_sparse" not in name}
    for folder, wanted in ((two, second), (one, first), (one, first), (two, second)):
        hotswap_adapter(model, folder)
        assert torch.equal(logits(model, architecture), wanted)
        assert model.active_adapters == ["default"]
    assert model.peft_config["default"].epsilon == 0.05
    assert {
        name: parameter.data_ptr() for name, parameter in model.named_parameters() if "_sparse" not in name
    } == parameters
    assert_same({name.removeprefix("base_model.model."): w for name, w in weights(model.unload()).items()}, base)


def test_an_inactive_adapter_and_a_disabled_one_are_replaced(build, saved):
    (one, first), (two, second) = saved("one"), saved("two", first=9)
    model = PeftModel.from_pretrained(build("bert"), one)
    model.load_adapter(one, "other")
    hotswap_adapter(model, two, "other")
    assert torch.equal(logits(model, "bert"), first)
    with model.disable_adapter():
        base = logits(model, "bert")
        hotswap_adapter(model, two, "default")
        assert torch.equal(logits(model, "bert"), base)
    assert torch.equal(logits(model, "bert"), second)
    model.set_adapter("other")
    assert torch.equal(logits(model, "bert"), second)


def test_pefts_own_function_does_it(build, saved):
    (one, _), (two, second) = saved("one"), saved("two", first=9)
    model = PeftModel.from_pretrained(build("bert"), one)
    peft.utils.hotswap.hotswap_adapter(model, str(two), adapter_name="default", torch_device="cpu")
    assert torch.equal(logits(model, "bert"), second)
    peft_dst.register()
    lora = get_peft_model(bert(), LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="Incompatible PEFT types"):
        peft.utils.hotswap.hotswap_adapter(lora, str(two), adapter_name="default")


def test_dense_copies_are_replaced_too(build, saved):
    (one, _), (two, second) = (saved(n, first=f, modules_to_save=["classifier"]) for n, f in (("one", 0), ("two", 9)))
    model = PeftModel.from_pretrained(build("bert"), one)
    hotswap_adapter(model, two)
    assert torch.equal(logits(model, "bert"), second)


@pytest.mark.parametrize(
    "options",
    [{"siloing": "none", "epsilon": 0.05}, {"num_free_parameters": 77, "epsilon": None}, {"selection": "random"}],
    ids=["siloing", "number", "fixed"],
)
def test_training_and_saving_go_on_under_the_new_config(build, saved, tmp_path, options):
    one, _ = saved("one")
    two, second = saved("two", first=9, **options)
    model = PeftModel.from_pretrained(build("bert"), one, is_trainable=True)
    reference = PeftModel.from_pretrained(build("bert"), two, is_trainable=True)
    hotswap_adapter(model, two)
    assert torch.equal(logits(model, "bert"), second)
    assert model.silos() == reference.silos()
    assert model.get_nb_trainable_parameters() == reference.get_nb_trainable_parameters()
    for one in (model, reference):
        train(one, "bert", first=30)
    assert_same(weights(model), weights(reference))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(
        logits(PeftModel.from_pretrained(build("bert"), tmp_path / "again"), "bert"), logits(model, "bert")
    )


def test_there_is_nothing_to_prepare(build, saved):
    one, output = saved("one")
    model = PeftModel.from_pretrained(build("bert"), one)
    peft.utils.hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert torch.equal(logits(model, "bert"), output)


def test_from_a_fixed_subset_to_a_dynamic_one(build, saved):
    one, _ = saved("one", selection="random")
    two, second = saved("two")
    model = PeftModel.from_pretrained(build("bert"), one, is_trainable=True)
    reference = PeftModel.from_pretrained(build("bert"), two, is_trainable=True)
    train(model, "bert")
    hotswap_adapter(model, two)
    assert torch.equal(logits(model, "bert"), second)
    for one in (model, reference):
        train(one, "bert", first=30)
    assert_same(weights(model), weights(reference))


def step(model, optimizer, number):
    loss(model, "bert", number).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("replace", ["swapped", "deleted and added"])
@pytest.mark.parametrize(
    "make",
    [lambda p: torch.optim.SGD(p, lr=0.1), lambda p: DSTOptimizer(p, torch.optim.SGD, lr=0.1)],
    ids=["hook", "own"],
)
def test_an_optimizer_knows_nothing_of_the_old_one(make, replace, build, saved):
    """Neither its thresholds nor its steps, which are the adapter's; how long the training is stays known."""
    options = {"epsilon": 0.05, "threshold": "iterative", "threshold_iterations": 1, "churn_stop": 0.5}
    model = get_peft_model(build("bert"), DSTConfig(**options))
    two, _ = saved("two", epsilon=0.05, threshold="iterative", threshold_iterations=1, churn_interval=2)
    optimizer = make(trainable(model))
    set_training_steps(model, 10)
    for number in range(3):
        step(model, optimizer, number)
    if replace == "swapped":
        hotswap_adapter(model, two)
    else:
        model.add_adapter("other", DSTConfig(**options))
        model.set_adapter("other")
        model.delete_adapter("default")
        model.load_adapter(two, "default", is_trainable=True)
        model.set_adapter("default")
        model.delete_adapter("other")
    constraint = model.constraint()
    step(model, optimizer, 20)
    # Tracking would have come near it only.
    assert [silo.free() for silo in constraint.silos] == [silo.budget for silo in constraint.silos]
    assert constraint.steps == 1


def test_how_long_the_training_is_stays_known(build, tmp_path):
    model = get_peft_model(build("bert"), DSTConfig(epsilon=0.05, churn_stop=0.5))
    model.save_pretrained(tmp_path)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    set_training_steps(model, 4)
    for number in range(3):
        step(model, optimizer, number)
        hotswap_adapter(model, tmp_path)
    assert model.constraint().total_steps == 4


def test_a_failed_swap_leaves_an_optimizer_alone(build, saved):
    options = {"epsilon": 0.05, "threshold": "iterative"}
    two, _ = saved("two", **options)
    model = get_peft_model(build("bert"), DSTConfig(**options))
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    step(model, optimizer, 0)
    before = copy.deepcopy(optimizer.state_dict()["param_groups"])
    damage(two, unsorted)
    with pytest.raises(ValueError, match="not strictly ascending"):
        hotswap_adapter(model, two)
    assert optimizer.state_dict()["param_groups"] == before


def damage(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def unsorted(tensors):
    key = next(k for k in tensors if "dst_indices" in k and tensors[k].numel() > 1)
    tensors[key] = tensors[key].flip(0).contiguous()


def foreign(folder):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    for summary in config["records"].values():
        summary[2] = dict.fromkeys(summary[2], "00000000")
    path.write_text(json.dumps(config))
    # Without metadata, which would count.
    damage(folder, lambda tensors: None)


def wide(folder):
    def widen(tensors):
        tensors["base_model.model.classifier.weight"] = torch.zeros(5, 16)

    damage(folder, widen)


def headless(folder):
    damage(folder, lambda tensors: tensors.pop("base_model.model.classifier.bias"))


def lora(folder):
    get_peft_model(bert(), LoraConfig(target_modules=["query"])).save_pretrained(folder)


HEAD = {"modules_to_save": ["classifier"]}
BAD = {
    "damaged": ({}, lambda folder: damage(folder, unsorted), "positions are not strictly ascending"),
    "base": ({}, foreign, "the base model's values differ"),
    "targets": ({"target_modules": ["query"]}, None, "do not tune the same parameters; only one of them tunes"),
    "copies": ({"modules_to_save": ["pooler"]}, None, r"has modules_to_save=\['classifier'\], the one in .* \['pooler'\]"),
    "width": (HEAD, wide, r"'base_model.model.classifier.weight' has shape \(3, 16\) in the model, and \(5, 16\) in the"),
    "headless": (HEAD, headless, r"'base_model.model.classifier.bias' has shape \(3,\) in the model, and none in the"),
    "method": (HEAD, lora, "holds an adapter of type PeftType.LORA|holds an adapter of type LORA"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_changes_nothing(build, saved, case):
    options, change, message = BAD[case]
    one, _ = saved("one", **HEAD)
    two, _ = saved("two", first=9, epsilon=0.05, **{**HEAD, **options})
    if change:
        change(two)
    model = PeftModel.from_pretrained(build("bert"), one)
    config, constraint = model.peft_config["default"], model.constraint()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, two)
    assert_same(before, dict(model.state_dict()))
    assert model.peft_config["default"] is config
    assert model.constraint() is constraint
    assert constraint in constraint.live


@pytest.mark.parametrize(
    ("old", "new"),
    [({}, {}), ({"selection": "random"}, {}), ({}, {"selection": "random"})],
    ids=["dynamic", "from fixed", "to fixed"],
)
@pytest.mark.parametrize("after", [0, 2, 40])
def test_a_swap_that_is_interrupted_changes_nothing(build, saved, monkeypatch, old, new, after):
    """Wherever in loading it is: in the first record, the third, or after the last. Training goes on as if never tried."""
    one, _ = saved("one", **HEAD, **old)
    two, _ = saved("two", first=9, epsilon=0.05, **HEAD, **new)
    model, reference = (PeftModel.from_pretrained(build("bert"), one, is_trainable=True) for _ in range(2))
    constraint = model.constraint()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    load, calls = HostRecords._replace, []

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) > after:
            raise KeyboardInterrupt
        load(self, *args)

    def loaded(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(HostRecords, "_replace", interrupted)
            set_peft_model_state_dict(*args, **kwargs)
            raise KeyboardInterrupt

    monkeypatch.setattr(hotswap, "set_peft_model_state_dict", loaded)
    with pytest.raises(KeyboardInterrupt):
        hotswap_adapter(model, two)
    assert len(calls) > after or after == 40
    assert model.constraint() is constraint
    assert_same(before, dict(model.state_dict()))
    for one in (model, reference):
        train(one, "bert", first=20)
    assert_same(dict(reference.state_dict()), dict(model.state_dict()))


def test_what_cannot_be_replaced_is_refused(build, saved):
    one, _ = saved("one")
    model = PeftModel.from_pretrained(build("bert"), one)
    with pytest.raises(ValueError, match="adapter 'b' does not exist; there are default"):
        hotswap_adapter(model, one, "b")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"'default' is merged into the base weights\. Call unmerge_adapter"):
        hotswap_adapter(model, one)
    with pytest.raises(ValueError, match="replaces an adapter of a PeftModel with DST adapters"):
        hotswap_adapter(bert(), one)


@pytest.fixture
def _no_recompilation():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_no_recompilation")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_is_not_compiled_again(build, saved, backend):
    (one, first), (two, second) = saved("one", "llama"), saved("two", "llama", first=9, epsilon=0.05)
    model = PeftModel.from_pretrained(build("llama"), one).eval()
    compiled = torch.compile(model, backend=backend)
    tokens = batch("llama")["input_ids"]
    with torch.no_grad():
        assert torch.equal(compiled(input_ids=tokens).logits, first)
        with torch.compiler.set_stance("fail_on_recompile"):
            for folder, wanted in ((two, second), (one, first)):
                hotswap_adapter(compiled, folder)
                assert torch.equal(compiled(input_ids=tokens).logits, wanted)


@pytest.mark.usefixtures("_no_recompilation")
def test_a_compiled_base_serves_every_adapter(build, saved):
    """PeftModel's own forward looks at the name of the active adapter; what it calls does not."""
    (one, first), (two, second) = saved("one"), saved("two", first=9, epsilon=0.05)
    model = PeftModel.from_pretrained(build("bert"), one).eval()
    model.load_adapter(two, "other")
    model.get_base_model().compile(backend="eager")
    tokens = batch("bert")["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, first)
        base = build("bert").eval()(input_ids=tokens).logits
        with torch.compiler.set_stance("fail_on_recompile"):
            model.set_adapter("other", inference_mode=True)
            assert torch.equal(model(input_ids=tokens).logits, second)
            hotswap_adapter(model, one, "other")
            assert torch.equal(model(input_ids=tokens).logits, first)
            with model.disable_adapter():
                assert torch.equal(model(input_ids=tokens).logits, base)
            assert torch.equal(model(input_ids=tokens).logits, first)
