"""Keep ONNX Runtime from quantizing float layers by itself.

    Q -> Conv(DQ(q, s, z), W, b) -> (Relu ->) Q    =>    Q -> Conv(DQ(q, [s...], [z...]), W, b) -> Q

Where a float Conv, ConvTranspose or Gemm stands between a DequantizeLinear with one scale and a
QuantizeLinear, ONNX Runtime quantizes its weight when it loads the model: int8, one scale for the
whole weight (core/optimizer/qdq_transformer/weight_bias_quantization.cc). The layer that was to be
exact is then the worst of all, and often slower than in floats. It leaves the layer alone when the
input has a scale for each channel: here the same for all, so that no value changes.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.model import Model, producer, readers, values_of


def spread_scales(model: Model) -> None:
    """Give float layers between pairs an input with a scale for each channel."""
    for node in model.nodes("Conv", "ConvTranspose", "Gemm"):
        dequantize, weight = producer(node.inputs[0]), producer(node.inputs[1])
        if dequantize is None or dequantize.op != "DequantizeLinear":
            continue
        if weight is not None and weight.op == "DequantizeLinear":
            continue
        if not _is_quantized_behind(node) or len(dequantize.inputs) < 3:
            continue
        scale, zero = (values_of(t) for t in dequantize.inputs[1:3])
        axis, count = _channels(node)
        if scale is None or zero is None or scale.ndim or count is None:
            continue
        name = node.inputs[0].name
        constants = [
            model.constant(f"{name}_{what}_spread", np.full(count, value))
            for what, value in (("scale", scale), ("zero_point", zero))
        ]
        node.inputs[0] = model.emit(
            "DequantizeLinear", dequantize.inputs[0], *constants, name=f"{name}_spread",
            like=node.inputs[0], at=node, axis=axis,
        )  # fmt: skip
    model.sweep()


def _is_quantized_behind(node: gs.Node) -> bool:
    found = [reader for reader, _ in readers(node.outputs[0])]
    if len(found) == 1 and found[0].op in ("Relu", "Clip"):
        found = [reader for reader, _ in readers(found[0].outputs[0])]
    return any(reader.op == "QuantizeLinear" for reader in found)


def _channels(node: gs.Node) -> tuple[int, int | None]:
    """An axis of the layer's input that has more than one value (one counts as one scale); size.

    The axis that is summed over, whose size the weight tells; or another of known size.
    """
    shape = node.inputs[1].shape
    if not shape or not all(isinstance(d, int) for d in shape):
        return 1, None
    if node.op == "Gemm":
        axis, count = int(not node.attrs.get("transA", 0)), shape[int(node.attrs.get("transB", 0))]
    else:
        axis, count = 1, shape[1] * node.attrs.get("group", 1) if node.op == "Conv" else shape[0]
    if count > 1:
        return axis, count
    known = [(i, d) for i, d in enumerate(node.inputs[0].shape or ()) if isinstance(d, int)]
    return next(((i, d) for i, d in known if d > 1), (axis, None))
