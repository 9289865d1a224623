"""The cost of `onnxq optimize` as a whole process, beside onnxruntime's own tool and a plain run.

    python tests/bench/bench_optimize.py MODEL FOLDER_OF_NPZ [--repeats 3]

Prints JSON. Times are medians of runs in turn, in seconds; memory is the peak resident size in MB.
`ratios` are what the project promises: onnxq over onnxruntime.quantization (MinMax at most 1,
Percentile at most 0.25), and onnxq's memory over that of a plain run (at most 2), for the samples
given and for 1,000 (the same files over and over). onnxruntime's calibration is given a model that
its own pre-processing has gone over, at no charge.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PEER = """
import sys, numpy as np, onnxruntime as ort
from pathlib import Path
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
from onnxruntime.quantization import QuantType, quantize_static
model, folder, out, method = sys.argv[1:]
class Reader(CalibrationDataReader):
    def __init__(self): self.files = iter(sorted(Path(folder).glob("*.npz")))
    def get_next(self):
        path = next(self.files, None)
        return None if path is None else {k: v for k, v in np.load(path).items() if k != "labels"}
quantize_static(model, out, Reader(), per_channel=True, activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8, calibrate_method=getattr(CalibrationMethod, method))
"""
PLAIN = """
import sys, numpy as np, onnxruntime as ort
from pathlib import Path
session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
for path in sorted(Path(sys.argv[2]).glob("*.npz")):
    session.run(None, {k: v for k, v in np.load(path).items() if k != "labels"})
"""


def measure(command: list[str]) -> tuple[float, float, str]:
    """Seconds, peak MB and the last line of stderr of a command that must succeed."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        pid = os.posix_spawn(
            command[0], command, os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_DUP2, errors.fileno(), 2),
            ],
        )  # fmt: skip
        _, status, usage = os.wait4(pid, 0)
        seconds = time.perf_counter() - start
        errors.seek(0)
        lines = errors.read().decode().strip().splitlines()
    failed = "" if status == 0 else (lines or ["failed"])[-1][:200]
    return seconds, usage.ru_maxrss / 1024, failed


def prepared(model: Path, folder: Path) -> Path:
    """The model as onnxruntime wants it: opset 13 or newer, its own pre-processing done."""
    code = (
        "import sys, onnx\n"
        "from onnx import version_converter\n"
        "from onnxruntime.quantization.shape_inference import quant_pre_process\n"
        "m = onnx.load(sys.argv[1]); m.ir_version = max(8, m.ir_version)\n"
        "names = {t.name for t in m.graph.initializer}\n"
        "inputs = [i for i in m.graph.input if i.name not in names]\n"
        "del m.graph.input[:]; m.graph.input.extend(inputs)\n"
        "old = max(o.version for o in m.opset_import if o.domain in ('', 'ai.onnx'))\n"
        "m = version_converter.convert_version(m, 13) if old < 13 else m\n"
        "onnx.save(m, sys.argv[2])\n"
        "quant_pre_process(sys.argv[2], sys.argv[2], skip_symbolic_shape=True)\n"
    )
    out = folder / "prepared.onnx"
    subprocess.run([sys.executable, "-c", code, model, out], check=True, capture_output=True)
    return out


def repeated(samples: Path, folder: Path, count: int) -> Path:
    """A folder of `count` links to the samples, over and over."""
    many = folder / "many"
    many.mkdir()
    files = sorted(samples.glob("*.npz"))
    for i in range(count):
        (many / f"{i:05d}.npz").symlink_to(files[i % len(files)].resolve())
    return many


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("samples", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    python = sys.executable
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, out = str(options.model), str(folder / "out.onnx")
        many = repeated(options.samples, folder, 1000)
        theirs = str(prepared(options.model, folder))

        def ours(samples: Path, *extra: str) -> list[str]:
            common = ("--recipe", "int8", "--data")
            return [python, "-m", "onnxq", "optimize", model, out, *common, str(samples), *extra]

        data = str(options.samples)
        commands = {
            "onnxq": ours(options.samples, "--no-validate"),
            "onnxq_validated": ours(options.samples),
            "minmax": [python, "-c", PEER, theirs, data, out, "MinMax"],
            "percentile": [python, "-c", PEER, theirs, data, out, "Percentile"],
            "plain": [python, "-c", PLAIN, model, data],
        }
        runs: dict[str, list[tuple[float, float, str]]] = {key: [] for key in commands}
        for _ in range(options.repeats):
            for key, command in commands.items():
                runs[key].append(measure(command))
        runs["onnxq_1000"] = [measure(ours(many, "--no-validate"))]
        runs["plain_1000"] = [measure([python, "-c", PLAIN, model, str(many)])]
    seconds = {key: sorted(r[0] for r in taken)[len(taken) // 2] for key, taken in runs.items()}
    peak = {key: max(r[1] for r in taken) for key, taken in runs.items()}
    failed = {key: taken[0][2] for key, taken in runs.items() if taken[0][2]}
    ratios = {
        "time_over_minmax": seconds["onnxq"] / seconds["minmax"],
        "time_over_percentile": seconds["onnxq"] / seconds["percentile"],
        "time_over_plain": seconds["onnxq"] / seconds["plain"],
        "validation_adds_seconds": seconds["onnxq_validated"] - seconds["onnxq"],
        "memory_over_plain": peak["onnxq"] / peak["plain"],
        "memory_over_plain_1000": peak["onnxq_1000"] / peak["plain_1000"],
        "memory_1000_over_given": peak["onnxq_1000"] / peak["onnxq"],
    }
    figures = {
        "model": model,
        "failed": failed,
        "ratios": ratios,
        "seconds": seconds,
        "peak_mb": peak,
    }
    rounded = json.loads(json.dumps(figures), parse_float=lambda text: round(float(text), 3))
    print(json.dumps(rounded, indent=1))


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
