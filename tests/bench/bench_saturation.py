"""What saturating pair sums cost on x86-64 without VNNI, and what the guard against them costs.

    python tests/bench/bench_saturation.py MODEL CALIBRATION EVALUATION [--limit 200]

The model is optimized for ort-cpu (no guard) and for ort-cpu-avx2; both results are run exactly and
as that machine would run them (`onnxq.emulation`). Prints JSON: for both the SQNR in dB against the
float model, top-1 accuracy if there are labels, and the layers and channels that the guard touched.
"""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

import numpy as np

from onnxq import load, optimize, runtime
from onnxq.data import open_samples
from onnxq.emulation import emulator
from onnxq.numerics.metrics import sqnr_db


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("model")
    p.add_argument("calibration")
    p.add_argument("evaluation")
    p.add_argument("--limit", type=int, default=200)
    a = p.parse_args()
    samples = open_samples(a.evaluation, load(a.model)).take(a.limit)
    floats = runtime.session(a.model)
    reference = [floats.run(None, feed)[0] for feed in samples]
    labels = samples.labels
    figures: dict[str, Any] = {"float": {"accuracy": accuracy(reference, labels)}}
    for target in ("ort-cpu", "ort-cpu-avx2"):
        out = f"/tmp/bench_saturation_{target}.onnx"
        report = optimize(
            a.model, out, data=a.calibration, recipe="int8", target=target, validate=False
        )
        result, emulated = runtime.session(out), emulator(load(out))
        exact = [result.run(None, feed)[0] for feed in samples]
        saturating = [emulated.run(feed)[0] for feed in samples]
        touched = [re.search(r"scales of (\d+) channels", n.text) for n in report.notes]
        figures[target] = {
            "layers of uint8 x int8": emulated.total,
            "layers that can saturate": len(emulated.layers),
            "layers touched by the guard": sum(m is not None for m in touched),
            "channels touched": sum(int(m[1]) for m in touched if m),
            "exact": scores(reference, exact, labels),
            "saturating": scores(reference, saturating, labels),
        }
    print(json.dumps(figures, indent=1))


def scores(reference: list[Any], outputs: list[Any], labels: Any) -> dict[str, Any]:
    return {
        "sqnr_db": round(float(sqnr_db(np.stack(reference), np.stack(outputs))), 2),
        "accuracy": accuracy(outputs, labels),
    }


def accuracy(outputs: list[Any], labels: Any) -> float | None:
    if labels is None:
        return None
    guesses = np.concatenate([np.asarray(o).argmax(-1).reshape(-1) for o in outputs])
    return float((guesses == np.asarray(labels).reshape(-1)).mean())


if __name__ == "__main__":
    main()
