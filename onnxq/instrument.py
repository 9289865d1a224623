"""Make a model show what calibration wants to see of its tensors.

Small tensors (up to `WHOLE` values) are fetched and reduced by numpy: fetching is cheaper than an
operator. Of a large one only what the graph makes of it is fetched: its extremes (exact, over all
values; rows by ReduceMin/ReduceMax, which run on all cores, the rest by numpy) and, for histograms,
every s-th value of the flattened tensor. s is the least prime that leaves at most `SAMPLE` values
and does not divide the tensor's size: so it falls into step with no width, height or channel count.
It starts at another offset for each sample (a Weyl sequence over the sample's number), so that all
positions are seen over the samples, wherever a sample is run.

Sums of squares of each index of an axis (`Squares`) are made in the graph as well. Tensors whose
vectors' products are summed (`Products`) are fetched whole: a graph has no BLAS for patches.

Tensors in the bodies of If, Loop and Scan are logged in rows (`onnxq.bodies`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxq import bodies
from onnxq.errors import ModelError
from onnxq.graphs import DEFAULT_DOMAIN
from onnxq.model import Model
from onnxq.statistics import Histogram, MinMax, Products, Squares, Statistic
from onnxq.weights import data_type_of

Feed = Mapping[str, NDArray[Any]]

SAMPLE = 2048  # values of a tensor that one sample adds to its histogram
WHOLE = 1 << 17  # values up to which a tensor is fetched (measured: bench_calibration.py)
ROWS = 32  # rows that a reduction in the graph leaves, about
Wanted = Mapping[str, "type[Statistic] | Squares | Products"]
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


@dataclass(frozen=True, slots=True)
class Probe:
    """How one tensor is observed: `source` whole (`is_input`: in the feed), or what is made.

    is_log: `source` is rows of extremes and values, float32 [runs, bodies.ROW]. sums: `source` is
    sums of squares. products: what is made of it whole.
    """

    tensor: str
    histogram: bool
    source: str
    is_input: bool = False
    is_log: bool = False
    sums: bool = False
    products: Products | None = None
    lo: str = ""
    hi: str = ""
    sample: str = ""

    @property
    def fetched(self) -> list[str]:
        """The outputs to fetch."""
        if self.is_input:
            return []
        return [name for name in (self.lo, self.hi, self.sample) if name] or [self.source]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to feed and fetch; phase: the extra input that shifts the strided samples, if any."""

    probes: tuple[Probe, ...]
    inputs: tuple[str, ...]
    phase: str


@lru_cache(maxsize=4096)
def stride(size: int) -> int:
    """1 for up to SAMPLE values; else the least prime, no divisor of size, that leaves SAMPLE."""
    step = -(-size // SAMPLE)
    while step > 1 and (
        size % step == 0 or any(step % d == 0 for d in range(2, int(step**0.5) + 1))
    ):
        step += 1
    return max(step, 1)


# For sizes that are known only in the run: the strides to choose from, 5 % apart.
STRIDES = tuple(dict.fromkeys(stride(int(SAMPLE * 1.05**k) + 1) for k in range(300)))


def instrument(model: Model, wanted: Wanted, first: Feed) -> tuple[onnx.ModelProto, Plan]:
    """Make a model with observations for outputs instead of its own; and say how to use it.

    The first sample's shapes decide how tensors of dynamic shape are observed, not what is.
    """
    proto = model.to_proto()
    graph = proto.graph
    constants = {t.name for t in graph.initializer}
    inputs = [i.name for i in graph.input if i.name not in constants]
    made = {name for node in graph.node for name in node.output}
    inside = dict(bodies.paths(graph))
    types = {
        t.name: helper.make_tensor_type_proto(data_type_of(t.dtype), t.shape).tensor_type
        for inner in reversed(model.graphs())
        for t in inner.tensors().values()
        if t.dtype is not None
    }
    shapes = model.shapes_for({name: np.shape(values) for name, values in first.items()})
    if all(o.domain not in DEFAULT_DOMAIN for o in proto.opset_import):
        proto.opset_import.add(version=model.opset)
    graph.ClearField("output")
    extra, log = Observations(graph, model.opset), bodies.Log()
    probes = []
    for key, statistic in wanted.items():
        if statistic not in (MinMax, Histogram) and not isinstance(statistic, Squares | Products):
            raise TypeError(f"cannot calibrate {statistic}: MinMax, Histogram, Squares or Products")
        tensor = statistic.tensor if isinstance(statistic, Products) else key
        if tensor not in inputs and tensor not in made and tensor not in inside:
            raise ModelError(f"there is no activation {tensor!r} to calibrate")
        kind = types[tensor].elem_type if tensor in types else 0
        if kind not in FLOATS:
            name = TensorProto.DataType.Name(kind).lower()
            raise ModelError(f"cannot calibrate {tensor!r}: it is of type {name}, not float")
        histogram = statistic is Histogram
        if isinstance(statistic, Squares):
            if tensor in inside:
                raise ModelError(f"cannot calibrate {tensor!r}: no sums of squares in bodies")
            rank = len(shapes.get(tensor) or _dims(types[tensor]) or ())
            probes.append(extra.squares(tensor, kind, rank, statistic.axis))
        elif isinstance(statistic, Products):
            if tensor in inside:
                raise ModelError(f"cannot calibrate {tensor!r}: no sums of products in bodies")
            if tensor not in inputs:
                extra.output(tensor)
            probes.append(Probe(key, False, tensor, tensor in inputs, products=statistic))
        elif tensor in inputs:
            probes.append(Probe(tensor, histogram, tensor, is_input=True))
        elif tensor in made:
            known = _dims(types[tensor])
            probes.append(extra.probe(tensor, kind, known, shapes.get(tensor), histogram=histogram))
        else:
            if not bodies.is_observable(inside[tensor]):
                raise ModelError(f"cannot calibrate {tensor!r}: it is in a loop inside of a loop")
            rows = log.add(tensor, kind, inside[tensor])
            extra.output(rows)
            probes.append(Probe(tensor, histogram, rows, is_log=True))
    if not graph.output and graph.node:  # only inputs are wanted, but a graph must have an output
        graph.output.append(onnx.ValueInfoProto(name=graph.node[0].output[0]))
    return proto, Plan(tuple(probes), tuple(inputs), extra.phase)


def _dims(kind: Any) -> list[int | None] | None:
    """Read the dimensions, None where they are not known; None for an unknown rank."""
    if not kind.HasField("shape"):
        return None
    return [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]


@dataclass(slots=True)
class Observations:
    """Adds observations to a graph."""

    graph: onnx.GraphProto
    opset: int
    phase: str = ""
    constants: dict[tuple[int, ...], str] = field(default_factory=dict)
    windows: dict[Any, tuple[str, str]] = field(default_factory=dict)

    def probe(
        self,
        tensor: str,
        kind: int,
        known: list[int | None] | None,
        shape: list[int] | None,
        *,
        histogram: bool,
    ) -> Probe:
        """Observe a tensor: its element type, its shape if known, and that in the first sample."""
        source = tensor
        if kind not in (TensorProto.FLOAT, TensorProto.DOUBLE):
            source = self.node("Cast", tensor, to=TensorProto.FLOAT)
        small = shape is not None and np.prod(shape, dtype=np.int64) <= WHOLE
        if small or self.opset < 11:  # Slice and Mod as used here are of opset 10, ArgMax of 11
            self.output(source)
            return Probe(tensor, histogram, source)
        lo, hi = self.reduce("ReduceMin", source, shape), self.reduce("ReduceMax", source, shape)
        self.output(lo)
        self.output(hi)
        if not histogram:
            return Probe(tensor, histogram, source, lo=lo, hi=hi)
        flat = self.node("Reshape", source, self.constant(-1))
        start, step = self.window(source, known)
        end, axis = self.constant(np.iinfo(np.int64).max), self.constant(0)
        sample = self.node("Slice", flat, start, end, axis, step)
        self.output(sample)
        return Probe(tensor, histogram, source, lo=lo, hi=hi, sample=sample)

    def squares(self, tensor: str, kind: int, rank: int, axis: int) -> Probe:
        """Sum the squares over all axes but one. Raises ModelError for a rank that is not known."""
        if not -rank <= axis < rank:
            raise ModelError(f"cannot calibrate {tensor!r}: it has no axis {axis}")
        source = tensor
        if kind != TensorProto.FLOAT:
            source = self.node("Cast", tensor, to=TensorProto.FLOAT)
        axes = [a for a in range(rank) if a != axis % rank]
        if not axes:
            sums = self.node("Mul", source, source)
        elif self.opset >= 18:
            sums = self.node("ReduceSumSquare", source, self.constant(*axes), keepdims=0)
        else:
            sums = self.node("ReduceSumSquare", source, keepdims=0, axes=axes)
        self.output(sums)
        return Probe(tensor, False, sums, sums=True)

    def reduce(self, op: str, source: str, shape: list[int] | None) -> str:
        """Reduce to about ROWS rows: a reduction to one value runs on one core only."""
        rank = len(shape or ())
        if shape is None or rank < 2:
            return self.node(op, source, keepdims=0)
        rows = np.cumprod(shape[:-1])
        split = 1 + int(np.argmin(np.abs(np.log(np.maximum(rows, 1) / ROWS))))
        axes = list(range(split, rank))
        if self.opset >= 18:
            return self.node(op, source, self.constant(*axes), keepdims=0)
        return self.node(op, source, keepdims=0, axes=axes)

    def window(self, source: str, known: list[int | None] | None) -> tuple[str, str]:
        """Start and step of the strided sample; tensors of equal size share them."""
        if not self.phase:
            self.phase = "onnxq/phase"
            value = helper.make_tensor_value_info(self.phase, TensorProto.INT64, [1])
            self.graph.input.append(value)
        fixed = known is not None and None not in known
        key = stride(int(np.prod([d or 0 for d in known or ()]))) if fixed else source
        if key not in self.windows:
            if fixed:
                step = self.constant(int(key))
            else:  # the first of STRIDES that leaves at most SAMPLE values
                strides = self.constant(*STRIDES)
                enough = self.node("Mul", strides, self.constant(SAMPLE))
                size = self.node("Size", source)
                less = self.node("Cast", self.node("Less", enough, size), to=TensorProto.INT32)
                step = self.node("Gather", strides, self.node("ArgMin", less, axis=0, keepdims=1))
            self.windows[key] = (self.node("Mod", self.phase, step), step)
        return self.windows[key]

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Add a node; return its output."""
        name = f"onnxq/{op}_{len(self.graph.node)}"
        self.graph.node.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def constant(self, *values: int) -> str:
        """Add a 1-D int64 constant, once."""
        if values not in self.constants:
            self.constants[values] = f"onnxq/constant_{len(self.constants)}"
            tensor = numpy_helper.from_array(np.array(values, np.int64), self.constants[values])
            self.graph.initializer.append(tensor)
        return self.constants[values]

    def output(self, name: str) -> None:
        """Make a tensor an output of the graph, once; onnxruntime infers its type."""
        if all(output.name != name for output in self.graph.output):
            self.graph.output.append(onnx.ValueInfoProto(name=name))
