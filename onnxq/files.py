"""Files: reading a model's protobuf, and atomic writing."""

from __future__ import annotations

import errno
import os
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from onnxq.errors import ModelError
from onnxq.leftovers import create, temporary_name

PROTOBUF_LIMIT = 2**31 - 1
"""Bytes that fit one protobuf message."""


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
        self.temporary = temporary_name(target.parent)
        with self._told():
            self.mode = _mode_of(target)
            self.file = os.fdopen(create(self.temporary), "wb")

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
            if os.name == "nt":  # which renames no open file
                self.file.close()

    def commit(self) -> None:
        """Take the place of the target."""
        with self._told():
            os.replace(self.temporary, self.target)
            self.file.close()  # not before: its lock says whose it is
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
