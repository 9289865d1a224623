"""Files: reading a model's protobuf, data files beside a model, and atomic writing."""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import signal
import stat
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray

from onnxq.errors import ModelError

PROTOBUF_LIMIT = 2**31 - 1
"""Bytes that fit one protobuf message."""

CHUNK = 1 << 24
"""Bytes copied at a time from one data file to another."""


LEFTOVER_SECONDS = 86400
"""Age at which nobody writes to a temporary file any more."""


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write a file so that `path` holds its old content, or all of the new one, never a part.

    The bytes go into a temporary file in the same folder, which takes the name `path` (and the
    permissions of the file that had it) when the block ends; if the block raises, nothing is left
    behind. A symbolic link at `path` is replaced, what it points to stays.

    Raises ModelError, one line, when the file cannot be written.
    """
    with atomic_writes(path) as (file,):
        yield file


@contextmanager
def atomic_writes(*paths: str | os.PathLike[str]) -> Iterator[tuple[BinaryIO, ...]]:
    """Write several files, as `atomic_write` does one: all are complete before any takes its name.

    They take their names in the order of `paths`, and no signal comes between.
    """
    with ExitStack() as stack:
        drafts = [stack.enter_context(_Draft(Path(path))) for path in reversed(paths)][::-1]
        yield tuple(draft.file for draft in drafts)
        for draft in drafts:
            draft.complete()
        with _undisturbed():
            for draft in drafts:
                draft.commit()


class _Draft:
    """A temporary file on its way to become `target`; all that fails is told as ModelError."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.temporary = target.parent / f".onnxq-{secrets.token_hex(8)}.tmp"
        with self._told():
            self.mode = _mode_of(target)
            self.file = _create(self.temporary)

    def __enter__(self) -> _Draft:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with suppress(OSError):
            self.file.close()
        with suppress(OSError):
            self.temporary.unlink()
        if isinstance(error, OSError):
            with self._told():
                raise error

    def complete(self) -> None:
        """Bring all bytes to the disk, under the temporary name."""
        with self._told():
            self.file.flush()
            if self.mode is not None:
                os.chmod(self.file.fileno(), self.mode)
            os.fsync(self.file.fileno())
            if not self.temporary.exists():
                _give_name(self.file.fileno(), self.temporary)
            self.file.close()

    def commit(self) -> None:
        """Take the place of the target."""
        with self._told():
            os.replace(self.temporary, self.target)
            _sync_folder(self.target.parent)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            reason = e.strerror or str(e)
            raise ModelError(
                f"{self.target}: cannot be written ({reason}); choose another output"
            ) from e


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise ModelError now if `atomic_write` could not even begin."""
    with _Draft(Path(path)):
        pass


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold back SIGINT and SIGTERM; their handlers run in the main thread, and would raise."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    late: list[int] = []
    before = {
        number: signal.signal(number, lambda got, frame: late.append(got))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for got in late:
            signal.raise_signal(got)


def _mode_of(target: Path) -> int | None:
    """Permissions of the file to be replaced; None when there is none. Raises OSError."""
    if not target.exists():
        return None
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not target.is_file():  # /dev/null would be replaced by a plain file
        raise OSError(errno.EINVAL, "not a regular file")
    os.close(os.open(target, os.O_WRONLY))  # a rename would not ask
    return stat.S_IMODE(target.stat().st_mode)


def _create(temporary: Path) -> BinaryIO:
    """A new file to write; where the system can, without a name: none is left if we are killed."""
    unnamed = getattr(os, "O_TMPFILE", None)
    if unnamed is not None and Path("/proc/self/fd").is_dir():
        with suppress(OSError):
            return os.fdopen(os.open(temporary.parent, unnamed | os.O_RDWR, 0o666), "wb")
    _remove_leftovers(temporary.parent)
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(temporary, flags, 0o666), "wb")


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed runs left behind, of files that have a name: a day old, to be sure."""
    for old in folder.glob(".onnxq-*.tmp"):
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > LEFTOVER_SECONDS:
                old.unlink()


def _give_name(descriptor: int, name: Path) -> None:
    folder = os.open(name.parent, os.O_RDONLY)
    try:
        # Python follows the link in /proc only if a folder is given, though the path is absolute
        os.link(f"/proc/self/fd/{descriptor}", name.name, src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        os.close(folder)


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every system lets a folder be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_model(path: Path) -> onnx.ModelProto:
    """Parse a model file; external data is not read.

    Raises ModelError, one line that says what to do, for anything that is not a model.
    """
    proto = onnx.ModelProto()
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise ModelError(f"{path}: is a folder; name the .onnx file in it")
        if size > PROTOBUF_LIMIT:
            raise ModelError(f"{path}: over 2 GiB in one file; save it with external data")
        if size == 0:
            raise ModelError(f"{path}: the file is empty; download or export it again")
        proto.ParseFromString(path.read_bytes())
    except (OSError, ValueError) as e:  # ValueError: a NUL in the path
        reason = getattr(e, "strerror", None) or str(e)
        raise ModelError(f"{path}: cannot be read ({reason}); check the path") from e
    except DecodeError as e:
        raise ModelError(
            f"{path}: not an ONNX model, or cut short; download or export it again"
        ) from e
    check_model(proto, str(path))
    for entry in proto.opset_import:
        newest = onnx.defs.onnx_opset_version()
        if entry.domain in ("", "ai.onnx") and entry.version > newest:
            raise ModelError(
                f"{path}: opset {entry.version} is newer than onnx {onnx.__version__} knows "
                f"({newest}); install a newer onnx"
            )
    return proto


def check_model(proto: onnx.ModelProto, where: str) -> None:
    """Refuse what is no model: no graph, no operator set, from the future.

    Raises ModelError, with `where` in front.
    """
    if not proto.HasField("graph") or not proto.opset_import:
        missing = "opset_import" if proto.HasField("graph") else "graph"
        raise ModelError(f"{where}: not an ONNX model (no {missing}); export it again")
    if proto.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"{where}: IR version {proto.ir_version} is newer than onnx {onnx.__version__} knows "
            f"({onnx.IR_VERSION}); install a newer onnx"
        )


class DataFile:
    """A file with the bytes of weights.

    A kept file stays open, so that it can still be read after a save has put another one in its
    place. Not all can be kept: some exporters write one file a tensor, systems limit open files.
    """

    def __init__(self, path: Path, *, keep: bool, flags: int = 0) -> None:
        self.path = path
        descriptor = os.open(path, _READ | flags)
        self.size = os.fstat(descriptor).st_size
        self._identity = _identity(descriptor)
        self._descriptor: int | None = None
        if keep:
            self._descriptor = descriptor
            weakref.finalize(self, os.close, descriptor)
        else:
            os.close(descriptor)

    @classmethod
    def unnamed(cls) -> DataFile:
        """A new file to append to, that goes with this value. Raises OSError."""
        descriptor, name = tempfile.mkstemp(prefix="onnxq-")
        try:
            return cls(Path(name), keep=True, flags=os.O_RDWR)
        finally:
            os.close(descriptor)
            os.unlink(name)

    def append(self, data: Any) -> int:
        """Write bytes at the end; return where that was. Raises OSError."""
        assert self._descriptor is not None
        offset = -(-self.size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        view, done = memoryview(data), 0
        while done < len(view):
            done += os.pwrite(self._descriptor, view[done : done + CHUNK], offset + done)
        self.size = offset + done
        return offset

    @contextmanager
    def _open(self) -> Iterator[int]:
        if self._descriptor is not None:
            yield self._descriptor
            return
        try:
            descriptor = os.open(self.path, _READ)
        except OSError as e:
            raise ModelError(f"{self.path}: cannot be read any more ({e.strerror})") from e
        try:
            if _identity(descriptor) != self._identity:
                raise ModelError(f"{self.path}: was changed after the model was loaded; load again")
            yield descriptor
        finally:
            os.close(descriptor)

    def map(self, offset: int, size: int) -> NDArray[np.uint8]:
        """A read-only view of bytes; the pages are given back when it is garbage."""
        if size == 0:
            return np.empty(0, np.uint8)
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        with self._open() as descriptor:
            pages = mmap.mmap(
                descriptor, offset + size - start, access=mmap.ACCESS_READ, offset=start
            )
        return np.frombuffer(pages, np.uint8, size, offset - start)

    def chunks(self, offset: int, size: int) -> Iterator[bytes]:
        """The bytes in pieces, so that copying a tensor of gigabytes takes megabytes."""
        with self._open() as descriptor, os.fdopen(os.dup(descriptor), "rb", buffering=0) as file:
            file.seek(offset)
            while size:
                piece = file.read(min(size, CHUNK))
                if not piece:
                    raise ModelError(f"{self.path}: became shorter while it was read")
                yield piece
                size -= len(piece)


_READ = os.O_RDONLY | getattr(os, "O_BINARY", 0)


def _identity(descriptor: int) -> tuple[int, ...]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class DataFolder:
    """The folder of a model, as far as its external data may reach."""

    KEEP = 32
    """Data files held open; the rest are opened when they are read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, DataFile] = {}

    def locate(self, tensor: onnx.TensorProto, size: int) -> tuple[DataFile, int]:
        """The file and offset of a tensor that needs `size` bytes.

        Raises ModelError when the place lies outside of the folder, is missing or too short.
        """
        entries = {entry.key: entry.value for entry in tensor.external_data}
        what = f"tensor {tensor.name!r}"
        try:
            offset = int(entries.get("offset", 0))
            length = int(entries.get("length", size))
        except ValueError as e:
            raise ModelError(f"{what}: offset or length of its data is not a number") from e
        location = entries.get("location", "")
        file = self._open(location, what)
        if offset < 0 or length < size or offset + max(length, size) > file.size:
            raise ModelError(
                f"{what}: needs {size} bytes at {offset} of {location!r}, declared {length}, the "
                f"file has {file.size}; download or export the data file again"
            )
        return file, offset

    def _open(self, location: str, what: str) -> DataFile:
        if location in self._files:
            return self._files[location]
        path = self.folder / _inside(location, what)
        try:
            if not path.resolve().is_relative_to(self.folder.resolve()):
                raise ModelError(
                    f"{what}: data file {location!r} is a link that leaves the model's folder; "
                    "copy the real file there"
                )
            if not path.is_file():
                raise ModelError(f"{what}: data file {location!r} is missing beside the model")
            file = DataFile(path, keep=len(self._files) < self.KEEP)
        except (OSError, RuntimeError) as e:  # RuntimeError: links in a circle
            reason = getattr(e, "strerror", None) or str(e)
            raise ModelError(f"{what}: data file {location!r} cannot be read ({reason})") from e
        self._files[location] = file
        return file


def _inside(location: str, what: str) -> PurePosixPath:
    """The location as a path that cannot leave its folder, on any system."""
    path, windows = PurePosixPath(location), PureWindowsPath(location)
    bad = not location or "\0" in location or ".." in path.parts or ".." in windows.parts
    if bad or path.is_absolute() or windows.anchor:
        raise ModelError(
            f"{what}: data location {location!r} is not inside the model's folder; "
            "put the data file beside the model"
        )
    return path
