"""The only module that makes onnxruntime sessions: run, time, describe."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxq.errors import ModelError
from onnxq.model import Model

Source = Model | onnx.ModelProto | bytes | str | os.PathLike[str]
Level = Literal["all", "extended", "basic", "off"]
LARGE = 1 << 30  # bytes of weights above which a model goes to onnxruntime through a file


def session(model: Source, *, optimize: Level = "all", threads: int | None = None) -> Any:
    """Make an onnxruntime session on the CPU; only errors are logged.

    threads: for one operator (None: onnxruntime's own choice, all cores). Raises ModelError when
    onnxruntime does not take the model.
    """
    import onnxruntime as ort

    levels = ort.GraphOptimizationLevel
    options = ort.SessionOptions()
    options.graph_optimization_level = {
        "all": levels.ORT_ENABLE_ALL,
        "extended": levels.ORT_ENABLE_EXTENDED,
        "basic": levels.ORT_ENABLE_BASIC,
        "off": levels.ORT_DISABLE_ALL,
    }[optimize]
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = threads

    def made(source: bytes | str) -> Any:
        try:
            return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as e:  # onnxruntime's exceptions share no base but Exception
            where = source if isinstance(source, str) else "the model"
            raise ModelError(f"onnxruntime cannot load {where}: {one_line(e)}") from e

    if isinstance(model, Model):
        if sum(model.weight_sizes()) > LARGE:
            with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
                path = Path(folder) / "model.onnx"
                model.save(path)
                return made(str(path))
        model = model.to_proto()
    if isinstance(model, onnx.ModelProto):
        return made(model.SerializeToString())
    return made(model if isinstance(model, bytes) else os.fspath(model))


def one_line(error: BaseException) -> str:
    """The first line of an error's text that says something."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds of one run with one thread, original and result, timed in alternation.

    20th percentiles, since other work on a machine only ever adds time.
    """

    original_ms: float
    result_ms: float

    @property
    def ratio(self) -> float:
        """Result's time over the original's: below 1 is faster."""
        return self.result_ms / self.original_ms


def latency(
    original: Source, result: Source, feed: Mapping[str, NDArray[Any]], *, seconds: float = 3.0
) -> Latency:
    """Time both models on one sample, in turn, for about `seconds`, one thread."""
    runs = [_runner(session(model, threads=1), feed) for model in (original, result)]
    times: tuple[list[float], list[float]] = ([], [])
    for run in runs:
        run()
    once = min(_seconds(runs[0], 1) for _ in range(2))
    inner = max(1, int(0.004 / max(once, 1e-6)))  # a clock reading every 4 ms at most
    end = time.perf_counter() + seconds
    while len(times[0]) < 3 or (time.perf_counter() < end and len(times[0]) < 100):
        for run, taken in zip(runs, times, strict=True):
            taken.append(_seconds(run, inner))
    low = [1000 * float(np.percentile(taken, 20)) for taken in times]
    return Latency(low[0], low[1])


def _runner(made: Any, feed: Mapping[str, NDArray[Any]]) -> Callable[[], Any]:
    wanted = {i.name: feed[i.name] for i in made.get_inputs()}
    return lambda: made.run(None, wanted)


def _seconds(run: Callable[[], Any], inner: int) -> float:
    start = time.perf_counter()
    for _ in range(inner):
        run()
    return (time.perf_counter() - start) / inner


def environment() -> dict[str, str]:
    """Versions and processor: what measured figures depend on."""
    import onnxruntime as ort

    return {
        "onnxruntime": ort.__version__,
        "onnx": onnx.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
