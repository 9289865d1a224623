"""Where labels go when data is moved: Reshape, Transpose, Slice, Pad and others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.core import Skip
from onnxq.model import values_of
from onnxq.passes.ops import is_constant
from onnxq.passes.size_algebra import Shape, Size, parted, product, target_of
from onnxq.passes.unit_labels import Block, Net, Shuffle

Move = Callable[[Net, gs.Node], Sequence[Block | None]]


def segments(one: Shape, other: Shape) -> list[tuple[range, range]]:
    """Runs of axes of two shapes with as many values, as short as they can be proved to be."""
    fronts = {product(other[:j]): j for j in range(len(other), -1, -1)}
    backs = {product(other[j:]): j for j in range(len(other) + 1)}
    found, i, j = [], 0, 0
    for k in range(1, len(one) + 1):
        end = fronts.get(product(one[:k]), backs.get(product(one[k:])))
        if k == len(one):
            end = len(other)
        if end is not None and end >= j:
            found.append((range(i, k), range(j, end)))
            i, j = k, end
    return found


def _shuffled(net: Net, node: gs.Node, block: Block) -> bool:
    """Whether the node begins a channel shuffle; labels are given to what it ends with.

        [n, g c, ..] -> Reshape [n, g, c, ..] -> Transpose [n, c, g, ..] -> Reshape [n, c g, ..]

    Units need not be alike in each of the g groups then: the shuffle becomes a Gather.
    """
    chain = [node]
    for op in ("Transpose", "Reshape"):
        (tensor,) = chain[-1].outputs
        users = list(tensor.outputs)
        if len(users) != 1 or users[0].op != op or net.model.is_output(tensor):
            return False
        if users[0].inputs[0] is not tensor or users[0].domain:
            return False
        chain.append(users[0])
    source, folded = net.shape(node.inputs[0]), net.shape(node.outputs[0])
    out = chain[2].outputs[0]
    (at, *others), size = block.axes, block.labels.size
    if (
        others
        or source != net.shape(out)
        or net.model.graph_of(node) is not net.model.graph_of(chain[2])
    ):
        return False
    inner = folded[at : at + 2]
    if folded[:at] != source[:at] or len(inner) < 2 or product(inner) != size:
        return False
    swapped = [*range(at), at + 1, at, *range(at + 2, len(folded))]
    if list(chain[1].attrs.get("perm", range(len(folded))[::-1])) != swapped:
        return False
    order = np.arange(size).reshape(_ints(folded, (at, at + 1))).T.reshape(-1)
    net.shuffles.append(Shuffle(chain[2], node.inputs[0], at, order))
    net.give(out, Block((at,), block.labels[order]))
    return True


def _reshape(net: Net, node: gs.Node) -> Sequence[Block | None]:
    """Labels are folded and unfolded with the axes that they are along."""
    source, out = net.shape(node.inputs[0]), net.shape(node.outputs[0])
    block = net.of(node.inputs[0])
    if block is not None and node.op == "Reshape" and _shuffled(net, node, block):
        return [None]
    touched: list[tuple[range, range, list[int], list[int]]] = []
    for before, behind in segments(source, out):
        if block is None or not set(before) & set(block.axes):
            continue
        dims = _lined([source[a] for a in before], [out[a] for a in behind])
        if dims is not None:
            touched.append((before, behind, *dims))
            continue
        for axis in before:
            why = f"{node.name} ({node.op}) mixes it with an axis of free size"
            block = net.drop(block, axis, why)
    if block is None:
        return [None]
    touched = [entry for entry in touched if set(entry[0]) & set(block.axes)]
    axes = [a for before, *_ in touched for a in before]
    labels = block.over(axes, [d for _, _, dims, _ in touched for d in dims])
    made = [a for _, behind, *_ in touched for a in behind]
    shape = [d for *_, dims in touched for d in dims]
    if not made or 0 in shape:
        raise Skip("its one channel loses its axis")
    if prod(shape) != labels.size:
        raise Skip("its sizes are not known")
    result = simplified(Block(tuple(made), labels.reshape(shape)))
    _check_target(net, node, result)
    return [result]


def _lined(before: Shape, behind: Shape) -> tuple[list[int], list[int]] | None:
    """Sizes of axes that are reshaped, without a free size that stays in front; None for others.

    [batch, heads * size] becomes [batch * heads, size]: labels of [heads * size] and [heads, size].
    """
    if not before or not behind:
        return [int(d) for d in before], [int(d) for d in behind]
    (one, free), (other, same) = parted(before[0]), parted(behind[0])
    rest = *before[1:], *behind[1:]
    if free != same or any(not isinstance(d, int) for d in rest):
        return None
    return [one, *(int(d) for d in before[1:])], [other, *(int(d) for d in behind[1:])]


def _check_target(net: Net, node: gs.Node, block: Block) -> None:
    """Raise Skip where the target of a Reshape could not be written with other sizes."""
    if node.op != "Reshape" or "shape" in node.attrs or is_constant(node.inputs[1]):
        return
    source, out = net.shape(node.inputs[0]), net.shape(node.outputs[0])
    if smaller_target(source, out, dict.fromkeys(block.axes, 2)) is not None:
        return
    known = net.sizes.values(node.inputs[1])
    if known is None or any(not isinstance(known[a], int) for a in block.axes):
        raise Skip("its target is computed")


def smaller_target(source: Shape, out: Shape, new: dict[int, int]) -> list[int] | None:
    """A constant target for a Reshape whose result has other sizes; None where there is none."""
    result: list[Size | None] = [
        d if i not in new else new[i] if isinstance(d, int) else f"{d}, less"
        for i, d in enumerate(out)
    ]
    return target_of(source, result)


def _ints(shape: Shape, axes: Sequence[int]) -> list[int]:
    found = [d for a in axes if isinstance(d := shape[a], int)]
    if len(found) < len(axes):
        raise Skip("the size of its channels is not known")
    return found


def simplified(block: Block) -> Block:
    """Without axes along which labels are the same everywhere."""
    axes, labels = list(block.axes), block.labels
    for axis in block.axes:
        at = axes.index(axis)
        first = labels.take([0], at)
        if len(axes) > 1 and (labels == first).all():
            labels = first.squeeze(at)
            axes.remove(axis)
    return Block(tuple(axes), np.array(labels))


def _transpose(net: Net, node: gs.Node) -> Sequence[Block | None]:
    block = net.of(node.inputs[0])
    assert block is not None
    rank = len(net.shape(node.inputs[0]))
    order = list(node.attrs.get("perm", range(rank)[::-1]))
    where = [order.index(a) for a in block.axes]
    return [Block(tuple(sorted(where)), block.labels.transpose(np.argsort(where)))]


def _resize(net: Net, node: gs.Node) -> Sequence[Block | None]:
    """Channels are as they were: the same size, and nothing is cut off."""
    if "crop" in node.attrs.get("coordinate_transformation_mode", ""):
        raise Skip("it crops")
    source, out = net.shape(node.inputs[0]), net.shape(node.outputs[0])
    block = net.of(node.inputs[0])
    assert block is not None
    for axis in block.axes:
        if source[axis] != out[axis]:
            block = net.drop(block, axis, f"{node.name} ({node.op}) resizes its channels")
    if block is not None and len(node.inputs) > 3 and node.inputs[3].name:
        known = net.sizes.values(node.inputs[3])
        if known is None or any(
            not isinstance(known[a], int) for a in block.axes if "axes" not in node.attrs
        ):
            raise Skip("its sizes are computed")
    return [block]


def _pad(net: Net, node: gs.Node) -> Sequence[Block | None]:
    """Channels of a constant that are put in front or behind are units too."""
    block = net.of(node.inputs[0])
    assert block is not None
    rank = len(net.shape(node.inputs[0]))
    pads = node.attrs.get("pads")
    if pads is None:
        pads = net.numbers(node.inputs[1])
    if pads is None or (len(node.inputs) > 3 and node.inputs[3].name) or len(pads) != 2 * rank:
        raise Skip("what it pads is computed")
    for axis in block.axes:
        ends = int(pads[axis]), int(pads[axis + rank])
        if not any(ends):
            continue
        _ints(net.shape(node.inputs[0]), (axis,))
        if len(block.axes) > 1 or min(ends) < 0 or node.attrs.get("mode", "constant") != "constant":
            raise Skip("it pads channels")
        front, back = (net.new(n) for n in ends)
        block = Block(block.axes, np.concatenate([front, block.labels, back]))
    return [block]


def bounds(node: gs.Node, net: Net) -> tuple[list[int], list[int], list[int], list[int]]:
    """Starts, ends, axes and steps of a Slice. Raises Skip where they are computed."""
    rank = len(net.shape(node.inputs[0]))
    if "starts" in node.attrs:
        starts, ends = list(node.attrs["starts"]), list(node.attrs["ends"])
        axes = list(node.attrs.get("axes", range(len(starts))))
        return starts, ends, [a % rank for a in axes], [1] * len(starts)
    inputs = [net.numbers(t) if t.name else [] for t in node.inputs[1:]]
    found = [*inputs, *[[] for _ in range(4 - len(inputs))]]
    starts_, ends_, axes_, steps_ = found
    if axes_ is None:
        raise Skip("its axes are computed")
    count = len(axes_) or len(starts_ or ends_ or ())
    axes = [a % rank for a in axes_] or list(range(count))
    if starts_ is None or ends_ is None or steps_ is None:
        block = net.of(node.inputs[0])
        if block is not None and set(block.axes) & set(axes):
            raise Skip("where it cuts is computed")
        return [0] * count, [0] * count, axes, [1] * count
    return starts_, ends_, axes, steps_ or [1] * count


def _slice(net: Net, node: gs.Node) -> Sequence[Block | None]:
    block = net.of(node.inputs[0])
    assert block is not None
    starts, ends, axes, steps = bounds(node, net)
    labels = block.labels
    for at, axis in enumerate(block.axes):
        if axis in axes:
            _ints(net.shape(node.inputs[0]), (axis,))
            i = axes.index(axis)
            if steps[i] != 1:
                raise Skip("it takes every so many channels")
            labels = labels.swapaxes(0, at)[slice(starts[i], ends[i])].swapaxes(0, at)
    if not labels.size:
        raise Skip("nothing is left of its channels")
    return [Block(block.axes, labels)]


def _split(net: Net, node: gs.Node) -> Sequence[Block | None]:
    block = net.of(node.inputs[0])
    assert block is not None
    axis = node.attrs.get("axis", 0) % len(net.shape(node.inputs[0]))
    if axis not in block.axes:
        return [block] * len(node.outputs)
    at = block.axes.index(axis)
    counts = [net.shape(t)[axis] for t in node.outputs]
    known = [d for d in counts if isinstance(d, int)]
    if len(known) < len(counts) or sum(known) != block.labels.shape[at] or 0 in known:
        raise Skip("the sizes of its parts are not known")
    if len(node.inputs) > 1 and node.inputs[1].name and not is_constant(node.inputs[1]):
        raise Skip("the sizes of its parts are computed")
    parts = np.split(block.labels, np.cumsum(known)[:-1], at)
    return [Block(block.axes, part) for part in parts]


def _gather(net: Net, node: gs.Node) -> Sequence[Block | None]:
    block, index = net.of(node.inputs[0]), node.inputs[1]
    if net.of(index) is not None:
        raise Skip("its indices are channels")
    axis = node.attrs.get("axis", 0) % len(net.shape(node.inputs[0]))
    more = len(net.shape(index)) - 1
    if block is None:
        return [None]
    if axis in block.axes:
        values = values_of(index)
        if values is None or values.ndim != 1:  # one index: what is taken has no such axis
            block = net.drop(block, axis, f"{node.name} (Gather) takes single channels")
        else:
            at = block.axes.index(axis)
            _ints(net.shape(node.inputs[0]), (axis,))
            return [Block(block.axes, block.labels.take(values.astype(np.int64), at))]
    if block is None:
        return [None]
    return [Block(tuple(a + more * (a > axis) for a in block.axes), block.labels)]


def _expand(net: Net, node: gs.Node) -> Sequence[Block | None]:
    """Repeated along other axes only; the sizes that are asked for have to be known."""
    source, out = net.shape(node.inputs[0]), net.shape(node.outputs[0])
    block = net.of(node.inputs[0])
    assert block is not None
    block = block.shifted(len(out) - len(source))
    for axis in block.axes:
        if source[axis - len(out)] != out[axis]:
            block = net.drop(block, axis, f"{node.name} ({node.op}) repeats its channels")
    asked = net.sizes.values(node.inputs[1])
    if block is not None and (
        asked is None or any(not isinstance(asked[a - len(out)], int) for a in block.axes)
    ):
        raise Skip("its sizes are computed")
    return [block]


def _tile(net: Net, node: gs.Node) -> Sequence[Block | None]:
    block, source, out = net.of(node.inputs[0]), *map(net.shape, (node.inputs[0], node.outputs[0]))
    for axis in () if block is None else block.axes:
        if source[axis] != out[axis]:
            block = net.drop(block, axis, f"{node.name} (Tile) repeats its channels")
    return [block]


def _to_space(net: Net, node: gs.Node) -> Sequence[Block | None]:
    """Each new channel is made of block^2 old ones."""
    area = int(node.attrs["blocksize"]) ** 2
    block = net.only(net.of(node.inputs[0]), (1,), f"{node.name} (DepthToSpace) is not along it")
    if block is None:
        return [None]
    is_crd = node.attrs.get("mode", "DCR") == "CRD"
    parts = block.labels.reshape((-1, area) if is_crd else (area, -1))
    rows = parts if is_crd else parts.T
    net.join(rows[:, :1], rows, f"{node.name} (DepthToSpace) puts channels beside it that stay")
    return [Block((1,), rows[:, 0])]


def _to_depth(net: Net, node: gs.Node) -> Sequence[Block | None]:
    block = net.only(net.of(node.inputs[0]), (1,), f"{node.name} (SpaceToDepth) is not along it")
    area = int(node.attrs["blocksize"]) ** 2
    return [None if block is None else Block((1,), np.tile(block.labels, area))]


MOVES: dict[str, Move] = {
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    "Transpose": _transpose,
    "Pad": _pad,
    "Slice": _slice,
    "Split": _split,
    "Gather": _gather,
    "Expand": _expand,
    "Tile": _tile,
    "DepthToSpace": _to_space,
    "SpaceToDepth": _to_depth,
}
