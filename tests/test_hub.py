"""Through the hub and back: pushed and loaded, by branch and folder, refused and failed; and the model card."""

from __future__ import annotations

import copy
import json
import re
import shutil

import pytest
import torch
from huggingface_hub import EvalResult, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from peft_dst import DSTConfig
from peft_dst.delta import DeltaError, read_metadata
from tests.hub import HUB, TOKEN, metadata_errors
from tests.models import assert_same, batch, bert, logits, train, weights


# huggingface_hub's uploads without xet pass the file as httpx once wanted it.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

BASE, REPO = "user/base", "user/adapter"
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
OPTIONS = {"epsilon": 0.05, "task_type": "SEQ_CLS", "modules_to_save": ["classifier"]}


@pytest.fixture(scope="module")
def pushed_base():
    torch.manual_seed(0)
    bert().push_to_hub(BASE, token=TOKEN)
    return HUB.repositories[BASE]


@pytest.fixture(autouse=True)
def _hub(pushed_base) -> None:
    """Nothing on the hub but a base model, and nothing in the cache."""
    HUB.repositories = {BASE: copy.deepcopy(pushed_base)}
    HUB.requests.clear()
    HUB.failures.clear()
    shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)


def base():
    return AutoModelForSequenceClassification.from_pretrained(BASE)


def tuned(first: int = 0, **options):
    model = get_peft_model(base(), DSTConfig(**{**OPTIONS, **options}))
    train(model, "bert", first=first)
    return model


def card(repo: str = REPO, revision: str = "main") -> ModelCard:
    return ModelCard(HUB.repositories[repo].files(revision)["README.md"].decode())


def test_pushed_and_loaded_in_every_way(tmp_path):
    model = tuned()
    output = logits(model, "bert")
    model.push_to_hub(REPO, token=TOKEN, private=True, commit_message="A first try")
    repository = HUB.repositories[REPO]
    assert repository.private
    assert repository.messages == ["A first try"]
    assert repository.files().keys() == FILES

    # What was uploaded is what saving writes, with the metadata that are stamped last.
    model.save_pretrained(tmp_path / "local")
    (tmp_path / "remote").mkdir()
    for name, content in repository.files().items():
        (tmp_path / "remote" / name).write_bytes(content)
    local, remote = (tmp_path / folder / "adapter_model.safetensors" for folder in ("local", "remote"))
    assert_same(load_file(local), load_file(remote))
    assert read_metadata(local) == read_metadata(remote)
    metadata = read_metadata(remote)
    assert metadata["records"] == json.loads(repository.files()["adapter_config.json"])["records"]
    assert sum(entries for entries, *_ in metadata["records"].values()) == model.base_model.constraint().budget
    assert metadata["config"]["base_model_name_or_path"] == BASE

    loaded = PeftModel.from_pretrained(base(), REPO, token=TOKEN)
    assert torch.equal(logits(loaded, "bert"), output)
    loaded.load_adapter(REPO, "again", token=TOKEN)
    loaded.set_adapter("again")
    assert torch.equal(logits(loaded, "bert"), output)
    native = base()
    native.load_adapter(REPO, adapter_kwargs={"token": TOKEN})
    for found in (
        native,
        AutoModelForSequenceClassification.from_pretrained(REPO, token=TOKEN),
        AutoPeftModelForSequenceClassification.from_pretrained(REPO, token=TOKEN),
    ):
        assert torch.equal(logits(found, "bert"), output)
    config = DSTConfig.from_pretrained(REPO, token=TOKEN)
    assert (config.epsilon, config.base_model_name_or_path) == (0.05, BASE)


def test_without_the_token_nothing_is_read_or_touched():
    tuned().push_to_hub(REPO, token=TOKEN, private=True)
    fresh = base()
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json' at 'user/adapter'"):
        PeftModel.from_pretrained(fresh, REPO)
    assert_same(weights(fresh), weights(base()))
    with pytest.raises((HfHubHTTPError, RepositoryNotFoundError)):
        tuned().push_to_hub("user/other")
    assert "user/other" not in HUB.repositories


def test_revisions_and_folders():
    model = tuned()
    outputs = {"main": logits(model, "bert")}
    model.push_to_hub(REPO, token=TOKEN)
    train(model, "bert", first=20)
    outputs["v2"] = logits(model, "bert")
    model.push_to_hub(REPO, token=TOKEN, revision="v2")
    model.add_adapter("second", DSTConfig(**OPTIONS, siloing="none"))
    model.set_adapter("second")
    train(model, "bert", first=30)
    second = logits(model, "bert")
    info = model.push_to_hub(REPO, token=TOKEN, create_pr=True)
    for revision, output in outputs.items():
        assert torch.equal(logits(PeftModel.from_pretrained(base(), REPO, revision=revision), "bert"), output)
    both = {"revision": info.pr_revision, "subfolder": "second"}
    assert DSTConfig.from_pretrained(REPO, **both).siloing == "none"
    loaded = PeftModel.from_pretrained(base(), REPO, revision="v2")
    loaded.load_adapter(REPO, "b", **both)
    loaded.set_adapter("b")
    assert torch.equal(logits(loaded, "bert"), second)
    native = base()
    native.load_adapter(REPO, adapter_kwargs={"revision": "v2"})
    assert torch.equal(logits(native, "bert"), outputs["v2"])


def test_a_file_that_was_changed_on_the_hub_is_refused():
    model = tuned()
    model.push_to_hub(REPO, token=TOKEN)
    repository = HUB.repositories[REPO]
    good = repository.branches["main"]
    content = bytearray(repository.files()["adapter_model.safetensors"])
    header = 8 + int.from_bytes(content[:8], "little")
    offsets = json.loads(content[8:header])
    key = next(key for key in offsets if "dst_indices" in key)
    begin, _ = offsets[key]["data_offsets"]
    content[header + begin + 4] ^= 1
    repository.commit("main", {"adapter_model.safetensors": bytes(content)})
    fresh = base()
    with pytest.raises(DeltaError, match=r"come from different saves|not strictly ascending"):
        PeftModel.from_pretrained(fresh, REPO)
    assert_same(weights(fresh), weights(base()))
    loaded = PeftModel.from_pretrained(fresh, REPO, revision=good)
    with pytest.raises(DeltaError):
        loaded.load_adapter(REPO, "damaged")
    assert list(loaded.peft_config) == ["default"]
    assert torch.equal(logits(loaded, "bert"), logits(model, "bert"))
    # Another base under the same name is noticed as well.
    torch.manual_seed(5)
    HUB.repositories[BASE].commit("main", {})
    bert().push_to_hub(BASE, token=TOKEN)
    with pytest.raises(DeltaError, match="the base model's values differ"):
        PeftModel.from_pretrained(base(), REPO, revision=good)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_an_adapter_of_another_base_is_not_loaded_over_one(kind, tmp_path):
    model = tuned()
    where = {"token": TOKEN, "revision": "v2"}
    model.push_to_hub(REPO, private=True, **where)
    if kind == "bin":
        model.save_pretrained(tmp_path, safe_serialization=False)
        repository = HUB.repositories[REPO]
        repository.commit("v2", {"adapter_model.bin": (tmp_path / "adapter_model.bin").read_bytes()})
        del repository.files("v2")["adapter_model.safetensors"]
    torch.manual_seed(5)
    bert().push_to_hub(BASE, token=TOKEN)
    other = tuned(first=20)
    before = weights(other)
    with pytest.raises(DeltaError, match="the base model's values differ"):
        other.load_adapter(REPO, "default", **where)
    assert_same(weights(other), before)
    output = logits(model, "bert")
    train(model, "bert", first=20)
    model.load_adapter(REPO, "default", **where)
    assert torch.equal(logits(model, "bert"), output)


@pytest.mark.parametrize("request_", ["POST /api/models/user/adapter/commit", "PUT /objects", "POST .*batch"])
def test_a_push_that_fails_leaves_the_model_as_it_was(request_):
    model = tuned()
    output = logits(model, "bert")
    HUB.failures[request_] = 403
    with pytest.raises((HfHubHTTPError, RuntimeError)):
        model.push_to_hub(REPO, token=TOKEN)
    assert HUB.repositories[REPO].files() == {}
    assert torch.equal(logits(model, "bert"), output)
    HUB.failures.clear()
    train(model, "bert", first=20)
    model.push_to_hub(REPO, token=TOKEN)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), REPO), "bert"), logits(model, "bert"))


def test_a_download_that_fails_can_be_repeated():
    model = tuned()
    model.push_to_hub(REPO, token=TOKEN)
    model.push_to_hub("user/second", token=TOKEN)
    output, fresh = logits(model, "bert"), base()
    HUB.failures["HEAD /user/adapter/resolve/main/adapter_model.safetensors"] = 403
    with pytest.raises(HfHubHTTPError):
        PeftModel.from_pretrained(fresh, REPO)
    # PEFT has wrapped it by then, which is taken back.
    assert torch.equal(logits(fresh, "bert"), logits(base(), "bert"))
    HUB.failures.clear()
    loaded = PeftModel.from_pretrained(fresh, REPO)
    assert torch.equal(logits(loaded, "bert"), output)
    HUB.failures["HEAD /user/second/resolve/main/adapter_model.safetensors"] = 403
    with pytest.raises(HfHubHTTPError):
        loaded.load_adapter("user/second", "b")
    # The other one goes on.
    assert list(loaded.peft_config) == ["default"]
    assert torch.equal(logits(loaded, "bert"), output)
    HUB.failures.clear()
    loaded.load_adapter("user/second", "b")
    loaded.set_adapter("b")
    assert torch.equal(logits(loaded, "bert"), output)


# The card


def test_the_model_card_says_what_it_is():
    model = tuned(selection="magnitude")
    model.push_to_hub(REPO, token=TOKEN)
    found = card()
    assert metadata_errors(str(found)) == []
    data = found.data.to_dict()
    assert (data["base_model"], data["library_name"], data["pipeline_tag"]) == (BASE, "peft", "text-classification")
    assert {"peft-dst", "dst", "dynamic-subset-tuning", f"base_model:adapter:{BASE}"} <= set(data["tags"])
    assert "license" not in data
    constraint = model.base_model.constraint()
    size, head = sum(silo.size for silo in constraint.silos), 4 * (3 * 16 + 3) / 1000
    row = (
        f"| default | ε = 0.05 | {constraint.budget:,} of {size:,} | magnitude | module_and_layer | inverse_relative "
        f"| {constraint.budget:,} ({8 * constraint.budget / 1000:,.1f} kB) | classifier ({head:,.1f} kB) |"
    )
    assert row in found.text
    assert f'AutoModelForSequenceClassification.from_pretrained("{BASE}", num_labels=3)' in found.text
    assert "pip install peft-dst" in found.text
    assert found.text.count("import peft_dst") == 1


def test_the_snippet_has_the_head_s_width_without_a_task_type(build, tmp_path):
    get_peft_model(build("bert"), DSTConfig(epsilon=0.02)).save_pretrained(tmp_path)
    assert re.search(
        r"BertForSequenceClassification.from_pretrained\(.*, num_labels=3\)", (tmp_path / "README.md").read_text()
    )


@pytest.mark.parametrize(
    ("options", "budget"),
    [
        ({"num_free_parameters": 1000}, "1,000 parameters"),
        ({"selection": "bitfit"}, "all biases"),
    ],
)
def test_budgets_that_are_no_fraction(options, budget, build, tmp_path):
    get_peft_model(build("bert"), DSTConfig(**options)).save_pretrained(tmp_path)
    assert f"| default | {budget} | " in (tmp_path / "README.md").read_text()


def test_the_snippet_of_the_card_runs():
    model = tuned()
    model.push_to_hub(REPO, token=TOKEN)
    code = card().text.partition("```python\n")[2].partition("```")[0]
    found: dict = {}
    exec(code.replace("path/or/hub-id/of/this/adapter", REPO), found)
    assert torch.equal(logits(found["model"], "bert"), logits(model, "bert"))


def test_what_a_person_wrote_stays():
    model = tuned()
    model.push_to_hub(REPO, token=TOKEN, tags=["my-tag"])
    assert "my-tag" in card().data.tags
    edited = card()
    edited.text = "# My adapter\n\nFor questions | and answers.\n\n" + edited.text.replace(
        "### Framework versions", "## Notes\n\n\\1 and \\g<0>\n\n### Framework versions"
    )
    edited.data["license"] = "mit"
    edited.data["datasets"] = ["user/questions"]
    edited.data["tags"].append("another-tag")
    edited.data["model_name"] = "mine"
    edited.data["eval_results"] = [
        EvalResult("text-classification", "user/questions", "Questions", "accuracy", 0.93, task_name="Questions")
    ]
    HUB.repositories[REPO].commit("main", {"README.md": str(edited).encode()})
    train(model, "bert", first=20)
    for _ in range(2):
        model.push_to_hub(REPO, token=TOKEN)
        found = card()
        assert metadata_errors(str(found)) == []
        assert found.text.startswith("# My adapter\n\nFor questions | and answers.\n\n<!-- peft-dst: begin -->")
        assert "## Notes\n\n\\1 and \\g<0>\n" in found.text
        assert found.text.count("## A Dynamic Subset Tuning adapter") == 1
        data = found.data.to_dict()
        assert (data["license"], data["datasets"]) == ("mit", ["user/questions"])
        assert {"my-tag", "another-tag", "peft-dst"} <= set(data["tags"])
        (result,) = data["model-index"][0]["results"]
        assert result["metrics"] == [{"type": "accuracy", "value": 0.93}]


def test_folders_of_this_machine_stay_out_of_the_card(tmp_path):
    base().save_pretrained(tmp_path / "a base")
    model = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "a base"), DSTConfig(**OPTIONS)
    )
    model.save_pretrained(tmp_path / "adapter")
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert str(tmp_path) not in text
    assert "a base" not in text
    found = ModelCard(text)
    assert metadata_errors(str(found)) == []
    assert found.data.base_model is None
    # What a person says it is stays.
    found.data["base_model"] = BASE
    found.save(tmp_path / "adapter" / "README.md")
    model.save_pretrained(tmp_path / "adapter")
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert str(tmp_path) not in text
    assert ModelCard(text).data.base_model == BASE
    model.push_to_hub(REPO, token=TOKEN)
    assert str(tmp_path) not in str(card())


@pytest.mark.parametrize(
    "name", ["", "a: b\n- c", "../../x", "C:\\models\\x", "<!-- peft-dst: end -->", 'x")\nimport os', "a/b/c"]
)
@pytest.mark.filterwarnings(
    "ignore:Could not find a config file in:UserWarning"
)  # PEFT's remark on names it does not know
def test_strange_names_break_nothing(name, tmp_path):
    model = bert()
    model.config._name_or_path = model.name_or_path = name
    model = get_peft_model(model, DSTConfig(epsilon=0.1, task_type="SEQ_CLS", modules_to_save=["classifier"]), "a | b")
    for _ in range(2):
        model.save_pretrained(tmp_path)
        found = ModelCard.load(tmp_path / "README.md")
        assert metadata_errors(str(found)) == []
        assert found.data.base_model is None
        assert not [tag for tag in found.data.tags if tag.startswith("base_model:")]
        assert "\n| a \\| b | ε = 0.1 | " in found.text
        assert found.text.count("<!-- peft-dst: end -->") == 1
        code = found.text.partition("```python\n")[2].partition("```")[0]
        compile(code, "card", "exec")
        assert 'from_pretrained("path/or/hub-id/of/the/base", num_labels=3)' in code


def test_dense_modules_of_one_name_are_added_up(tmp_path):
    """modules_to_save names ends of names, and may keep several modules."""
    net = torch.nn.ModuleDict({name: torch.nn.Module() for name in "abc"})
    net["a"].proj, net["b"].proj = torch.nn.Linear(100, 10), torch.nn.Linear(10, 10)
    net["c"].fc = torch.nn.Linear(10, 10)
    model = get_peft_model(net, DSTConfig(epsilon=0.5, modules_to_save=["proj"]))
    model.save_pretrained(tmp_path)
    size = 4 * (1010 + 110)
    assert f"| proj ({size / 1000:,.1f} kB) |" in ModelCard.load(tmp_path / "README.md").text


@pytest.mark.parametrize("other", [torch.nn.Sequential(torch.nn.Linear(8, 8))])
def test_bases_that_are_not_transformers(other, tmp_path):
    get_peft_model(other, DSTConfig(epsilon=0.5)).save_pretrained(tmp_path)
    found = ModelCard.load(tmp_path / "README.md")
    assert metadata_errors(str(found)) == []
    assert "\nbase = ...  # the base model\n" in found.text
    assert "transformers" not in (found.data.tags or [])


@pytest.mark.parametrize(
    ("name", "loader"),
    [("vit", "ViTForImageClassification"), ("gpt2", "GPT2LMHeadModel"), ("t5", "T5ForConditionalGeneration")],
)
def test_models_without_a_task_are_loaded_by_their_own_class(name, loader, build, tmp_path):
    get_peft_model(build(name), DSTConfig(epsilon=0.1)).save_pretrained(tmp_path)
    found = ModelCard.load(tmp_path / "README.md")
    assert f"\nbase = {loader}.from_pretrained(" in found.text
    assert found.data.pipeline_tag is None


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
def test_trainer_pushes_adapter_and_results(tmp_path):
    rows = [{name: tensor[i] for name, tensor in batch("bert").items()} for i in range(4)]
    arguments = TrainingArguments(
        str(tmp_path / "runs"),
        max_steps=4,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=2,
        report_to=[],
        push_to_hub=True,
        hub_model_id=REPO,
        hub_token=TOKEN,
        hub_private_repo=True,
        hub_strategy="end",
    )
    trainer = Trainer(
        get_peft_model(base(), DSTConfig(**OPTIONS)),
        arguments,
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
    )
    trainer.train()
    trainer.push_to_hub(dataset="Questions", dataset_tags="user/questions", tasks="text-classification")
    repository = HUB.repositories[REPO]
    assert repository.private
    assert repository.files().keys() >= FILES
    output = logits(trainer.model, "bert")
    loaded = PeftModel.from_pretrained(base(), REPO, token=TOKEN)
    assert torch.equal(logits(loaded, "bert"), output)
    found = card()
    assert metadata_errors(str(found)) == []
    assert found.text.count("## A Dynamic Subset Tuning adapter") == 1
    # Trainer's own text, hyperparameters and table of losses are there too.
    for heading in ("### Training hyperparameters", "### Training results", "It achieves the following results"):
        assert heading in found.text
    data = found.data.to_dict()
    assert (data["base_model"], data["library_name"]) == (BASE, "peft")
    assert {"generated_from_trainer", "peft-dst"} <= set(data["tags"])
    (result,) = data["model-index"][0]["results"]
    accuracy = trainer.evaluate()["eval_accuracy"]
    assert result["metrics"][0]["value"] == pytest.approx(accuracy)
