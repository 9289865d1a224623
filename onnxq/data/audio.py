"""Samples from .wav files: PCM of 8 to 32 bits as floats in [-1, 1], one channel, in windows."""

from __future__ import annotations

import io
import wave
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.data.columns import listed, stacked
from onnxq.data.fitting import only_input, shape_text
from onnxq.data.samples import Feed, Samples
from onnxq.errors import DataError
from onnxq.model import Model

LONGEST = 30  # seconds of a window where the input's length is free
CONVERT = "convert it to 16-bit PCM"


class _AsPcm(io.FileIO):
    """A file whose format WAVE_FORMAT_EXTENSIBLE is read as what it stands for.

    Files of 24 bits are usually of that format, which `wave` reads from Python 3.12 on only.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        head = super().read(1024)
        self.seek(0)
        found = head.find(b"fmt ") + 8  # then tag, channels, rates, bits, ..., the real tag at 24
        is_extensible = head[found : found + 2] == b"\xfe\xff" and len(head) > found + 26
        self.tag, self.place = head[found + 24 : found + 26] if is_extensible else b"", found

    def read(self, size: int | None = -1, /) -> bytes:
        begin = self.tell()
        data = bytearray(super().read(-1 if size is None else size) or b"")
        offset = self.place - begin
        if self.tag and 0 <= offset <= len(data) - 2:
            data[offset : offset + 2] = self.tag
        return bytes(data)


@dataclass(frozen=True, slots=True)
class Recording:
    """What the header of a .wav file says; `frames` are values a channel."""

    path: Path
    rate: int
    frames: int
    channels: int
    width: int

    def read(self, start: int, count: int) -> NDArray[np.float32]:
        """Values from `start` on, at most `count`, the mean of the channels."""
        with _AsPcm(self.path) as file, wave.open(file, "rb") as stream:
            stream.setpos(start)
            data = stream.readframes(count)
        wanted = min(count, self.frames - start) * self.channels * self.width
        if len(data) < wanted:
            raise DataError(f"{self.path}: cut off, its header promises {self.frames} values")
        values = _floats(data, self.width).reshape(-1, self.channels)
        mixed: NDArray[np.float32] = values.mean(1, dtype=np.float32)
        return mixed


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a recording."""

    recording: Recording
    start: int
    length: int

    def read(self) -> NDArray[np.float32]:
        """The window's values; zeros where the recording is over."""
        values = self.recording.read(self.start, self.length)
        return np.pad(values, (0, self.length - len(values)))


def from_wavs(files: list[Path], text: str, model: Model) -> Samples:
    """A sample a window of the input's length; the last one of a file is padded with zeros.

    A rest of less than half a window is left out, unless it is all there is. Where the length is
    free, a sample is a file, in parts of 30 s at most. Nothing is resampled: the files' rate is
    stated in the description, and must be one for all.

    Raises DataError: an input that is no wave, files that are no PCM, different rates, no sound.
    """
    tensor = only_input(model, text, "a .wav holds one array")
    length = _length(tensor)
    recordings = [_header(path) for path in files]
    odd = next((r for r in recordings if r.rate != recordings[0].rate), None)
    if odd is not None:
        raise DataError(
            f"{odd.path} is at {odd.rate} Hz, {recordings[0].path} at {recordings[0].rate} Hz: "
            "resample to the rate that the model was trained with"
        )
    windows = tuple(w for recording in recordings for w in _windows(recording, length))
    rate = recordings[0].rate
    lead = tuple(1 for _ in tensor.shape[1:-1])
    if length is None:
        said = f"{len(windows)} windows of {text} at {rate} Hz, one channel"

        def load(i: int) -> Feed:
            axes = len(tensor.shape) - 1
            return {tensor.name: windows[i].read().reshape((1,) * axes + (-1,))}

        return listed(load, len(windows), said, model)
    seconds = f"{length} values ({length / rate:.3g} s at {rate} Hz)"
    said = f"{len(windows)} windows of {seconds} from {len(files)} .wav of {text}, one channel"
    return stacked({tensor.name: _Windows(windows, lead, length)}, None, model, said)


def _length(tensor: gs.Variable) -> int | None:
    """The values that the input takes; None where that is free."""
    shape, dtype = tensor.shape, tensor.dtype
    is_wave = shape is not None and 1 <= len(shape) <= 3
    is_wave = is_wave and not any(isinstance(d, int) and d != 1 for d in shape[1:-1])
    if not is_wave or dtype is None or np.dtype(dtype).kind != "f":
        raise DataError(
            f"input {tensor.name!r} {shape_text(shape)} {dtype}: sound is fed as floats "
            "[n], [1, n] or [1, 1, n]; give an .npz with what the model wants"
        )
    return shape[-1] if isinstance(shape[-1], int) else None


def _header(path: Path) -> Recording:
    try:
        with _AsPcm(path) as file, wave.open(file, "rb") as stream:
            found = Recording(
                path,
                stream.getframerate(),
                stream.getnframes(),
                stream.getnchannels(),
                stream.getsampwidth(),
            )
    except (wave.Error, EOFError, OSError, RuntimeError) as e:
        text = str(e) or "it ends too soon"
        raise DataError(f"{path}: cannot be read as a PCM .wav: {text}; {CONVERT}") from e
    if not 1 <= found.width <= 4:
        raise DataError(f"{path}: {8 * found.width} bits a value; {CONVERT}")
    if not found.frames:
        raise DataError(f"{path}: holds no sound; take it out of the folder")
    return found


def _windows(recording: Recording, length: int | None) -> list[Window]:
    step = length or LONGEST * recording.rate
    starts = range(0, recording.frames, step)
    rest = recording.frames - starts[-1]
    if len(starts) > 1 and rest < step / 2:
        starts = starts[:-1]
    if length is not None:
        return [Window(recording, start, length) for start in starts]
    return [Window(recording, s, min(step, recording.frames - s)) for s in starts]


def _floats(data: bytes, width: int) -> NDArray[np.float32]:
    """Little-endian PCM as floats in [-1, 1): 8 bits are unsigned, more are signed."""
    if width == 1:
        return np.frombuffer(data, np.uint8).astype(np.float32) / np.float32(128) - np.float32(1)
    if width == 3:  # as the upper three bytes of 32 bits
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        data, width = wide.tobytes(), 4
    values = np.frombuffer(data, np.dtype(f"<i{width}"))
    return (values / 2.0 ** (8 * width - 1)).astype(np.float32)


@dataclass(frozen=True, slots=True)
class _Windows:
    """A column of windows of one length."""

    windows: tuple[Window, ...]
    lead: tuple[int, ...]
    length: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Samples first."""
        return len(self.windows), *self.lead, self.length

    def rows(self, start: int, size: int) -> Iterator[NDArray[Any]]:
        """Runs of windows."""
        for i in range(start, len(self.windows), size):
            values = np.stack([window.read() for window in self.windows[i : i + size]])
            yield values.reshape(len(values), *self.lead, self.length)
