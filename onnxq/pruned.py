"""What a model remembers of a layer that was pruned."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Pruned:
    """A layer: its first output's name, how many weights, how many zeros, and where (bits)."""

    output: str
    weights: int
    zeros: int
    masks: tuple[tuple[tuple[int, ...], NDArray[np.uint8]], ...]
