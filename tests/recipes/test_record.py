"""What is written down of the surroundings of a run."""

from __future__ import annotations

import subprocess

from peft_dst.recipes import record


def test_the_commit_is_a_commit(tmp_path, monkeypatch):
    """Not a tag that names it; changes that are not committed are told."""
    package = tmp_path / "package" / "recipes"
    package.mkdir(parents=True)
    (package / "record.py").write_text("1")

    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "tag.gpgSign=false", "-c", "commit.gpgSign=false")
        command = ["git", "-C", str(tmp_path), *who, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    git("tag", "-a", "v9", "-m", "nine")
    monkeypatch.setattr(record, "__file__", str(package / "record.py"))
    head = git("rev-parse", "HEAD")
    assert record.surroundings()["commit"] == head
    (package / "record.py").write_text("2")
    assert record.surroundings()["commit"] == f"{head}-dirty"
