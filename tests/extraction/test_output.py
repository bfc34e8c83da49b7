"""What extraction says and writes, and what it refuses before it writes anything."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

from peft_dst import DSTConfig
from peft_dst.config import SELECTIONS
from peft_dst.delta import Checkpoint, SparseDelta
from peft_dst.extraction import extract
from tests.extraction.runs import renamed, run
from tests.models import bert


def test_progress(pair, tmp_path, capsys):
    pair()
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", DSTConfig(epsilon=0.1))
    assert "6/6" in capsys.readouterr().err
    run(tmp_path)
    assert "6/6" not in capsys.readouterr().err


class TestOutput:
    def test_an_adapter_is_overwritten_and_its_card_kept(self, pair, tmp_path):
        pair()
        run(tmp_path)
        card = tmp_path / "out" / "README.md"
        card.write_text(card.read_text() + "\nOur own words.\n")
        report = run(tmp_path, epsilon=0.1)
        assert "Our own words." in card.read_text()
        assert sum(len(r.indices) for r in SparseDelta.load(tmp_path / "out").values()) == report.total.free > 600
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []

    @pytest.mark.parametrize("inside", ["tuned", "lora", "file"])
    def test_anything_else_is_not(self, inside, pair, tmp_path):
        pair()
        out = tmp_path / "out"
        if inside == "tuned":
            out = tmp_path / "tuned"
        elif inside == "lora":
            get_peft_model(bert(), LoraConfig(target_modules=["query"])).save_pretrained(out)
        else:
            out.write_text("")
        with pytest.raises(ValueError, match="holds something else than a DST adapter"):
            extract(tmp_path / "base", tmp_path / "tuned", out, DSTConfig(), progress=False)

    def test_nothing_is_left_where_saving_fails(self, pair, tmp_path, monkeypatch):
        pair()
        run(tmp_path)
        before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

        def fail(*args, **kwargs):
            raise OSError("no space left")

        monkeypatch.setattr("peft.peft_model.safe_save_file", fail)
        with pytest.raises(OSError, match="no space"):
            run(tmp_path, epsilon=0.3)
        assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
        assert {p.name for p in tmp_path.iterdir()} == {"base", "tuned", "out"}


class TestRefusals:
    @pytest.fixture(autouse=True)
    def _nothing_is_written(self, tmp_path):
        yield
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("selection", [selection for selection in SELECTIONS if selection != "dynamic"])
    def test_other_selections(self, selection, tmp_path):
        """Before anything is looked for: neither model is there."""
        options = {"num_free_parameters": None} if selection == "bitfit" else {}
        with pytest.raises(ValueError, match=rf"selection='dynamic'.*got '{selection}'. Leave selection out"):
            run(tmp_path, selection=selection, **options)

    def test_the_same_model_twice(self, pair, tmp_path):
        pair()
        with pytest.raises(ValueError, match="the same weights"):
            run(tmp_path, tuned=tmp_path / "base")

    def test_two_state_dicts(self, pair, tmp_path):
        _, base, tuned = pair()
        with pytest.raises(ValueError, match="both state dicts"):
            run(tmp_path, base.state_dict(), tuned.state_dict())

    def test_no_folder(self, pair, tmp_path):
        pair()
        with pytest.raises(ValueError, match=r"base='org/model' is not a folder.*snapshot_download"):
            run(tmp_path, base="org/model")

    def test_no_safetensors(self, pair, tmp_path):
        pair()
        (tmp_path / "base" / "model.safetensors").unlink()
        with pytest.raises(ValueError, match=r"holds neither model.safetensors nor"):
            run(tmp_path)

    def test_a_damaged_file(self, pair, tmp_path):
        pair()
        path = tmp_path / "base" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ValueError, match=r"cannot be read .*damaged"):
            run(tmp_path)

    @pytest.mark.parametrize(
        ("index", "message"),
        [
            ("{}", "no readable weight_map"),
            ("[", "no readable weight_map"),
            ('{"weight_map": {"a": "../model.safetensors"}}', "outside its folder"),
            ('{"weight_map": {"a": "gone.safetensors"}}', "cannot be read"),
            ('{"weight_map": {"a": "one.safetensors"}}', "does not hold 'a'"),
        ],
    )
    def test_a_damaged_index(self, index, message, tmp_path):
        save_file({"b": torch.zeros(1)}, tmp_path / "one.safetensors")
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(ValueError, match=message):
            Checkpoint(tmp_path)

    def test_no_config(self, pair, tmp_path):
        pair()
        (tmp_path / "tuned" / "config.json").unlink()
        with pytest.raises(ValueError, match=r"no config.json that transformers can read"):
            run(tmp_path)

    def test_an_unknown_architecture(self, pair, tmp_path):
        pair()
        path = tmp_path / "tuned" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["MyBert"]}))
        with pytest.raises(ValueError, match=r"'MyBert'.*model_class"):
            run(tmp_path)
        config = DSTConfig(epsilon=0.1)
        report = extract(
            tmp_path / "base",
            tmp_path / "tuned",
            tmp_path / "elsewhere",
            config,
            model_class=hf.BertForSequenceClassification,
            progress=False,
        )
        assert report.total.free > 0

    def test_names_that_nobody_knows(self, pair, tmp_path):
        _, base, _ = pair()
        save_file(renamed(base, "scale"), tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(
            ValueError, match=r"LayerNorm.weight.*LayerNorm.scale.*load both models with from_pretrained"
        ):
            run(tmp_path)

    def test_more_in_the_tuned_state_dict_than_the_base_has(self, pair, tmp_path):
        _, base, tuned = pair()
        with pytest.raises(ValueError, match=r"state dict holds 'classifier.weight'.*Pass the tuned model itself"):
            run(tmp_path, base.bert, {n.removeprefix("bert."): t for n, t in tuned.state_dict().items()})

    def test_embeddings_of_another_size(self, pair, tmp_path):
        _, base, tuned = pair()
        tuned.resize_token_embeddings(70, mean_resizing=False)
        with pytest.raises(ValueError, match=r"word_embeddings.weight' is \(61, 16\).*resize_token_embeddings"):
            run(tmp_path, base, tuned)

    def test_tied_here_and_not_there(self, pair, tmp_path):
        _, base, tuned = pair("gpt2")
        loose = {n: t.clone() for n, t in base.state_dict().items()}
        loose["lm_head.weight"] += 1
        with pytest.raises(ValueError, match=r"base: 'transformer.wte.weight' and 'lm_head.weight' are tied"):
            run(tmp_path, loose, tuned)

    @pytest.mark.parametrize("which", ["base", "tuned"])
    def test_values_that_are_not_finite(self, which, pair, tmp_path):
        _, base, tuned = pair()
        model = {"base": base, "tuned": tuned}[which]
        with torch.no_grad():
            model.bert.pooler.dense.weight[1, 2] = math.inf
        with pytest.raises(ValueError, match=rf"'bert.pooler.dense.weight' holds values in the {which} model"):
            run(tmp_path, base, tuned)

    def test_models_with_adapters(self, pair, tmp_path):
        _, base, tuned = pair()
        with pytest.raises(ValueError, match="tuned model has PEFT adapters"):
            run(tmp_path, base, get_peft_model(tuned, DSTConfig()))

    def test_models_without_data(self, pair, tmp_path):
        _, base, tuned = pair()
        with pytest.raises(ValueError, match="meta device"):
            run(tmp_path, base.to("meta"), tuned)

    def test_quantised_weights(self, tmp_path):
        base = nn.Sequential(nn.Linear(3, 3))
        integers = {n: t.to(torch.int8) for n, t in base.state_dict().items()}
        with pytest.raises(ValueError, match="int8"):
            run(tmp_path, integers, base)

    def test_no_budget(self, pair, tmp_path):
        pair()
        with pytest.raises(ValueError, match="leaves no free parameter"):
            run(tmp_path, epsilon=1e-9)
