"""The member that PEFT's enum gets: a real one, in every process, however often the package is imported."""

from __future__ import annotations

import copy
import enum
import importlib
import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peft
import pytest
from peft import PeftModel, get_peft_config, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType

import peft_dst
from peft_dst import DSTConfig, DSTModel, registration
from tests.models import bert
from tests.programs import run


ROOT = Path(__file__).parent.parent


def python(code: str, *arguments: object) -> str:
    """What a fresh process prints; it finds the package and the tests wherever it runs."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_it_is_a_member_like_any_other():
    member = PeftType.DST
    lora = PeftType.LORA
    assert PeftType("DST") is PeftType["DST"] is member
    assert list(PeftType)[-1] is member
    assert len(PeftType) == len(list(PeftType)) == len(PeftType.__members__) == len(set(PeftType))
    assert member in PeftType
    assert member == "DST" == member.value == member.name
    assert (type(member), repr(member), str(member), hash(member)) == (
        type(lora),
        repr(lora).replace("LORA", "DST"),
        str(lora).replace("LORA", "DST"),
        hash("DST"),
    )
    assert {"DST": 1}[member] == 1
    assert json.loads(json.dumps({"peft_type": member, member: 1})) == {"peft_type": "DST", "DST": 1}
    assert copy.copy(member) is copy.deepcopy(member) is member
    assert [pickle.loads(pickle.dumps(member, protocol)) for protocol in range(6)] == [member] * 6
    assert all(pickle.loads(pickle.dumps([other]))[0] is other for other in PeftType)
    with pytest.raises(AttributeError):
        PeftType.DST = "other"
    with pytest.raises(ValueError, match="is not a valid PeftType"):
        PeftType("DSTT")


def test_registering_again_and_reloading_change_nothing():
    before = list(PeftType), PeftModel.get_nb_trainable_parameters, PeftModel.create_or_update_model_card
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: peft_dst.register(), range(32)))
    importlib.reload(registration)
    importlib.reload(peft_dst)
    assert (list(PeftType), PeftModel.get_nb_trainable_parameters, PeftModel.create_or_update_model_card) == before
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.DST] is DSTConfig is peft_dst.DSTConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.DST] is DSTModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.DST] == "dst_"
    assert isinstance(get_peft_config({"peft_type": "DST", "epsilon": 0.1}), DSTConfig)
    # Other methods' counts are left alone.
    lora = get_peft_model(bert(), peft.LoraConfig(target_modules=["query"], r=2))
    assert lora.get_nb_trainable_parameters()[0] == 2 * 2 * (16 + 16)


def test_a_second_import_serves_old_and_new_models(tmp_path, apart):
    """As test runners and notebooks do it that clear sys.modules."""
    script = tmp_path / "script.py"
    script.write_text(
        """
import sys
import torch, peft_dst
from peft import PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file
from tests.models import bert, train

def base():
    torch.manual_seed(0)
    return bert()

old_config, old = peft_dst.DSTConfig, get_peft_model(base(), peft_dst.DSTConfig(epsilon=0.02))
member = PeftType.DST
for name in [name for name in sys.modules if name.partition(".")[0] == "peft_dst"]:
    del sys.modules[name]
import peft_dst
assert peft_dst.DSTConfig is not old_config and PeftType.DST is member and [*PeftType].count("DST") == 1
for config in (peft_dst.DSTConfig(epsilon=0.02), old_config(epsilon=0.02)):
    new = get_peft_model(base(), config)
    assert type(new.base_model) is peft_dst.DSTModel
    for model in (old, new):
        seed = {n: p.detach().clone() for n, p in base().named_parameters()}
        train(model, "bert")
        inner = model.get_base_model().named_parameters()
        moved = sum(int((p != seed[n]).sum()) for n, p in inner if n in seed)
        assert moved == model.get_nb_trainable_parameters()[0]
        model.save_pretrained(sys.argv[1])
        assert sum(len(t) for t in load_file(sys.argv[1] + "/adapter_model.safetensors").values()) == 2 * moved
        assert PeftModel.from_pretrained(base(), sys.argv[1]).get_nb_trainable_parameters()[0] == 0
        assert model.get_nb_trainable_parameters()[0] == model.base_model.constraint().budget
print("all were served")
"""
    )
    assert "all were served" in apart(run, script, tmp_path)


def test_processes_know_the_member_that_another_one_sends(tmp_path, apart):
    """A pickle is read where only peft was imported; workers are forked and spawned."""
    (tmp_path / "member").write_bytes(pickle.dumps({"type": PeftType.DST, "config": DSTConfig(epsilon=0.25)}))
    python(
        """
import pickle, sys
import peft
assert "peft_dst" not in sys.modules and "DST" not in peft.PeftType.__members__
found = pickle.load(open(sys.argv[1], "rb"))
assert found["type"] is peft.PeftType.DST is found["config"].peft_type and found["config"].epsilon == 0.25
assert isinstance(peft.get_peft_config({"peft_type": "DST"}), type(found["config"]))
""",
        tmp_path / "member",
    )
    script = tmp_path / "script.py"
    script.write_text(
        """
import torch
from accelerate import debug_launcher
from torch.utils.data import DataLoader, Dataset

class Rows(Dataset):
    def __init__(self, config):
        self.config = config
    def __len__(self):
        return 4
    def __getitem__(self, i):
        from peft import PeftType
        return i, self.config, PeftType("DST")

def keep(rows):
    return rows

def in_a_process(rank, config=None):
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    assert config.peft_type is PeftType.DST
    assert type(config) is PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.DST]

def two_ranks(config):
    import torch
    from accelerate import PartialState
    from peft import get_peft_model
    from tests.models import bert, train
    assert PartialState(cpu=True).num_processes == 2
    torch.manual_seed(0)
    model = get_peft_model(bert(), config)
    train(model, "bert", steps=1)
    assert model.get_nb_trainable_parameters()[0] == model.base_model.constraint().budget

if __name__ == "__main__":
    from peft import PeftType
    from peft_dst import DSTConfig
    config = DSTConfig(epsilon=0.25)
    for context, workers in (("fork", 2), ("spawn", 1)):
        options = {"num_workers": workers, "multiprocessing_context": context}
        loader = DataLoader(Rows(config), collate_fn=keep, batch_size=2, **options)
        found = [row for rows in loader for row in rows]
        assert [i for i, *_ in found] == [0, 1, 2, 3]
        assert all(c == config and c.peft_type is t is PeftType.DST for _, c, t in found)
    torch.multiprocessing.start_processes(in_a_process, (config,), nprocs=2, start_method="fork")
    debug_launcher(two_ranks, (config,), num_processes=2)
    print("all came back")
"""
    )
    assert "all came back" in apart(run, script)


@pytest.fixture
def registered(monkeypatch):
    """PEFT's mappings, to be put back."""
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        monkeypatch.setitem(mapping, PeftType.DST, mapping[PeftType.DST])


def test_a_method_of_the_same_name_is_left_alone(registered):
    class TheirConfig:
        pass

    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.DST] = TheirConfig
    with pytest.raises(ImportError, match=r"already knows a method 'DST', tests\.test_registration.*TheirConfig"):
        peft_dst.register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.DST] is TheirConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.DST] is DSTModel


def test_a_peft_that_knows_the_name_but_has_no_such_method(registered):
    """The member that is there is used."""
    for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        del mapping[PeftType.DST]
    before = list(PeftType)
    peft_dst.register()
    assert list(PeftType) == before
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.DST] is DSTConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.DST] is DSTModel


class Numbers(enum.Enum):
    LORA = 1


@pytest.mark.parametrize("other", [Numbers, type("Plain", (), {"__members__": {}})])
def test_an_enum_of_another_make_is_refused(other, monkeypatch):
    monkeypatch.setattr(registration, "PeftType", other)
    with pytest.raises(ImportError, match=r"cannot add 'DST' to peft .*Install one of those"):
        peft_dst.register()
    assert list(getattr(other, "__members__", ())) in (["LORA"], [])
