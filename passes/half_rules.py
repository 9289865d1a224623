"""Which nodes have to stay float32 in a model that computes in 16 bits, and why.

What decides, in this order: whether the standard and the runtime have the operator in the format;
what the user asked for; constants that do not fit; activations seen in samples, and the sums and
squares that operators make inside; and values whose small differences matter more than 11 bits
tell (denominators next to 0, logarithms of small numbers, positions and angles that are large).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.data import Samples
from onnxq.model import Model, producer, readers, values_of
from onnxq.passes.half_forms import form_of
from onnxq.passes.half_masks import clamp_masks
from onnxq.passes.half_ranges import RELATIVE, Seen, observe
from onnxq.passes.half_regions import LAYERS, MOVES
from onnxq.passes.halves import HalfType, is_float32, why_unfit
from onnxq.passes.ops import is_constant
from onnxq.targets.halves import HalfRule

Kept = dict[int, str]
MARGIN = 2.0  # samples are not all there is: half of the range is left to others
# Operators that sum squares inside; those that sum. LayerNormalization and its kin say by their
# stash_type that they do it in float32.
SQUARES = ("ReduceSumSquare", "ReduceL2", "LpNormalization", "LpPool", "GlobalLpPool", "LRN",
           "InstanceNormalization", "MeanVarianceNormalization")  # fmt: skip
SUMS = ("ReduceSum", "ReduceMean", "ReduceL1", "ReduceLogSum")
WINDOWS = ("InstanceNormalization", "LpPool", "GlobalLpPool")  # sums over the axes from 2 on
# Without samples: operators whose results are often too large, or which tell small values apart.
DOUBTFUL = frozenset(
    (*SQUARES, "ReduceSum", "ReduceProd", "ReduceLogSum", "ReduceLogSumExp", "CumSum", "Exp", "Pow",
     "Log", "Reciprocal")
)  # fmt: skip
# Operators that tell apart what is next to each other, however large: an index, an angle.
ABSOLUTE = ("Floor", "Ceil", "Round", "Mod", "Sin", "Cos", "OneHot")
ANGLES, ANGLE = ("Sin", "Cos"), 8.0
# What relative and absolute errors go through; layers and activation functions they do not.
CHAIN = MOVES | frozenset(
    "Add Sub Mul Div Neg Abs Pow Sqrt Reciprocal Exp Log Max Min Clip Sum Mean Where Cast "
    "Floor Ceil Round ReduceSum ReduceMean ReduceSumSquare ReduceL2 ReduceMax ReduceMin CumSum "
    "Range".split()
)
SQUARED = frozenset("ReduceMean ReduceSum Pow Mul Add".split())
FAR = 8  # nodes that an index is followed up


def kept_nodes(
    model: Model,
    half: HalfType,
    rule: HalfRule,
    asked: Mapping[int, str],
    samples: Samples | None,
    progress: Callable[[int], None] | None,
) -> Kept:
    """Reasons by node id. Masks are made to fit first: that changes constants of the model.

    asked: what the user wants as it is. Raises DataError for samples that do not fit.
    """
    clamp_masks(model, half)
    kept: Kept = {}
    for node in model.nodes():
        form = form_of(node, model.opset, half)
        if isinstance(form, str):
            kept[id(node)] = form
        elif form is not None and not rule.runs(node.op):
            kept[id(node)] = f"no kernel for {half.name}"
    kept |= asked
    for part in (_integers(model), _constants(model, half)):
        for node, reason in part:
            kept.setdefault(id(node), reason)
    small = _denominators(model)
    seen = observe(model, samples, progress, {tensor.name for _, tensor in small})
    for node in model.nodes():
        if (why := _too_large(node, half, seen)) is not None:
            kept.setdefault(id(node), why)
        if not seen.real and node.op in DOUBTFUL:
            kept.setdefault(id(node), f"no samples show that {node.op} fits {half.name}")
    _Fine(model, half, seen, kept).follow(small)
    return kept


def _integers(model: Model) -> Iterator[tuple[gs.Node, str]]:
    """Nodes between DequantizeLinear and QuantizeLinear: kernels of integers stand for them."""
    for node in model.nodes():
        data = [t for t in node.inputs if is_float32(t) and not is_constant(t)]
        makers = [producer(t) for t in data]
        if data and all(m is not None and m.op == "DequantizeLinear" for m in makers):
            yield node, "quantized"
        for tensor in node.outputs:
            if any(n.op == "QuantizeLinear" for n, _ in readers(tensor)):
                yield node, "quantized"


def _constants(model: Model, half: HalfType) -> Iterator[tuple[gs.Node, str]]:
    """Nodes whose constants do not fit; bounds of Clip that become infinite bound nothing."""
    known: dict[int, str | None] = {}
    for node in model.nodes():
        for index, tensor in enumerate(node.inputs):
            if not is_float32(tensor) or not is_constant(tensor):
                continue
            if node.op == "Clip" and index > 0 and half.name == "float16":
                bound = values_of(tensor)
                if bound is not None and np.abs(bound).min(initial=np.inf) > half.largest:
                    continue
            if id(tensor) not in known:
                known[id(tensor)] = why_unfit(np.asarray(values_of(tensor)), half)
            if (why := known[id(tensor)]) is not None:
                yield node, f"{tensor.name}: {why}"


def _too_large(node: gs.Node, half: HalfType, seen: Seen) -> str | None:
    """Why what was seen of a node's tensors, or what it sums inside, does not fit."""
    limit = half.largest / MARGIN
    for tensor in (*node.inputs, *node.outputs):
        if is_float32(tensor) and (size := seen.size(tensor)) is not None and size > limit:
            return f"{tensor.name} reaches {size:.3g}: {half.name} ends at {half.largest:.5g}"
    if node.op == "Cast" and node.inputs[0].dtype is not None:
        made = seen.size(node.outputs[0]) if is_float32(node.outputs[0]) else None
        if np.dtype(node.inputs[0].dtype).kind in "iu" and made is not None and made > half.whole:
            return f"integers up to {made:.0f}: beyond {half.whole:.0f} {half.name} skips some"
    if node.op not in (*SQUARES, *SUMS):
        return None
    size, count = seen.size(node.inputs[0]), _summed(node, seen)
    if size is not None:
        inside = count * size ** (2 if node.op in SQUARES else 1)
        if inside > limit:
            return f"sums of up to {inside:.3g} inside: {half.name} ends at {half.largest:.5g}"
    return None


def _summed(node: gs.Node, seen: Seen) -> float:
    """How many values of the first input a reduction sums; 1 where that is not known."""
    source, out = node.inputs[0], node.outputs[0]
    one, two = (seen.shapes.get(t.name, t.shape) for t in (source, out))
    if not one or two is None or not all(isinstance(d, int) for d in (*one, *two)):
        return 1.0
    if node.op in WINDOWS:
        return float(prod(one[2:]))
    if node.op == "LRN":
        return float(node.attrs.get("size", 1))
    if node.op == "LpNormalization":
        return float(one[node.attrs.get("axis", -1)])
    if node.op == "MeanVarianceNormalization":
        axes = node.attrs.get("axes", [0, 2, 3])
        return float(prod(one[a] for a in axes if a < len(one)))
    return float(prod(one) / max(prod(two), 1))


def _denominators(model: Model) -> list[tuple[gs.Node, gs.Tensor]]:
    """Operators that tell small values from each other, and what they read."""
    found = []
    for node in model.nodes(*RELATIVE):
        index = RELATIVE[node.op]
        if node.op == "Pow":
            power = values_of(node.inputs[1])
            if power is None or (np.asarray(power) >= 1).all():
                continue
        read = node.inputs[index]
        if is_float32(read) and not is_constant(read):
            found.append((node, read))
    return found


class _Fine:
    """Follows values that need more digits, or smaller ones, than there are, to their source."""

    def __init__(self, model: Model, half: HalfType, seen: Seen, kept: Kept) -> None:
        self.model, self.half, self.seen, self.kept = model, half, seen, kept
        self.done: set[tuple[int, bool]] = set()

    def follow(self, small: list[tuple[gs.Node, gs.Tensor]]) -> None:
        """Keep what makes them, up to layers."""
        for node, tensor in small if self.half.name == "float16" else ():
            least = self._least(tensor)
            if least is not None and least < self.half.least:
                why = f"values down to {least:.1g} go into {node.op}"
                self.kept.setdefault(id(node), why)
                self._up(tensor, why, relative=True, left=FAR)
        for node in self.model.nodes(*ABSOLUTE, "Cast"):
            if not node.inputs or not is_float32(node.inputs[0]) or not self._counts(node):
                continue
            why = f"goes into {node.op}, which tells neighbours apart"
            self.kept.setdefault(id(node), why)
            self._up(node.inputs[0], why, relative=False, left=FAR)

    def _counts(self, node: gs.Node) -> bool:
        """Whether the node turns small differences of large values into others."""
        if node.op == "Cast":
            out = node.outputs[0].dtype
            return out is not None and np.dtype(out).kind in "iu"
        size = self.seen.size(node.inputs[0])
        return size is None or node.op not in ANGLES or size > ANGLE

    def _least(self, tensor: gs.Tensor) -> float | None:
        """The smallest value seen; without samples, what is added so that it is not 0."""
        if self.seen.real or tensor.name in self.seen.statistics:
            return self.seen.smallest(tensor)
        node = producer(tensor)
        while node is not None and node.op in ("Sqrt", *MOVES) and node.inputs:
            node = producer(node.inputs[0])
        if node is None or node.op not in ("Add", "Max", "Clip"):
            return None
        found = [values_of(t) for t in node.inputs if is_float32(t) and is_constant(t)]
        sizes = [float(np.abs(v).min()) for v in found if v is not None and v.size == 1]
        return min((s for s in sizes if s), default=None)

    def _up(self, tensor: gs.Tensor, why: str, *, relative: bool, left: int) -> None:
        node = producer(tensor)
        if node is None or not left or (id(node), relative) in self.done:
            return
        self.done.add((id(node), relative))
        if node.op not in CHAIN:
            if relative and node.op in LAYERS:
                self.kept.setdefault(id(node), why)
            return
        self.kept.setdefault(id(node), why)
        for source in node.inputs:
            if not is_float32(source) or is_constant(source):
                continue
            if relative:
                least = self.seen.smallest(source)
                is_small = least is not None and least < self.half.least
                if not is_small and (self.seen.real or node.op not in SQUARED):
                    continue
            self._up(source, why, relative=relative, left=left - 1)
