"""Original against rewritten model on the same samples: streaming, one sample in flight."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxq import runtime
from onnxq.data import Feed, Samples
from onnxq.emulation import Emulator
from onnxq.errors import ModelError
from onnxq.model import Model
from onnxq.numerics.metrics import ErrorSums

CHUNK = 64  # tensors fetched together in a comparison of layers
LEAST = 4  # samples compared however long they take


@dataclass(frozen=True, slots=True)
class OutputFidelity:
    """How close one output is to the original's, over all samples.

    top1_agreement: share of equal argmax along the last axis, for float outputs whose last axis
    holds at least two values (class scores have this form; for others the figure says little).
    """

    name: str
    sqnr_db: float
    cosine: float
    max_abs: float
    top1_agreement: float | None
    is_finite: bool


@dataclass(frozen=True, slots=True)
class Fidelity:
    """All outputs, and the accuracy of both models where there are labels."""

    outputs: tuple[OutputFidelity, ...]
    samples: int
    original_accuracy: float | None = None
    result_accuracy: float | None = None

    @property
    def sqnr_db(self) -> float:
        """The least SQNR of any output."""
        return min((o.sqnr_db for o in self.outputs), default=float("inf"))


@dataclass(frozen=True, slots=True)
class LayerError:
    """How close one tensor inside the model is to the original's."""

    name: str
    op: str
    sqnr_db: float


@dataclass(slots=True)
class _Tally:
    """What is summed up for one output."""

    sums: ErrorSums = field(default_factory=ErrorSums)
    same: int = 0
    rows: int = 0
    is_finite: bool = True

    def add(self, name: str, reference: NDArray[Any], output: NDArray[Any]) -> None:
        if reference.shape != output.shape:
            raise ModelError(
                f"output {name!r} is {list(output.shape)} in the result, "
                f"{list(reference.shape)} in the original"
            )
        if reference.dtype.kind not in "fiub":
            return
        self.sums = self.sums.merge(ErrorSums.of(reference, output))
        if output.dtype.kind == "f":
            # What is infinite in the original (masks of -inf) may be so in the result.
            self.is_finite &= bool(np.isfinite(output[np.isfinite(reference)]).all())
            if reference.ndim and reference.shape[-1] > 1 and reference.size:
                equal = reference.argmax(-1) == output.argmax(-1)
                self.same, self.rows = self.same + int(equal.sum()), self.rows + equal.size

    def result(self, name: str) -> OutputFidelity:
        agreement = self.same / self.rows if self.rows else None
        return OutputFidelity(
            name, self.sums.sqnr_db, self.sums.cosine, self.sums.max_abs, agreement, self.is_finite
        )


def compare(
    original: runtime.Source,
    result: runtime.Source,
    samples: Samples,
    *,
    seconds: float | None = None,
    progress: Callable[[int], None] | None = None,
    emulated: Emulator | None = None,
) -> Fidelity:
    """Run both models over the samples, which are real values, and compare each output.

    Integer inputs and outputs that the model's metadata explain (`onnxq.ports`) are converted.
    Stops after `seconds` (but not before a few samples). Accuracy is top-1 of the first output, for
    labels that have its shape without the last axis. emulated: runs in the result's place.

    Raises ModelError for outputs of other names or shapes, DataError for samples that do not run.
    """
    one, two = (runtime.Client(runtime.session(model)) for model in (original, result))
    names = one.names
    if two.names != names:
        raise ModelError(
            "the two models have different outputs: they are not versions of one model"
        )
    tallies = {name: _Tally() for name in names}
    judged = two if emulated is None else emulated
    hits, used, start = [0, 0, 0], 0, time.perf_counter()
    for feed in samples:
        a, b = (_run(s, feed, used) for s in (one, judged))
        for name, x, y in zip(names, a, b, strict=True):
            if isinstance(x, np.ndarray):
                tallies[name].add(name, x, np.asarray(y))
        _count_hits(hits, a[0], b[0], samples, used)
        used += 1
        if progress is not None:
            progress(used)
        if seconds is not None and used >= LEAST and time.perf_counter() - start > seconds:
            break
    accuracy = [hits[i] / hits[2] if hits[2] else None for i in (0, 1)]
    return Fidelity(tuple(t.result(n) for n, t in tallies.items()), used, *accuracy)


def _run(client: runtime.Client | Emulator, feed: Feed, index: int) -> list[Any]:
    with runtime.blames_sample(index):
        return client.run(feed)


def _count_hits(hits: list[int], a: Any, b: Any, samples: Samples, index: int) -> None:
    """Add one feed's hits of the original and the result, and the number of labels."""
    if samples.labels is None or not isinstance(a, np.ndarray) or a.ndim < 1:
        return
    labels = samples.labels[index * samples.batch : (index + 1) * samples.batch]
    shape = a.shape[:-1]
    if (
        labels.size == 0
        or (len(labels), *shape[1:]) != labels.shape
        or len(labels) > (shape or (0,))[0]
    ):
        return
    for i, scores in enumerate((a, b)):
        hits[i] += int((scores.argmax(-1)[: len(labels)] == labels).sum())
    hits[2] += labels.size


def layer_fidelity(original: Model, result: Model, samples: Iterable[Feed]) -> list[LayerError]:
    """Compare the float tensors inside that have the same name in both models.

    A rewritten graph keeps the names of its float tensors, so this is layer by layer. Tensors are
    fetched some at a time, the samples being run once for each lot.
    """
    ours, theirs = (_floats(m) for m in (original, result))
    names = [name for name in ours if name in theirs]
    sums = dict.fromkeys(names, ErrorSums())
    feeds = list(samples)
    for i in range(0, len(names), CHUNK):
        chunk = names[i : i + CHUNK]
        one, two = (runtime.Client(runtime.session(_showing(m, chunk))) for m in (original, result))
        for index, feed in enumerate(feeds):
            a, b = (_run(s, feed, index) for s in (one, two))
            for name, x, y in zip(chunk, a, b, strict=True):
                if x.shape == y.shape:
                    sums[name] = sums[name].merge(ErrorSums.of(x, y))
    return [LayerError(name, ours[name], sums[name].sqnr_db) for name in names]


def _floats(model: Model) -> dict[str, str]:
    """Float tensors that nodes of the main graph make, with the operator that makes them."""
    return {
        t.name: node.op
        for node in model.graph.nodes
        for t in node.outputs
        if t.name and t.dtype == np.float32
    }


def _showing(model: Model, names: Sequence[str]) -> onnx.ModelProto:
    proto = model.to_proto()
    proto.graph.ClearField("output")
    proto.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names
    )
    return proto
