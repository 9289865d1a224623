"""Scales of rows that have a codebook."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from onnxq.numerics.grids import SMALLEST_SCALE
from onnxq.numerics.sharing import Sharing

Scale = NDArray[np.float32]  # of Sharing.shape


def absmax(rows: NDArray[np.float32], sharing: Sharing) -> Scale:
    """The greatest magnitude of what shares a scale; 1 if all is 0, and never subnormal."""
    scale = np.zeros(sharing.shape, np.float32)
    for block in sharing.blocks():
        x = block.of(rows)
        block.merge(np.maximum, scale, np.maximum(x.max(2), -x.min(2)))
    return np.where(scale == 0, np.float32(1), np.maximum(scale, SMALLEST_SCALE))
