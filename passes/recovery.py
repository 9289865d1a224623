"""From integers back to floats: what the files of `dequantize_model` share.

An integer tensor t with scale s and zero point z stands for the float tensor (t - z) s. `lifted`
finds that tensor, or makes it: it is what a QuantizeLinear reads; data movement is done to floats
in place of integers; a constant becomes a weight that remembers its integers (`onnxq.packed`).

What a QuantizeLinear cuts off is a part of the model where somebody relied on it: a Relu, or a
Relu6, in front of it is usually left out. So where a range begins at 0 and the values could be
negative, a Relu is put back; a Clip where it ends at 6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.core import Skip
from onnxq.model import Model, producer, readers, values_of
from onnxq.packed import Grid, Recovered
from onnxq.passes.ops import OPS
from onnxq.passes.packed_weights import Stands
from onnxq.schemes import FORMATS, QParams
from onnxq.weights import Weight

FLOAT = np.dtype(np.float32)
MOVES = (*(op for op, spec in OPS.items() if spec.role == "move"), "Concat", "Identity")
POSITIVE = frozenset(
    "Relu Sigmoid HardSigmoid Softmax Softplus Abs Exp Sqrt Pow ReduceL1 ReduceL2 "
    "ReduceSumSquare".split()
)
"""Operators that make no negative values (Pow: of even powers, as exporters have it)."""
KEEPING = frozenset(
    "AveragePool GlobalAveragePool GlobalMaxPool ReduceMean ReduceMax ReduceMin ReduceSum Add Mul "
    "Max Dropout Cast".split()
)
"""Operators that make none of values that are not negative."""
CAST_BACK = ("_quantized", "_unpacked", "_narrow", "_dq", "_dequantized", "_q")
RELU6 = 6.0
Key = tuple[float, int, str]


@dataclass(slots=True, eq=False)
class Recovery:
    """One run over one model; holds what was made so far."""

    model: Model
    made: dict[tuple[int, Key], gs.Tensor] = field(default_factory=dict)
    weights: dict[tuple[int, int], gs.Tensor] = field(default_factory=dict)
    ranges: list[tuple[gs.Tensor, QParams]] = field(default_factory=list)
    clamped: dict[tuple[int, Key], gs.Tensor] = field(default_factory=dict)
    heirs: dict[int, gs.Tensor] = field(default_factory=dict)
    integers: list[tuple[gs.Tensor, gs.Tensor, tuple[gs.Tensor, gs.Tensor]]] = field(
        default_factory=list
    )

    # Constants.

    def weight(self, stands: Stands, shape: Sequence[int], name: str, dtype: Any) -> gs.Tensor:
        """A float constant that remembers its integers; Skip where they cannot be read."""
        if stands.read is None:
            raise Skip(f"how {name} is packed is not known")
        return self.constant(stands.numbers, stands.read, name, shape, dtype)

    def constant(
        self, numbers: gs.Tensor, read: Any, name: str, shape: Sequence[int], dtype: Any = FLOAT
    ) -> gs.Tensor:
        """A float constant, named after what it was quantized from where that can be told."""
        plain = name
        while plain.endswith(CAST_BACK):
            plain = plain[: -len(next(end for end in CAST_BACK if plain.endswith(end)))]
        return Weight(self.model.unique(plain or name), Recovered(read, tuple(shape), dtype))

    # Tensors.

    def is_read(self, tensor: gs.Tensor) -> bool:
        """Whether anybody still wants a tensor."""
        return self.model.is_output(tensor) or any(True for _ in readers(tensor))

    def now(self, tensor: gs.Tensor) -> gs.Tensor:
        """The tensor that is there in its place by now."""
        while id(tensor) in self.heirs:
            tensor = self.heirs[id(tensor)]
        return tensor

    def replace(self, old: gs.Tensor, new: gs.Tensor) -> None:
        """Let readers of a dequantized tensor read the float one, which keeps the better name.

        Raises Skip where both names are the model's interface.
        """
        model, new = self.model, self.now(new)
        is_fixed = isinstance(new, gs.Constant) or model.is_input(new) or model.is_output(new)
        if model.is_output(old):
            if is_fixed or model.home(old) is not model.home(new):
                raise Skip(f"{old.name} and {new.name} are inputs or outputs both")
            model.replace(old, new)
            self.heirs[id(new)] = old
            return
        model.replace(old, new)
        if not is_fixed and new.name.startswith(old.name):  # the pair had the plain name
            old.name, new.name = new.name, old.name

    def floats(
        self, tensor: gs.Tensor, scale: gs.Tensor, zero: gs.Tensor | None, node: gs.Node
    ) -> gs.Tensor:
        """The float tensor that integers stand for; where nothing is known, dequantized here.

        Raises Skip where that takes an axis, which operators on integers do not name.
        """
        found = self.lifted(tensor, scale, zero, node)
        if found is not None:
            return found
        if prod(scale.shape or (1,) if isinstance(scale, gs.Constant) else (1,)) > 1:
            raise Skip(f"{tensor.name} is not constant, and has scales of channels")
        inputs = [tensor, scale, *([] if zero is None else [zero])]
        return self.model.emit(
            "DequantizeLinear", *inputs, name=f"{tensor.name}_float", dtype=FLOAT,
            shape=tensor.shape, at=node,
        )  # fmt: skip

    def lifted(
        self, tensor: gs.Tensor, scale: gs.Tensor, zero: gs.Tensor | None, node: gs.Node
    ) -> gs.Tensor | None:
        """As `floats`; None where nothing is known."""
        params = activation_params(scale, zero, tensor.dtype)
        if params is None:
            return None
        return self._lifted(tensor, params, (scale, zero), node)

    def _lifted(
        self, tensor: gs.Tensor, params: QParams, given: Any, node: gs.Node
    ) -> gs.Tensor | None:
        key = id(tensor), key_of(params)
        if key not in self.made:
            made = self._made(tensor, params, given, node)
            if made is None:
                return None
            self.made[key] = made
        return self.now(self.made[key])

    def _made(
        self, tensor: gs.Tensor, params: QParams, given: Any, node: gs.Node
    ) -> gs.Tensor | None:
        values = values_of(tensor)
        if values is not None:
            read = _reader(tensor, params)
            return self.constant(tensor, read, tensor.name, values.shape)
        source = producer(tensor)
        if source is None:
            return None
        if source.op == "QuantizeLinear":
            zero = source.inputs[2] if len(source.inputs) > 2 else None
            own = activation_params(source.inputs[1], zero, tensor.dtype)
            if own is None or key_of(own) != key_of(params):
                return None
            return self.observed(self.now(source.inputs[0]), own, source)
        if source.op not in MOVES or source.domain:
            return None
        return self._moved(source, tensor, params, given)

    def _moved(
        self, source: gs.Node, tensor: gs.Tensor, params: QParams, given: Any
    ) -> gs.Tensor | None:
        """Data movement done to floats."""
        data = range(len(source.inputs)) if source.op == "Concat" else (0,)
        inputs = list(source.inputs)
        for i in data:
            found = self._lifted(inputs[i], params, given, source)
            if found is None:
                return None
            inputs[i] = found
        if source.op == "Pad" and str(source.attrs.get("mode", "constant")) == "constant":
            inputs = self._padded(source, inputs, params)
        first, *others = source.outputs
        made: gs.Tensor = self.model.emit(
            source.op, *inputs, name=f"{first.name}_float", dtype=FLOAT, shape=first.shape,
            at=source, **source.attrs,
        )  # fmt: skip
        parts = [made]
        for out in others:  # of a Split
            parts.append(gs.Variable(self.model.unique(f"{out.name}_float"), FLOAT, out.shape))
            made.inputs[0].outputs.append(parts[-1])
        for out, part in zip(source.outputs, parts, strict=True):
            self.made[id(out), key_of(params)] = part
            self.ranges.append((part, params))
        return next(part for out, part in zip(source.outputs, parts, strict=True) if out is tensor)

    def _padded(self, pad: gs.Node, inputs: list[gs.Tensor], params: QParams) -> list[gs.Tensor]:
        """A Pad's inputs, with the float that the integer it pads with stands for."""
        given = values_of(inputs[2]) if len(inputs) > 2 and inputs[2].name else None
        number = np.zeros((), params.zero_point.dtype) if given is None else given.reshape(())
        filled = self.model.constant(f"{pad.name}_value", params.dequantize(number))
        return [*inputs[:2], filled, *inputs[3:]]

    def observed(self, tensor: gs.Tensor, params: QParams, node: gs.Node) -> gs.Tensor:
        """A float tensor that was quantized so, clamped if that cut something off."""
        key = id(tensor), key_of(params)
        if key not in self.clamped:
            result = self._clamp(tensor, params, node)
            self.clamped[key] = result
            self.ranges.append((result, params))
        return self.clamped[key]

    def _clamp(self, tensor: gs.Tensor, params: QParams, node: gs.Node) -> gs.Tensor:
        numbers = FORMATS[str(params.zero_point.dtype)]
        if int(params.zero_point) != numbers.qmin or not may_be_negative(tensor):
            return tensor
        top, step = float(params.scale) * (numbers.qmax - numbers.qmin), float(params.scale)
        name = f"{tensor.name}_clamped"
        if abs(top - RELU6) > step:
            return self.model.emit("Relu", tensor, name=name, like=tensor, at=node)
        if self.model.opset < 11:
            attributes: dict[str, Any] = {"min": 0.0, "max": RELU6}
            return self.model.emit("Clip", tensor, name=name, like=tensor, at=node, **attributes)
        values = (("min", 0.0), ("max", RELU6))
        ends = [self.model.constant(f"{name}_{k}", np.array(v, np.float32)) for k, v in values]
        return self.model.emit("Clip", tensor, *ends, name=name, like=tensor, at=node)

    def result(
        self, node: gs.Node, made: gs.Tensor, scale: gs.Tensor, zero: gs.Tensor | None
    ) -> None:
        """A float tensor in place of the integers that a node made; the node goes."""
        out = node.outputs[0]
        kind = None if zero is None else zero.dtype
        params = activation_params(scale, zero, kind or np.dtype(np.uint8))
        assert params is not None  # checked before
        made = self.observed(made, params, node)
        self.made[id(out), key_of(params)] = made
        point = zero or self.model.constant(f"{out.name}_zero_point", params.zero_point)
        self.integers.append((out, made, (scale, point)))
        drop(node)

    def finish(self) -> None:
        """Quantize again what somebody still wants in integers; note what was seen of ranges."""
        model = self.model
        for out, made, params in self.integers:
            if self.is_read(out):
                made = self.now(made)
                q = model.emit(
                    "QuantizeLinear", made, *params, name=f"{out.name}_q", dtype=out.dtype,
                    shape=out.shape, at=model.home(made),
                )  # fmt: skip
                q.inputs[0].outputs[0] = out


def drop(node: gs.Node) -> None:
    """Take a node out: nobody makes its results."""
    node.outputs.clear()
    node.inputs.clear()


def activation_params(scale: gs.Tensor, zero: gs.Tensor | None, dtype: Any) -> QParams | None:
    """One constant scale and zero point, also where they are the same for all channels."""
    s = values_of(scale)
    z = None if zero is None or not zero.name else values_of(zero)
    if s is None or not s.size or (zero is not None and zero.name and z is None):
        return None
    if z is None:
        z = np.zeros(1, np.dtype(dtype) if dtype is not None else np.uint8)
    if str(z.dtype) not in FORMATS or str(z.dtype).startswith("float"):
        return None
    if (s != s.flat[0]).any() or (z != z.flat[0]).any():
        return None
    return QParams(np.asarray(s.flat[0], np.float32), z.reshape(-1)[0].reshape(()))


def key_of(params: QParams) -> Key:
    """Scale, zero point and format as a value."""
    return float(params.scale), int(params.zero_point), str(params.zero_point.dtype)


def _reader(tensor: gs.Tensor, params: QParams) -> Any:
    def read() -> Grid:
        numbers = values_of(tensor)
        assert numbers is not None
        return Grid.of(numbers, params.scale, params.zero_point)

    return read


def may_be_negative(tensor: gs.Tensor, depth: int = 32) -> bool:
    """Whether a computed tensor may have negative values; inputs and constants are not computed."""
    node = producer(tensor)
    if node is None or node.op == "Constant" or not depth:
        return False
    if node.op in POSITIVE:
        return False
    if node.op == "Clip":
        low = node.attrs.get("min")
        if low is None and len(node.inputs) > 1 and (v := values_of(node.inputs[1])) is not None:
            low = float(v.reshape(()))
        return low is None or low < 0
    if node.op == "DequantizeLinear":
        return False  # integers of the interface: as they are
    if node.op in MOVES:
        data: Sequence[gs.Tensor] = node.inputs if node.op == "Concat" else node.inputs[:1]
    elif node.op in KEEPING:
        data = node.inputs
    else:
        return True
    return any(_is_negative(t) or may_be_negative(t, depth - 1) for t in data)


def _is_negative(tensor: gs.Tensor) -> bool:
    values = values_of(tensor)
    return values is not None and values.dtype.kind == "f" and bool((values < 0).any())


def ranges_by_name(
    recovery: Recovery,
) -> Mapping[str, tuple[QParams, ...]]:
    """The parameters that each tensor was quantized with, by the name that it has now."""
    found: dict[str, dict[Key, QParams]] = {}
    for tensor, params in recovery.ranges:
        found.setdefault(recovery.now(tensor).name, {})[key_of(params)] = params
    return {name: tuple(known.values()) for name, known in found.items()}


__all__ = ["Recovery", "activation_params", "drop", "key_of", "ranges_by_name"]
