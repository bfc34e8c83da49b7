"""The deltas' files: a folder each, which may come and go while they are served."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..delta import CONFIG_NAME, WEIGHTS_NAME, DeltaError, SparseDelta
from ..delta.files import read_config
from ..delta.packed import DESCRIPTION
from ..serving import DeltaPool, UnknownDelta
from .limits import Refused


LOG = logging.getLogger(__name__)
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}")
INCOMING = ".incoming-"
# Seconds after which an upload that nothing was written to any more is none.
ABANDONED = 3600.0
# Of an upload, and parsed as JSON, which takes many times as much memory: adapter_config.json, the header of the tensors'
# file (which has much the same in it, and the tensors' names), and the packed description of them.
CONFIG_BYTES, HEADER_BYTES, DESCRIPTION_BYTES = 2**20, 2**22, 2**18


class DeltaFolder:
    """The deltas of a pool, and where they lie.

    Adapters of other methods, what has no config that can be read, and what no upload could be called, are left out.

    Args:
        pool: gets those that are there.
        path: a folder of folders, made if it is not there; None for no deltas, and no uploads.
        base: the base's name, which no delta may have.

    Attributes:
        left_out: why, for each folder of an adapter that is none of the deltas.

    Raises:
        ValueError: if a delta has it, or the folder is an adapter's own.
    """

    def __init__(self, pool: DeltaPool, path: Path | None, base: str) -> None:
        self.pool, self.path, self.base = pool, path, base
        self.left_out: dict[str, str] = {}
        if path is not None:
            self._open(path)
        if base in pool:
            raise ValueError(f"the base is called {base!r}, and so is a delta; rename one of them.")

    def _open(self, path: Path) -> None:
        if (path / CONFIG_NAME).exists():
            raise ValueError(
                f"{path} is an adapter's own folder. Give a folder of adapters, which has a folder for each."
            )
        path.mkdir(parents=True, exist_ok=True)
        for left in path.glob(f"{INCOMING}*"):
            # Of uploads that were killed; others may be another server's, and under way. It may be removing these as well.
            with contextlib.suppress(FileNotFoundError):
                if time.time() - left.stat().st_mtime > ABANDONED:
                    shutil.rmtree(left, ignore_errors=True)
        for config in sorted(path.glob(f"[!.]*/{CONFIG_NAME}")):
            folder = config.parent
            try:
                _check_spelling(folder.name)
                read_config(folder)
            except (Refused, DeltaError) as error:
                self.left_out[folder.name] = str(error)
            else:
                self.pool.add(folder.name, folder)

    def report(self) -> None:
        """Log what may be otherwise than was meant: adapters that are left out, and a folder without any."""
        for name, why in self.left_out.items():
            LOG.warning("%r is left out: %s", name, why)
        if self.path is not None and not len(self.pool):
            LOG.warning("there are no deltas in %s; only the base is served.", self.path.absolute())

    @contextlib.contextmanager
    def incoming(self) -> Iterator[Path]:
        """A new folder for what is being uploaded, beside the deltas; it goes at the end, if `take` has not taken it.

        Raises:
            Refused: if the server takes none.
        """
        if self.path is None:
            raise Refused("this server has no folder for deltas.", 403)
        with tempfile.TemporaryDirectory(prefix=INCOMING, dir=self.path, ignore_cleanup_errors=True) as around:
            # That one is private.
            folder = Path(around) / "delta"
            folder.mkdir()
            yield folder

    def take(self, name: str, folder: Path) -> SparseDelta:
        """Check an uploaded delta against the base, and add it; blocking.

        Args:
            name: what it is to be called.
            folder: made by `incoming`, with its two files; it becomes the delta's, or is left where it is.

        Raises:
            Refused: if the name is none or taken, the files are larger than they may be, or the pool is closed.
            DeltaError: if the files are not as they should be, or of another base.
            OSError: if the folder cannot get its name.
        """
        self.check_name(name)
        try:
            check_sizes(folder)
            delta = SparseDelta.load(folder)
        except DeltaError as error:
            # Where the server keeps its files is nobody's business.
            raise DeltaError(str(error).replace(f"{folder}{os.sep}", "").replace(str(folder), "the upload")) from None
        self.pool.verify(delta)
        assert self.path is not None
        target = self.path / name
        try:
            folder.rename(target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            raise _taken(name) from None
        try:
            self.pool.add(name, target)
        except BaseException:
            # What was not taken is not to be there when a server starts again.
            shutil.rmtree(target, ignore_errors=True)
            self.check_open()
            raise
        return delta

    def check_open(self) -> None:
        """Check that the pool is not closed, which then has no names.

        Raises:
            Refused: if it is.
        """
        if self.pool.closed:
            raise Refused("the server is stopping.", 503, "overloaded")

    def check_name(self, name: str) -> None:
        """Check that a new delta can be called that.

        Raises:
            Refused: if it is no name, or taken, or the pool is closed.
        """
        self.check_open()
        _check_spelling(name)
        if name == self.base or name in self.pool:
            raise _taken(name)

    def remove(self, name: str) -> None:
        """Remove a delta, once nobody uses it; blocking. Its files may be gone already.

        Raises:
            Refused: if there is none, or it is the base, or the pool is closed.
            OSError: if its files cannot be removed; then it stays.
        """
        self.check_open()
        if name == self.base or name not in self.pool:
            raise _missing(name)
        try:
            self.pool.remove(name)
        except UnknownDelta:
            raise _missing(name) from None
        assert self.path is not None
        folder = self.path / name
        try:
            # Renamed first: a server killed in the middle does not come up with half of it.
            with self.incoming() as leaving, contextlib.suppress(FileNotFoundError):
                folder.rename(leaving / name)
        except OSError:
            self.pool.add(name, folder)
            raise


def check_sizes(folder: Path) -> None:
    """Check, before any is parsed, that an upload's JSON is no larger than it may be.

    Raises:
        Refused: if it is.
        DeltaError: if the tensors' file cannot be read.
    """
    path = folder / WEIGHTS_NAME
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    sizes = [
        (CONFIG_NAME, (folder / CONFIG_NAME).stat().st_size, CONFIG_BYTES),
        # A damaged file announces anything; that is told below.
        (f"the header of {WEIGHTS_NAME}", header if header <= path.stat().st_size else 0, HEADER_BYTES),
    ]
    _check_sizes(sizes)
    try:
        with safe_open(path, framework="pt") as file:
            shape = file.get_slice(DESCRIPTION).get_shape() if DESCRIPTION in file.keys() else []  # noqa: SIM118
    except SafetensorError as error:
        raise DeltaError(f"{WEIGHTS_NAME} cannot be read ({error}). It is damaged; upload it again.") from error
    _check_sizes([(f"{DESCRIPTION!r} in {WEIGHTS_NAME}", math.prod(shape), DESCRIPTION_BYTES)])


def _check_sizes(sizes: list[tuple[str, int, int]]) -> None:
    for what, size, most in sizes:
        if size > most:
            raise Refused(f"{what} may have {most:,} bytes, not {size:,}.", 413)


def _check_spelling(name: str) -> None:
    if not NAME.fullmatch(name):
        raise Refused(
            f"{name[:80]!r} is no name: letters, digits, '_', '.' and '-', 64 at most, a letter or digit first."
        )


def _taken(name: str) -> Refused:
    return Refused(f"there is a model {name!r} already.", 409)


def _missing(name: str) -> Refused:
    return Refused(f"there is no delta {name!r}.", 404, "model_not_found")
