"""What of a network can be removed whole: output channels, neurons, attention heads, hidden units.

A unit is all that is removed together: rows of the weights that make it, columns of those that read
it, what is beside it in biases, normalisations and other constants, and its place in every tensor
between. `structure` finds the units of a model and says why the rest has to stay; `remove` takes
some away and writes all weights, constants, attributes and shapes anew.

    y = W2 f(W1 x + b1) + b2        =>        y = W2[:, kept] f(W1[kept] x + b1[kept]) + b2

The result computes what the model computes whose consumers (`Structure.consumers`) have zeros in
the columns of the units that are gone. Shapes at inputs and outputs stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.core import Note, Skip
from onnxq.graphs import DEFAULT_DOMAIN, op_type_of, sort
from onnxq.model import Model
from onnxq.passes.channels import from_matrices, matrices
from onnxq.passes.linear import LINEAR
from onnxq.passes.removal_edits import EDITS, Editor, Masks, reorder
from onnxq.passes.sizes import Sizes
from onnxq.passes.unit_labels import FIXED, Block, Cut, Layer, Marks, Net, Shuffle
from onnxq.passes.unit_layers import GATES, LAYERS, is_layer
from onnxq.passes.unit_rules import RULES

STAYS = -1


@dataclass(frozen=True, slots=True, eq=False)
class Structure:
    """The units of a model, numbered from 0; -1 stands for what stays.

    layers: weights with the units of their rows and columns. groups: units of the same tensors,
    which are counted together: of each group at least one has to be kept. group_of: [units].
    tensors: units along axes of tensors that shrink, by id; cuts: constants that shrink with them.
    held: why layers keep all they make.
    """

    layers: tuple[Layer, ...]
    groups: tuple[Marks, ...]
    group_of: Marks
    tensors: dict[int, tuple[gs.Tensor, Block]]
    cuts: tuple[Cut, ...]
    shuffles: tuple[Shuffle, ...]
    held: tuple[Note, ...]
    sizes: Sizes

    @property
    def count(self) -> int:
        """How many units there are."""
        return len(self.group_of)

    def width(self, group: int) -> int:
        """Rows of a weight that a unit of the group is: 1, or the size of a head, of a group ..."""
        unit = int(self.groups[group][0])
        counts = [int((v.outputs == unit).sum()) for v in self.layers if not v.is_depthwise]
        return min(c for c in counts if c)

    def producers(self, group: int) -> list[Layer]:
        """The layers that make units of a group."""
        units = self.groups[group]
        return [v for v in self.layers if not v.is_depthwise and np.isin(v.outputs, units).any()]

    def consumers(self, group: int) -> list[Layer]:
        """The layers that read units of a group through a weight."""
        units = self.groups[group]
        return [v for v in self.layers if not v.is_depthwise and np.isin(v.inputs, units).any()]


def weight_matrix(layer: Layer, weight: NDArray[Any]) -> NDArray[Any]:
    """A layer's weight as [groups, outputs, inputs, positions], as its units are; maybe a view.

    Positions: a kernel's, the gates of a hidden unit in all directions, the rows of a table.
    """
    op = layer.node.op
    if op in LINEAR:
        return matrices(layer.node, weight)
    if op == "Gather":
        return weight.T[None, :, None, :]
    directions, rows, columns = weight.shape
    split = weight.reshape(directions, GATES[op], rows // GATES[op], columns)
    return split.transpose(2, 3, 0, 1).reshape(rows // GATES[op], columns, -1)[None]


def weight_from(layer: Layer, matrix: NDArray[np.float64], like: NDArray[Any]) -> NDArray[Any]:
    """The weight as the layer has it; the reverse of `weight_matrix`."""
    op = layer.node.op
    if op in LINEAR:
        return from_matrices(layer.node, matrix, like)
    if op == "Gather":
        return np.ascontiguousarray(matrix[0, :, 0, :].T.astype(like.dtype))
    directions, rows, columns = like.shape
    split = matrix.reshape(rows // GATES[op], columns, directions, GATES[op])
    return np.ascontiguousarray(split.transpose(2, 3, 0, 1).reshape(like.shape).astype(like.dtype))


def structure(model: Model, rule: str, dense: Collection[int] = ()) -> Structure:
    """Find all units of a model; notes are those of `rule`. Brings shapes up to date.

    dense: ids of nodes that keep all that they make.
    """
    model.infer_shapes()
    for graph in model.graphs():
        sort(graph)
    net = Net(model, Sizes(model))
    for graph in model.graphs():
        for node in graph.nodes:
            _see(net, graph, node)
    for tensor, block in net.blocks.values():
        if model.is_output(tensor):
            net.hold(block, f"it reaches the output {tensor.name}")
        elif model.is_input(tensor):
            net.hold(block, f"it is the input {tensor.name}")
    for layer in net.layers:
        if id(layer.node) in dense:
            net.hold(layer.outputs, f"an override keeps {layer.node.name} dense")
    return _Finish(net, rule).structure()


def _see(net: Net, graph: gs.Graph, node: gs.Node) -> None:
    """Label what the node makes, or hold what it reads."""
    labelled = [t for t in node.inputs if t.name and net.of(t) is not None]
    outside = [t for t in labelled if net.model.home(t) is not graph]
    for tensor in outside:
        net.hold(net.of(tensor), f"{node.name} ({node.op}) reads it in a body")
    known = len(net.cuts), len(net.layers)
    is_plain = node.domain in DEFAULT_DOMAIN
    try:
        if outside:
            raise Skip("it reads it in a body")
        if is_plain and node.op in LAYERS and is_layer(node):
            LAYERS[node.op](net, node)
        elif labelled:
            if f"{node.domain}::{op_type_of(node)}" in net.model.functions:
                raise Skip("it is a function of the model: inline it first (inline_functions)")
            if not is_plain or node.op not in RULES:
                raise Skip("channels cannot be followed through it")
            for tensor, block in zip(node.outputs, RULES[node.op](net, node), strict=False):
                if block is not None and tensor.name:
                    net.give(tensor, block)
    except Skip as reason:
        del net.cuts[known[0] :], net.layers[known[1] :]
        for tensor in labelled:
            net.hold(net.of(tensor), f"{node.name} ({node.op}): {reason}")
        if is_plain and node.op in LAYERS and is_layer(node):
            net.declined[id(node)] = node, str(reason)


class _Finish:
    """From labels to units."""

    def __init__(self, net: Net, rule: str) -> None:
        self.net, self.rule = net, rule
        self.settle()

    def final(self, labels: Marks) -> Marks:
        """What was joined, FIXED for what is held."""
        roots = self.net.roots(labels)
        held = np.isin(roots, list(self.net.reasons))
        return np.where(held, FIXED, roots)

    def blocks(self) -> Iterator[Block]:
        yield from (block for _, block in self.net.blocks.values())
        yield from (cut.block for cut in self.net.cuts)

    def settle(self) -> None:
        """Let the labels of each tensor vary along one axis: the longest of those they vary along.

        What is left of a tensor has to be one block. A Reshape of [heads * size] leaves open which
        of the two is removed. Heads have been told from their size before, by the MatMul that sums
        over one and not over the other, and a channel shuffle is followed as the order of channels
        that it is (`unit_moves`): neither gets here.
        """
        changed = True
        while changed:
            changed = False
            for block in self.blocks():
                if len(block.axes) < 2:
                    continue
                labels = self.final(block.labels)
                varying = _varying(labels)
                if len(varying) < 2:
                    continue
                best = max(varying, key=lambda at: labels.shape[at])
                rest = tuple(at for at in range(labels.ndim) if at != best)
                first = labels[
                    tuple(slice(0, 1) if at in rest else slice(None) for at in range(labels.ndim))
                ]
                self.net.join(first, labels, "it is mixed with channels that stay")
                changed = True

    def structure(self) -> Structure:
        net = self.net
        made = [self.final(v.outputs) for v in net.layers if not v.is_depthwise]
        roots = (
            np.unique(np.concatenate([m.reshape(-1) for m in made]))
            if made
            else np.zeros(0, np.int64)
        )
        roots = roots[roots != FIXED]
        signatures: dict[int, list[int]] = {int(r): [] for r in roots}
        for i, (_, block) in enumerate(net.blocks.values()):
            for root in np.unique(self.final(block.labels)).tolist():
                if root in signatures:
                    signatures[root].append(i)
        members: dict[tuple[int, ...], list[int]] = {}
        for root, places in signatures.items():
            members.setdefault(tuple(places), []).append(root)
        unit = np.full(len(net.parent), STAYS, np.int64)
        groups, first = [], 0
        for group in members.values():
            unit[group] = np.arange(first, first + len(group))
            groups.append(np.arange(first, first + len(group)))
            first += len(group)

        def units(labels: Marks) -> Marks:
            return np.asarray(unit[self.final(labels)])

        def named(block: Block) -> Block:
            return Block(block.axes, units(block.labels))

        layers = [replace(v, inputs=units(v.inputs), outputs=units(v.outputs)) for v in net.layers]
        return Structure(
            tuple(layers),
            tuple(groups),
            np.repeat(np.arange(len(groups)), [len(g) for g in groups]).astype(np.int64),
            {k: (t, named(b)) for k, (t, b) in net.blocks.items()},
            tuple(Cut(c.node, c.index, named(c.block)) for c in net.cuts),
            tuple(net.shuffles),
            tuple(self.notes(layers, groups)),
            net.sizes,
        )

    def notes(self, layers: Sequence[Layer], groups: Sequence[Marks]) -> Iterator[Note]:
        """Why layers keep what they make."""
        alone = [int(group[0]) for group in groups if len(group) == 1]
        for node, reason in self.net.declined.values():
            yield Note(self.rule, node.name, reason, changed=False)
        for found, layer in zip(layers, self.net.layers, strict=True):
            if layer.is_depthwise or (layer.node.op in GATES and layer.index == 2):
                continue
            units = found.outputs[found.outputs != STAYS]
            if units.size and not np.isin(units, alone).all():
                continue
            if units.size:
                text = "its channels go all together, as one unit"
            else:
                roots = self.net.roots(layer.outputs).reshape(-1).tolist()
                reasons = Counter(self.net.reasons.get(r, "nothing reads it") for r in roots)
                text = f"its channels stay: {reasons.most_common(1)[0][0]}"
            yield Note(self.rule, layer.node.name, text, changed=False)


def _varying(labels: Marks) -> list[int]:
    """The dimensions along which labels differ."""
    return [at for at in range(labels.ndim) if (labels != labels.take([0], at)).any()]


def remove(model: Model, found: Structure, keep: NDArray[np.bool_], rule: str) -> Sequence[Note]:
    """Remove the units that are not to be kept, in place; a note for each layer that makes some.

    found: of the model as it is. keep: [units]. Raises ValueError where nothing is left of a group.
    """
    for number, group in enumerate(found.groups):
        if not keep[group].any():
            raise ValueError(f"nothing is left of group {number}: keep at least one unit of each")
    if keep.all():
        return []
    edit = Editor(model, found.sizes, keep, found.tensors)
    notes = []
    for layer in found.layers:
        if not ((layer.node.op in GATES and layer.index == 2) or edit.stays(layer.outputs).all()):
            notes.append(Note(rule, layer.node.name, _told(layer, keep)))
        if layer.is_depthwise:
            layer.node.attrs["group"] = int(edit.stays(layer.inputs[:, 0]).sum())
        elif layer.node.op in GATES:
            layer.node.attrs["hidden_size"] = int(edit.stays(layer.outputs).sum())
    nodes = model.nodes(*EDITS)
    for node in sorted(nodes, key=lambda n: n.op == "Shape"):  # what reads sizes is edited before
        if any(edit.of(t) for t in (*node.inputs, *node.outputs)):
            EDITS[node.op](edit, node)
    for shuffle in found.shuffles:
        reorder(edit, shuffle)
    for (node, index), masks in _together(edit, found.cuts).items():
        edit.cut(node, index, masks)
    for tensor, block in found.tensors.values():
        _shrink(model, tensor, edit.masks(block))
    model.sweep()
    model.infer_shapes()
    return notes


NOUNS = {"Conv": "channels", "ConvTranspose": "channels", "Gather": "columns"}


def _told(layer: Layer, keep: NDArray[np.bool_]) -> str:
    """How many of its outputs go, and how many units those are if they are fewer."""
    units = np.unique(layer.outputs[layer.outputs != STAYS])
    gone, whole = units[~keep[units]], layer.outputs.size
    noun = NOUNS.get(layer.node.op, "hidden units" if layer.node.op in GATES else "neurons")
    text = f"{np.isin(layer.outputs, gone).sum()} of {whole} {noun} removed"
    return text if units.size == whole else f"{text}: {gone.size} of {units.size} units"


def _together(edit: Editor, cuts: Sequence[Cut]) -> dict[tuple[gs.Node, int], Masks]:
    """All cuts of an input."""
    found: dict[tuple[gs.Node, int], Masks] = {}
    for cut in cuts:
        found.setdefault((cut.node, cut.index), {}).update(edit.masks(cut.block))
    return found


def _shrink(model: Model, tensor: gs.Tensor, masks: Masks) -> None:
    """The tensor's new sizes, and what is known of the channels that are left."""
    if not masks:
        return
    if tensor.shape is not None:
        counts = {axis: int(mask.sum()) for axis, mask in masks.items()}
        tensor.shape = [
            d if axis not in counts else counts[axis] if isinstance(d, int) else None
            for axis, d in enumerate(tensor.shape)
        ]
    known = model.moments.get(tensor.name)
    mask = next(iter(masks.values()))
    if known is not None:
        if len(known[0]) == mask.size:
            model.moments[tensor.name] = known[0][mask], known[1][mask]
        else:
            del model.moments[tensor.name]
