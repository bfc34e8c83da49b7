"""The cache of a sweep's folder: several sweeps may use it at once, and the last one removes it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from filelock import BaseFileLock, FileLock, Timeout

from .record import CACHE, LOCK


# Holds a locked file for each sweep that is under way.
USERS = ".users"


@dataclass(frozen=True)
class SharedCache:
    """A sweep's part in the cache of its folder."""

    sweep: Path
    own: BaseFileLock

    @property
    def folder(self) -> Path:
        return self.sweep / CACHE

    def remove(self) -> None:
        """Give the cache up; it is removed if no other sweep uses it."""
        with FileLock(self.sweep / LOCK):
            self.own.release()
            for user in (self.sweep / USERS).iterdir():
                with suppress(Timeout):
                    with FileLock(user).acquire(blocking=False):
                        pass
                    user.unlink(missing_ok=True)
            if not any((self.sweep / USERS).iterdir()):
                for left in (CACHE, USERS):
                    shutil.rmtree(self.sweep / left, ignore_errors=True)


@contextmanager
def shared_cache(sweep: Path) -> Iterator[SharedCache]:
    """The cache of a sweep's folder, which no other sweep removes meanwhile."""
    sweep.mkdir(parents=True, exist_ok=True)
    with FileLock(sweep / LOCK):
        (sweep / USERS).mkdir(exist_ok=True)
        # The system releases it when the process ends, however it ends.
        own = FileLock(sweep / USERS / uuid4().hex)
        own.acquire()
    try:
        yield SharedCache(sweep, own)
    finally:
        own.release()
