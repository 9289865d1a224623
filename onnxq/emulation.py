"""What a quantized model gives on x86-64 without VNNI, on any machine.

Layers of uint8 activations and int8 weights are run exactly, in floats; what their saturating pair
sums would lose (`numerics.saturation`) is computed in numpy from their integer inputs, and added
behind them, one layer after the other, since each changes the input of those that follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq import runtime
from onnxq.model import Model, producer, values_of
from onnxq.numerics import saturation
from onnxq.passes.ops import OPS, kernel_rows

Feed = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer that can saturate: its integer input, its weight as [groups, K, N], its scales.

    correction: the extra graph input that is added to its result. scale: of one product, [N] or
    scalar.
    """

    node: gs.Node
    integers: str
    zero_point: int
    weight: NDArray[np.int8]
    scale: NDArray[np.float32]
    correction: str


@dataclass(frozen=True, slots=True)
class Emulator:
    """A model with a correction behind each layer that can saturate.

    layers: those; total: the number of layers with uint8 activations and int8 weights.
    """

    session: Any
    layers: tuple[Layer, ...]
    total: int
    outputs: tuple[str, ...]

    def run(self, feed: Feed) -> list[NDArray[Any]]:
        """The model's outputs for one sample, as saturating arithmetic gives them."""
        feed = runtime.fitted(self.session, feed)
        feed |= {layer.correction: np.zeros((), np.float32) for layer in self.layers}
        for layer in self.layers:
            (integers,) = self.session.run([layer.integers], feed)
            feed[layer.correction] = _correction(layer, integers)
        return list(self.session.run(list(self.outputs), feed))


def emulator(model: Model) -> Emulator:
    """Prepare a model in Q/DQ form; the layers of its main graph are emulated."""
    model = model.copy()
    outputs = tuple(t.name for t in model.graph.outputs)
    layers, total = [], 0
    for node in list(model.graph.nodes):
        found = _layer(model, node)
        total += found is not None
        if found is not None and (saturation.excess(np.hstack(list(found.weight))) > 1).any():
            layers.append(found)
            _add_correction(model, found)
    proto = model.to_proto()
    shown = {layer.integers for layer in layers} - set(outputs)
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(shown))
    proto.graph.input.extend(
        onnx.helper.make_tensor_value_info(layer.correction, onnx.TensorProto.FLOAT, None)
        for layer in layers
    )
    return Emulator(runtime.session(proto, optimize="off"), tuple(layers), total, outputs)


def _layer(model: Model, node: gs.Node) -> Layer | None:
    if node.op not in OPS or OPS[node.op].role != "linear" or len(node.inputs) < 2:
        return None
    data, weight = (producer(t) for t in node.inputs[:2])
    for source in (data, weight):
        if source is None or source.op != "DequantizeLinear":
            return None
    assert data is not None
    assert weight is not None
    q = values_of(weight.inputs[0])
    if q is None or q.dtype != np.int8 or data.inputs[0].dtype != np.uint8:
        return None
    rows = kernel_rows(node, q)
    if rows is None:
        return None
    x_scale, zero, w_scale = (
        np.asarray(values_of(t)) for t in (data.inputs[1], data.inputs[2], weight.inputs[1])
    )
    name = model.unique(f"{node.name}_saturation")
    return Layer(node, data.inputs[0].name, int(zero), rows, x_scale * w_scale, name)


def _add_correction(model: Model, layer: Layer) -> None:
    node = layer.node
    out = node.outputs[0]
    exact = gs.Variable(model.unique(f"{out.name}_exact"), out.dtype)
    node.outputs[0] = exact
    correction = gs.Variable(layer.correction, np.dtype(np.float32))
    total = model.emit("Add", exact, correction, name=f"{out.name}_saturated", like=out)
    total.inputs[0].outputs[0] = out


def _correction(layer: Layer, integers: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The layer's loss in floats, in the shape of its result."""
    node, groups = layer.node, len(layer.weight)
    if node.op != "Conv":
        rows = integers.T if node.op == "Gemm" and node.attrs.get("transA", 0) else integers
        lost = saturation.lost(lambda k: rows[..., k], layer.weight[0], rows.shape[:-1])
        return np.asarray(lost * layer.scale, np.float32)
    column, shape = _windows(node, integers, layer.zero_point)
    depth = integers.shape[1] // groups
    parts = [
        saturation.lost(partial(_in_group, column, depth, g), weight, shape)
        for g, weight in enumerate(layer.weight)
    ]
    return np.asarray(np.moveaxis(np.concatenate(parts, -1) * layer.scale, -1, 1), np.float32)


Window = Callable[[int, int], NDArray[np.uint8]]


def _in_group(column: Window, depth: int, group: int, k: int) -> NDArray[np.uint8]:
    """The k-th input of each sum of a group: channels last, kernel positions first."""
    return column(k // depth, group * depth + k % depth)


def _windows(
    node: gs.Node, x: NDArray[np.uint8], zero_point: int
) -> tuple[Window, tuple[int, ...]]:
    """(kernel position, channel) -> what each output of a Conv reads there; and their shape."""
    weight = node.inputs[1]
    kernel = tuple(weight.shape[2:]) if weight.shape else tuple(node.attrs["kernel_shape"])
    rank = len(kernel)
    strides = node.attrs.get("strides", [1] * rank)
    dilations = node.attrs.get("dilations", [1] * rank)
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    begins, ends = _pads(node, x.shape[2:], spans, strides)
    padded = np.pad(
        x, [(0, 0), (0, 0), *zip(begins, ends, strict=True)], constant_values=zero_point
    )
    size = [
        (n - span) // s + 1 for n, span, s in zip(padded.shape[2:], spans, strides, strict=True)
    ]

    def column(position: int, channel: int) -> NDArray[np.uint8]:
        at = np.unravel_index(position, kernel)
        index: tuple[Any, ...] = tuple(
            slice(i * d, i * d + (n - 1) * s + 1, s)
            for i, d, n, s in zip(at, dilations, size, strides, strict=True)
        )
        return np.asarray(padded[(slice(None), channel, *index)])

    return column, (x.shape[0], *size)


def _pads(
    node: gs.Node, shape: tuple[int, ...], spans: list[int], strides: list[int]
) -> tuple[list[int], list[int]]:
    auto = node.attrs.get("auto_pad", "NOTSET")
    rank = len(shape)
    if not auto.startswith("SAME"):
        pads = [0] * 2 * rank if auto == "VALID" else node.attrs.get("pads", [0] * 2 * rank)
        return list(pads[:rank]), list(pads[rank:])
    totals = [
        max((-(-n // s) - 1) * s + span - n, 0)
        for n, s, span in zip(shape, strides, spans, strict=True)
    ]
    halves = [t // 2 for t in totals]
    rests = [t - h for t, h in zip(totals, halves, strict=True)]
    return (halves, rests) if auto == "SAME_UPPER" else (rests, halves)
