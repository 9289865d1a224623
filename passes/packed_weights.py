"""Which constants stand for a weight, in the forms that quantized models have.

    float       a constant of floats; also with a Cast behind it
    qdq         DequantizeLinear(q, s, z); also with a QuantizeLinear of floats, or a Cast, in front
    storage     Mul(Sub(Cast(q), z), s), also moved: what `encodings` writes
    codebook    Mul(Gather(table, Cast(q)), s), also moved
    qoperator   QLinearConv, QLinearMatMul, QGemm, QLinearAdd ...: scale and zero point beside it
    nbits       MatMulNBits, GatherBlockQuantized (com.microsoft): several numbers a byte
    dynamic     MatMulInteger, ConvInteger, DynamicQuantizeLSTM ...: integers at run time only

Finding them reads no values. Sources: onnx Operators.md and ONNX Runtime's ContribOperators.md;
each form is checked against what its operator computes in onnxruntime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.layers import is_lookup
from onnxq.model import Model, producer, readers, values_of
from onnxq.numerics.affine import quantize
from onnxq.packed import Grid
from onnxq.passes.bitmaps import spread_constant
from onnxq.passes.integer_weights import INTEGER_WEIGHTS, Beside
from onnxq.passes.layouts import WEIGHTS, held_by
from onnxq.schemes import FORMATS

Form = Literal["float", "qdq", "storage", "codebook", "qoperator", "nbits", "dynamic"]
MOVES = ("Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Identity")
FLOATS = ("float16", "float32", "float64", "bfloat16")
NARROW = tuple(name for name in FORMATS if name != "int32")
Read = Callable[[], Grid]


@dataclass(frozen=True, slots=True, eq=False)
class Stands:
    """What stands for a tensor of weights.

    numbers: the constant of integers (or floats). beside: the scales, zero points, codebook. read:
    computes the grid; of a float weight it is None. bits: of a number, where the constant has
    several a byte. digits: unpacks them, where several are the digits of one number of some bytes.
    """

    form: Form
    numbers: gs.Constant
    beside: tuple[gs.Constant, ...] = ()
    read: Read | None = None
    bits: int | None = None
    is_scaled: bool = False
    digits: Callable[[], NDArray[Any]] | None = None


def stands_for(tensor: gs.Tensor) -> Stands | None:
    """What a tensor is computed from, if from stored integers alone; None for all else."""
    found = _follow(tensor)
    return found if found is not None and found.is_scaled else None


def uses_of(numbers: gs.Tensor) -> int:
    """How many nodes read stored integers, through what dequantizes them."""
    count = 0
    for node, _ in readers(numbers):
        within = node.op in ("Cast", "Sub", "Mul", "DequantizeLinear")
        count += uses_of(node.outputs[0]) if within else 1
    return count


def weights_of(node: gs.Node) -> Iterator[tuple[int, Stands]]:
    """The weights that a node reads, floats included, with the input that they are at."""
    if node.op in INTEGER_WEIGHTS:
        for beside in INTEGER_WEIGHTS[node.op](node):
            if (found := _direct(node, beside)) is not None:
                yield beside.index, found
        return
    if node.domain or node.op not in WEIGHTS:
        return
    if is_lookup(node):
        return
    for held in held_by(node):
        tensor = node.inputs[held.index]
        constant = _floats(tensor)
        if constant is not None and len(held.shape) > 1:
            yield held.index, Stands("float", constant)
        elif (found := stands_for(tensor)) is not None:
            yield held.index, found


def _direct(node: gs.Node, beside: Beside) -> Stands | None:
    """A weight that an operator takes as integers, with what else it takes for it."""
    numbers = _constant(node.inputs[beside.index])
    if numbers is None:
        return None
    others = [node.inputs[i] for i in beside.others if i < len(node.inputs)]
    extra = tuple(c for t in others if t.name and (c := _constant(t)) is not None)
    whole = len(extra) == len([t for t in others if t.name]) and beside.read is not None
    return Stands(beside.form, numbers, extra, beside.read if whole else None, beside.bits, True)


def _constant(tensor: gs.Tensor) -> gs.Constant | None:
    """The constant, also one that a Constant node makes, or that is stored as a bitmap."""
    if isinstance(tensor, gs.Constant):
        return tensor
    node = producer(tensor)
    if node is None or node.op != "Constant" or node.domain:
        return None if node is None else spread_constant(tensor)
    return next((v for v in node.attrs.values() if isinstance(v, gs.Constant)), None)


def _floats(tensor: gs.Tensor) -> gs.Constant | None:
    """The constant of floats that it is, or is cast and moved from: 16 bits, stored."""
    constant, node = _constant(tensor), producer(tensor)
    while constant is None and node is not None and node.op in ("Cast", *MOVES) and not node.domain:
        constant, node = _constant(node.inputs[0]), producer(node.inputs[0])
    return None if constant is None or _name(constant.dtype) not in FLOATS else constant


def _follow(tensor: gs.Tensor) -> Stands | None:
    """What a tensor is computed from; integers themselves are not scaled yet."""
    constant = _constant(tensor)
    if constant is not None:
        if constant.dtype is None or str(np.dtype(constant.dtype)) not in NARROW:
            return None
        return Stands("storage", constant, (), lambda: _plain(_read(constant)))
    node = producer(tensor)
    if node is None or node.op not in _STEPS or len([t for t in node.outputs if t.name]) != 1:
        return None
    return _STEPS[node.op](node)


def _name(dtype: Any) -> str:
    return "" if dtype is None else str(np.dtype(dtype))


def _read(tensor: gs.Tensor) -> NDArray[Any]:
    values = values_of(tensor)
    assert values is not None
    return values


def _plain(numbers: NDArray[Any]) -> Grid:
    return Grid(numbers, np.broadcast_to(np.float32(1), numbers.shape))


def _dequantize(node: gs.Node) -> Stands | None:
    scale, zero = _constant(node.inputs[1]), None
    if len(node.inputs) > 2 and node.inputs[2].name:
        zero = _constant(node.inputs[2])
        if zero is None:
            return None
    source = node.inputs[0]
    constant = _constant(source)
    if constant is not None and _name(constant.dtype) == "int32":  # a bias
        base: Stands | None = Stands("qdq", constant, (), lambda: _plain(_read(constant)))
    else:
        base = _follow(source)
    if scale is None or base is None or base.is_scaled or base.read is None:
        return None
    axis, block = int(node.attrs.get("axis", 1)), int(node.attrs.get("block_size", 0))
    numbers = base.read

    def read() -> Grid:
        points = None if zero is None else _read(zero)
        return Grid.of(numbers().numbers, _read(scale), points, axis=axis, block=block)

    beside = (*base.beside, scale, *([] if zero is None else [zero]))
    return replace(base, form="qdq", beside=beside, read=read, is_scaled=True)


def _quantize(node: gs.Node) -> Stands | None:
    """Floats that are quantized when the model is loaded."""
    parts = [c for t in node.inputs if t.name and (c := _constant(t)) is not None]
    if len(parts) != 3 or len(node.inputs) != 3 or _name(parts[0].dtype) != "float32":
        return None
    if node.attrs.get("block_size", 0):
        return None
    axis = int(node.attrs.get("axis", 1))
    values, scale, zero = parts

    def read() -> Grid:
        s, z = _read(scale), _read(zero)
        along = None if s.size == 1 else axis
        if along is None:
            s, z = s.reshape(()), z.reshape(())
        return _plain(quantize(_read(values), s, z, axis=along))

    return Stands("qdq", values, (), read)


def _cast(node: gs.Node) -> Stands | None:
    base = _follow(node.inputs[0])
    if base is None or base.read is None:
        return None
    dtype = node.outputs[0].dtype
    if dtype is None or not base.is_scaled:
        return _widened(base, dtype)
    if str(np.dtype(dtype)) not in FLOATS:
        return None
    numbers = base.read
    return replace(base, read=lambda: replace(numbers(), dtype=np.dtype(dtype)))


def _widened(base: Stands, dtype: Any) -> Stands | None:
    """Integers in a type that holds them all: their values are as they were."""
    if dtype is None:
        return None
    to, numbers = np.dtype(dtype), base.read
    if str(to) in FLOATS or str(to) in ("int32", "int64"):
        return base
    if str(to) not in NARROW or numbers is None:
        return None
    return replace(base, read=lambda: replace(numbers(), numbers=numbers().numbers.astype(to)))


def _subtract(node: gs.Node) -> Stands | None:
    base, point = _follow(node.inputs[0]), _follow(node.inputs[1])
    constant = _constant(node.inputs[1]) if point is None else point.numbers
    if base is None or base.is_scaled or base.read is None or constant is None:
        return None
    numbers = base.read

    def read() -> Grid:
        grid = numbers()
        return replace(grid, zero=np.broadcast_to(_read(constant), grid.numbers.shape))

    return replace(base, beside=(*base.beside, constant), read=read)


def _multiply(node: gs.Node) -> Stands | None:
    for index in (0, 1):
        base, scale = _follow(node.inputs[index]), _constant(node.inputs[1 - index])
        if base is None or (base.is_scaled and base.form != "codebook"):
            continue
        if scale is None or _name(scale.dtype) not in FLOATS or base.read is None:
            continue
        if base.form == "codebook" and len(base.beside) > 1:
            continue
        return _scaled(base, scale)
    return None


def _scaled(base: Stands, scale: gs.Constant) -> Stands:
    numbers = base.read
    assert numbers is not None

    def read() -> Grid:
        grid, factor = numbers(), _read(scale)
        wide = np.broadcast_to(factor.astype(np.float32, copy=False), grid.numbers.shape)
        return replace(grid, scale=wide, dtype=factor.dtype)

    return replace(base, beside=(*base.beside, scale), read=read, is_scaled=True)


def _look_up(node: gs.Node) -> Stands | None:
    """Gather(codebook [entries] or [entries, dim], indices)."""
    table = _constant(node.inputs[0])
    indices = _follow(node.inputs[1]) or _digits(node.inputs[1])
    if table is None or indices is None or indices.is_scaled or indices.read is None:
        return None
    if _name(table.dtype) not in FLOATS or node.attrs.get("axis", 0) or len(table.shape) > 2:
        return None
    numbers = indices.read

    def read() -> Grid:
        entries, index = _read(table), numbers().numbers
        if entries.ndim == 2:
            dim = entries.shape[1]
            index = index[..., None].astype(np.uint16) * np.uint16(dim) + np.arange(dim, dtype="u2")
        flat = entries.reshape(-1).astype(np.float32, copy=False)
        return replace(_plain(index), table=flat, dtype=entries.dtype)

    return replace(indices, form="codebook", beside=(table,), read=read, is_scaled=True)


def _digits(tensor: gs.Tensor) -> Stands | None:
    """Indices that are computed from bytes, as `codebook_encoding` has them."""
    found = _computed(tensor)
    if found is None:
        return None
    root, read = found
    return Stands("codebook", root, (), lambda: _plain(read()), digits=read)


def _computed(tensor: gs.Tensor) -> tuple[gs.Constant, Callable[[], NDArray[Any]]] | None:
    """The bytes that integers are computed from alone, and what computes them."""
    constant, node = _constant(tensor), producer(tensor)
    if constant is not None:
        is_bytes = _name(constant.dtype) == "uint8"
        return (constant, lambda: _read(constant).astype(np.int32)) if is_bytes else None
    if (
        node is None
        or node.domain
        or not node.inputs
        or (base := _computed(node.inputs[0])) is None
    ):
        return None
    root, read = base
    if node.op == "Cast":
        return base if _name(node.outputs[0].dtype) in ("int32", "int64") else None
    if node.op == "ReduceSum":
        return root, lambda: read().sum(1, keepdims=True)
    if node.op in _ARITHMETIC:
        other, compute = _constant(node.inputs[1]), _ARITHMETIC[node.op]
        return None if other is None else (root, lambda: compute(read(), _read(other)))
    numbers = _numbers(node.inputs[1:]) if node.op in ("Reshape", "Slice") else None
    move = None if numbers is None else _move(node, numbers)
    return None if move is None else (root, lambda: move(read()))


_ARITHMETIC: dict[str, Callable[..., NDArray[Any]]] = {
    "Mul": np.multiply, "Div": np.floor_divide, "Mod": np.mod,
}  # fmt: skip


def _moved(node: gs.Node) -> Stands | None:
    base = _follow(node.inputs[0])
    numbers = _numbers(node.inputs[1:])
    if base is None or base.read is None or numbers is None:
        return None
    read, move = base.read, _move(node, numbers)
    return None if move is None else replace(base, read=lambda: read().map(move))


def _numbers(tensors: Sequence[gs.Tensor]) -> list[list[int] | None] | None:
    """Shapes, axes and bounds: small constants; None where one is not constant."""
    found: list[list[int] | None] = []
    for tensor in tensors:
        values = values_of(tensor) if tensor.name else None
        if tensor.name and (values is None or values.dtype.kind not in "iu"):
            return None
        found.append(None if values is None else [int(v) for v in values.reshape(-1)])
    return found


def _move(
    node: gs.Node, numbers: list[list[int] | None]
) -> Callable[[NDArray[Any]], NDArray[Any]] | None:
    """What the operator does to an array."""
    if node.op == "Identity":
        return lambda a: a
    if node.op == "Transpose":
        perm = node.attrs.get("perm")
        return lambda a: a.transpose(perm)
    if node.op == "Slice":
        if len(numbers) < 2:
            return None
        starts, ends, axes, steps = (*numbers, None, None)[:4]
        if starts is None or ends is None:
            return None
        bounds = [slice(*b) for b in zip(starts, ends, steps or [1] * len(starts), strict=True)]
        where = dict(zip(axes or range(len(starts)), bounds, strict=True))
        if any((b.step or 1) < 1 for b in bounds):
            return None
        return lambda a: a[
            tuple(where.get(i, where.get(i - a.ndim, slice(None))) for i in range(a.ndim))
        ]
    shape = node.outputs[0].shape
    if shape is None or not all(isinstance(d, int) for d in shape):
        return None
    return lambda a: a.reshape(shape)


_STEPS: dict[str, Callable[[gs.Node], Stands | None]] = {
    "DequantizeLinear": _dequantize,
    "QuantizeLinear": _quantize,
    "Cast": _cast,
    "Sub": _subtract,
    "Mul": _multiply,
    "Gather": _look_up,
    **dict.fromkeys(MOVES, _moved),
}


def stored_weights(model: Model) -> Iterator[tuple[gs.Node, gs.Tensor, Stands]]:
    """All weights of a model, bodies included, each once: (a node that reads it, its input)."""
    seen = set[int]()
    for node in model.nodes():
        for index, found in weights_of(node):
            if id(found.numbers) not in seen:
                seen.add(id(found.numbers))
                yield node, node.inputs[index], found


def shape_of(node: gs.Node, tensor: gs.Tensor, stands: Stands) -> tuple[int, ...]:
    """The shape of the weight that the numbers stand for."""
    if stands.form == "nbits" and "K" in node.attrs:
        return int(node.attrs["K"]), int(node.attrs["N"])
    shape = stands.numbers.shape
    if not isinstance(tensor, gs.Constant) and all(
        isinstance(d, int) for d in tensor.shape or (None,)
    ):
        shape = tensor.shape
    each = 8 // stands.bits if stands.bits else 1
    return tuple(int(d) for d in (*shape[:-1], *(d * each for d in shape[-1:])))
