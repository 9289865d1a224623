"""Run a model over sample inputs and observe its tensors: streaming, at about the cost of the runs.

What is fetched of each tensor is decided in `onnxq.instrument`.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, islice
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxq import runtime
from onnxq.errors import DataError
from onnxq.files import atomic_write
from onnxq.instrument import Plan, Wanted, instrument, stride
from onnxq.model import Model
from onnxq.numerics import histograms
from onnxq.numerics.sequences import weyl
from onnxq.statistics import GramTally, Histogram, MinMax, Statistic, SumOfSquares

Feed = Mapping[str, NDArray[Any]]

CHUNK = 8  # samples in one work item of an executor
BUFFER = 1 << 15  # values kept before they are counted


def calibrate(
    model: Model,
    wanted: Wanted,
    data: Iterable[Feed],
    *,
    executor: Executor | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Statistic]:
    """Observe tensors over samples, those in bodies of If, Loop and Scan too.

    wanted: tensor name -> `MinMax`, `Histogram` or `Squares(axis)`, whose result is a
    `SumOfSquares`; or any key -> `Products(tensor, ...)`, whose result is a `Gram`. Bodies do not
    have the last two. data: dicts of arrays by input name; shapes may
    differ from sample to sample. One sample is in flight (with an executor: a bounded number of
    chunks), so memory does not depend on the number of samples. The result does not depend on how
    the samples are divided. progress is called with the number of samples that are done.

    Raises DataError for samples that do not fit, hold NaN or infinities, or when there are none;
    ModelError for a tensor that does not exist, is not float, or is in a loop inside of a loop. One
    in a branch that no sample takes has count 0.
    """
    samples = iter(data)
    first = next(samples, None)
    if first is None:
        raise DataError("there are no samples to calibrate on")
    samples = chain([first], samples)
    proto, plan = instrument(model, wanted, first)
    done = 0
    if executor is not None:
        result: dict[str, Statistic] = {}
        for part, size in _sharded(proto.SerializeToString(), plan, samples, executor):
            result = {t: result[t].merge(s) if result else s for t, s in part.items()}
            done += size
            if progress is not None:
                progress(done)
        return result
    watch = Watch(plan, runtime.session(proto), lambda: instrument(model, wanted, first)[0])
    del proto  # the session has its own copy of the weights
    for index, feed in enumerate(samples):
        watch.see(index, feed)
        done += 1
        if progress is not None:
            progress(done)
    return watch.statistics()


def _sharded(
    proto: bytes, plan: Plan, samples: Iterator[Feed], executor: Executor
) -> Iterator[tuple[dict[str, Statistic], int]]:
    """Yield the results of the chunks, in order; twice as many in flight as there are cores."""
    in_flight: deque[Any] = deque()
    start = 0
    try:
        while chunk := [dict(feed) for feed in islice(samples, CHUNK)]:
            in_flight.append(executor.submit(observe_chunk, proto, plan, start, chunk))
            start += len(chunk)
            if len(in_flight) >= 2 * (os.cpu_count() or 1):
                yield in_flight.popleft().result()
        while in_flight:
            yield in_flight.popleft().result()
    finally:
        for future in in_flight:
            future.cancel()
        _worker_session.cache_clear()  # of this process: a thread pool's


def observe_chunk(
    proto: bytes, plan: Plan, start: int, feeds: list[dict[str, NDArray[Any]]]
) -> tuple[dict[str, Statistic], int]:
    """Do a worker's share: statistics over samples start, start + 1, ..., and their number."""
    watch = Watch(plan, _worker_session(proto), lambda: onnx.load_from_string(proto))
    for i, feed in enumerate(feeds):
        watch.see(start + i, feed)
    return watch.statistics(), len(feeds)


@lru_cache(maxsize=1)
def _worker_session(proto: bytes) -> Any:
    """Make a session; the chunks of one calibration share it in each worker."""
    return runtime.session(onnx.load_from_string(proto), threads=1)


@dataclass(slots=True)
class Watch:
    """Statistics under construction. `rebuild` gives the model again, if it is needed whole."""

    plan: Plan
    session: Any
    rebuild: Callable[[], onnx.ModelProto]
    names: list[str] = field(init=False)
    tallies: list[Tally] = field(init=False)
    second: Any = None

    def __post_init__(self) -> None:
        every = (name for probe in self.plan.probes for name in probe.fetched)
        self.names = list(dict.fromkeys(every))
        self.tallies = [
            Tally(products=None if probe.products is None else GramTally(probe.products))
            for probe in self.plan.probes
        ]

    def see(self, index: int, feed: Feed) -> None:
        """Run one sample and add what is observed."""
        check_feed(feed, index, self.plan.inputs)
        inputs = {name: np.asarray(feed[name]) for name in self.plan.inputs}
        offset = weyl(index)
        if self.plan.phase:
            inputs[self.plan.phase] = np.array([offset], np.int64)
        values = dict(
            zip(self.names, self._run(self.session, self.names, inputs, index), strict=True)
        )
        late = []
        for probe, tally in zip(self.plan.probes, self.tallies, strict=True):
            if tally.products is not None:
                if tally.products.wish.has(index):
                    source = feed[probe.source] if probe.is_input else values[probe.source]
                    tally.products.see(np.asarray(source), offset, unmasked(feed))
            elif probe.sums:
                tally.see_sums(np.asarray(values[probe.source]))
            elif probe.lo:
                lo, hi = float(values[probe.lo].min()), float(values[probe.hi].max())
                if not np.isfinite(hi - lo):
                    late.append((probe, tally))
                    continue
                tally.extend(lo, hi)
                if probe.sample:
                    tally.add(values[probe.sample])
            elif probe.is_log:
                tally.see_rows(np.asarray(values[probe.source]))
            else:
                whole = np.asarray(feed[probe.tensor] if probe.is_input else values[probe.source])
                tally.see(whole, offset if probe.histogram else None)
        if late:  # infinities: their tensors' finite extremes need the values themselves
            if self.second is None:
                self.second = runtime.session(_fetching(self.rebuild(), self.plan))
            sources = [probe.source for probe, _ in late]
            wholes = self._run(self.second, sources, inputs, index)
            for (probe, tally), whole in zip(late, wholes, strict=True):
                tally.see(whole, offset if probe.histogram else None)

    def _run(self, session: Any, names: list[str], inputs: dict[str, Any], index: int) -> list[Any]:
        if not names:
            return []
        with runtime.blames_sample(index):
            return list(session.run(names, inputs))

    def statistics(self) -> dict[str, Statistic]:
        """Return what was observed so far."""
        return {
            probe.tensor: tally.products.gram()
            if tally.products is not None
            else tally.sums
            if tally.sums is not None
            else tally.histogram()
            if probe.histogram
            else tally.minmax()
            for probe, tally in zip(self.plan.probes, self.tallies, strict=True)
        }


@dataclass(slots=True)
class Tally:
    """One tensor's statistic under construction; upper halves of values wait to be counted."""

    lo: float = np.inf
    hi: float = -np.inf
    count: int = 0
    has_nonfinite: bool = False
    waiting: list[NDArray[np.uint16]] = field(default_factory=list)
    size: int = 0
    counted: histograms.Counts = histograms.NONE
    sums: SumOfSquares | None = None
    products: GramTally | None = None

    def see_sums(self, sums: NDArray[Any]) -> None:
        """Add one sample's sums of squares."""
        new = SumOfSquares.of_sums(sums)
        self.sums = new if self.sums is None else self.sums.merge(new)

    def extend(self, lo: float, hi: float) -> None:
        """Add one sample's extremes."""
        self.lo, self.hi, self.count = min(self.lo, lo), max(self.hi, hi), self.count + 1

    def see(self, whole: NDArray[Any], offset: int | None) -> None:
        """Add one sample's whole tensor; offset None: its extremes alone."""
        seen = MinMax.of(whole)
        self.extend(seen.lo, seen.hi)
        self.has_nonfinite |= seen.has_nonfinite
        if offset is not None:
            flat = whole.reshape(-1)
            step = stride(flat.size)
            self.add(flat[offset % step :: step])

    def see_rows(self, rows: NDArray[np.float32]) -> None:
        """Add the runs of a body in one sample: rows of least, greatest and further values."""
        rows = rows[~np.isnan(rows).all(1)]  # a branch that was not taken
        if rows.size:
            seen = MinMax.of(rows)
            self.extend(seen.lo, seen.hi)
            self.has_nonfinite |= seen.has_nonfinite
            self.add(rows[:, 2:])

    def add(self, sample: NDArray[Any]) -> None:
        """Add values to be counted; those that are not finite are dropped (and noted)."""
        halves = histograms.halves_of(sample)
        self.waiting.append(halves)
        self.size += halves.size
        if self.size >= BUFFER:
            self._flush()

    def _flush(self) -> None:
        if self.size:
            new, dropped = histograms.count(np.concatenate(self.waiting))
            self.counted = histograms.add(self.counted, new)
            self.has_nonfinite |= dropped > 0
            self.waiting, self.size = [], 0

    def histogram(self) -> Histogram:
        """Return what was seen so far."""
        self._flush()
        return Histogram(self.lo, self.hi, self.count, self.has_nonfinite, *self.counted)

    def minmax(self) -> MinMax:
        """Return what was seen so far, without the histogram."""
        return MinMax(self.lo, self.hi, self.count, self.has_nonfinite)


def unmasked(feed: Feed) -> NDArray[np.bool_] | None:
    """Where an input that is called a mask has ones, and zeros elsewhere; None without such one.

    What is computed at the other places (padding behind a text) reaches no result.
    """
    for name, given in feed.items():
        values = np.asarray(given)
        if "mask" in name.lower() and values.ndim > 1 and values.dtype.kind in "biuf":
            kept: NDArray[np.bool_] = np.not_equal(values, 0)
            if kept.any() and (values[kept] == 1).all():
                return kept
    return None


def check_feed(feed: Feed, index: int, inputs: Iterable[str]) -> None:
    """Raise DataError unless the sample has every input and holds neither NaN nor infinities."""
    for name in inputs:
        if name not in feed:
            raise DataError(f"sample {index} has no input {name!r}")
        values = np.asarray(feed[name])
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            what = "NaN" if np.isnan(values).any() else "infinite values"
            raise DataError(f"sample {index}, input {name!r} has {what}")


def _fetching(proto: onnx.ModelProto, plan: Plan) -> onnx.ModelProto:
    """Add what is observed in the graph to the outputs, whole."""
    for probe in plan.probes:
        if probe.lo:
            proto.graph.output.append(onnx.ValueInfoProto(name=probe.source))
    return proto


VERSION = 1
FORMAT = "onnxq calibration"


def save_calibration(
    path: str | os.PathLike[str], stats: Mapping[str, Statistic], *, meta: Mapping[str, Any]
) -> None:
    """Write statistics to an .npz file, atomically; meta: what JSON can hold, for the reader.

    Raises ModelError when the file cannot be written.
    """
    rows: list[list[Any]] = []
    arrays: dict[str, Any] = {}
    for i, (tensor, s) in enumerate(stats.items()):
        if not isinstance(s, MinMax | Histogram):
            raise TypeError(f"cannot save {type(s).__name__} of {tensor!r}")
        rows.append([type(s).__name__, tensor, s.lo, s.hi, s.count, s.has_nonfinite])
        if isinstance(s, Histogram):
            arrays[f"bins_{i}"], arrays[f"counts_{i}"] = s.bins, s.counts
    header = {"format": FORMAT, "version": VERSION, "meta": dict(meta), "tensors": rows}
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    with atomic_write(path) as file:
        np.savez_compressed(file, **arrays)


def load_calibration(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Statistic], dict[str, Any]]:
    """Read what `save_calibration` wrote: the statistics, and meta.

    Raises DataError when the file is missing, damaged, something else, or of a newer onnxq.
    """
    name = os.fspath(path)
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            header = json.loads(file["header"].tobytes())
            if header["format"] != FORMAT:
                raise ValueError("foreign header")
            if header["version"] > VERSION:
                raise DataError(f"{name} was written by a newer onnxq: upgrade, or calibrate again")
            stats: dict[str, Statistic] = {}
            for i, (kind, tensor, *values) in enumerate(header["tensors"]):
                if kind == "Histogram":
                    lo, hi, number, nonfinite = values
                    bins, counts = file[f"bins_{i}"], file[f"counts_{i}"]
                    stats[tensor] = Histogram(lo, hi, number, nonfinite, bins, counts)
                else:
                    stats[tensor] = MinMax(*values)
            return stats, header["meta"]
    except OSError as e:
        raise DataError(f"cannot read {name}: {e.strerror or e}") from e
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as e:
        raise DataError(f"{name} is not a calibration of onnxq, or is damaged") from e
