"""What each weight of a model is stored in: format, bits a weight, entropy; reads little of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.model import Model
from onnxq.numerics.entropy import entropy_of, excerpt, float_zeros
from onnxq.passes.masks import zeros_of
from onnxq.passes.packed_weights import Stands, shape_of, stored_weights
from onnxq.weights import Stored, bytes_in, values_in

if TYPE_CHECKING:
    from rich.console import Console

WHOLE_FLOATS = 1 << 25  # bytes of floats up to which all zeros are counted
ZEROS = 0.005  # share of zeros from which on people are told: less is chance, or rounding
SHOWN = 8  # tensors that people see, the largest; machines get all


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight as it is stored.

    node, op: the first layer that reads it. form: see `onnxq.passes.packed_weights`. weights: how
    many. scale_for: how many of them share a scale; None where there are none, or not at the weight
    (MatMulInteger, ConvInteger: they stand behind it). bits: a weight, with the scales, zero points
    and codebook at it. entropy: of the stored numbers, in bits a weight, see
    `onnxq.numerics.entropy`; None where they are empty. zeros: share of the weights that are
    exactly zero (of more than 32 MiB of floats, estimated by a part); None: it cannot be read.
    """

    name: str
    node: str
    op: str
    shape: tuple[int, ...]
    form: str
    format: str
    weights: int
    scale_for: int | None
    size_bytes: int
    bits: float
    entropy: float | None
    zeros: float | None = None


@dataclass(frozen=True, slots=True)
class FormatTotal:
    """The weights of one format together; bits, entropy, zeros: means over all weights."""

    format: str
    tensors: int
    weights: int
    size_bytes: int
    bits: float
    entropy: float
    zeros: float = 0.0


def weight_table(model: Model) -> tuple[StoredWeight, ...]:
    """A row for each weight tensor of a model, bodies included, in the order of its layers."""
    return tuple(_rows(model))


def totals(table: Iterable[StoredWeight]) -> tuple[FormatTotal, ...]:
    """The table by format, what takes most bytes first."""
    groups: dict[str, list[StoredWeight]] = {}
    for row in table:
        groups.setdefault(row.format, []).append(row)
    found = [_total(name, rows) for name, rows in groups.items()]
    return tuple(sorted(found, key=lambda total: -total.size_bytes))


def _total(name: str, rows: Sequence[StoredWeight]) -> FormatTotal:
    weights, size = sum(r.weights for r in rows), sum(r.size_bytes for r in rows)
    entropy = sum(r.weights * (r.entropy or 0.0) for r in rows)
    count = max(weights, 1)
    zeros = sum(r.weights * (r.zeros or 0.0) for r in rows)
    return FormatTotal(
        name, len(rows), weights, size, 8 * size / count, entropy / count, zeros / count
    )


def _rows(model: Model) -> Iterator[StoredWeight]:
    for node, tensor, stands in stored_weights(model):
        numbers, shape = stands.numbers, shape_of(node, tensor, stands)
        weights = prod(shape)
        if not weights:
            continue
        size = bytes_in(numbers) + sum(bytes_in(c) for c in stands.beside)
        scales = [prod(c.shape) for c in _scales(stands)]
        raw, bits, count = _stored(stands)
        each = entropy_of(raw, bits, count) * min(1, count / weights)  # vectors: fewer numbers
        yield StoredWeight(
            name=numbers.name or tensor.name,
            node=node.name,
            op=node.op,
            shape=shape,
            form=stands.form,
            format=_format(stands),
            weights=weights,
            scale_for=-(-weights // max(scales)) if scales else None,
            size_bytes=size,
            bits=8 * size / weights,
            entropy=each,
            zeros=_zeros(stands, raw, bits),
        )


def _zeros(stands: Stands, raw: NDArray[np.uint8], bits: int) -> float | None:
    """The share of zeros; of many floats, in a part of them."""
    if stands.form == "float" and raw.size > WHOLE_FLOATS and bits in (16, 32):
        return float_zeros(excerpt(raw), bits)
    mask = zeros_of(stands)
    return None if mask is None else float(np.count_nonzero(mask) / max(1, mask.size))


def _scales(stands: Stands) -> list[gs.Constant]:
    beside = stands.beside[1:] if stands.form == "codebook" else stands.beside
    return [c for c in beside if "float" in str(c.dtype) and not str(c.dtype).startswith("float8")]


def _format(stands: Stands) -> str:
    name = f"uint{stands.bits}" if stands.bits else str(np.dtype(stands.numbers.dtype))
    if stands.form != "codebook":
        return name
    table = stands.beside[0].shape
    return f"codebook of {table[0]}" + (f" x {table[1]}" if len(table) > 1 else "")


def _stored(stands: Stands) -> tuple[NDArray[np.uint8], int, int]:
    """The numbers' bytes, the bits of each, how many there are."""
    if stands.digits is not None:
        each = stands.digits().astype(np.uint8).reshape(-1)
        return each, 8, each.size
    constant, bits = stands.numbers, stands.bits
    held: Any = constant._values
    name = str(np.dtype(constant.dtype))
    count = prod(constant.shape)
    if bits is not None:
        return _bytes_of(values_in(constant)), bits, count * 8 // bits
    narrow = next((b for b in (2, 4) if name.endswith(f"int{b}")), None)
    is_raw = isinstance(held, Stored) and (
        held.file is not None or held.tensor.HasField("raw_data")
    )
    if narrow is not None and is_raw:
        return held.raw(), narrow, count
    values = values_in(constant)
    if name == "float64":
        values = values.astype(np.float32)
    return _bytes_of(values), 8 * values.dtype.itemsize, count


def _bytes_of(values: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def print_totals(console: Console, table: Sequence[StoredWeight]) -> None:
    """Print what the weights are stored in, a line a format."""
    from rich.table import Table

    if not table:
        return
    shown = Table(box=None, padding=(0, 2, 0, 0), title_justify="left")
    shown.add_column("weights stored in", no_wrap=True)
    found = totals(table)
    has_zeros = any(total.zeros >= ZEROS for total in found)
    for name in ("tensors", "weights", "bits each", "entropy", *["zeros"] * has_zeros):
        shown.add_column(name, justify="right")
    for total in found:
        cells = [total.format, f"{total.tensors}", f"{total.weights:,}", f"{total.bits:.2f}"]
        cells += [f"{total.entropy:.2f}", *[f"{total.zeros:.1%}"] * has_zeros]
        shown.add_row(*cells)
    console.print(shown)


def print_largest(console: Console, table: Sequence[StoredWeight]) -> None:
    """Print the largest tensors of weights."""
    from rich.table import Table

    if not table:
        return
    shown = Table(box=None, padding=(0, 2, 0, 0))
    shown.add_column("largest", overflow="ellipsis", no_wrap=True, max_width=40)
    for name in ("read by", "shape", "format"):
        shown.add_column(name, no_wrap=True)
    has_zeros = any((row.zeros or 0) >= ZEROS for row in table)
    for name in ("a scale for", "bits each", "entropy", *["zeros"] * has_zeros):
        shown.add_column(name, justify="right")
    for row in sorted(table, key=lambda row: -row.size_bytes)[:SHOWN]:
        shown.add_row(
            row.name, row.op, " x ".join(map(str, row.shape)), row.format,
            "" if row.scale_for is None else "all" if row.scale_for >= row.weights
            else f"{row.scale_for:,}",
            f"{row.bits:.2f}", "" if row.entropy is None else f"{row.entropy:.2f}",
            *["" if row.zeros is None else f"{row.zeros:.1%}"] * has_zeros,
        )  # fmt: skip
    console.print(shown)
