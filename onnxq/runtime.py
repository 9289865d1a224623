"""The only module that makes onnxruntime sessions: run, time, describe."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxq.errors import DataError, ModelError, RefusedError
from onnxq.leftovers import temporary_folder
from onnxq.model import Model
from onnxq.ports import ports_in

Source = Model | onnx.ModelProto | bytes | str | os.PathLike[str]
Level = Literal["all", "extended", "basic", "off"]
LARGE = 1 << 30  # bytes of weights above which a model goes to onnxruntime through a file

# On x86, onnxruntime 1.31 makes uint8 of int8 zero points, but leaves the output_dtype that it has
# itself given to QuantizeLinear, moving a pair over a Reshape, Slice or Transpose (opset 21 on):
# the graph then contradicts itself. With this option int8 stays what it is, as on ARM.
INT8_BUG = "output_dtype INT8 does not match y_zero_point type UINT8"
INT8_ALLOWED = "session.qdqisint8allowed"
HALF_INPUT = "tensor(float16)"


def session(model: Source, *, optimize: Level = "all", threads: int | None = None) -> Any:
    """Make an onnxruntime session on the CPU; only errors are logged.

    threads: for one operator (None: onnxruntime's own choice, all cores). Raises RefusedError when
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

    def made(source: bytes | str, *, again: bool = False) -> Any:
        try:
            return ort.InferenceSession(
                source, options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
        except Exception as e:  # onnxruntime's exceptions share no base but Exception
            if INT8_BUG in str(e) and not again:
                options.add_session_config_entry(INT8_ALLOWED, "1")
                return made(source, again=True)
            where = source if isinstance(source, str) else "the model"
            raise RefusedError(f"onnxruntime cannot load {where}: {_reason(e)}") from e

    if isinstance(model, onnx.ModelProto) and model.ByteSize() > LARGE:
        model = Model.from_proto(model)  # it does not fit into one string of bytes
    if isinstance(model, Model):
        if sum(model.weight_sizes()) > LARGE:
            with temporary_folder() as folder:
                path = folder / "model.onnx"
                model.save(path)
                return made(str(path))
        model = model.to_proto()
    if isinstance(model, onnx.ModelProto):
        return made(model.SerializeToString())
    return made(model if isinstance(model, bytes) else os.fspath(model))


def needs_int8_allowed(model: Source) -> bool:
    """Whether onnxruntime takes the model here only with the option INT8_ALLOWED."""
    options = session(model).get_session_options()
    try:
        return bool(options.get_session_config_entry(INT8_ALLOWED) == "1")
    except Exception:  # what is not set is an error
        return False


def _reason(error: BaseException) -> str:
    """What onnxruntime says, without the number and name of its error."""
    return one_line(error).removeprefix("[ONNXRuntimeError] : ").split(" : ", 2)[-1]


CONVERTER = "onnxruntime.tools.convert_onnx_models_to_ort"


def convert_to_ort(model: Path, folder: Path) -> None:
    """Let onnxruntime's own converter write MODEL.ort and its operator configuration to a folder.

    Optimizations are those for ARM, done before saving. The converter runs as a process of its own:
    it prints, sets up logging, and imports torch where that is installed. Raises ModelError when
    it cannot convert the model.
    """
    options = ("--optimization_style", "Fixed", "--target_platform", "arm", "--output_dir")
    command = [sys.executable, "-m", CONVERTER, *options, str(folder), str(model.resolve())]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
        raise ModelError(f"onnxruntime cannot convert {model} to .ort: {said[-1].strip()}")


def run(session: Any, feed: Mapping[str, Any]) -> dict[str, Any]:
    """Run a session on one sample; outputs by name, sequences and maps as onnxruntime gives them.

    What the feed has beyond the session's inputs (labels, inputs that a rewritten model lost) is
    left out. Raises whatever onnxruntime raises.
    """
    wanted = fitted(session, feed)
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, wanted), strict=True))


def fitted(session: Any, feed: Mapping[str, Any]) -> dict[str, Any]:
    """What the session takes of a feed; floats of 32 bits in 16, where it wants those."""
    return {
        i.name: np.asarray(feed[i.name]).astype(np.float16)
        if i.type == HALF_INPUT and np.asarray(feed[i.name]).dtype == np.float32
        else feed[i.name]
        for i in session.get_inputs()
        if i.name in feed
    }


@dataclass(frozen=True, slots=True)
class Value:
    """One input or output: dtype as onnxruntime names it, `tensor(float)`; free axes are names.

    shape: None where nothing is known of it.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True, slots=True)
class Interface:
    """What a model takes and gives; inputs with a default in the model are not among them."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]

    @classmethod
    def of(cls, session: Any) -> Interface:
        """Of a session."""
        inputs, outputs = (
            tuple(Value(v.name, v.type, None if v.shape is None else tuple(v.shape)) for v in part)
            for part in (session.get_inputs(), session.get_outputs())
        )
        return cls(inputs, outputs)


class Client:
    """A session as those use it who have real values, whichever integers its interface takes.

    Floats for an integer input are quantized, an integer output is dequantized, by the scales that
    the model's metadata tell (`onnxq.ports`). All else passes as it is.
    """

    def __init__(self, session: Any) -> None:
        """Raises ModelError for metadata that are damaged."""
        self.session = session
        self.names = [o.name for o in session.get_outputs()]
        values = {v.name: v for v in (*session.get_inputs(), *session.get_outputs())}
        known = ports_in(session.get_modelmeta().custom_metadata_map)
        self._ports = {
            name: port.affine
            for name, port in known.items()
            if name in values and values[name].type == f"tensor({port.affine.type})"
        }

    def fed(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        """What the session takes of the feed; other arrays (labels) are left out."""
        wanted = fitted(self.session, feed)
        return {
            name: self._ports[name].quantize(values)
            if name in self._ports and np.asarray(values).dtype.kind == "f"
            else values
            for name, values in wanted.items()
        }

    def run(self, feed: Mapping[str, Any]) -> list[Any]:
        """The outputs in their order. Raises whatever onnxruntime raises."""
        outputs = self.session.run(self.names, self.fed(feed))
        return [
            self._ports[name].dequantize(values) if name in self._ports else values
            for name, values in zip(self.names, outputs, strict=True)
        ]


@contextmanager
def blames_sample(index: int | None = None) -> Iterator[None]:
    """Raise DataError, one line, where onnxruntime does not run a sample; None: any."""
    try:
        yield
    except Exception as e:  # onnxruntime's exceptions share no base but Exception
        which = "a sample" if index is None else f"sample {index}"
        raise DataError(f"{which} does not run: {one_line(e)}") from e


def one_line(error: BaseException) -> str:
    """The first line of an error's text that says something."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)


# Seconds between two readings of the clock, at least: well below the 3 to 4 ms after which a busy
# system gives the processor to another process, or no reading would be free of that.
CHUNK = 0.001
QUICK = 0.02  # below this a run is cheap enough to be timed several times beforehand
ROUNDS = 100  # more are not needed


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds of one run, original and result, timed in alternation.

    20th percentiles of processor time, since other work on a machine only ever adds to it.
    """

    original_ms: float
    result_ms: float

    @property
    def ratio(self) -> float:
        """Result's time over the original's: below 1 is faster."""
        return self.result_ms / self.original_ms


def latency(
    original: Source,
    result: Source,
    feed: Mapping[str, NDArray[Any]],
    *,
    seconds: float = 3.0,
    threads: int = 1,
) -> Latency:
    """Time both models on one sample, in turn, for about `seconds`.

    One with integer inputs gets integers, as its own client would give them.
    Models that run for less than 1 ms are run several times for each reading of the clock. Each
    model is run at least three times, the first one not counted, however long that takes.
    Raises ModelError for a model that onnxruntime does not take or that does not run.
    """
    runs = [_runner(session(model, threads=threads), feed) for model in (original, result)]
    once = [_seconds(run, 1) for run in runs]
    inner = [_batch(run, s) for run, s in zip(runs, once, strict=True)]
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    least = 3 if 3 * sum(once) < seconds else 1
    while len(times[0]) < least or (time.perf_counter() < end and len(times[0]) < ROUNDS):
        first = len(times[0]) % 2  # neither always comes after the other
        for i in (first, 1 - first):
            times[i].append(_seconds(runs[i], inner[i]))
    low = [1000 * float(np.percentile(taken, 20)) for taken in times]
    return Latency(low[0], low[1])


def _runner(made: Any, feed: Mapping[str, NDArray[Any]]) -> Callable[[], Any]:
    wanted = Client(made).fed(feed)
    try:
        made.run(None, wanted)  # warms it up, too
    except Exception as e:  # onnxruntime's exceptions share no base but Exception
        raise ModelError(f"cannot be timed, it does not run: {one_line(e)}") from e
    return lambda: made.run(None, wanted)


def _batch(run: Callable[[], Any], once: float) -> int:
    """Runs for one reading of the clock; `once`: seconds of a first run, which may have waited."""
    if once < QUICK:
        once = min(once, *(_seconds(run, 1) for _ in range(4)))
    return max(1, math.ceil(CHUNK / max(once, 1e-6)))


def _seconds(run: Callable[[], Any], inner: int) -> float:
    """Processor time of this thread for one run: other programs' turns are not in it."""
    start = _clock()
    for _ in range(inner):
        run()
    return (_clock() - start) / inner


# Not all systems count a thread's time finely enough (Windows: 16 ms).
_FINE = time.get_clock_info("thread_time").resolution <= 1e-6
_clock = time.thread_time if _FINE else time.perf_counter


def environment() -> dict[str, str]:
    """Versions and processor: what measured figures depend on."""
    import onnxruntime as ort

    return {
        "onnxruntime": ort.__version__,
        "onnx": onnx.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "cpu": _cpu(),
        "threads": "latency: 1; else onnxruntime's choice",
    }


def _cpu() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")
