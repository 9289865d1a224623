"""What calibration costs, as ratios measured in one run.

    python tests/bench/bench_calibration.py MODEL SAMPLES [--limit 64] [--ort]

SAMPLES: a folder of .npz files, one a sample, arrays named as the model's inputs; or one .npz whose
arrays have the sample axis first. Prints JSON: seconds and ratios to one plain forward pass over
the samples, peak memory of whole processes, and for each range method the mean SQNR of real
activations quantized with it. `--ort` adds onnxruntime.quantization's calibrators.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PLAIN = "import sys, numpy, onnxruntime; from bench_calibration import *; plain(*sys.argv[1:])"
OURS = "import sys; from bench_calibration import *; ours(*sys.argv[1:])"
ORT = "import sys; from bench_calibration import *; theirs(*sys.argv[1:])"
OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
METHODS = ("minmax", "percentile", "mse", "entropy")


class Samples:
    """The samples, read when they are iterated; `limit` may exceed their number: they repeat."""

    def __init__(self, source: str, limit: int) -> None:
        self.files = sorted(Path(source).glob("*.npz")) if Path(source).is_dir() else []
        self.whole = {} if self.files else dict(np.load(source))
        count = len(self.files) or min(len(v) for v in self.whole.values())
        self.order = [i % count for i in range(limit)]

    def __iter__(self) -> Any:
        for i in self.order:
            if self.files:
                yield dict(np.load(self.files[i]))
            else:
                yield {k: v[i : i + 1] for k, v in self.whole.items()}


def activations(proto: Any) -> list[str]:
    """The float tensors that the heavy operators read and make."""
    graph = proto.graph
    constants = {t.name for t in graph.initializer}
    made = {o for n in graph.node if n.op_type != "Constant" for o in n.output}
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}
    names = {}
    for node in graph.node:
        if node.op_type in OPERATORS:
            for name in (*node.input[:2], node.output[0]):
                if name not in constants and name in made and kinds.get(name) == 1:
                    names[name] = True
    return list(names)


def plain(model: str, source: str, limit: str) -> None:
    """One plain pass; print its peak memory."""
    import onnxruntime as ort

    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    for feed in Samples(source, int(limit)):
        session.run(None, feed)
    print(peak_mb())


def ours(model: str, source: str, limit: str) -> None:
    """One calibration; print its peak memory."""
    from onnxq.calibration import calibrate
    from onnxq.model import Model
    from onnxq.statistics import Histogram

    loaded = Model.load(model)
    wanted = dict.fromkeys(activations(loaded.to_proto()), Histogram)
    calibrate(loaded, wanted, Samples(source, int(limit)))
    print(peak_mb())


def theirs(model: str, source: str, limit: str, method: str) -> None:
    """One calibration of onnxruntime.quantization; print its seconds, then its peak memory."""
    from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator

    class Reader:
        def __init__(self) -> None:
            self.samples = iter(Samples(source, int(limit)))

        def get_next(self) -> Any:
            return next(self.samples, None)

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        calibrator = create_calibrator(
            model,
            OPERATORS,
            augmented_model_path=f"{folder}/augmented.onnx",
            calibrate_method=CalibrationMethod[method],
        )
        calibrator.collect_data(Reader())
        calibrator.compute_data()
        seconds = time.perf_counter() - start
    print(json.dumps([seconds, peak_mb()]))


def peak_mb() -> float:
    """Peak resident memory of this process, in MB; ru_maxrss would include the parent's (Linux)."""
    status = Path("/proc/self/status").read_text()
    return round(int(status.split("VmHWM:")[1].split()[0]) / 1024, 1)


def child(code: str, *args: Any) -> Any:
    """What a fresh process prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    return json.loads(done.stdout.splitlines()[-1]) if not done.returncode else done.stderr[-200:]


def best_of(runs: int, *work: Callable[[], Any]) -> list[float]:
    """The least seconds of each, run in alternation."""
    best = [np.inf] * len(work)
    for _ in range(runs):
        for i, f in enumerate(work):
            start = time.perf_counter()
            f()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def quality_db(model: Any, stats: Any, feed: Any) -> dict[str, float]:
    """Mean SQNR over tensors of one sample, uint8 asymmetric, by range method."""
    import onnx

    from onnxq import runtime
    from onnxq.numerics.metrics import sqnr_db
    from onnxq.schemes import QuantScheme

    proto = model.to_proto()
    proto.graph.ClearField("output")
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in stats)
    values = runtime.session(proto).run(list(stats), feed)
    scheme = QuantScheme("uint8", symmetric=False)
    result = {}
    for method in METHODS:
        db = []
        for seen, x in zip(stats.values(), values, strict=True):
            params = scheme.params(*seen.range(method))
            db.append(np.clip(sqnr_db(x, params.dequantize(params.quantize(x))), 0, 100))
        result[method] = round(float(np.mean(db)), 2)
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("samples")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--ort", action="store_true")
    args = parser.parse_args()

    from onnxq import runtime
    from onnxq.calibration import calibrate
    from onnxq.model import Model
    from onnxq.statistics import Histogram, MinMax

    model = Model.load(args.model)
    proto = model.to_proto()
    names = activations(proto)
    feeds = list(Samples(args.samples, args.limit))
    session = runtime.session(proto)
    kept: dict[str, Any] = {}

    def forward() -> None:
        for feed in feeds:
            session.run(None, feed)

    def histogram() -> None:
        kept.update(calibrate(model, dict.fromkeys(names, Histogram), feeds))

    def minmax() -> None:
        calibrate(model, dict.fromkeys(names, MinMax), feeds)

    forward()
    seconds = best_of(3, forward, histogram, minmax)
    search = {m: best_of(1, lambda m=m: [s.range(m) for s in kept.values()])[0] for m in METHODS}  # type: ignore[misc]
    floor = child(PLAIN, args.model, args.samples, args.limit)
    report: dict[str, Any] = {
        "model": args.model,
        "tensors": len(names),
        "samples": args.limit,
        "plain_s": round(seconds[0], 3),
        "histogram_ratio": round(seconds[1] / seconds[0], 2),
        "minmax_ratio": round(seconds[2] / seconds[0], 2),
        "range_search_s": {m: round(s, 3) for m, s in search.items()},
        "peak_mb": {
            "plain": floor,
            "ours": child(OURS, args.model, args.samples, args.limit),
            "ours_1000": child(OURS, args.model, args.samples, 1000),
        },
        "mean_sqnr_db": quality_db(model, kept, feeds[0]),
    }
    if args.ort:
        for method in ("MinMax", "Percentile", "Entropy"):
            answer = child(ORT, args.model, args.samples, args.limit, method)
            if isinstance(answer, list):
                answer = {
                    "seconds_to_ours": round(answer[0] / seconds[1], 2),
                    "peak_mb": answer[1],
                }
            report[f"onnxruntime_{method}"] = answer
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
