"""Compute at once what depends on constants only.

    y = f(c1, c2)    =>    y is an initializer

Constant nodes become initializers, and so does the Shape of a tensor whose shape is known. All that
can be computed is computed by onnxruntime, in one session; where one node fails there, the others
are computed without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import numpy_helper

from onnxq import runtime
from onnxq.core import Note
from onnxq.model import Model, readers, values_of
from onnxq.weights import Values, Weight, dtype_of

NAME = "fold_constants"
RANDOM = (
    "RandomNormal RandomNormalLike RandomUniform RandomUniformLike Multinomial Bernoulli Dropout"
)
CONTROL = "If Loop Scan SequenceMap"
# What unpacks quantized weights at load or in kernels: folding would undo the quantization.
QUANTIZED = "QuantizeLinear DequantizeLinear DynamicQuantizeLinear"
NEVER = frozenset(f"{RANDOM} {CONTROL} {QUANTIZED}".split())
LARGE = 1 << 20  # bytes; results above that must not be larger than what they are made of
# Operators whose results are as large as a few numbers among their inputs say, and which inputs.
GROWING = {"ConstantOfShape": (0,), "Expand": (1,), "Tile": (1,), "Range": (0, 1, 2)}
WEIGHT = 64  # elements; from here on small integers are taken for a quantized weight


class FoldConstants:
    """Replace nodes whose inputs are all constant, graph by graph, bodies too; no options."""

    name = NAME

    def __repr__(self) -> str:
        return NAME

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Fold in place; a note for each node, and for each result that would be too large."""
        notes = [note for node in model.nodes("Constant") if (note := _unwrap(model, node))]
        notes += [n for node in model.nodes("Shape", "Size") if (n := _static(model, node))]
        _make_scalars(model)
        declined: list[Note] = []
        for graph in model.graphs():
            chosen, left = _foldable(model, graph)
            declined += left
            if chosen:
                notes += _evaluate(model, chosen)
        _make_scalars(model)
        if notes:
            model.sweep()
        return [*notes, *declined]


def _make_scalars(model: Model) -> None:
    """Give Range scalars: vectors of one, which it takes at run time, keep a model from loading."""
    for node in model.nodes("Range"):
        for i, tensor in enumerate(node.inputs):
            if isinstance(tensor, gs.Constant) and tuple(tensor.shape) == (1,):
                node.inputs[i] = model.constant(tensor.name, tensor.values.reshape(()))


def _unwrap(model: Model, node: gs.Node) -> Note | None:
    values = values_of(node.outputs[0])
    if values is None or model.is_output(node.outputs[0]):
        return None
    held = getattr(node.attrs.get("sparse_value"), "_values", values)  # sparse: it stays so
    _settle(node.outputs[0], held)
    return Note(NAME, node.name, "a constant, now an initializer")


def _static(model: Model, node: gs.Node) -> Note | None:
    shape, out = node.inputs[0].shape, node.outputs[0]
    if shape is None or not all(isinstance(d, int) for d in shape) or model.is_output(out):
        return None
    if node.op == "Size":
        values = np.array(prod(shape), np.int64)
    else:
        values = np.array(shape, np.int64)[node.attrs.get("start", 0) : node.attrs.get("end", None)]
    _settle(out, values)
    return Note(NAME, node.name, f"{node.op} of a tensor whose shape is known")


def _settle(tensor: gs.Tensor, values: Values) -> None:
    """Let all that reads the tensor read a constant of the same name."""
    constant = Weight(tensor.name, values)
    for reader, i in list(readers(tensor)):
        reader.inputs[i] = constant
    tensor.inputs.clear()


def _foldable(model: Model, graph: gs.Graph) -> tuple[list[gs.Node], list[Note]]:
    """Nodes that depend on constants only, in order; and those left for their size."""
    known: dict[int, int] = {}  # id of a tensor that will be known -> bytes
    chosen, declined = [], []
    for node in graph.nodes:
        sizes = [
            _bytes(t) if isinstance(t, gs.Constant) else known.get(id(t))
            for t in node.inputs
            if t.name
        ]
        if any(s is None for s in sizes) or not _may_fold(model, node):
            continue
        if (grown := _grown(node)) is None:
            continue  # the next round knows its size
        results = [max(_expected(t), grown) for t in node.outputs]
        if sum(results) > max(LARGE, sum(s or 0 for s in sizes)):
            text = f"its result would take {sum(results) / 1e6:.1f} MB in the file"
            declined.append(Note(NAME, node.name, text, changed=False))
            continue
        chosen.append(node)
        known |= {id(t): size for t, size in zip(node.outputs, results, strict=True)}
    return chosen, declined


def _grown(node: gs.Node) -> int | None:
    """Bytes, at least, that an operator makes of a few numbers; None while these are not known."""
    if node.op not in GROWING:
        return 0
    read = [values_of(node.inputs[i]) for i in GROWING[node.op]]
    numbers = [np.asarray(values, np.float64) for values in read if values is not None]
    if len(numbers) < len(read):
        return None
    if node.op == "Range":
        start, limit, delta = (float(n.reshape(())) for n in numbers)
        elements = abs(limit - start) / max(abs(delta), 1e-300)
    else:
        elements = float(np.prod(np.maximum(np.abs(numbers[0]), 1)))
    return int(min(elements, 2.0**60))


def _may_fold(model: Model, node: gs.Node) -> bool:
    if node.domain or node.op in NEVER or node.op.startswith(("Sequence", "Optional")):
        return False
    if any(isinstance(value, gs.Graph) for value in node.attrs.values()):
        return False
    if any(model.is_output(t) for t in node.outputs) or not node.outputs:
        return False
    if node.op == "Cast" and _widens(node):
        return False
    return not any(isinstance(t, gs.Constant) and _is_packed(t) for t in node.inputs)


def _widens(node: gs.Node) -> bool:
    """Whether a weight stored in 16-bit floats is cast to wider ones: runtimes do it at load."""
    source, to = node.inputs[0], dtype_of(node.attrs["to"])
    name = str(source.dtype)
    is_half = name in ("float16", "bfloat16") and prod(source.shape or ()) >= WEIGHT
    return is_half and to is not None and to.itemsize > np.dtype(source.dtype).itemsize


def _is_packed(constant: gs.Constant) -> bool:
    """Whether the constant looks like a weight stored in few bits."""
    name = str(constant.dtype)
    is_narrow = name.endswith(("int16", "int8", "int4", "int2")) or name.startswith("float8")
    return is_narrow and prod(constant.shape) >= WEIGHT


def _bytes(constant: gs.Constant) -> int:
    return int(prod(constant.shape) * getattr(np.dtype(constant.dtype), "itemsize", 1))


def _expected(tensor: gs.Tensor) -> int:
    """Bytes, as far as the shape is known."""
    if tensor.shape is None or tensor.dtype is None:
        return 0
    sizes = [d if isinstance(d, int) else 1 for d in tensor.shape]
    return int(prod(sizes) * np.dtype(tensor.dtype).itemsize)


def _evaluate(model: Model, chosen: list[gs.Node]) -> list[Note]:
    made = {id(t) for node in chosen for t in node.outputs}
    inside = {id(node) for node in chosen}
    needed = {
        t.name: t
        for node in chosen
        for t in node.outputs
        if t.name and any(id(reader) not in inside for reader in t.outputs)
    }
    weights = {t.name: t for node in chosen for t in node.inputs if t.name and id(t) not in made}
    proto = model.skeleton()
    names = {node.name for node in chosen}
    nodes = [node for node in _all_nodes(proto.graph) if node.name in names]
    graph = onnx.helper.make_graph(
        nodes, "constants", [], [onnx.ValueInfoProto(name=n) for n in needed]
    )
    for name, tensor in weights.items():
        graph.initializer.append(numpy_helper.from_array(np.asarray(values_of(tensor)), name))
    proto.graph.CopyFrom(graph)
    proto.ClearField("functions")
    proto.ir_version = max(proto.ir_version, 4)  # before that, initializers had to be inputs
    try:
        results = runtime.session(proto, optimize="off").run(list(needed), {})
    except Exception as e:  # onnxruntime's exceptions share no base but Exception
        if len(chosen) > 1:
            return _by_halves(model, chosen)
        text = f"cannot be computed: {runtime.one_line(e)}"
        return [Note(NAME, chosen[0].name, text, changed=False)]
    for tensor, value in zip(needed.values(), results, strict=True):
        _settle(tensor, np.asarray(value))
    return [Note(NAME, node.name, f"{node.op} of constants") for node in chosen]


def _by_halves(model: Model, chosen: list[gs.Node]) -> list[Note]:
    """Find what fails among nodes in order; what depends on that is left as well."""
    half = len(chosen) // 2
    notes = _evaluate(model, chosen[:half])
    known: set[int] = set()
    left = []
    for node in chosen[half:]:
        if all(isinstance(t, gs.Constant) or id(t) in known for t in node.inputs if t.name):
            left.append(node)
            known.update(id(t) for t in node.outputs)
    return [*notes, *(_evaluate(model, left) if left else ())]


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _all_nodes(body)


fold_constants = FoldConstants()
