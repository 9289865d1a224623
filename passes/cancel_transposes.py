"""Move Transposes through operators that do not mind, where that leaves fewer of them.

    y = Transpose(Relu(Transpose(x)))                    =>    y = Relu(x)
    y = Transpose(Concat(Transpose(a), Transpose(b)))    =>    y = Concat'(a, b)
    y = Transpose(Transpose(x))                          =>    y = Transpose'(x)
    y = ReduceMean(Transpose(x)), not keeping axes       =>    y = ReduceMean'(x)

From a Transpose upwards: elementwise operators, Softmax, Concat and reductions compute the same on
transposed inputs, with their axes renamed. Where such a region ends at a Transpose that
undoes the one it began with, both go; where it ends at something else, one is put there. It is done
when more go than come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.core import Skip, rewrites
from onnxq.model import Model, producer, values_of
from onnxq.passes.shape_rules import axes_of

UNARY = frozenset(
    (
        "Abs Cast Ceil Celu Clip Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity LeakyRelu "
        "Log Mish Neg Not Reciprocal Relu Round Selu Sigmoid Sign Softplus Softsign Sqrt Tanh "
        "ThresholdedRelu"
    ).split()
)
ELEMENTWISE = frozenset(
    "Add And Div Equal Greater Less Max Min Mul Or PRelu Pow Sub Sum Where Xor".split()
)
REDUCE = frozenset(
    "ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare".split()
)
AXIS = frozenset(("Concat", "Softmax", "LogSoftmax"))
SOFTMAX_HAS_AXIS = 13  # before that it flattened the tensor at the axis
LARGEST = 1 << 16  # elements of a constant that is worth storing in another order


@rewrites("Transpose", *sorted(REDUCE))
def cancel_transposes(model: Model, node: gs.Node) -> str | None:
    """Anchored at the last Transpose of a region, or at a reduction behind one."""
    before = producer(node.inputs[0])
    if before is None or before.domain or node.domain:
        return None
    if node.op in REDUCE:
        return _reduce(model, node, before)
    perm = _perm(node)
    if perm is None:
        return None
    if before.op == "Transpose":
        return _compose(model, node, before)
    region = _Region(model, perm)
    if not region.grow(node):
        return None
    gone, made = region.balance()
    if gone <= made:
        raise Skip(f"{gone} Transposes would go, {made} would come")
    region.move(node)
    return f"moved through {', '.join(n.op for n in region.nodes.values())}: {gone} go, {made} come"


def _reduce(model: Model, node: gs.Node, before: gs.Node) -> str | None:
    """A reduction that drops its axes reads what a Transpose reads, if the others keep order."""
    if before.op != "Transpose" or node.attrs.get("keepdims", 1):
        return None
    perm, axes = _perm(before), axes_of(node)
    if perm is None or not axes:
        return None
    reduced = {a % len(perm) for a in axes}
    kept = [p for i, p in enumerate(perm) if i not in reduced]
    if kept != sorted(kept):
        return None
    _set_axes(model, node, [perm[a] for a in axes])
    node.inputs[0] = before.inputs[0]
    return f"without {before.name}"


def _perm(node: gs.Node) -> list[int] | None:
    perm = node.attrs.get("perm")
    if perm is None:
        shape = node.inputs[0].shape
        return None if shape is None else list(range(len(shape)))[::-1]
    return [int(p) for p in perm]


def _compose(model: Model, node: gs.Node, before: gs.Node) -> str | None:
    """Two Transposes have one permutation; when that is the identity, both go."""
    first, second = _perm(before), _perm(node)
    if first is None or second is None:
        return None
    both, source, out = [first[p] for p in second], before.inputs[0], node.outputs[0]
    if both != sorted(both):
        node.inputs[0], node.attrs["perm"] = source, both
        return f"with {before.name}"
    maker = producer(source)
    if model.is_output(out) and (
        maker is None
        or model.is_output(source)
        or model.graph_of(maker) is not model.graph_of(node)
    ):
        raise Skip(f"{out.name} is an output, {source.name} has a name to keep too")
    model.replace(out, source)
    return f"undoes {before.name}"


@dataclass(slots=True)
class _Region:
    """Nodes above a Transpose that can do without it; `perm` is what the Transpose does."""

    model: Model
    perm: list[int]
    nodes: dict[int, gs.Node] = field(default_factory=dict)

    def grow(self, last: gs.Node) -> bool:
        """Take in what feeds the Transpose; leave out what others need as it is."""
        home, todo = self.model.graph_of(last), [last.inputs[0]]
        while todo:
            node = producer(todo.pop())
            if node is None or id(node) in self.nodes or self.model.graph_of(node) is not home:
                continue
            if self._minds(node):
                continue
            self.nodes[id(node)] = node
            todo += self._data(node)
        while outside := [
            key
            for key, node in self.nodes.items()
            if self.model.is_output(node.outputs[0])
            or any(r is not last and id(r) not in self.nodes for r in node.outputs[0].outputs)
        ]:
            for key in outside:
                del self.nodes[key]
        self._keep_connected(last)
        return bool(self.nodes)

    def _keep_connected(self, last: gs.Node) -> None:
        reached: dict[int, gs.Node] = {}
        todo = [last.inputs[0]]
        while todo:
            node = producer(todo.pop())
            if node is not None and id(node) in self.nodes and id(node) not in reached:
                reached[id(node)] = node
                todo += self._data(node)
        self.nodes = reached

    def _minds(self, node: gs.Node) -> bool:
        """Whether the node computes something else on a transposed input, or may."""
        rank = len(self.perm)
        shape = node.outputs[0].shape
        if node.domain or shape is None or len(shape) != rank or len(node.outputs) != 1:
            return True
        if node.op in UNARY:
            return any(t.name and np.prod(t.shape or [1]) != 1 for t in node.inputs[1:])
        if node.op in ELEMENTWISE:
            return any(self._order(t) is None for t in node.inputs)
        if node.op in REDUCE:
            return not node.attrs.get("keepdims", 1) or not axes_of(node)
        if node.op in AXIS:
            if node.op == "Concat":
                return any(self._order(t) is None for t in node.inputs)
            return self.model.opset < SOFTMAX_HAS_AXIS
        return True

    def _order(self, tensor: gs.Tensor) -> str | None:
        """How an operand gets in order: `any` has one element, `constant`, or `data`."""
        if tensor.shape is None:
            return None
        values = values_of(tensor) if isinstance(tensor, gs.Constant) else None
        if values is not None:
            if values.size == 1:
                return "any"
            return "constant" if values.size <= LARGEST else None
        if not tensor.shape:
            return "any"
        return "data" if len(tensor.shape) == len(self.perm) else None

    def _data(self, node: gs.Node) -> list[gs.Tensor]:
        """The inputs that have to be transposed."""
        operands = [node.inputs[i] for i in self._operands(node)]
        return [t for t in operands if node.op in UNARY or self._order(t) == "data"]

    def _operands(self, node: gs.Node) -> range:
        """Which inputs have the result's axes."""
        several = node.op in ELEMENTWISE or node.op == "Concat"
        return range(len(node.inputs) if several else 1)

    def _edges(self) -> list[gs.Tensor]:
        """What the region reads from outside, each once."""
        inputs = [t for node in self.nodes.values() for t in self._data(node)]
        made = {id(node.outputs[0]) for node in self.nodes.values()}
        return list({id(t): t for t in inputs if id(t) not in made}.values())

    def balance(self) -> tuple[int, int]:
        """How many Transposes go, and how many come."""
        gone, come = 1, 0
        for tensor in self._edges():
            node = producer(tensor)
            if node is None or node.op != "Transpose" or node.domain:
                come += 1
                continue
            if all(id(r) in self.nodes for r in tensor.outputs) and not self.model.is_output(
                tensor
            ):
                gone += 1
            if [(_perm(node) or self.perm)[p] for p in self.perm] != sorted(self.perm):
                come += 1
        return gone, come

    def move(self, last: gs.Node) -> None:
        """Transposed inputs in, transposed result out."""
        new = {id(t): self._transposed(t, last) for t in self._edges()}
        for node in self.nodes.values():
            for i, tensor in enumerate(node.inputs):
                if id(tensor) in new:
                    node.inputs[i] = new[id(tensor)]
                elif i in self._operands(node) and self._order(tensor) == "constant":
                    node.inputs[i] = self._reordered(tensor)
            self._rename_axes(node)
        for node in self.nodes.values():
            out = node.outputs[0]
            out.shape = [out.shape[p] for p in self.perm]
        out, result = last.outputs[0], last.inputs[0]
        self.model.replace(out, result)

    def _transposed(self, tensor: gs.Tensor, at: gs.Node) -> gs.Tensor:
        node, perm = producer(tensor), self.perm
        if node is not None and node.op == "Transpose" and (own := _perm(node)) is not None:
            tensor, perm = node.inputs[0], [own[p] for p in self.perm]
            if perm == sorted(perm):
                return tensor
        shape = None if tensor.shape is None else [tensor.shape[p] for p in perm]
        return self.model.emit(
            "Transpose", tensor, name=f"{tensor.name}_moved", dtype=tensor.dtype, shape=shape,
            at=at, perm=perm,
        )  # fmt: skip

    def _reordered(self, constant: gs.Constant) -> gs.Constant:
        values = values_of(constant)
        assert values is not None
        full = values.reshape([1] * (len(self.perm) - values.ndim) + list(values.shape))
        return self.model.constant(f"{constant.name}_moved", full.transpose(self.perm))

    def _rename_axes(self, node: gs.Node) -> None:
        """Axis a of the old order is where `perm` has it."""
        if node.op in AXIS:
            axis = node.attrs.get("axis", -1)
            node.attrs["axis"] = self.perm.index(axis % len(self.perm))
        elif node.op in REDUCE:
            axes = axes_of(node) or []
            _set_axes(self.model, node, [self.perm.index(a % len(self.perm)) for a in axes])


def _set_axes(model: Model, node: gs.Node, axes: Sequence[int]) -> None:
    if "axes" in node.attrs:
        node.attrs["axes"] = sorted(axes)
    else:
        node.inputs[1] = model.constant(f"{node.name}_axes", np.array(sorted(axes), np.int64))
