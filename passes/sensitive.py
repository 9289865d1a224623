"""What should not be quantized with fixed ranges, found from the graph and from calibrated ranges.

Each rule answers with the nodes that have to stay float and a reason for the report. No rule looks
at names: they are about what the arithmetic does to an error of one quantization step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.graphs import bodies_of
from onnxq.layers import reached_from
from onnxq.model import Model, producer, readers
from onnxq.passes.ops import OPS, activation_inputs, is_constant
from onnxq.passes.placement import Placement
from onnxq.statistics import Histogram

# Operators that pass an error on as it is, or scaled: what lies behind them decides.
PASSING = frozenset(
    [
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Neg",
        "Abs",
        "Max",
        "Min",
        "Clip",
        "Relu",
        "Pow",
        "Sum",
        "Where",
        "Cast",
        "Identity",
        "Concat",
        "Split",
        "Slice",
        "Reshape",
        "Flatten",
        "Squeeze",
        "Unsqueeze",
        "Transpose",
        "Expand",
        "Tile",
        "Gather",
        "Pad",
        "ReduceSum",
        "Unsqueeze",
        "MaxPool",
    ]
)
# Operators whose result depends on the relative, not the absolute size of small inputs.
RELATIVE = frozenset(("Log", "Sqrt", "Reciprocal"))
# Operators around a softmax's scores.
SCORES = frozenset(
    ["Add", "Sub", "Mul", "Div", "Where", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Expand"]
)
# Share of the multiply-accumulates that an output layer may have to be kept float.
OUTPUT_SHARE = 0.1
# Share of the multiply-accumulates that integers have to take over, or nothing gets faster.
LEAST_SHARE = 0.05
# A part of a Concat whose range is smaller than this share of the whole keeps under 4 of 8 bits.
TAIL = 1 / 16

Floats = dict[int, str]


def graph_rules(model: Model, macs: Mapping[int, float]) -> Floats:
    """Nodes to keep float for what the graph says; macs: multiply-accumulates by node id."""
    floats: Floats = {}
    for rule in (front_ends, normalisations, softmax_scores, recurrent_state):
        for node, reason in rule(model):
            floats.setdefault(id(node), reason)
    for node, reason in output_layers(model, macs):
        floats.setdefault(id(node), reason)
    return floats


def front_ends(model: Model) -> Iterator[tuple[gs.Node, str]]:
    """Layers whose result is logged, rooted or divided by: a small value's relative error counts.

    Spectrograms are of this kind. Statistics (behind a Reduce operator) are not: an average of many
    values has no small-value problem, and every decomposed normalisation would match.
    """
    for node in model.nodes():
        if OPS.get(node.op) is None or OPS[node.op].role != "linear":
            continue
        hit = _first(node, _is_relative, through=lambda n: n.op in PASSING)
        if hit is not None:
            yield (
                node,
                f"its result goes into {hit.op}: relative errors of small values count there",
            )


def _is_relative(node: gs.Node, index: int) -> bool:
    if node.op == "Div":
        return index == 1
    return node.op in RELATIVE


def _first(
    start: gs.Node,
    wanted: Callable[[gs.Node, int], bool],
    through: Callable[[gs.Node], bool],
) -> gs.Node | None:
    """A node behind `start` that is wanted, reached over nodes that may be gone through."""
    todo, seen = list(start.outputs), set[int]()
    while todo:
        for node, index in readers(todo.pop()):
            if wanted(node, index):
                return node
            if id(node) not in seen and through(node):
                seen.add(id(node))
                todo.extend(node.outputs)
    return None


def normalisations(model: Model) -> Iterator[tuple[gs.Node, str]]:
    """Mul and Add inside a normalisation: products with reciprocals and roots have a wide range."""
    for node in model.nodes("Mul", "Add"):
        for tensor in node.inputs:
            source = producer(tensor)
            if source is not None and source.op in (*RELATIVE, "Exp", "Pow", "ReduceMean"):
                if source.op == "ReduceMean" and node.op == "Mul":
                    continue  # an average as a gate
                yield node, f"part of a normalisation: one operand comes from {source.op}"
                break


def softmax_scores(model: Model) -> Iterator[tuple[gs.Node, str]]:
    """Elementwise operators in front of Softmax: masks of -1e9 would take the whole range."""
    for softmax in model.nodes("Softmax"):
        todo, seen = [softmax.inputs[0]], set[int]()
        while todo:
            node = producer(todo.pop())
            if node is not None and node.op in SCORES and id(node) not in seen:
                seen.add(id(node))
                todo.extend(node.inputs)
                yield node, "in front of a Softmax: an additive mask would take the whole range"


def recurrent_state(model: Model) -> Iterator[tuple[gs.Node, str]]:
    """Layers that read or write a state which goes round: their errors add up from step to step.

    A state is what a Loop or Scan carries; and a float input of the model, not the first, with the
    shape of an output (not the first either) that other inputs go into, too: else it is a branch.
    """
    states = [
        (i, o)
        for i in model.graph.inputs[1:]
        for o in model.graph.outputs[1:]
        if _twins(i, o) and _has_other_inputs(model, i, o)
    ]
    states += [pair for node in model.nodes("Loop", "Scan") for pair in _carried(node)]
    text = "recurrent state goes through it: errors would add up from step to step"
    for state, _ in states:
        for node in _layers(state, lambda t: [n for n, _ in readers(t)], lambda n: n.outputs):
            yield node, text
    for _, state in states:
        for node in _layers(state, lambda t: list(t.inputs), _sources):
            yield node, text


def _sources(node: gs.Node) -> list[gs.Tensor]:
    return [*node.inputs, *(t for body in bodies_of(node) for t in body.outputs)]


def _carried(node: gs.Node) -> Iterator[tuple[gs.Tensor, gs.Tensor]]:
    """What the node's body takes from one run and gives to the next."""
    body = node.attrs["body"]
    if node.op == "Loop":
        yield from zip(body.inputs[2:], body.outputs[1:], strict=False)
    else:
        count = len(body.inputs) - node.attrs["num_scan_inputs"]
        yield from zip(body.inputs[:count], body.outputs, strict=False)


def _twins(a: gs.Tensor, b: gs.Tensor) -> bool:
    if a.dtype != np.float32 or b.dtype != np.float32 or not a.shape or not b.shape:
        return False
    known = [(x, y) for x, y in zip(a.shape, b.shape, strict=False) if isinstance(x, int)]
    return len(a.shape) == len(b.shape) and all(x == y or not isinstance(y, int) for x, y in known)


def _has_other_inputs(model: Model, state: gs.Tensor, output: gs.Tensor) -> bool:
    """Whether inputs besides the state go into the output."""
    maker = producer(output)
    return maker is not None and any(
        id(maker) in {*map(id, t.outputs), *reached_from(model, t.outputs, forwards=True)}
        for t in model.graph.inputs
        if t is not state
    )


def _layers(
    tensor: gs.Tensor,
    step: Callable[[gs.Tensor], list[gs.Node]],
    onward: Callable[[gs.Node], list[gs.Tensor]],
) -> Iterator[gs.Node]:
    """All nodes next to the tensor up to and with the first linear layer."""
    todo, seen = [tensor], set[int]()
    while todo:
        for node in step(todo.pop()):
            if id(node) not in seen:
                seen.add(id(node))
                yield node
                if node.op in PASSING or node.op == "If":
                    todo.extend(onward(node))


def output_layers(model: Model, macs: Mapping[int, float]) -> Iterator[tuple[gs.Node, str]]:
    """Convolutions that write an output: pixels, boxes and logits show each step of 8 bits.

    Only while they are cheap: together at most OUTPUT_SHARE of all multiply-accumulates. MatMul and
    Gemm return floats from integer kernels and need no exception; nor do convolutions of whose
    results averages over all pixels are taken: the steps average out.
    """
    last = [n for n in output_convolutions(model) if not _is_averaged(n)]
    share = sum(macs.get(id(n), 0.0) for n in last) / (sum(macs.values()) or 1.0)
    if share <= OUTPUT_SHARE:
        for node in last:
            yield node, f"an output layer, {share:.1%} of the work: its result shows each step"


def _is_averaged(node: gs.Node) -> bool:
    """Whether the node's result is read as averages over pixels only."""
    found = list(readers(node.outputs[0]))
    return bool(found) and all(
        n.op == "GlobalAveragePool"
        or (n.op == "ReduceMean" and list(n.attrs.get("axes", ())) in ([2, 3], [-2, -1]))
        or (n.op in ("Relu", "LeakyRelu", "Clip") and _is_averaged(n))
        for n, _ in found
    )


def output_convolutions(model: Model) -> list[gs.Node]:
    """Convolutions of the main graph with no further layer behind them."""
    return [
        node
        for node in model.graph.nodes
        if node.op in ("Conv", "ConvTranspose")
        and _first(node, _is_layer, through=lambda _: True) is None
    ]


def _is_layer(node: gs.Node, index: int) -> bool:
    return node.op in ("LSTM", "GRU", "RNN") or (node.op in OPS and OPS[node.op].role == "linear")


def slight_gains(placement: Placement, macs: Mapping[int, float]) -> Floats:
    """All nodes, where integers would do hardly any of the work: that costs more than it brings."""
    share = sum(macs.get(key, 0.0) for key in placement.nodes) / (sum(macs.values()) or 1.0)
    if share >= LEAST_SHARE:
        return {}
    text = f"integers could do only {share:.1%} of the work: not worth their steps"
    return dict.fromkeys(placement.nodes, text)


def range_rules(
    placement: Placement, ranges: Mapping[str, Histogram], *, strict: bool = False
) -> Floats:
    """Nodes to keep float for what calibration saw; strict: only where nothing else is possible."""
    floats: Floats = {}
    for node in placement.nodes.values():
        ends = placement.clamps.get(id(node), node).outputs
        for tensor in (*node.inputs, *ends):
            seen = [ranges[name] for name in placement.sources.get(tensor.name, ())]
            if seen and not any(r.bins.size for r in seen):
                floats[id(node)] = f"{tensor.name} has no elements in any sample"
            if any(r.has_nonfinite for r in seen):
                floats[id(node)] = f"{tensor.name} has infinite values: no range covers them"
            if any(not r.count for r in seen):
                floats[id(node)] = "no sample takes the branch that it is in"
        if (
            not strict
            and id(node) not in floats
            and node.op == "Concat"
            and (reason := _mixed_tail(node, placement, ranges))
        ):
            floats[id(node)] = reason
    return floats


def _mixed_tail(node: gs.Node, placement: Placement, ranges: Mapping[str, Histogram]) -> str | None:
    """A Concat of parts with very different ranges: boxes in pixels beside scores from 0 to 1."""
    widths = {}
    for i in activation_inputs(node):
        if not is_constant(node.inputs[i]):
            found = _own(node.inputs[i], placement, ranges)
            widths[node.inputs[i].name] = max(r.hi for r in found) - min(r.lo for r in found)
    small, large = min(widths, key=widths.__getitem__), max(widths.values())
    if 0 < widths[small] < TAIL * large:
        return f"{small} spans {widths[small]:.3g} beside {large:.3g}: one scale would wipe it out"
    return None


def _own(
    tensor: gs.Tensor, placement: Placement, ranges: Mapping[str, Histogram]
) -> list[Histogram]:
    """What was seen of a part itself where the whole has one scale; of moves, at their input."""
    source: gs.Tensor | None = tensor
    while source is not None and source.name not in ranges:
        node = producer(source)
        source = node.inputs[0] if node is not None and node.inputs else None
    if source is not None:
        return [ranges[source.name]]
    return [ranges[name] for name in placement.sources[tensor.name]]
