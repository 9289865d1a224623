"""Samples from ONNX's own test data: folders test_data_set_N with input_K.pb, one sample each."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from onnxq.data.columns import listed
from onnxq.data.fitting import describe, inputs_of
from onnxq.data.samples import Feed, Samples
from onnxq.errors import DataError
from onnxq.model import Model


def from_sets(folders: list[Path], text: str, model: Model) -> Samples:
    """A sample a folder; input_K.pb is the model's K-th input, or the one it is named after.

    Raises DataError: missing or surplus files, files that are no tensor.
    """
    names = list(inputs_of(model))
    said = f"{len(folders)} test data sets of {text}"
    return listed(lambda i: _feed(folders[i], names, model), len(folders), said, model)


def _feed(folder: Path, names: list[str], model: Model) -> Feed:
    tensors = []
    for index, name in enumerate(names):
        path = folder / f"input_{index}.pb"
        if not path.is_file():
            raise DataError(
                f"{path} is missing, for input {name!r}; the model's inputs are "
                f"{describe(model.graph.inputs)}"
            )
        tensors.append((path, _tensor(path)))
    files = [p for p in folder.iterdir() if re.fullmatch(r"input_\d+\.pb", p.name)]
    if len(files) > len(names):
        raise DataError(f"{folder}: has {len(files)} inputs, the model takes {len(names)}")
    own = [tensor.name for _, tensor in tensors]
    keys = own if sorted(own) == sorted(names) else names
    feed: Feed = {}
    for key, (path, tensor) in zip(keys, tensors, strict=True):
        try:
            feed[key] = onnx.numpy_helper.to_array(tensor)
        except (ValueError, TypeError, KeyError) as e:
            raise DataError(f"{path}: holds no values of its shape: {e}") from e
    return feed


def _tensor(path: Path) -> onnx.TensorProto:
    tensor = onnx.TensorProto()
    try:
        tensor.ParseFromString(path.read_bytes())
    except (DecodeError, OSError) as e:
        raise DataError(f"{path}: cannot be read as a tensor: {e}") from e
    is_sequence = tensor.HasField("segment")  # where a SequenceProto has its tensors
    if is_sequence or tensor.data_type == onnx.TensorProto.UNDEFINED:
        raise DataError(f"{path}: is no tensor (sequences, maps and optionals cannot be fed)")
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise DataError(f"{path}: keeps its values in another file: write them into the .pb")
    return tensor
