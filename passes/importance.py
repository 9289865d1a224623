"""How much each value of a weight matters: mean squares of what it is multiplied with.

An error e in a weight adds e x to the result; over samples the squared error is e^2 E[x^2] where
errors of different weights are independent. So E[x^2] along the axis that is summed over is what
squared errors of weights are weighed by (the diagonal of the layer's Hessian, as in Frantar et al.,
"Optimal Brain Compression", 2022, equation 2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.calibration import calibrate
from onnxq.data import Samples
from onnxq.errors import DataError
from onnxq.model import Model
from onnxq.passes.layouts import Held
from onnxq.passes.ops import is_constant
from onnxq.statistics import Squares, SumOfSquares

Importance = Mapping[tuple[int, int], NDArray[np.float64]]
"""Sums of squares by (node id, input index)."""


def observed(
    model: Model,
    weights: Sequence[tuple[gs.Node, Held]],
    samples: Samples | None,
    progress: Callable[[int], None] | None = None,
) -> Importance:
    """Run the model over samples; what cannot be observed (tables, bodies, zeros) is left out.

    Raises DataError without samples, or with ones that do not fit.
    """
    if samples is None or not len(samples):
        raise DataError('range "importance" looks at samples: give --data')
    model.separate_names()
    wanted: dict[str, Squares] = {}
    found: dict[tuple[int, int], str] = {}
    for node, held in weights:
        if held.meets is None:
            continue
        tensor, axis = held.meets
        rank = len(tensor.shape or ())
        inside = model.home(tensor) is not model.graph
        if inside or is_constant(tensor) or not rank or not -rank <= axis < rank:
            continue
        if tensor.dtype not in (np.float32, np.float16, np.float64):
            continue
        squares = Squares(axis % rank)
        if wanted.setdefault(tensor.name, squares) == squares:
            found[id(node), held.index] = tensor.name
    seen = calibrate(model, wanted, samples, progress=progress) if wanted else {}
    sums = {}
    for key, name in found.items():
        statistic = seen[name]
        assert isinstance(statistic, SumOfSquares)
        if not statistic.has_nonfinite and statistic.sums.any():
            sums[key] = statistic.sums
    return sums
