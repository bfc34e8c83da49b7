"""The deltas' files: a folder each, which may come and go while they are served."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from ..delta import SparseDelta
from ..serving import DeltaPool
from .limits import Refused


NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}")
INCOMING = ".incoming-"


class DeltaFolder:
    """The deltas of a pool, and where they lie.

    Args:
        pool: gets those that are there.
        path: a folder of folders, made if it is not there; None for no deltas, and no uploads.
        base: the base's name, which no delta may have.

    Raises:
        ValueError: if a delta has it.
    """

    def __init__(self, pool: DeltaPool, path: Path | None, base: str) -> None:
        self.pool, self.path, self.base = pool, path, base
        if path is not None:
            path.mkdir(parents=True, exist_ok=True)
            for left in path.glob(f"{INCOMING}*"):
                # Of uploads that were killed.
                shutil.rmtree(left)
            pool.add_folder(path)
        if base in pool:
            raise ValueError(f"the base is called {base!r}, and so is a delta; rename one of them.")

    def incoming(self) -> Path:
        """A new folder for what is being uploaded, beside the deltas.

        Raises:
            Refused: if the server takes none.
        """
        if self.path is None:
            raise Refused("this server has no folder for deltas.", 403)
        return Path(tempfile.mkdtemp(prefix=INCOMING, dir=self.path))

    def take(self, name: str, folder: Path) -> SparseDelta:
        """Check an uploaded delta against the base, and add it; blocking.

        Args:
            name: what it is to be called.
            folder: made by `incoming`, with its two files; it becomes the delta's, or is left where it is.

        Raises:
            Refused: if the name is none or taken.
            DeltaError: if the files are not as they should be, or of another base.
        """
        self.check_name(name)
        delta = SparseDelta.load(folder)
        self.pool.verify(delta)
        assert self.path is not None
        target = self.path / name
        try:
            folder.rename(target)
        except OSError:
            raise Refused(f"there is a model {name!r} already.", 409) from None
        self.pool.add(name, target)
        return delta

    def check_name(self, name: str) -> None:
        """Check that a new delta can be called that.

        Raises:
            Refused: if it is no name, or taken.
        """
        if not NAME.fullmatch(name):
            raise Refused(
                f"{name[:80]!r} is no name: letters, digits, '_', '.' and '-', 64 at most, a letter or digit first."
            )
        if name == self.base or name in self.pool:
            raise Refused(f"there is a model {name!r} already.", 409)

    def remove(self, name: str) -> None:
        """Remove a delta, once nobody uses it; blocking.

        Raises:
            Refused: if there is none, or it is the base.
        """
        if name == self.base or name not in self.pool:
            raise Refused(f"there is no delta {name!r}.", 404, "model_not_found")
        try:
            self.pool.remove(name)
        except KeyError:
            raise Refused(f"there is no delta {name!r}.", 404, "model_not_found") from None
        assert self.path is not None
        # Renamed first: a server killed in the middle does not come up with half of it.
        leaving = Path(tempfile.mkdtemp(prefix=INCOMING, dir=self.path)) / name
        (self.path / name).rename(leaving)
        shutil.rmtree(leaving.parent)
