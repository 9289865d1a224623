"""Temporary files and folders of a run, and those that killed runs have left behind.

Where the system can, a temporary file has no name: nothing is left of it. One that has a name is
locked by the process that writes it; a lock goes with its process, however that ends. So what is
not locked has no owner, and the next run that makes a temporary file beside it removes it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: it does not let go of a file that is open, which does as well
    fcntl = None  # type: ignore[assignment]

PREFIX, SUFFIX = ".onnxq-", ".tmp"
FOLDER = "onnxq-"  # what begins the name of a temporary folder
LOCK = ".onnxq-lock"  # in a temporary folder: the file that is locked

LEFTOVER_SECONDS = 86400
"""Age at which nobody writes to what cannot be locked."""


def temporary_name(folder: Path) -> Path:
    """A name in the folder that nobody has."""
    return folder / f"{PREFIX}{secrets.token_hex(8)}{SUFFIX}"


def create(temporary: Path) -> int:
    """A new file to read and write, by its descriptor; without a name where the system can.

    Leftovers in its folder are removed first. Raises OSError.
    """
    remove_leftovers(temporary.parent)
    unnamed = getattr(os, "O_TMPFILE", None)
    if unnamed is not None and Path("/proc/self/fd").is_dir():
        with suppress(OSError):
            descriptor = os.open(temporary.parent, unnamed | os.O_RDWR, 0o666)
            _claim(descriptor)
            return descriptor
    return _create_named(temporary)


def create_without_name(folder: Path) -> int:
    """As `create`, of a file that goes when it is closed. Raises OSError."""
    temporary = temporary_name(folder)
    descriptor = create(temporary)
    if os.name != "nt":
        with suppress(FileNotFoundError):
            temporary.unlink()
    return descriptor


def _create_named(path: Path) -> int:
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0)
    while True:
        descriptor = os.open(path, flags, 0o666)
        _claim(descriptor)
        with suppress(FileNotFoundError):  # somebody took it for a leftover before it was locked
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)


def _claim(descriptor: int) -> None:
    """Lock a file for as long as it is open; one who looks whether it is a leftover is brief."""
    if fcntl is not None:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)


def _is_free(descriptor: int) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders of this user that no running process owns."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            is_file = entry.name.startswith(PREFIX) and entry.name.endswith(SUFFIX)
            if is_file or entry.name.startswith(FOLDER):
                with suppress(OSError):
                    _remove(Path(entry.path), entry.stat(follow_symlinks=False))


def _remove(path: Path, status: os.stat_result) -> None:
    if hasattr(os, "getuid") and status.st_uid != os.getuid():
        return
    if stat.S_ISREG(status.st_mode):
        if path.name.endswith(SUFFIX) and _is_without_owner(path, status):
            path.unlink()
    elif not (path / LOCK).is_file():
        return  # somebody else's folder
    elif stat.S_ISDIR(status.st_mode) and _is_without_owner(path / LOCK, status):
        (path / LOCK).unlink(missing_ok=True)  # which Windows refuses while it is open
        shutil.rmtree(path, ignore_errors=True)


def _is_without_owner(locked: Path, status: os.stat_result) -> bool:
    """Whether nobody holds the lock; by its age (status) for what cannot be locked."""
    try:
        descriptor = os.open(locked, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return time.time() - status.st_mtime > LEFTOVER_SECONDS
    try:
        return _is_free(descriptor)
    except OSError:  # a file system without locks
        return time.time() - status.st_mtime > LEFTOVER_SECONDS
    finally:
        os.close(descriptor)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder of this run, in the system's place for temporary files; raises OSError."""
    remove_leftovers(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=FOLDER) as name:
        descriptor = os.open(Path(name) / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            _claim(descriptor)
            yield Path(name)
        finally:
            os.close(descriptor)
