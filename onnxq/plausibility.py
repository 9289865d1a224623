"""Whether samples look like what the graph expects: warnings, each with what to do.

Only what is near certain is said. Scales are judged from the graph's own numbers: constants that
the input meets first, the statistics of a BatchNormalization behind the first Conv, or how far the
first Conv's response is from its bias.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.data import Feed, Samples
from onnxq.front import Front, front, weight_of
from onnxq.model import Model, readers, values_of

LOOKED_AT = 16  # samples that are looked at, fewer when they are large
ENOUGH = 64e6  # bytes of them
PATCHES = 64  # places of a sample where the first Conv is computed
# Standard deviations against the trained ones that are too far apart. Measured on six nets: own
# samples 0.8 to 1.4, images at 0.4 of their brightness 0.34, ImageNet's mean and std forgotten
# 0.18 to 0.21, pixels of 0..255 for values of 0..1 49 to 193.
TOO_LITTLE, TOO_MUCH = 0.2, 8.0
# The same for samples that use all of 0..1 with the usual contrast: 0.8 for a net trained on such,
# 0.18 to 0.36 for those that want mean and std.
TOO_LITTLE_OF_UNIT, CONTRAST = 0.4, 0.15
# A first Conv's response in multiples of its bias (or of 1): trained nets stay below 5.
LARGE = 24.0
PIXELS = 16.0  # values above it are no normalised ones
NORMALISED = 8.0  # values of 0..1, -1..1 or of a unit deviation stay below
LARGEST_KERNEL = 1 << 16  # values of a first Conv's filter that is looked at
MOVES = frozenset(["Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"])  # ids on their way


@dataclass(frozen=True, slots=True)
class SeenInput:
    """One input over the first samples: type, shapes, and its values' range, mean and deviation."""

    name: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    lo: float
    hi: float
    mean: float
    std: float


def first(samples: Samples) -> list[Feed]:
    """The feeds that are looked at."""
    feeds: list[Feed] = []
    size = 0
    for feed in samples.take(LOOKED_AT):
        feeds.append(feed)
        size += sum(array.nbytes for array in feed.values())
        if size > ENOUGH and len(feeds) > 1:
            break
    return feeds


def look(feeds: Sequence[Feed]) -> tuple[SeenInput, ...]:
    """What the feeds are like, input by input."""
    return tuple(_seen(name, [np.asarray(feed[name]) for feed in feeds]) for name in feeds[0])


def _seen(name: str, arrays: Sequence[NDArray[Any]]) -> SeenInput:
    shapes = tuple(dict.fromkeys(array.shape for array in arrays))
    filled = [array for array in arrays if array.size]
    if not filled or filled[0].dtype.kind not in "biuf":
        return SeenInput(name, str(arrays[0].dtype), shapes, *[float("nan")] * 4)
    count = sum(array.size for array in filled)
    with np.errstate(over="ignore", invalid="ignore"):  # float64 near its limits
        mean = sum(float(array.sum(dtype=np.float64)) for array in filled) / count
        square = sum(float(np.square(array - mean, dtype=np.float64).sum()) for array in filled)
    return SeenInput(
        name,
        str(arrays[0].dtype),
        shapes,
        min(float(array.min()) for array in filled),
        max(float(array.max()) for array in filled),
        mean,
        float(np.sqrt(square / count)),
    )


def doubts(model: Model, samples: Samples) -> tuple[str, ...]:
    """Warnings about the first samples; none for synthetic ones.

    Raises DataError for samples that cannot be read.
    """
    return () if samples.synthetic else tuple(found(model, first(samples)))


def found(model: Model, feeds: Sequence[Feed]) -> Iterator[str]:
    """Warnings about feeds, one at most for an input and what is wrong."""
    yield from _sameness(feeds)
    seen = {s.name: s for s in look(feeds)}
    for tensor in model.graph.inputs:
        arrays = [np.asarray(feed[tensor.name]) for feed in feeds if tensor.name in feed]
        if not arrays or not arrays[0].size:
            continue
        if arrays[0].dtype.kind in "iu":
            yield from _ids(tensor, seen[tensor.name])
        elif arrays[0].dtype.kind == "f":
            text = _channels(tensor, arrays[0]) or _scale(tensor, seen[tensor.name], arrays)
            if text is not None:
                yield text


def _sameness(feeds: Sequence[Feed]) -> Iterator[str]:
    """All zero, constant or identical samples; inputs of one value, a rate say, do not count."""
    wide = [{n: a for n, a in feed.items() if np.size(a) > 1} for feed in feeds]
    if not wide[0]:
        return
    constant = [all(np.all(a == np.ravel(a)[0]) for a in feed.values()) for feed in wide]
    total = len(feeds)
    if sum(constant) > total / 2:
        zero = all(not np.any(a) for feed in wide for a in feed.values())
        what = "all zero" if zero else "of one value each"
        yield (
            f"{sum(constant)} of {total} samples looked at are {what}: "
            "give samples as the device will see them"
        )
    elif total > 1 and all(_equal(feed, feeds[0]) for feed in feeds[1:]):
        yield f"the {total} samples looked at are all the same: give samples that differ"


def _equal(a: Feed, b: Feed) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in a)


def _ids(tensor: gs.Variable, seen: SeenInput) -> Iterator[str]:
    rows = _table_rows(tensor)
    if rows is not None and (seen.hi >= rows or seen.lo < 0):
        odd = seen.hi if seen.hi >= rows else seen.lo
        yield (
            f"input {tensor.name!r} has the id {odd:.0f}, its table has rows 0 to {rows - 1}: "
            "use the tokenizer that belongs to the model"
        )


def _table_rows(tensor: gs.Tensor) -> int | None:
    """Rows of the table of floats that the input indexes, through nodes that move values only."""
    todo, sizes = [tensor], []
    for now in todo:
        for node, index in readers(now):
            if node.op == "Gather" and index == 1 and not node.attrs.get("axis", 0):
                table = values_of(node.inputs[0])
                if table is not None and table.ndim == 2 and table.dtype.kind not in "iub":
                    sizes.append(len(table))
            elif node.op in MOVES and index == 0:
                todo.extend(node.outputs)
    return min(sizes, default=None)


def _channels(tensor: gs.Variable, array: NDArray[Any]) -> str | None:
    """A sample with its channels last where the first Conv takes them first, or the reverse."""
    head = front(tensor)
    channels = head.channels
    if channels is None or array.ndim != 4:
        return None
    axis, other = (3, 1) if head.channels_last else (1, 3)
    if array.shape[axis] == channels or array.shape[other] != channels:
        return None
    place, swap = ("last", (0, 2, 3, 1)) if head.channels_last else ("first", (0, 3, 1, 2))
    return (
        f"input {tensor.name!r} is fed {list(array.shape)}, but the first layer takes {channels} "
        f"channels {place}: transpose the samples by {swap}"
    )


def _scale(tensor: gs.Variable, seen: SeenInput, arrays: Sequence[NDArray[Any]]) -> str | None:
    """Values of 0..255 where 0..1 or the like are expected, or the reverse."""
    if arrays[0].ndim != 4:
        return None
    head = front(tensor)
    text = f"input {tensor.name!r} is fed values of {seen.lo:.3g} to {seen.hi:.3g}"
    is_pixels = _is_pixels(seen)
    if head.is_affine:
        wants = f"the graph itself takes {head.centre:.3g} off and divides by {head.unit:.3g}"
        is_normalised = max(abs(seen.lo), abs(seen.hi)) <= NORMALISED
        if is_normalised and (head.unit > PIXELS or abs(head.centre) > 4 * PIXELS):
            return (
                f"{text}, but {wants}: feed pixels of 0 to 255 (for images: --scale 1, no --mean)"
            )
        if is_pixels and head.unit < 4 and abs(head.centre) < 4:
            return f"{text}, but {wants}: feed values of 0 to 1"
        return None
    return _response(head, seen, text, arrays)


def _is_pixels(seen: SeenInput) -> bool:
    return seen.lo >= 0 and PIXELS < seen.hi <= 256 and seen.mean > 4


def _response(
    head: Front, seen: SeenInput, text: str, arrays: Sequence[NDArray[Any]]
) -> str | None:
    """What the first Conv makes of the samples against what follows it was trained with."""
    weight = head.layer and weight_of(head.layer)
    values = None if weight is None else values_of(weight)
    if head.layer is None or values is None or values.ndim != 4 or head.channels != values.shape[1]:
        return None
    if values[0].size > LARGEST_KERNEL:
        return None
    flat = values.astype(np.float32).reshape(len(values), -1)
    responses = np.concatenate([_patches(a, head, values.shape[2:]) @ flat.T for a in arrays[:4]])
    if not len(responses):
        return None
    deviation = responses.std(0, dtype=np.float64)
    learned = _learned(head.layer)
    if learned is not None:
        live = learned > 1e-3 * learned.max()
        ratio = float(np.median(deviation[live] / learned[live]))
        is_unit = seen.lo >= 0 and 0.9 < seen.hi <= 1 and seen.std > CONTRAST
        if not (TOO_LITTLE_OF_UNIT if is_unit else TOO_LITTLE) < ratio < TOO_MUCH:
            how = f"{ratio:.0f} times as far" if ratio > 1 else f"{ratio:.1g} times as far"
            return (
                f"{text}, which spread {how} behind the first Conv as its BatchNormalization "
                "remembers from training: scale the samples as in training "
                "(images: --preset, --scale, --mean, --std)"
            )
        return None
    if not _is_pixels(seen) or head.channels != 3 or _rescales(head.layer):
        return None
    bias = None if len(head.layer.inputs) < 3 else values_of(head.layer.inputs[2])
    usual = max(1.0, 0.0 if bias is None else float(np.median(np.abs(bias.astype(np.float32)))))
    if float(np.median(deviation)) <= LARGE * usual:
        return None
    return (
        f"{text}, but nothing in the graph scales them down before the first Conv, whose weights "
        "are for values of about 1: scale the samples as in training "
        "(images: --preset, --scale, --mean, --std)"
    )


def _patches(array: NDArray[Any], head: Front, kernel: Sequence[int]) -> NDArray[np.float32]:
    """Windows of the first Conv's size at evenly spread places, a row each, channel first."""
    image = np.asarray(array[0], np.float32)
    if head.channels_last:
        image = image.transpose(2, 0, 1)
    high, wide = image.shape[1] - kernel[0], image.shape[2] - kernel[1]
    if image.shape[0] != head.channels or high < 0 or wide < 0:
        return np.zeros((0, int(head.channels or 0) * int(np.prod(kernel))), np.float32)
    side = int(np.sqrt(PATCHES))
    rows, columns = np.linspace(0, high, side).astype(int), np.linspace(0, wide, side).astype(int)
    cut = [image[:, y : y + kernel[0], x : x + kernel[1]].ravel() for y in rows for x in columns]
    return np.stack(cut)


def _learned(conv: gs.Node) -> NDArray[np.float32] | None:
    """The standard deviations of a Conv's channels that the BatchNormalization behind it knows."""
    nodes = [node for node, _ in readers(conv.outputs[0])]
    if len(nodes) != 1 or nodes[0].op != "BatchNormalization":
        return None
    variance = values_of(nodes[0].inputs[4])
    return None if variance is None else np.sqrt(np.abs(variance.astype(np.float32)) + 1e-9)


def _rescales(conv: gs.Node) -> bool:
    """Whether the Conv's result may be normalised by its own statistics: scale is no matter then.

    That is an InstanceNormalization, a mean, or a Reshape to the patches of a transformer.
    """
    ops = {node.op for node, _ in readers(conv.outputs[0])}
    return any("Norm" in op for op in ops) or bool(ops & {"ReduceMean", "Reshape", "Flatten"})
