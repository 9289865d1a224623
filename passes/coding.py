"""Weights on their way to indices into a codebook, which is one for all values of a weight."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.codebooks import CodebookScheme, fit_codebook
from onnxq.numerics.sharing import BLOCK
from onnxq.packed import remembered
from onnxq.parallel import Tick, Work
from onnxq.passes.codebook_encoding import Coded, IndexStorage
from onnxq.passes.layouts import Held
from onnxq.passes.streamed import rows_of
from onnxq.schemes import PerGroup
from onnxq.scratch import Scratch

WHOLE = 6  # bytes a value: as float32, and its index; about
GROUP = 80  # bytes a scale: sums in float64 while scales are searched for, about
COPIES = 20  # arrays of a block's size, about
FIXED = 8 << 20  # bins and the divisions of points


@dataclass(frozen=True, slots=True, eq=False)
class CodeSource:
    """A weight and its codebook's scheme. squares: of what it is multiplied with, if seen."""

    tensor: gs.Tensor
    held: Held
    scheme: CodebookScheme
    storage: IndexStorage
    seed: int = 0
    squares: NDArray[Any] | None = None

    def work(self) -> Work:
        """What it takes."""
        count, grain = prod(self.held.shape), self.scheme.granularity
        scales = count // (grain.size if isinstance(grain, PerGroup) else self.held.length or 1)
        memory = WHOLE * count + GROUP * scales + min(COPIES * 4 * BLOCK, 80 * count) + FIXED
        size = count * np.dtype(self.tensor.dtype).itemsize
        return Work(size, memory, f"weight {self.tensor.name}")

    def made(self, scratch: Scratch, tick: Tick) -> Coded:
        """The weight as it is stored. Raises Skip where a value is not finite."""
        grid = remembered(self.tensor)
        if grid is not None and (known := grid.map(self.held.rows).coded(self.scheme)) is not None:
            return Coded.of(self.held, known, self.storage, scratch)
        rows = rows_of(self.tensor, self.held, tick)
        m = None if self.squares is None else self.held.importance(self.squares)
        codes = fit_codebook(rows, self.scheme, importance=m, seed=self.seed)
        tick(self.work().size)
        return Coded.of(self.held, codes, self.storage, scratch)
