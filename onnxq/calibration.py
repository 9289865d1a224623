"""Run a model over sample inputs and observe its tensors: streaming, at about the cost of the runs.

Activations are not copied out. What is fetched of a tensor is made in the graph: its least and
greatest value (exact, over all values), and for histograms every s-th value of the flattened tensor,
s the least prime that leaves at most `SAMPLE` values and does not divide the tensor's size. A prime
stride falls into step with no width, height or channel count; and it starts at another offset for
each sample (a Weyl sequence over the sample's number), so that over the samples all positions are seen.
Tensors of at most `SAMPLE` values are fetched whole.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxq import runtime
from onnxq.errors import DataError, ModelError
from onnxq.model import Model
from onnxq.numerics import histograms
from onnxq.statistics import Histogram, MinMax, Statistic, extremes

Feed = Mapping[str, NDArray[Any]]

SAMPLE = 4096  # values of a tensor that one sample adds to its histogram
CHUNK = 8  # samples in one work item of an executor
FLUSH = 1 << 16  # values buffered before they are counted
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


@dataclass(frozen=True, slots=True)
class Probe:
    """How one tensor is observed: the names of what is fetched for it.

    `whole`: the tensor itself (an input of the graph, or a small tensor); else `lo`, `hi` and, for
    histograms, `sample`.
    """

    tensor: str
    histogram: bool
    is_input: bool = False
    whole: str = ""
    lo: str = ""
    hi: str = ""
    sample: str = ""

    @property
    def fetched(self) -> list[str]:
        """The outputs to fetch."""
        return [n for n in (self.whole, self.lo, self.hi, self.sample) if n and not self.is_input]


@dataclass(frozen=True, slots=True)
class Instrumented:
    """A model whose outputs are observations: picklable, all that a worker needs."""

    model: bytes
    probes: tuple[Probe, ...]
    inputs: tuple[str, ...]
    phase: str = ""  # the extra input that shifts the strided samples; empty: there are none


def calibrate(
    model: Model,
    wanted: Mapping[str, type[Statistic]],
    data: Iterable[Feed],
    *,
    executor: Executor | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Statistic]:
    """Observe tensors of the main graph over samples.

    wanted: tensor name -> `MinMax` or `Histogram`. data: dicts of arrays by input name; shapes may
    differ from sample to sample. One sample is in flight (with an executor: a bounded number of
    chunks), so memory does not depend on the number of samples. The result does not depend on how
    the samples are divided. progress is called with the number of samples that are done.

    Raises DataError for samples that do not fit, hold NaN or infinities, or when there are none;
    ModelError for a tensor that is not in the main graph or is not float.
    """
    plan = instrument(model, wanted)
    if executor is None:
        watch = Watch(plan)
        run = _session(plan)
        done = 0
        for index, feed in enumerate(data):
            watch.see(run, index, feed)
            done = index + 1
            if progress is not None:
                progress(done)
        result = watch.statistics()
    else:
        result, done = _sharded(plan, data, executor, progress)
    if not done:
        raise DataError("there are no samples to calibrate on")
    return {tensor: result[tensor] for tensor in wanted}


def _sharded(
    plan: Instrumented,
    data: Iterable[Feed],
    executor: Executor,
    progress: Callable[[int], None] | None,
) -> tuple[dict[str, Statistic], int]:
    """The statistics by an executor, and the number of samples."""
    in_flight: deque[Any] = deque()
    result: dict[str, Statistic] = {}
    done = 0

    def collect() -> None:
        nonlocal result, done
        part, size = in_flight.popleft().result()
        result = {t: result[t].merge(s) if result else s for t, s in part.items()}
        done += size
        if progress is not None:
            progress(done)

    try:
        for start, feeds in _chunks(data):
            in_flight.append(executor.submit(observe_chunk, plan, start, feeds))
            if len(in_flight) >= 2 * (os.cpu_count() or 1):
                collect()
        while in_flight:
            collect()
    finally:
        for future in in_flight:
            future.cancel()
        _worker_session.cache_clear()
    return result, done


def _chunks(data: Iterable[Feed]) -> Iterator[tuple[int, list[dict[str, NDArray[Any]]]]]:
    feeds, start = iter(data), 0
    while chunk := [dict(feed) for feed in islice(feeds, CHUNK)]:
        yield start, chunk
        start += len(chunk)


def observe_chunk(
    plan: Instrumented, start: int, feeds: list[dict[str, NDArray[Any]]]
) -> tuple[dict[str, Statistic], int]:
    """A worker's share: the statistics over samples start, start + 1, ..., and their number."""
    run = _worker_session(plan)
    watch = Watch(plan)
    for i, feed in enumerate(feeds):
        watch.see(run, start + i, feed)
    return watch.statistics(), len(feeds)


@lru_cache(maxsize=1)
def _worker_session(plan: Instrumented) -> Any:
    """Chunks of one calibration share a session in each worker."""
    return _session(plan, threads=1)


def _session(plan: Instrumented, threads: int | None = None) -> Any:
    return runtime.session(onnx.load_from_string(plan.model), threads=threads)


@dataclass(slots=True)
class Watch:
    """Statistics under construction."""

    plan: Instrumented
    ranges: dict[str, MinMax] = field(default_factory=dict)
    pending: dict[str, list[NDArray[np.uint16]]] = field(default_factory=dict)
    counted: dict[str, tuple[NDArray[np.uint16], NDArray[np.uint64]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ranges = {p.tensor: MinMax() for p in self.plan.probes}
        self.pending = {p.tensor: [] for p in self.plan.probes if p.histogram}
        self.counted = {tensor: histograms.count(np.empty(0, np.uint16)) for tensor in self.pending}

    def see(self, session: Any, index: int, feed: Feed) -> None:
        """Run one sample and add what is observed."""
        check_feed(feed, index, self.plan.inputs)
        inputs: dict[str, Any] = {name: feed[name] for name in self.plan.inputs}
        offset = index * 2654435769 % (1 << 31)  # Weyl sequence: 2^32 / golden ratio (Knuth 6.4)
        if self.plan.phase:
            inputs[self.plan.phase] = np.array([offset], np.int64)
        names = [name for probe in self.plan.probes for name in probe.fetched]
        try:
            values = dict(zip(names, session.run(names, inputs) if names else (), strict=True))
        except Exception as e:  # onnxruntime's exceptions share no base but Exception
            raise DataError(f"sample {index} does not run: {str(e).splitlines()[0]}") from e
        for probe in self.plan.probes:
            self._add(probe, feed[probe.tensor] if probe.is_input else None, values, offset)

    def _add(
        self, probe: Probe, direct: NDArray[Any] | None, values: dict[str, Any], offset: int
    ) -> None:
        if probe.is_input or probe.whole:
            whole = np.asarray(direct if direct is not None else values[probe.whole])
            seen = MinMax.of(whole)
            sample = whole.reshape(-1)
            if sample.size > SAMPLE:
                step = stride(sample.size)
                sample = sample[offset % step :: step]
        else:
            lo, hi = float(values[probe.lo]), float(values[probe.hi])
            sample = values.get(probe.sample, np.empty(0, np.float32))
            seen = MinMax(lo, hi, 1)
            if not (np.isfinite(lo) and np.isfinite(hi)):
                lo, hi, _ = extremes(sample[np.isfinite(sample)])
                seen = MinMax(lo, hi, 1, has_nonfinite=True)
        self.ranges[probe.tensor] = self.ranges[probe.tensor].merge(seen)
        if not probe.histogram:
            return
        if seen.has_nonfinite:
            sample = sample[np.isfinite(sample)]
        pending = self.pending[probe.tensor]
        pending.append(histograms.bins_of(sample))
        if sum(len(bins) for bins in pending) >= FLUSH:
            self._flush(probe.tensor)

    def _flush(self, tensor: str) -> None:
        if pending := self.pending[tensor]:
            new = histograms.count(np.concatenate(pending))
            self.counted[tensor] = histograms.add(self.counted[tensor], new)
            pending.clear()

    def statistics(self) -> dict[str, Statistic]:
        """What was observed so far."""
        for tensor in self.pending:
            self._flush(tensor)
        return {
            tensor: Histogram(r.lo, r.hi, r.count, r.has_nonfinite, *self.counted[tensor])
            if tensor in self.counted
            else r
            for tensor, r in self.ranges.items()
        }


def check_feed(feed: Feed, index: int, inputs: Iterable[str]) -> None:
    """Raise DataError unless the sample has every input and holds neither NaN nor infinities."""
    for name in inputs:
        if name not in feed:
            raise DataError(f"sample {index} has no input {name!r}")
        values = np.asarray(feed[name])
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            what = "NaN" if np.isnan(values).any() else "infinite values"
            raise DataError(f"sample {index}, input {name!r} has {what}")


def stride(size: int) -> int:
    """The least prime that leaves at most SAMPLE of `size` values and does not divide `size`."""
    step = -(-size // SAMPLE)
    while not _is_prime(step) or size % step == 0:
        step += 1
    return step


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def instrument(model: Model, wanted: Mapping[str, type[Statistic]]) -> Instrumented:
    """The model with observations for outputs instead of its own."""
    proto = model.to_proto()
    graph = proto.graph
    constants = {t.name for t in graph.initializer}
    inputs = {i.name: i for i in graph.input if i.name not in constants}
    made = {name for node in graph.node for name in node.output}
    types = {v.name: v.type.tensor_type for v in (*graph.value_info, *graph.output, *graph.input)}
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 1)
    probes = []
    graph.ClearField("output")
    extra = Extra(graph, opset)
    for tensor, statistic in wanted.items():
        if statistic not in (MinMax, Histogram):
            raise TypeError(f"cannot calibrate {statistic.__name__}: MinMax or Histogram")
        if tensor not in inputs and tensor not in made:
            raise ModelError(f"there is no activation {tensor!r} in the main graph to calibrate")
        kind = types[tensor].elem_type if tensor in types else 0
        if kind not in FLOATS:
            raise ModelError(
                f"cannot calibrate {tensor!r}: {TensorProto.DataType.Name(kind)} has no range"
            )
        histogram = statistic is Histogram
        if tensor in inputs:
            probes.append(Probe(tensor, histogram, is_input=True))
        else:
            probes.append(extra.probe(tensor, kind, _size(types[tensor]), histogram=histogram))
    if not graph.output:  # only inputs are wanted; a graph must have an output
        extra.output(next(iter(made), ""), TensorProto.FLOAT)
    return Instrumented(proto.SerializeToString(), tuple(probes), tuple(inputs), extra.phase)


def _size(kind: Any) -> int | None:
    """The number of elements, if every dimension is known."""
    if not kind.HasField("shape") or any(not d.HasField("dim_value") for d in kind.shape.dim):
        return None
    return int(np.prod([d.dim_value for d in kind.shape.dim], dtype=np.int64))


@dataclass(slots=True)
class Extra:
    """Adds observations to a graph."""

    graph: onnx.GraphProto
    opset: int
    phase: str = ""
    number: int = 0
    starts: dict[int, tuple[str, str]] = field(default_factory=dict)

    def probe(self, tensor: str, kind: int, size: int | None, *, histogram: bool) -> Probe:
        """Observe a tensor of `kind` with `size` elements (None: not known before the run)."""
        if (size is not None and size <= SAMPLE) or (histogram and (self.opset < 11)):
            if kind == TensorProto.BFLOAT16:
                tensor_out = self.node("Cast", tensor, to=TensorProto.FLOAT)
                kind = TensorProto.FLOAT
            else:
                tensor_out = tensor
            self.output(tensor_out, kind)
            return Probe(tensor, histogram, whole=tensor_out)
        source = tensor
        if kind != TensorProto.FLOAT:
            source = self.node("Cast", tensor, to=TensorProto.FLOAT)
        lo = self.node("ReduceMin", source, keepdims=0)
        hi = self.node("ReduceMax", source, keepdims=0)
        self.output(lo, TensorProto.FLOAT)
        self.output(hi, TensorProto.FLOAT)
        if not histogram:
            return Probe(tensor, histogram, lo=lo, hi=hi)
        flat = self.node("Reshape", source, self.shared("flat", [-1]))
        sample = self.node("Slice", flat, *self.window(source, size))
        self.output(sample, TensorProto.FLOAT)
        return Probe(tensor, histogram, lo=lo, hi=hi, sample=sample)

    def window(self, source: str, size: int | None) -> tuple[str, str, str, str]:
        """starts, ends, axes, steps of a Slice of the flat tensor."""
        end, axis = self.shared("end", [np.iinfo(np.int64).max]), self.shared("axis", [0])
        if not self.phase:
            self.phase = "onnxq/phase"
            self.graph.input.append(
                helper.make_tensor_value_info(self.phase, TensorProto.INT64, [1])
            )
        if size is not None:
            step = stride(size)
            if step not in self.starts:
                steps = self.shared(f"step_{step}", [step])
                self.starts[step] = (self.node("Mod", self.phase, steps), steps)
            start, steps = self.starts[step]
            return start, end, axis, steps
        # The step is the least prime of a list that is large enough, found in the graph.
        numbers = self.node("Div", self.node("Size", source), self.shared("sample", [SAMPLE]))
        less = self.node("Less", self.shared("primes", PRIMES), numbers)
        steps = self.node(
            "Gather",
            self.shared("primes", PRIMES),
            self.node("ArgMin", self.node("Cast", less, to=TensorProto.INT32), axis=0, keepdims=1),
        )
        return self.node("Mod", self.phase, steps), end, axis, steps

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Add a node; return its output."""
        self.number += 1
        name = f"onnxq/{op}_{self.number}"
        self.graph.node.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def shared(self, name: str, values: Any) -> str:
        """A constant (int64), made once."""
        name = f"onnxq/{name}"
        if all(t.name != name for t in self.graph.initializer):
            self.graph.initializer.append(
                numpy_helper.from_array(np.asarray(values, np.int64), name)
            )
        return name

    def output(self, name: str, kind: int) -> None:
        """Make a tensor an output of the graph."""
        self.graph.output.append(helper.make_tensor_value_info(name, kind, None))


PRIMES = np.array([1] + [stride(int(SAMPLE * 1.1**k)) for k in range(150)], np.int64)
