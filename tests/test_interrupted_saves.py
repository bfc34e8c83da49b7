"""A save that is killed at any of its moments leaves the old adapter or the new one, whole."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_dst import DSTConfig
from peft_dst.delta import SparseDelta


CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "shutil.copyfile"}


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 4))


def kill_at_every_moment(how: str, root: Path) -> tuple[int, int, int]:
    """How many moments there were, and after how many the old and the new adapter were found.

    In a process of its own, which forks: pytest's has threads. A child is killed where it would change the file system
    for the n-th time; what the libraries in Rust and C++ do in between happens to files that only they know.
    """

    def tuned(epsilon, seed):
        options = {"modules_to_save": ["2"], "packed": how == "packed"}
        model = get_peft_model(base(), DSTConfig(epsilon=epsilon, **options))
        if how == "several":
            model.add_adapter("other", DSTConfig(epsilon=epsilon, **options))
        for name in list(model.peft_config):
            model.set_adapter(name)
            torch.manual_seed(seed + len(name))
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
            model(torch.randn(8, 30)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        model.set_adapter("default")
        return model

    def write(model, folder):
        if how == "delta":
            deltas[id(model)].save(folder)
        else:
            model.save_pretrained(folder, safe_serialization=how != "pickled")

    def read(folder, name="default"):
        loaded = PeftModel.from_pretrained(base(), folder if name == "default" else folder / name)
        state = {n: p.detach().clone() for n, p in loaded.get_base_model().named_parameters() if "_sparse" not in n}
        return state, loaded.peft_config["default"].epsilon

    def same(one, other):
        return (
            one[1] == other[1]
            and one[0].keys() == other[0].keys()
            and all(torch.equal(one[0][n], other[0][n]) for n in one[0])
        )

    def killed(model, folder, moment):
        child = os.fork()
        if child == 0:
            count = 0

            def hook(event, arguments):
                nonlocal count
                writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
                if event in CHANGES or writes:
                    count += 1
                    if count == moment:
                        os._exit(9)

            sys.addaudithook(hook)
            try:
                write(model, folder)
                os._exit(0)
            finally:
                os._exit(1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9

    first, second = tuned(0.02, 1), tuned(0.05, 2)
    names = list(first.peft_config)
    deltas, known = {}, []
    for model in (first, second):
        folder = root / f"whole{len(known)}"
        model.save_pretrained(folder, safe_serialization=how != "pickled")
        if how == "delta":
            deltas[id(model)] = SparseDelta.load(folder)
        known.append({name: read(folder, name) for name in names})
    assert not any(same(known[0][name], known[1][name]) for name in names)

    moment, found = 1, [0, 0]
    while True:
        folder = root / str(moment)
        if how == "pickled":
            # What is there before is in safetensors.
            first.save_pretrained(folder)
        else:
            write(first, folder)
        if not killed(second, folder, moment):
            break
        for name in names:
            now = read(folder, name)
            which = [same(now, state[name]) for state in known]
            assert sum(which) == 1, (moment, name, sorted(path.name for path in folder.rglob("*")))
            found[which.index(True)] += 1
        # The next save is none the worse for it.
        write(second, folder)
        assert all(same(read(folder, name), known[1][name]) for name in names)
        moment += 1
    assert all(same(read(folder, name), known[1][name]) for name in names)
    return moment - 1, *found


# One plain adapter: those of "several" are, and "packed" is one.
@pytest.mark.parametrize("how", ["packed", "several", "pickled", "delta"])
def test_killed_at_any_moment(how, tmp_path, apart):
    moments, old, new = apart(kill_at_every_moment, how, tmp_path)
    # Moments before and after the change there are, and no other outcome.
    assert moments >= 5
    assert old > 0
    assert new > 0
