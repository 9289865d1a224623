"""Fold zero padding into the convolution or pooling behind it.

    y = Conv(Pad(x, p), W; pads q)    =>    y = Conv(x, W; pads p + q)

AveragePool counts what Pad made, so it has to count its own padding too, and may have none yet
that it does not count. MaxPool pads with minus infinity: the same where Pad does, or where Pad
makes zeros and the input has no negative values.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.core import Skip, rewrites
from onnxq.model import Model, producer, values_of
from onnxq.passes.ops import clamp_bounds

READERS = ("Conv", "AveragePool", "MaxPool")
LOWEST = -3.3e38  # as good as minus infinity


@rewrites("Pad")
def fold_pad(model: Model, pad: gs.Node) -> str | None:
    """Into every reader, so that the Pad goes."""
    out = pad.outputs[0]
    readers = list(out.outputs)
    if pad.domain or not readers or any(r.op not in READERS or r.domain for r in readers):
        return None
    if model.is_output(out) or any(r.inputs[0] is not out for r in readers):
        raise Skip(f"{out.name} is also used elsewhere")
    before, after = _amounts(pad)
    value = _value(pad)
    for reader in readers:
        _check(pad, reader, value, before, after)
    for reader in readers:
        own = reader.attrs.get("pads", [0] * 2 * len(before))
        reader.attrs["pads"] = [a + b for a, b in zip([*before, *after], own, strict=True)]
        reader.attrs.pop("auto_pad", None)
        if reader.op == "AveragePool":
            reader.attrs["count_include_pad"] = 1
        reader.inputs[0] = pad.inputs[0]
    pad.inputs.clear()
    pad.outputs.clear()
    return f"into {', '.join(f'{r.op} {r.name}' for r in readers)}"


def _amounts(pad: gs.Node) -> tuple[list[int], list[int]]:
    """Padding before and after each spatial axis; raises Skip where it pads something else."""
    if pad.attrs.get("mode", "constant") != "constant":
        raise Skip(f"it pads by {pad.attrs['mode']}")
    shape = pad.inputs[0].shape
    if shape is None:
        raise Skip("the rank of its input is not known")
    amounts = pad.attrs.get("pads")
    if amounts is None:
        found = values_of(pad.inputs[1]) if len(pad.inputs) > 1 else None
        if found is None:
            raise Skip("the padding is not constant")
        amounts = found.tolist()
    axes = list(range(len(shape)))
    if len(pad.inputs) > 3 and pad.inputs[3].name:
        chosen = values_of(pad.inputs[3])
        if chosen is None:
            raise Skip("the axes are not constant")
        axes = [int(a) % len(shape) for a in chosen]
    half = len(amounts) // 2
    before = dict(zip(axes, amounts[:half], strict=True))
    after = dict(zip(axes, amounts[half:], strict=True))
    if any(before.get(a, 0) or after.get(a, 0) for a in (0, 1)):
        raise Skip("it pads batch or channels")
    if min(amounts, default=0) < 0:
        raise Skip("it cuts")
    spatial = range(2, len(shape))
    return [before.get(a, 0) for a in spatial], [after.get(a, 0) for a in spatial]


def _value(pad: gs.Node) -> float:
    if len(pad.inputs) < 3 or not pad.inputs[2].name:
        return float(pad.attrs.get("value", 0.0))
    value = values_of(pad.inputs[2])
    if value is None or value.size != 1 or value.dtype.kind != "f":
        raise Skip("the value it pads with is not a constant")
    return float(value.reshape(()))


def _check(
    pad: gs.Node, reader: gs.Node, value: float, before: list[int], after: list[int]
) -> None:
    """Raise Skip unless the reader's own padding means the same."""
    if reader.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise Skip(f"{reader.name} pads by auto_pad")
    own = reader.attrs.get("pads", [0] * 2 * len(before))
    if reader.op == "Conv":
        if value != 0:
            raise Skip(f"it pads with {value:g}")
        return
    if reader.attrs.get("ceil_mode", 0) or any(d != 1 for d in reader.attrs.get("dilations", [])):
        raise Skip(f"{reader.name} has ceil_mode or dilations")
    total = np.add([*before, *after], own)
    if any(total >= [*reader.attrs["kernel_shape"]] * 2):
        raise Skip(f"{reader.name} has a kernel that the padding would fill")
    if reader.op == "AveragePool":
        if value != 0:
            raise Skip(f"it pads with {value:g}")
        if any(own) and not reader.attrs.get("count_include_pad", 0):
            raise Skip(f"{reader.name} does not count its own padding")
    elif value > LOWEST and not (value == 0 and _is_positive(pad.inputs[0])):
        raise Skip(f"MaxPool would not see the {value:g} it pads with")
    elif len([t for t in reader.outputs if t.name]) > 1:
        raise Skip(f"{reader.name} tells indices")


def _is_positive(tensor: gs.Tensor) -> bool:
    """Whether the tensor has no negative values."""
    node = producer(tensor)
    if node is None or node.domain:
        return False
    if node.op in ("Relu", "Clip"):
        bounds = clamp_bounds(node)
        return bounds is not None and bounds[0] >= 0
    return node.op in ("Sigmoid", "Softmax", "Abs", "HardSigmoid", "Softplus")
