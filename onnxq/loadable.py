"""What a target has to read of a model before it computes anything: the first part of a check.

Its opset, the domains and operators, weights that are to be unpacked at load, 16-bit floats.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq.conformance import Finding
from onnxq.graphs import op_type_of
from onnxq.layers import UNPACKING, is_lookup
from onnxq.model import Model, producer
from onnxq.passes.bitmaps import spread_constant
from onnxq.passes.ops import is_constant
from onnxq.passes.packed_weights import stands_for
from onnxq.schemes import FORMATS
from onnxq.targets import Target

HALVES = ("float16", "bfloat16")
FLOATS = (*HALVES, "float32", "float64")


def found(target: Target, rule: str, node: gs.Node, text: str, op: str = "") -> Finding:
    """A node that breaks a rule, with the rule's source; op: the operator that has the rule."""
    return Finding(rule, node.name, node.op, text, target.source(rule, op or node.op))


def free_shapes(model: Model, target: Target) -> Iterator[Finding]:
    """Inputs of no fixed shape, where the target wants one: the whole model falls back."""
    for tensor in model.graph.inputs if target.static_shapes else ():
        if tensor.shape is None or not all(isinstance(d, int) and d > 0 for d in tensor.shape):
            text = f"input {tensor.name} has free dimensions: fix them before it runs there"
            source = target.source("static_shapes")
            yield Finding("static_shapes", tensor.name, "", text, source)


def cannot_be_loaded(model: Model, target: Target) -> Iterator[Finding]:
    """All that the target does not read."""
    most, opset = target.max_opset, model.opset
    if most is not None and opset > most:
        text = f"opset {opset}, {target.name} reads up to {most}"
        yield Finding("max_opset", "", "", text, target.source("max_opset"))
    functions = {(f.domain, f.name) for f in model.envelope.functions}
    for node in model.nodes():
        domain = "" if node.domain in (None, "ai.onnx") else str(node.domain)
        if (domain, op_type_of(node)) in functions:
            continue
        if domain not in target.domains:
            text = f"{target.name} does not know domain {domain!r}"
            yield found(target, "domains", node, text)
        elif not domain and not onnx.defs.has(node.op):
            yield found(target, "domains", node, "ONNX has no such operator")
        yield from _unpacked(node, target)
        yield from _sparse(node, target)
        yield from _halves(node, target)


def is_folded(node: gs.Node) -> bool:
    """Whether it computes a constant: Mul(Cast(integers), scale), but no DequantizeLinear."""
    sources = [producer(t) for t in node.inputs if t.name and not is_constant(t)]
    return all(
        s is not None and s.op in UNPACKING and s.op != "DequantizeLinear" and is_folded(s)
        for s in sources
    )


def _unpacked(node: gs.Node, target: Target) -> Iterator[Finding]:
    """A node that makes floats of what a weight is stored as."""
    made = str(node.outputs[0].dtype) if node.outputs else ""
    if made not in FLOATS:
        return
    if node.op == "Cast" and is_constant(node.inputs[0]):
        stored = str(node.inputs[0].dtype).replace("_", "")
    elif is_lookup(node) and (packed := stands_for(node.outputs[0])) is not None:
        stored = str(np.dtype(packed.numbers.dtype))
    else:
        return
    if stored not in FORMATS and stored not in HALVES:
        return
    allowed = target.stored_formats
    if not target.stored_weights:
        text = f"a weight is unpacked by {node.op}: the target does not compute that at load"
        yield found(target, "stored_weights", node, text)
    elif allowed and stored in FORMATS and stored not in allowed:
        text = f"a weight is stored as {stored}, not as {', '.join(allowed)}"
        yield found(target, "stored_formats", node, text)


def _sparse(node: gs.Node, target: Target) -> Iterator[Finding]:
    """A node that makes a constant of one without its zeros."""
    is_coo = node.op == "Constant" and "sparse_value" in node.attrs
    if "coo" not in target.sparse_weights and is_coo:
        yield found(target, "sparse_weights", node, "a constant is a sparse tensor")
    is_spread = node.op == "Reshape" and spread_constant(node.outputs[0]) is not None
    if "bitmap" not in target.sparse_weights and is_spread:
        text = "a weight is spread from a bitmap: the target may do that at every run"
        yield found(target, "sparse_weights", node, text)


def _halves(node: gs.Node, target: Target) -> Iterator[Finding]:
    """A node that computes in 16-bit floats which the target has not at all."""
    if target.stored_weights or node.op in ("Cast", "Constant") or is_folded(node):
        return
    kinds = {str(t.dtype) for t in node.outputs} & set(HALVES) - set(target.halves)
    for kind in sorted(kinds):
        yield found(target, "halves", node, f"{target.name} has no {kind}")
