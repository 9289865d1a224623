"""Layers: new labels for what they make, and which labels their weights read.

Grouped convolutions lose as many channels in each group: channels of the same number in each are
one unit. Where there are more groups than channels in one, they lose whole groups: what a group
reads and makes is one unit, as in depthwise convolutions. The hidden units of a recurrent layer
have the same label in all its weights, in both directions and in its states.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.core import Skip
from onnxq.layers import has_weight
from onnxq.model import producer, values_of
from onnxq.packed import remembered
from onnxq.passes.ops import is_constant
from onnxq.passes.unit_labels import FIXED, Block, Cut, Layer, Marks, Net
from onnxq.passes.work import RECURRENT

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def is_layer(node: gs.Node) -> bool:
    """Whether it has a weight of its own, or a table."""
    if node.op == "Gather":
        data, index = node.inputs
        is_table = is_constant(data) and len(data.shape or ()) == 2 and not is_constant(index)
        return is_table and data.dtype is not None and np.dtype(data.dtype).kind == "f"
    return node.op in LAYERS and (node.op != "MatMul" or _has_right_weight(node))


def _has_right_weight(node: gs.Node) -> bool:
    """Whether the right operand is one constant matrix, or unpacked from constants."""
    left, right = node.inputs
    if is_constant(right):
        return len(right.shape or ()) == 2
    return not is_constant(left) and has_weight(node)


def _shape(node: gs.Node, index: int, rank: int | None = None) -> list[int]:
    """The shape of a weight that can be cut. Raises Skip for others."""
    tensor = node.inputs[index]
    values = values_of(tensor)
    if values is None:
        maker = producer(tensor)
        if maker is not None and maker.op == "DequantizeLinear":
            raise Skip(f"its weight {tensor.name} is quantized: prune first, then quantize")
        raise Skip(f"its weight {tensor.name} is not constant")
    if values.dtype.kind != "f":
        raise Skip(f"its weight {tensor.name} is {values.dtype}, not float")
    if remembered(tensor) is not None:
        raise Skip(f"its weight {tensor.name} has its integers already")
    if not values.size or (rank is not None and values.ndim != rank):
        raise Skip(f"its weight {tensor.name} is no matrix")
    for other in tensor.outputs:
        twins = [i for i, t in enumerate(other.inputs) if t is tensor]
        if other.op != node.op or twins != [index]:
            raise Skip(f"its weight {tensor.name} is also used by {other.name} ({other.op})")
    return list(values.shape)


def _add(net: Net, layer: Layer) -> None:
    """Another layer; one that shares its weight loses the same rows and columns."""
    weight = layer.node.inputs[layer.index]
    for other in net.layers:
        if other.node.inputs[other.index] is weight:
            if other.inputs.shape != layer.inputs.shape:
                raise Skip(f"its weight {weight.name} is used in another way by {other.node.name}")
            for a, b in ((other.inputs, layer.inputs), (other.outputs, layer.outputs)):
                net.join(a, b, f"its weight {weight.name} is shared with {other.node.name}")
    net.layers.append(layer)


def _bias(net: Net, node: gs.Node, index: int) -> bool:
    """Whether there is a bias; raises Skip for one that is computed."""
    if len(node.inputs) <= index or not node.inputs[index].name:
        return False
    if not is_constant(node.inputs[index]):
        raise Skip(f"its bias {node.inputs[index].name} is computed")
    return True


def _conv(net: Net, node: gs.Node) -> None:
    shape = _shape(node, 1)
    has_bias = _bias(net, node, 2)
    is_conv, groups = node.op == "Conv", int(node.attrs.get("group", 1))
    inputs = shape[1] * groups if is_conv else shape[0]
    outputs = shape[0] if is_conv else shape[1] * groups
    taken = net.take(node, 1, inputs)
    known = np.full(inputs, FIXED) if taken is None else taken
    split = known.reshape(groups, -1)
    is_depthwise = taken is not None and groups > max(outputs // groups, split.shape[1])
    is_depthwise |= taken is not None and groups == inputs > 1
    if is_depthwise:
        why = f"{node.name} ({node.op}) reads it together with channels that stay"
        net.join(split[:, :1], split, why)
        out = np.repeat(split[:, 0], outputs // groups)
        net.cuts.append(_cut(node, 1, 0, out if is_conv else known))
    else:
        why = f"{node.name} ({node.op}) reads it in groups, and others of them stay"
        net.join(split[:1], split, why)
        out = np.tile(net.new(outputs // groups), groups)
        per_group = out[: outputs // groups]
        net.cuts.append(_cut(node, 1, 0, out if is_conv else known))
        net.cuts.append(_cut(node, 1, 1, split[0] if is_conv else per_group))
    if has_bias:
        net.cuts.append(_cut(node, 2, 0, out))
    _add(net, Layer(node, 1, split, out.reshape(groups, -1), is_depthwise))
    net.give(node.outputs[0], Block((1,), out))


def _cut(node: gs.Node, index: int, axis: int, labels: Marks) -> Cut:
    return Cut(node, index, Block((axis,), labels))


def _matrix(net: Net, node: gs.Node) -> None:
    """Gemm, and MatMul with one constant matrix: along the last axis."""
    if node.op == "Gemm" and node.attrs.get("transA", 0):
        raise Skip("it transposes its input")
    shape = _shape(node, 1, 2)
    is_turned = bool(node.op == "Gemm" and node.attrs.get("transB", 0))
    outputs, inputs = shape if is_turned else shape[::-1]
    has_bias = _bias(net, node, 2)
    rank = len(net.shape(node.inputs[0]))
    taken = net.take(node, rank - 1, inputs)
    known = np.full(inputs, FIXED) if taken is None else taken
    out = net.new(outputs)
    net.cuts.append(_cut(node, 1, 0 if is_turned else 1, out))
    net.cuts.append(_cut(node, 1, 1 if is_turned else 0, known))
    bias = np.shape(values_of(node.inputs[2])) if has_bias else ()  # type: ignore[arg-type]
    if bias[-1:] == (outputs,):
        net.cuts.append(_cut(node, 2, len(bias) - 1, out))
    _add(net, Layer(node, 1, known[None], out[None]))
    net.give(node.outputs[0], Block((rank - 1,), out))


def _table(net: Net, node: gs.Node) -> None:
    """An embedding: rows of a table, whose columns are units."""
    shape = _shape(node, 0, 2)
    if node.attrs.get("axis", 0) not in (0, -2):
        raise Skip("it does not look up rows")
    if net.of(node.inputs[1]) is not None:
        raise Skip("its indices are channels")
    out = net.new(shape[1])
    net.cuts.append(_cut(node, 0, 1, out))
    _add(net, Layer(node, 0, np.full((1, 1), FIXED), out[None]))
    net.give(node.outputs[0], Block((len(net.shape(node.inputs[1])),), out))


def _recurrent(net: Net, node: gs.Node) -> None:
    """Hidden units of LSTM, GRU and RNN; gates lie one behind the other in the weights."""
    gates = GATES[node.op]
    w, r = _shape(node, 1, 3), _shape(node, 2, 3)
    hidden, directions = r[2], r[0]
    if len(node.inputs) > 4 and net.of(node.inputs[4]) is not None:
        raise Skip("its lengths are channels")
    for index in (3, 7):
        _bias(net, node, index)
    layout = node.attrs.get("layout", 0)
    taken = net.take(node, 2, w[2])
    known = np.full(w[2], FIXED) if taken is None else taken
    units = net.new(hidden)
    net.cuts += [_cut(node, 1, 1, np.tile(units, gates)), _cut(node, 1, 2, known)]
    net.cuts += [_cut(node, 2, 1, np.tile(units, gates)), _cut(node, 2, 2, units)]
    for index, times in ((3, 2 * gates), (7, 3)):
        if _bias(net, node, index):
            net.cuts.append(_cut(node, index, 1, np.tile(units, times)))
    _add(net, Layer(node, 1, known[None], units[None]))
    _add(net, Layer(node, 2, units[None], units[None]))
    for index in (5, 6):
        if len(node.inputs) > index and node.inputs[index].name:
            _state(net, node, index, units)
    per_direction = np.broadcast_to(units, (directions, hidden))
    for index, tensor in enumerate(node.outputs):
        if tensor.name:
            axes = ((2 if layout else 1, 3), (1 if layout else 0, 2))[min(index, 1)]
            net.give(
                tensor, Block(axes, per_direction) if directions > 1 else Block(axes[1:], units)
            )


def _state(net: Net, node: gs.Node, index: int, units: Marks) -> None:
    """An initial state loses units too: a constant, or a constant of computed shape."""
    tensor = node.inputs[index]
    if is_constant(tensor):
        net.cuts.append(_cut(node, index, 2, units))
        return
    block = net.only(net.of(tensor), (2,), "it is a state")
    if block is not None and block.labels.size == units.size:
        net.join(block.labels, units, "its state stays")
        return
    why = f"{node.name} ({node.op}) starts from {tensor.name}, which stays"
    net.hold(net.of(tensor), why)
    net.hold(units, why)


def _fill(net: Net, node: gs.Node) -> None:
    """A state of equal values, of computed shape: as many along the last axis as asked for."""
    out = node.outputs[0]
    if not any(r.op in RECURRENT for r in out.outputs):
        return
    asked = net.sizes.values(node.inputs[0])
    if not asked or not isinstance(asked[-1], int) or asked[-1] < 2 or net.model.is_output(out):
        return
    net.give(out, Block((len(asked) - 1,), net.new(asked[-1])))


LAYERS: dict[str, Callable[[Net, gs.Node], None]] = {
    "Conv": _conv,
    "ConvTranspose": _conv,
    "Gemm": _matrix,
    "MatMul": _matrix,
    "Gather": _table,
    "ConstantOfShape": _fill,
    **dict.fromkeys(RECURRENT, _recurrent),
}
