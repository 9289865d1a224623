"""What samples show of activations that are to be in 16 bits: how large they are, and how small."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.calibration import calibrate
from onnxq.data import Samples
from onnxq.graphs import bodies_of, walk
from onnxq.model import Model
from onnxq.numerics import histograms
from onnxq.passes.half_forms import CONTROL
from onnxq.passes.halves import is_float32
from onnxq.passes.ops import is_constant
from onnxq.passes.placement import unobservable
from onnxq.statistics import Histogram, MinMax, Statistic

# Operators that tell small values from each other, and which of their inputs.
RELATIVE = {"Log": 0, "Sqrt": 0, "Reciprocal": 0, "Div": 1, "Pow": 0}


@dataclass(frozen=True, slots=True)
class Seen:
    """Ranges by tensor name, and shapes in the first sample; `real`: not of made-up samples.

    Of tensors that an operator in RELATIVE depends on (not over layers) there are histograms.
    """

    statistics: Mapping[str, Statistic] = field(default_factory=dict)
    shapes: Mapping[str, list[int]] = field(default_factory=dict)
    real: bool = False

    def range(self, tensor: gs.Tensor) -> tuple[float, float] | None:
        """Least and greatest finite value; None where nothing was seen."""
        found = self.statistics.get(tensor.name)
        if not isinstance(found, MinMax | Histogram) or found.lo > found.hi:
            return None
        return found.lo, found.hi

    def size(self, tensor: gs.Tensor) -> float | None:
        """The greatest magnitude."""
        found = self.range(tensor)
        return None if found is None else max(abs(found[0]), abs(found[1]))

    def smallest(self, tensor: gs.Tensor) -> float | None:
        """The least magnitude of values that are not 0, within 1 %; None where none was counted."""
        found = self.statistics.get(tensor.name)
        if not isinstance(found, Histogram):
            return None
        left, right = histograms.edges_of(found.bins[found.bins != histograms.ZERO])
        sizes = np.minimum(np.abs(left), np.abs(right))
        return float(sizes.min()) if sizes.size else None


def observe(
    model: Model,
    samples: Samples | None,
    progress: Callable[[int], None] | None,
    counted: set[str],
) -> Seen:
    """Run the model over samples, if there are some; `counted`: of which to have histograms.

    Raises DataError for samples that do not fit.
    """
    if samples is None or not len(samples):
        return Seen()
    model.separate_names()
    hidden = unobservable(model)
    for node in model.nodes():
        if node.op not in CONTROL:
            hidden |= {id(graph) for body in bodies_of(node) for graph in walk(body)}
    wanted: dict[str, type[Statistic]] = {}
    for graph in model.graphs():
        tensors = [*graph.inputs, *(t for node in graph.nodes for t in node.outputs)]
        for tensor in tensors if id(graph) not in hidden else ():
            if is_float32(tensor) and not is_constant(tensor):
                wanted[tensor.name] = Histogram if tensor.name in counted else MinMax
    seen = calibrate(model, wanted, samples, progress=progress) if wanted else {}
    first = next(iter(samples), {})
    shapes = model.shapes_for({name: np.shape(values) for name, values in first.items()})
    return Seen(seen, shapes, real=not samples.synthetic)
