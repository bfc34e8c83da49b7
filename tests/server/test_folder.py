"""The folder of deltas: what is taken from it, what comes into it and leaves it, also beside another server's."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import stat

import pytest

from peft_dst.delta import DeltaError
from peft_dst.server.folder import ABANDONED, DeltaFolder
from peft_dst.server.limits import Refused
from peft_dst.serving import DeltaPool
from tests.server.servers import parts_of, write_deltas


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return parts_of(tmp_path_factory.mktemp("base"))[0]


@pytest.fixture
def pool(base):
    with DeltaPool(base) as made:
        yield made


@pytest.fixture
def path(base, tmp_path):
    """A folder of two deltas."""
    write_deltas(base, tmp_path / "deltas", 2)
    return tmp_path / "deltas"


@pytest.fixture
def upload(base, tmp_path):
    """Puts the files of a third delta into a folder."""
    write_deltas(base, tmp_path / "new", 1, start=7)

    def put(folder):
        folder.mkdir(exist_ok=True)
        for path in (tmp_path / "new" / "task7").iterdir():
            shutil.copyfile(path, folder / path.name)

    return put


def names(path):
    return sorted(found.name for found in path.iterdir())


def test_another_server_s_uploads_are_left_alone(base, pool, path, upload):
    folder = DeltaFolder(pool, path, "base")
    with folder.incoming() as under_way:
        upload(under_way)
        old = path / ".incoming-old"
        upload(old)
        past = old.stat().st_mtime - ABANDONED - 1
        os.utime(old, (past, past))
        with DeltaPool(copy.deepcopy(base)) as other:
            DeltaFolder(other, path, "base")
            assert other.names() == ["task0", "task1"]
        assert not old.exists()
        folder.take("new", under_way)
    assert names(path) == ["new", "task0", "task1"]


def test_what_is_left_out(pool, path, caplog):
    for name, text in (("lora", json.dumps({"peft_type": "LORA"})), ("damaged", "{"), ("task7", None)):
        (path / name).mkdir()
        if text is not None:
            (path / name / "adapter_config.json").write_text(text)
    folder = DeltaFolder(pool, path, "base")
    assert pool.names() == ["task0", "task1"]
    folder.report()
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "'damaged' is left out" in caplog.messages[0]
    assert "'lora' is left out" in caplog.messages[1]
    assert "describes an adapter of type 'LORA'" in caplog.messages[1]


def test_folders_whose_names_no_client_could_give(base, pool, path, caplog):
    """One that is no UTF-8 could not be told either: no list of the models would be answered any more."""
    for name in (b"\xff", b"two words", b"_hidden"):
        shutil.copytree(path / "task0", path / os.fsdecode(name))
    folder = DeltaFolder(pool, path, "base")
    assert pool.names() == ["task0", "task1"]
    folder.report()
    assert len(caplog.messages) == 3
    assert all("is no name: letters, digits" in message for message in caplog.messages)


def test_a_folder_without_deltas(pool, path, tmp_path, caplog):
    with pytest.raises(ValueError, match="is an adapter's own folder"):
        DeltaFolder(pool, path / "task0", "base")
    DeltaFolder(pool, tmp_path / "dletas", "base").report()
    assert f"there are no deltas in {tmp_path / 'dletas'}" in caplog.text
    caplog.clear()
    DeltaFolder(pool, None, "base").report()
    assert caplog.messages == []


def test_the_files_of_a_removed_delta_may_be_gone(pool, path):
    folder = DeltaFolder(pool, path, "base")
    shutil.rmtree(path / "task0")
    folder.remove("task0")
    assert pool.names() == names(path) == ["task1"]
    with pytest.raises(Refused, match="there is no delta 'task0'"):
        folder.remove("task0")


def test_a_delta_whose_files_cannot_be_removed_stays(pool, path, monkeypatch):
    folder = DeltaFolder(pool, path, "base")

    def refuse(*_):
        raise PermissionError("not yours")

    monkeypatch.setattr("pathlib.Path.rename", refuse)
    with pytest.raises(PermissionError):
        folder.remove("task0")
    assert sorted(pool.names()) == names(path) == ["task0", "task1"]
    with pool.use("task0"):
        pass


def test_why_an_upload_does_not_get_its_name(pool, path, upload, monkeypatch):
    folder = DeltaFolder(pool, path, "base")
    (path / "notes").mkdir()
    (path / "notes" / "a.txt").touch()
    (path / "file").touch()
    with folder.incoming() as made:
        upload(made)
        for name in ("task0", "base", "notes", "file"):
            with pytest.raises(Refused, match=f"there is a model '{name}' already") as error:
                folder.take(name, made)
            assert error.value.status == 409

        def refuse(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("pathlib.Path.rename", refuse)
        with pytest.raises(OSError, match="No space left"):
            folder.take("new", made)
    assert names(path) == ["file", "notes", "task0", "task1"]
    assert pool.names() == ["task0", "task1"]


def test_an_upload_has_the_usual_permissions(pool, path, upload):
    folder = DeltaFolder(pool, path, "base")
    before = os.umask(0o027)
    try:
        with folder.incoming() as made:
            # Nobody else looks into it meanwhile.
            assert stat.S_IMODE(made.parent.stat().st_mode) == 0o700
            upload(made)
            folder.take("new", made)
    finally:
        os.umask(before)
    assert stat.S_IMODE((path / "new").stat().st_mode) == 0o750


def test_a_pool_that_closes_meanwhile(pool, path, upload, monkeypatch):
    """What was told to have failed is not there when a server starts again."""
    folder = DeltaFolder(pool, path, "base")
    real = pool.verify
    monkeypatch.setattr(pool, "verify", lambda delta: (real(delta), pool.close()))
    with folder.incoming() as made:
        upload(made)
        for what in (lambda: folder.take("new", made), lambda: folder.remove("task0")):
            with pytest.raises(Refused, match="the server is stopping") as error:
                what()
            assert error.value.status == 503
    assert names(path) == ["task0", "task1"]


def test_an_abandoned_upload_that_another_server_removes(pool, path, monkeypatch):
    (path / ".incoming-old").mkdir()
    os.utime(path / ".incoming-old", (0, 0))
    real = shutil.rmtree

    def first(left, **options):
        real(left)
        real(left, **options)

    monkeypatch.setattr(shutil, "rmtree", first)
    DeltaFolder(pool, path, "base")
    assert names(path) == ["task0", "task1"]


def test_errors_of_an_upload_do_not_tell_where_it_lies(pool, path, upload):
    folder = DeltaFolder(pool, path, "base")
    with folder.incoming() as made:
        for name, data in (("adapter_config.json", b"{"), ("adapter_model.safetensors", b"\0" * 100)):
            upload(made)
            (made / name).write_bytes(data)
            with pytest.raises(DeltaError, match=name) as error:
                folder.take("new", made)
            assert str(path) not in str(error.value)
    assert names(path) == ["task0", "task1"]
