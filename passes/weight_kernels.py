"""Whether a layer has a kernel that multiplies floats with integer weights, and whether it pays.

    floats      c + w K N + m M K N                         nanoseconds, for M rows of K values
    integers    c + w K N + m M K N + i M K                 the rows are brought to integers, too

with constants measured for the target and the width of the weights ([weight_kernels.costs]). A few
rows cost what it takes to read the weight, which integers make short; for many rows it is the
products that count, and there floats are as fast or faster.
"""

from __future__ import annotations

from math import prod

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.model import Model, readers
from onnxq.passes.layouts import Held
from onnxq.passes.ops import is_constant
from onnxq.passes.work import Shapes
from onnxq.schemes import FORMATS, QuantScheme
from onnxq.targets import KernelCost, Target

GAIN = 0.9  # of the time of floats: what a kernel has to stay under to be worth it


def why_no_kernel(
    node: gs.Node, held: Held, scheme: QuantScheme, target: Target | None
) -> str | None:
    """Why the target has no kernel for this weight as the scheme would have it; None: it has."""
    kernels = None if target is None else target.weight_kernels
    if target is None or kernels is None or node.op not in kernels.operators:
        return f"{'the target' if target is None else target.name} has no kernel for {node.op}"
    tensor = node.inputs[held.index]
    if held.index != 1 or len(held.shape) != 2:
        return "kernels take a matrix on the right"
    if tensor.dtype != np.float32:
        return f"kernels are for float32, not {np.dtype(tensor.dtype)}"
    if scheme.format not in kernels.formats:
        return f"{target.name} has no kernel for {scheme.format} weights"
    if kernels.symmetric and not scheme.symmetric:
        return f"kernels of {target.name} have no zero points"
    size = scheme.group_size
    if size is None and not kernels.channels:
        return f"kernels of {target.name} want groups"
    if size is not None and size not in kernels.groups:
        return f"kernels take groups of {', '.join(map(str, kernels.groups))}"
    if sum(1 for _ in readers(tensor)) > 1:
        return "its weight is read more than once: such are not fused"
    return _why_no_gemm(node, held) if node.op == "Gemm" else None


def _why_no_gemm(node: gs.Node, held: Held) -> str | None:
    get = node.attrs.get
    if get("alpha", 1.0) != 1 or get("transA", 0):
        return "kernels have neither alpha nor transA"
    if len(node.inputs) > 2 and node.inputs[2].name:
        columns = prod(held.shape) // held.length
        if get("beta", 1.0) != 1 or list(node.inputs[2].shape or ()) != [columns]:
            return "kernels take a bias with one value a column, and no beta"
    return None


def why_no_gain(
    model: Model, node: gs.Node, held: Held, scheme: QuantScheme, target: Target, shapes: Shapes
) -> str | None:
    """Why floats are as fast, or may be; None: the kernel is faster.

    shapes: of tensors by name, where samples say them. A free dimension that comes first in an
    input of the model is taken for its batch, and 1; with any other the rows are not known.
    """
    kernels = target.weight_kernels
    if kernels is None or not kernels.costs:
        return None
    bits = str(FORMATS[scheme.format].bits)
    if bits not in kernels.costs:
        return f"the time of {bits}-bit kernels is not known"
    rows = _rows(model, node.inputs[0], shapes)
    if rows is None:
        return "how many rows it multiplies is not known: floats are safe"
    k, n = held.length, prod(held.shape) // held.length
    integer, real = (_ns(kernels.costs[name], rows, k, n) for name in (bits, "float"))
    if integer > GAIN * real:
        return f"{k}x{n} with {rows} row{'s' * (rows > 1)} is as fast in floats"
    return None


def _ns(cost: KernelCost, rows: int, k: int, n: int) -> float:
    return cost.node + (cost.weight + cost.product * rows) * k * n + cost.value * rows * k


def _rows(model: Model, tensor: gs.Tensor, shapes: Shapes) -> int | None:
    shape = shapes.get(tensor.name) or tensor.shape
    if shape is None or is_constant(tensor):
        return None
    batch = {i.shape[0] for i in model.graph.inputs if i.shape and isinstance(i.shape[0], str)}
    rows = [1 if d in batch else d for d in shape[:-1]]
    return prod(rows) if all(isinstance(d, int) and d > 0 for d in rows) else None
