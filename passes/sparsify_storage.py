"""Store constants that are zeros for the most part, or half, in less: zeros take no room.

    W                                =>    Reshape(Gather(values, places of a bitmap))    bitmap
    W                                =>    Constant(sparse_value)                         coo

A bitmap takes one bit a weight, and the values that are not zero: at 50 % zeros 17 bits of a float
weight in place of 32, 5 of an int8 one, 3 of a 4-bit one. Coordinates (coo) take 8 bytes for each
value that is not zero: they are smaller where less than one in 64 is not. Integers have their zero
point in place of zero: what is left out is the commonest value. A runtime that computes constants
at load has the weights as they were (but for -0.0), kernels and all; see `onnxq.passes.bitmaps`.

The index of an N:M pattern would take less than a bit a weight (2:4: 0.65), 2 % of a float weight
in return for a further form: 2:4 is stored as any other half.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, get_args

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq import sparse
from onnxq.core import Note
from onnxq.model import Model, readers
from onnxq.options import require_range
from onnxq.passes import bitmaps
from onnxq.passes.bitmaps import Bitmap, Tables, expanded
from onnxq.passes.encodings import Emitter
from onnxq.sparse import StoredSparse
from onnxq.targets import Target
from onnxq.weights import Weight, bytes_in, data_type_of, stored_size

NAME = "sparsify_storage"
Form = Literal["bitmap", "coo"]
BITMAP_BYTES, COO_BYTES = 1400, 250  # of nodes and names, about
AT_LOAD = 22  # bytes a weight, of all bitmaps at once (onnxruntime 1.31: 13.7 GB for 604 M weights)
LEAST = 1024  # bytes that are saved, or it is not worth the nodes
INDEX = 8  # bytes of a coordinate
COO_MOST = 1 << 24  # bytes of coordinates: they cannot be in a data file
TELLING = 0.4  # share of zeros from which on it is said why a constant stays as it is
FLOATS = ("float32", "float16", "float64")
NARROW = ("int8", "uint8", "int16", "uint16", *bitmaps.WIDENED)


@dataclass(frozen=True, slots=True)
class SparsifyStorage:
    """Constants of at least `smallest` values, if they take at most `ratio` of their bytes then.

    form: auto chooses the smaller one. What the target does not read is not written.
    load_memory_mb: what spreading bitmaps may take while a model is loaded; weights beyond that
    stay dense.
    """

    form: Literal["auto", "bitmap", "coo"] = "auto"
    smallest: int = 512
    ratio: float = 0.95
    load_memory_mb: int = 4096
    target: Target | None = None

    def __post_init__(self) -> None:
        require_range("smallest", self.smallest, 1)
        require_range("ratio", self.ratio, 0, 1)
        require_range("load_memory_mb", self.load_memory_mb, 0)

    @property
    def name(self) -> str:
        """The pass's name."""
        return NAME

    @property
    def opset(self) -> int:
        """The opset that a model should have."""
        return bitmaps.SINCE

    @property
    def forms(self) -> tuple[Form, ...]:
        """What is asked for and the target reads."""
        read = get_args(Form) if self.target is None else self.target.sparse_weights
        return tuple(f for f in get_args(Form) if f in read and self.form in ("auto", f))

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Rewrite in place; a note for each constant that is stored in less, or why none is."""
        if not self.forms:
            what = "sparse constants" if self.form == "auto" else self.form
            assert self.target is not None
            return [Note(NAME, "", f"{self.target.name} does not read {what}", changed=False)]
        return _Work(self, model).run()


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """What is to be done with a constant: bytes before and after."""

    constant: gs.Constant
    form: Form
    fill: Any
    others: int
    size: int

    @property
    def saved(self) -> int:
        return bytes_in(self.constant) - self.size


class _Work:
    """One run of the pass over one model."""

    def __init__(self, options: SparsifyStorage, model: Model) -> None:
        self.options, self.model = options, model
        self.tables = Tables(model)
        self.notes: list[Note] = []

    def run(self) -> list[Note]:
        self.model.nodes()
        plans = [p for c in self._constants() if (p := self._planned(c)) is not None]
        if sum(p.saved for p in plans if p.form == "bitmap") < bitmaps.TABLES:
            plans = [p for p in plans if p.form == "coo"]
        plans = self._loadable(plans)
        for plan in plans:
            self._store(plan)
        if plans:
            self.model.sweep()
        return self.notes

    def _loadable(self, plans: list[_Plan]) -> list[_Plan]:
        """Those whose bitmaps can be spread within the memory allowed, in graph order."""
        kept, left = [], self.options.load_memory_mb << 20
        for plan in plans:
            needed = AT_LOAD * prod(plan.constant.shape) if plan.form == "bitmap" else 0
            if needed > left:
                text = f"{plan.constant.name}: with it, loading takes more than load_memory_mb"
                self._noted(plan.constant, text, changed=False)
                continue
            left -= needed
            kept.append(plan)
        return kept

    def _constants(self) -> Iterator[gs.Constant]:
        seen = set[int]()
        for node in self.model.nodes():
            for tensor in node.inputs:
                if not isinstance(tensor, gs.Constant) or id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                is_large = prod(tensor.shape) >= self.options.smallest
                if is_large and not isinstance(tensor._values, StoredSparse):
                    yield tensor

    def _planned(self, constant: gs.Constant) -> _Plan | None:
        kind = str(np.dtype(constant.dtype))
        if kind not in (*FLOATS, *NARROW) or self.model.is_output(constant):
            return None
        values = constant.values
        fill = values.dtype.type(0) if kind in FLOATS else _commonest(values)
        others = int(np.count_nonzero(values != fill))
        sizes = self._sizes(constant, others, is_zero=not float(fill))
        if not sizes:
            return None
        form = min(sizes, key=sizes.__getitem__)
        before = bytes_in(constant)
        if sizes[form] <= min(self.options.ratio * before, before - LEAST):
            return _Plan(constant, form, fill, others, sizes[form])
        zeros = 1 - others / values.size
        if zeros >= TELLING:
            text = f"{constant.name}: {zeros:.1%} zeros, {before} bytes; {form}: {sizes[form]}"
            self._noted(constant, text, changed=False)
        return None

    def _sizes(self, constant: gs.Constant, others: int, *, is_zero: bool) -> dict[Form, int]:
        """Bytes in each form that can be written."""
        kind, found = data_type_of(constant.dtype), dict[Form, int]()
        count = prod(constant.shape)
        forms, opset = self.options.forms, self.model.opset
        if "bitmap" in forms and opset >= bitmaps.SINCE:
            found["bitmap"] = -(-count // 8) + stored_size(kind, (others + 1,)) + BITMAP_BYTES
        is_whole = str(np.dtype(constant.dtype)) not in bitmaps.WIDENED
        if "coo" in forms and opset >= sparse.SINCE and is_zero and is_whole:
            size = others * INDEX + stored_size(kind, (others,)) + COO_BYTES
            found |= {"coo": size} if size <= COO_MOST else {}
        return found

    def _store(self, plan: _Plan) -> None:
        constant, values = plan.constant, plan.constant.values
        before, count = bytes_in(constant), values.size
        self._noted(
            constant,
            f"{constant.name}: {1 - plan.others / count:.1%} zeros, {8 * plan.size / count:.2f} "
            f"bits a weight with their places ({plan.form}), {8 * before / count:.2f} before",
        )
        if plan.form == "coo":
            held = StoredSparse.of(values, np.flatnonzero(values).astype(np.int64))
            made: gs.Tensor = Weight(self.model.unique(f"{constant.name}_sparse"), held)
        else:
            made = self._expanded(constant, Bitmap.of(values, plan.fill))
        for node, index in list(readers(constant)):
            node.inputs[index] = made

    def _expanded(self, constant: gs.Constant, bitmap: Bitmap) -> gs.Tensor:
        users = [node for node, _ in readers(constant)]
        homes = {id(self.model.graph_of(node)) for node in users}
        at = users[0] if len(homes) == 1 else None  # bodies capture what the main graph has
        keep = any(node.op != "Cast" for node in users)
        return expanded(Emitter(self.model, at, constant), bitmap, self.tables, keep=keep)

    def _noted(self, constant: gs.Constant, text: str, *, changed: bool = True) -> None:
        node = next((n for n, _ in readers(constant)), None)
        self.notes.append(Note(NAME, "" if node is None else node.name, text, changed=changed))


def _commonest(values: NDArray[Any]) -> Any:
    """The integer that comes most often; of several, zero, or else the least."""
    wide = values.astype(np.int32).reshape(-1)
    least = int(wide.min())
    counts = np.bincount(wide - least)
    zero = -least if 0 <= -least < counts.size and counts[-least] == counts.max() else None
    return values.dtype.type((int(counts.argmax()) if zero is None else zero) + least)
