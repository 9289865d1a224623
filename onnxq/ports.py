"""Integer inputs and outputs: what their numbers mean, kept in the model and in a file beside it.

    q = clamp(round(x / scale) + zero_point)        x = (q - zero_point) * scale

with round half to even, as ONNX's QuantizeLinear. In the model each is an entry of
`metadata_props`: key `onnxq.io.NAME`, value a JSON object of role ("input" or "output"), type,
scale, zero_point and axis (null: one scale for the whole tensor).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.errors import ModelError
from onnxq.model import Model
from onnxq.schemes import FORMATS, QParams

PREFIX = "onnxq.io."
TYPES = ("int8", "uint8", "int16", "uint16")
SCHEMA = 1
FORMULA = {
    "quantize": "q = clamp(round_half_to_even(x / scale) + zero_point, least, greatest)",
    "dequantize": "x = (q - zero_point) * scale",
}
Role = Literal["input", "output"]


@dataclass(frozen=True, slots=True)
class Affine:
    """How integers of one scale stand for floats; scale is a float32, as a Python float."""

    type: str
    scale: float
    zero_point: int

    @property
    def params(self) -> QParams:
        """The same as arrays."""
        dtype = FORMATS[self.type].dtype
        return QParams(np.array(self.scale, np.float32), np.array(self.zero_point, dtype))

    def signed_as(self, type: str) -> Self:
        """The same steps in the type of the other sign, of the same width."""
        shift = FORMATS[type].qmin - FORMATS[self.type].qmin
        return self.__class__(type, self.scale, self.zero_point + int(shift))

    def quantize(self, x: NDArray[Any]) -> NDArray[Any]:
        """Floats as integers of the type."""
        return self.params.quantize(np.asarray(x, np.float32))

    def dequantize(self, q: NDArray[Any]) -> NDArray[np.float32]:
        """Integers of the type as floats."""
        return self.params.dequantize(q)


@dataclass(frozen=True, slots=True)
class Port:
    """An integer input or output."""

    name: str
    role: Role
    affine: Affine


def record(model: Model, ports: Iterable[Port]) -> None:
    """Write what ports mean into the model's metadata; other entries stay as they are."""
    entries = model.envelope.metadata_props
    for port in ports:
        key = PREFIX + port.name
        kept = [entry for entry in entries if entry.key != key]
        del entries[:]
        entries.extend(kept)
        value = {"role": port.role, **asdict(port.affine), "axis": None}
        entries.add(key=key, value=json.dumps(value))


def ports_in(metadata: Mapping[str, str]) -> dict[str, Port]:
    """The ports that a model's metadata tell of, by name.

    Raises ModelError for an entry that is damaged.
    """
    return {
        (name := key.removeprefix(PREFIX)): _port(name, value)
        for key, value in metadata.items()
        if key.startswith(PREFIX)
    }


def _port(name: str, text: str) -> Port:
    try:
        entry = json.loads(text)
        role, type_ = entry["role"], entry["type"]
        scale, zero_point = float(entry["scale"]), int(entry["zero_point"])
        numbers = FORMATS[type_]
        if role not in ("input", "output") or type_ not in TYPES or entry["axis"] is not None:
            raise ValueError(text)
        if not (0 < scale < math.inf and numbers.qmin <= zero_point <= numbers.qmax):
            raise ValueError(text)
    except (ValueError, KeyError, TypeError) as e:
        raise ModelError(
            f"metadata {PREFIX}{name} is damaged: make the model again with --integer-io"
        ) from e
    return Port(name, role, Affine(type_, scale, zero_point))


def ports_of(model: Model) -> dict[str, Port]:
    """The ports of a model, by name: those that are still inputs and outputs of their type.

    Raises ModelError for metadata that are damaged.
    """
    known = ports_in({entry.key: entry.value for entry in model.envelope.metadata_props})
    graph = model.graph
    return {
        tensor.name: port
        for role, tensors in (("input", graph.inputs), ("output", graph.outputs))
        for tensor in tensors
        if (port := known.get(tensor.name)) and port.role == role
        if tensor.dtype is not None and np.dtype(tensor.dtype) == port.affine.type
    }


def with_float_inputs(model: Model) -> Model:
    """The model as who has real values sees it: a copy with QuantizeLinear behind integer inputs.

    The model itself where it has none.
    """
    ports = {name: port for name, port in ports_of(model).items() if port.role == "input"}
    if not ports:
        return model
    seen = model.copy()
    _float_inputs(seen, ports)
    return seen


def _float_inputs(model: Model, ports: Mapping[str, Port]) -> None:
    for place, tensor in enumerate(model.graph.inputs):
        if (port := ports.get(tensor.name)) is None:
            continue
        real = gs.Variable(tensor.name, np.dtype(np.float32), tensor.shape)
        tensor.name = model.unique(f"{tensor.name}_q")
        made = model.emit(
            "QuantizeLinear", real, *constants(model, port.affine, real.name), name="q"
        )
        made.inputs[0].outputs[0] = tensor
        model.graph.inputs[place] = real


def restore_floats(model: Model) -> list[str]:
    """Give the model its float interface back, in place; the names of what is float again.

    QuantizeLinear behind integer inputs and DequantizeLinear behind integer outputs, as their
    metadata tell, which go.
    """
    ports = ports_of(model)
    if not ports:
        return []
    _float_inputs(model, {name: port for name, port in ports.items() if port.role == "input"})
    for place, tensor in enumerate(model.graph.outputs):
        if (port := ports.get(tensor.name)) is None or port.role == "input":
            continue
        name = tensor.name
        tensor.name = model.unique(f"{name}_q")
        real = model.emit(
            "DequantizeLinear", tensor, *constants(model, port.affine, name), name=f"{name}_dq",
            dtype=np.dtype(np.float32), shape=tensor.shape,
        )  # fmt: skip
        real.name = name
        model.graph.outputs[place] = real
    entries = model.envelope.metadata_props
    kept = [(e.key, e.value) for e in entries if e.key.removeprefix(PREFIX) not in ports]
    del entries[:]
    for key, value in kept:
        entries.add(key=key, value=value)
    return list(ports)


def constants(model: Model, affine: Affine, name: str) -> tuple[gs.Constant, gs.Constant]:
    """Scale and zero point as new initializers."""
    params = affine.params
    return (
        model.constant(f"{name}_scale", params.scale),
        model.constant(f"{name}_zero_point", params.zero_point),
    )


@dataclass(frozen=True, slots=True)
class Terminal:
    """An input or output as those see it who write a client; affine: None where it is no port.

    shape: free axes are names or None; None as a whole: of any shape.
    """

    name: str
    role: Role
    type: str
    shape: tuple[int | str | None, ...] | None
    affine: Affine | None


def terminals(model: Model) -> list[Terminal]:
    """All inputs, then all outputs, in the model's order."""
    ports = ports_of(model)
    roles: tuple[tuple[Role, list[gs.Tensor]], ...] = (
        ("input", model.graph.inputs),
        ("output", model.graph.outputs),
    )
    return [
        Terminal(
            t.name,
            role,
            _type(t),
            None if t.shape is None else tuple(t.shape),
            ports[t.name].affine if t.name in ports else None,
        )
        for role, tensors in roles
        for t in tensors
    ]


def _type(tensor: gs.Tensor) -> str:
    if tensor.dtype is None:
        return str(getattr(tensor, "type", "unknown")).removesuffix("_type")
    return "string" if tensor.dtype == object else str(np.dtype(tensor.dtype))


def sidecar(model: Model, name: str, preprocess: Mapping[str, Any] | None = None) -> str:
    """What is written beside the model, as JSON: each input and output, and the formulas.

    name: of the model's file. preprocess: how pixels become what the scale is about, where known.
    """
    found = terminals(model)
    return json.dumps(
        {
            "schema": SCHEMA,
            "model": name,
            **FORMULA,
            "inputs": [_described(t) for t in found if t.role == "input"],
            "outputs": [_described(t) for t in found if t.role == "output"],
            "preprocess": preprocess,
        },
        indent=1,
    )


def _described(terminal: Terminal) -> dict[str, Any]:
    """Numbers are null for what is no port."""
    affine = terminal.affine
    known: dict[str, Any] = dict.fromkeys(
        ("scale", "zero_point", "axis", "least", "greatest", "range")
    )
    if affine is not None:
        numbers = FORMATS[affine.type]
        ends = np.array([numbers.qmin, numbers.qmax], numbers.dtype)
        known |= {
            "scale": affine.scale,
            "zero_point": affine.zero_point,
            "least": numbers.qmin,
            "greatest": numbers.qmax,
            "range": affine.dequantize(ends).tolist(),
        }
    shape = None if terminal.shape is None else list(terminal.shape)
    return {"name": terminal.name, "type": terminal.type, "shape": shape, **known}
