"""Drop operators that return their input as it is.

    y = Identity(x)    =>    y = x

Also: Dropout of inference, Cast to the same type, Reshape, Expand and Tile to the same shape,
Transpose in order, Squeeze or Unsqueeze of nothing, Flatten of a matrix, Pad by nothing, Slice of
everything, Concat, Sum, Mean, Max and Min of one tensor, Split into one, Clip without bounds, Mul
and Div by 1, Add and Sub of 0, pooling over single elements. A Cast there and back, by a type that
holds every value, goes as well.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq.core import Skip, rewrites
from onnxq.model import Model, values_of


def _same_shape(node: gs.Node) -> bool:
    """Whether the result has the input's shape, all sizes known."""
    a, b = node.inputs[0].shape, node.outputs[0].shape
    return (
        a is not None
        and b is not None
        and list(a) == list(b)
        and all(isinstance(d, int) for d in a)
    )


def _is_inference(node: gs.Node) -> bool:
    if any(t.name and t.outputs for t in node.outputs[1:]) or node.attrs.get("is_test", 1) == 0:
        return False
    mode = values_of(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2].name else None
    has_mode = len(node.inputs) > 2 and bool(node.inputs[2].name)
    return not has_mode or (mode is not None and not mode.any())


def _casts_to_itself(node: gs.Node) -> bool:
    dtype = node.inputs[0].dtype
    if dtype is None:
        return False
    return bool(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)) == node.attrs["to"])


def _is_in_order(node: gs.Node) -> bool:
    shape = node.inputs[0].shape
    perm = node.attrs.get("perm")
    if perm is None:
        return shape is not None and len(shape) < 2
    return list(perm) == list(range(len(perm)))


def _is_unbounded(node: gs.Node) -> bool:
    limits = [
        node.attrs.get("min", -3.4028234663852886e38),
        node.attrs.get("max", 3.4028234663852886e38),
    ]
    return not any(t.name for t in node.inputs[1:]) and limits[0] < -3.4e38 and limits[1] > 3.4e38


def _has_no_padding(node: gs.Node) -> bool:
    pads = node.attrs.get("pads", node.attrs.get("paddings"))
    if pads is None and len(node.inputs) > 1:
        found = values_of(node.inputs[1])
        pads = None if found is None else found.tolist()
    return pads is not None and not any(pads)


def _is_one_tensor(node: gs.Node) -> bool:
    return len(node.inputs) == 1


def _neutral(value: float) -> Callable[[gs.Node], bool]:
    """Whether the second operand is a constant that changes neither values nor shape."""

    def test(node: gs.Node) -> bool:
        constant = values_of(node.inputs[1])
        if constant is None or constant.size == 0 or not (constant == value).all():
            return False
        shape = node.inputs[0].shape
        if constant.size == 1 and constant.ndim == 0:
            return True
        return (
            shape is not None
            and len(shape) >= constant.ndim
            and (constant.size == 1 or _same_shape(node))
        )

    return test


def _is_single(node: gs.Node) -> bool:
    return (
        all(k == 1 for k in node.attrs.get("kernel_shape", [0]))
        and all(s == 1 for s in node.attrs.get("strides", [1]))
        and not any(node.attrs.get("pads", [0]))
        and node.attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")
        and not any(t.name and t.outputs for t in node.outputs[1:])
    )


NOOPS: dict[str, Callable[[gs.Node], bool]] = {
    "Identity": lambda node: True,
    "Dropout": _is_inference,
    "Cast": _casts_to_itself,
    "Reshape": _same_shape,
    "Expand": _same_shape,
    "Tile": _same_shape,
    "Squeeze": _same_shape,
    "Unsqueeze": _same_shape,
    "Flatten": _same_shape,
    "Slice": lambda node: (_same_shape(node) and _steps_forward(node)) or _takes_all(node),
    "Split": lambda node: len(node.outputs) == 1,
    "Transpose": _is_in_order,
    "Pad": _has_no_padding,
    "Clip": _is_unbounded,
    "Concat": _is_one_tensor,
    "Sum": _is_one_tensor,
    "Mean": _is_one_tensor,
    "Max": _is_one_tensor,
    "Min": _is_one_tensor,
    "Mul": _neutral(1),
    "Div": _neutral(1),
    "Add": _neutral(0),
    "Sub": _neutral(0),
    "AveragePool": _is_single,
    "MaxPool": _is_single,
}


def _steps_forward(node: gs.Node) -> bool:
    """A Slice of everything with a negative step turns the tensor round."""
    if len(node.inputs) < 5:
        return True
    steps = values_of(node.inputs[4])
    return steps is not None and bool((steps > 0).all())


def _takes_all(node: gs.Node) -> bool:
    """From 0 to further than any axis reaches, step 1: whatever the shape is."""
    if len(node.inputs) < 3:
        return False
    given = [values_of(t) for i, t in enumerate(node.inputs) if t.name and i in (1, 2, 4)]
    if any(v is None for v in given):
        return False
    starts, ends, *steps = (v for v in given if v is not None)
    return not starts.any() and bool(
        (ends >= FURTHEST).all() and all((s == 1).all() for s in steps)
    )


FURTHEST = 2**31 - 1  # exporters write that, or its like in 64 bits, for the end of an axis


def _cast_from(node: gs.Node) -> gs.Tensor | None:
    """What a Cast there and back started from; None where the way there may lose something."""
    there = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
    if node.op != "Cast" or there is None or there.op != "Cast" or there.domain:
        return None
    source = there.inputs[0]
    if source.dtype is None or (source.dtype, node.attrs["to"]) not in {
        (np.dtype(narrow), onnx.helper.np_dtype_to_tensor_dtype(np.dtype(narrow)))
        for narrow, wide in WIDER
        if onnx.helper.np_dtype_to_tensor_dtype(np.dtype(wide)) == there.attrs["to"]
    }:
        return None
    return source


WIDER = (
    (np.float16, np.float32), (np.float16, np.float64), (np.float32, np.float64),
    (np.int32, np.int64), (np.int8, np.int32), (np.int8, np.int64), (np.uint8, np.int32),
    (np.uint8, np.int64), (np.int32, np.float64), (np.bool_, np.float32), (np.bool_, np.int32),
    (np.bool_, np.int64), (np.uint8, np.float32), (np.int8, np.float32),
)  # fmt: skip


@rewrites(*NOOPS)
def drop_noops(model: Model, node: gs.Node) -> str | None:
    """Let what reads the result read the input; names of graph inputs and outputs stay."""
    if node.domain or not node.inputs:
        return None
    begin = _cast_from(node)
    if begin is None and not NOOPS[node.op](node):
        return None
    source, result = node.inputs[0] if begin is None else begin, node.outputs[0]
    if model.is_output(result):
        if isinstance(source, gs.Constant) or model.is_input(source) or not source.inputs:
            raise Skip(f"{result.name} is an output, {source.name} has a name to keep too")
        if model.is_output(source):
            raise Skip(f"{source.name} and {result.name} are both outputs")
        if model.graph_of(node) is not model.graph_of(source.inputs[0]):
            raise Skip(f"{result.name} is an output of a body, {source.name} is made outside")
    model.replace(result, source)
    return f"{node.op} returned its input"
