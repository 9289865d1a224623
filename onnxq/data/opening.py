"""open_samples: which kind of source a specification is, and the samples in it."""

from __future__ import annotations

import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnxq.data.columns import Memory, listed, stacked
from onnxq.data.fitting import inputs_of
from onnxq.data.options import ImageOptions
from onnxq.data.samples import LABELS, Samples
from onnxq.errors import DataError
from onnxq.model import Model

Spec = str | os.PathLike[str] | Mapping[str, Any] | Iterable[Mapping[str, Any]] | Callable[[], Any]

IMAGES = {".png", ".jpg", ".jpeg", ".jpe", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
KINDS = {".npz": ".npz", ".npy": ".npy", ".wav": ".wav"} | dict.fromkeys(IMAGES, "images")
SET = re.compile(r"test_data_set_(\d+)")
GIVE = (
    "give an .npz or .npy, a folder of .npz, .npy, images or .wav, a .txt of token ids, "
    "a test_data_set folder or module:function"
)


def open_samples(spec: Spec, model: Model, *, images: ImageOptions | None = None) -> Samples:
    """Samples for the model's inputs.

    spec is one of
    - an .npz file or a mapping: arrays named as the inputs, sample axis first, maybe `labels`;
    - a .npy file, for a model of one input: sample axis first, mapped into memory;
    - a folder of .npz or .npy files: a sample a file;
    - a folder of images, or of folders of images (`images` says how they are fed; needs pillow);
    - a folder of .wav files, or of folders of them: windows of the input's length, in [-1, 1];
    - a .txt file of token ids: a sample a line;
    - a test_data_set_* folder of ONNX, or the folder that holds several;
    - 'module:function' or a function that yields feeds, or an iterable of feeds.

    Arrays of the input's rank are cut into batches of the model's fixed batch size (1 where it is
    free), those of one rank more hold one sample a row. Safe conversions (float64 to float32,
    integers that fit) are made.

    Raises DataError: no samples, names that are no inputs, missing inputs, shapes and types
    that the model does not take, NaN or infinities and broken files (when the sample is read),
    `images` for what are no images.
    """
    if not isinstance(spec, Samples):
        for tensor in model.graph.inputs:
            if getattr(tensor, "type", "tensor_type") != "tensor_type":
                kind = str(tensor.type).removesuffix("_type")
                raise DataError(f"input {tensor.name!r} is of type {kind}: only tensors can be fed")
        if isinstance(spec, str | os.PathLike):
            return _from_path(os.fspath(spec), model, images)
    if images is not None:
        raise DataError("image options, but the samples are no folder of images: leave them out")
    if isinstance(spec, Samples):
        return spec
    if isinstance(spec, Mapping):
        arrays = {name: np.asarray(array) for name, array in spec.items()}
        columns = {name: Memory(array) for name, array in arrays.items()}
        return stacked(columns, arrays.get(LABELS), model, "arrays in memory")
    if callable(spec):
        from onnxq.data.functions import from_function

        return from_function(spec, getattr(spec, "__name__", "function"), model)
    feeds = list(spec)
    return listed(lambda i: dict(feeds[i]), len(feeds), "feeds in memory", model)


def _from_path(text: str, model: Model, images: ImageOptions | None) -> Samples:
    path = Path(text)
    if path.is_dir():
        kind, files = _kind(path)
    elif path.is_file():
        kind, files = _file_kind(path), [path]
    elif re.fullmatch(r"[\w.]+:\w*", text):
        kind, files = "module:function", []
    else:
        raise DataError(f"{text}: no such file or folder; {GIVE}")
    if images is not None and kind != "images":
        raise DataError(f"{text}: image options, but these are no images: leave them out")
    if not inputs_of(model):
        raise DataError(f"{text}: the model has no inputs that samples could be fed to")
    return _open(kind, files, path, model, images or ImageOptions())


def _open(kind: str, files: list[Path], path: Path, model: Model, images: ImageOptions) -> Samples:
    """The samples of a kind of source; each source is imported when it is used."""
    text, many = str(path), f"{len(files)} files of {path}"
    if kind == "images":
        from onnxq.data.images import from_images

        return from_images(files, text, model, images)
    if kind == ".wav":
        from onnxq.data.audio import from_wavs

        return from_wavs(files, text, model)
    if kind == ".txt":
        from onnxq.data.tokens import from_text

        return from_text(path, model)
    if kind == "sets":
        from onnxq.data.testsets import from_sets

        return from_sets(files, text, model)
    if kind == "module:function":
        from onnxq.data.functions import from_function, imported

        module, _, name = text.partition(":")
        return from_function(imported(module, name), text, model)
    from onnxq.data import arrays

    if kind == ".npy":
        whole = path.is_file()
        return arrays.from_npy(path, model) if whole else arrays.from_npy_folder(files, many, model)
    if path.is_dir():
        return arrays.from_npz_folder(files, many, model)
    return arrays.from_npz(path, model)


def _file_kind(path: Path) -> str:
    suffix = path.suffix.lower()
    kind = KINDS.get(suffix, suffix if suffix == ".txt" else None)
    if kind is None and not zipfile.is_zipfile(path):  # as an .npz is, whatever it is called
        raise DataError(f"{path}: is no kind of samples; {GIVE}")
    return kind or ".npz"


def _kind(folder: Path) -> tuple[str, list[Path]]:
    """What a folder holds, and its files (or test sets) in order.

    Images and .wav may be one level down, a folder a class for instance; what is hidden or of
    another kind (a README, a list of classes) does not count.
    """
    entries = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    if any(re.fullmatch(r"input_\d+\.pb", p.name) for p in entries):
        return "sets", [folder]
    found: dict[str, list[Path]] = {}
    for entry in entries:
        kind = "sets" if SET.fullmatch(entry.name) else KINDS.get(entry.suffix.lower())
        if kind is not None and entry.is_dir() == (kind == "sets"):
            found.setdefault(kind, []).append(entry)
    if not found:
        for entry in sorted(p for e in entries if e.is_dir() for p in e.iterdir()):
            kind = KINDS.get(entry.suffix.lower(), "")
            if kind in ("images", ".wav") and not entry.name.startswith(".") and entry.is_file():
                found.setdefault(kind, []).append(entry)
    if not found:
        held = Counter(p.suffix or "folders" for p in entries).most_common(1)
        what = f"only {held[0][0]} and the like" if held else "it is empty"
        raise DataError(f"{folder}: no samples in this folder, {what}; {GIVE}")
    if len(found) > 1:
        listed_ = " and ".join(f"{len(files)} {kind}" for kind, files in found.items())
        raise DataError(f"{folder}: holds {listed_}: keep one kind of sample in a folder")
    ((kind, files),) = found.items()
    if kind == "sets":
        files.sort(key=lambda p: int(p.name.rpartition("_")[2]))
    return kind, files
