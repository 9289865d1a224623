"""What each format of weights costs: bytes, SQNR, top-1, perplexity, and time.

    python tests/bench/bench_weight_formats.py MODEL EVALUATION.npz [--calibration CALIBRATION.npz]
        [--limit 200] [--seconds 3] [--target ort-cpu] [--table]

EVALUATION holds arrays named as the inputs, sample axis first, and `labels`: what the last axis of
the first output should point at. The model is written by weight-only recipes, and ratios are to the
float model, timed in alternation with one thread on the first sample. Perplexity is exp of the mean
cross entropy. With --calibration, ranges weighted by importance are tried, too. Prints JSON, or a
Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from onnxq import load, runtime
from onnxq.data import open_samples
from onnxq.numerics.metrics import sqnr_db
from onnxq.recipes import Recipe, load_recipe, plan
from onnxq.targets import load_target

GROUP: dict[str, Any] = {"granularity": "group", "range": "hqq"}
FORMS: dict[str, dict[str, Any]] = {
    "int16 channel": {"format": "int16"},
    "int8 channel": {},
    "int8 channel, compute": {"encoding": "compute"},
    "int8 tensor": {"granularity": "tensor"},
    "float8e4m3fn channel": {"format": "float8e4m3fn"},
    "float8e5m2 channel": {"format": "float8e5m2"},
    "int4 channel": {"format": "int4", "range": "mse"},
    "int4 group 32": {**GROUP, "format": "int4"},
    "uint4 group 128": {**GROUP, "format": "uint4", "symmetric": False, "group_size": 128},
    "uint4 group 32": {**GROUP, "format": "uint4", "symmetric": False},
    "uint4 group 32, compute": {
        **GROUP, "format": "uint4", "symmetric": False, "encoding": "compute",
    },
    "uint4 group 16": {**GROUP, "format": "uint4", "symmetric": False, "group_size": 16},
    "uint2 group 16": {**GROUP, "format": "uint2", "symmetric": False, "group_size": 16},
}  # fmt: skip
WEIGHED: dict[str, dict[str, Any]] = {
    "uint4 group 32, importance": {**FORMS["uint4 group 32"], "range": "importance"},
    "uint2 group 16, importance": {**FORMS["uint2 group 16"], "range": "importance"},
}
RECIPES = ("int8-weights", "int4-weights", "int2-weights")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("model")
    p.add_argument("evaluation")
    p.add_argument("--calibration")
    p.add_argument("--limit", type=int, default=200)
    p.add_argument("--seconds", type=float, default=3.0)
    p.add_argument("--target", default="ort-cpu")
    p.add_argument("--table", action="store_true")
    a = p.parse_args()
    samples = open_samples(a.evaluation, load(a.model)).take(a.limit)
    fitting = open_samples(a.calibration, load(a.model)) if a.calibration else None
    reference = outputs(a.model, samples)
    rows = {"float": {"bytes": 1.0, **scores(reference, reference, samples.labels)}}
    passes = load_recipe("int8-weights").passes
    recipes = {name: load_recipe(name) for name in RECIPES}
    for name, options in (FORMS | (WEIGHED if fitting else {})).items():
        recipes[name] = Recipe(name, name, passes, {"quantize_weights": options})
    with tempfile.TemporaryDirectory() as folder:
        for name, recipe in recipes.items():
            model = load(a.model).copy()
            notes = plan(recipe, load_target(a.target), fitting)(model)
            file = Path(folder) / "model.onnx"
            model.save(file)
            texts = [n.text for n in notes if n.rule == "quantize_weights" and n.changed]
            timing = runtime.latency(a.model, file, next(iter(samples)), seconds=a.seconds)
            rows[name] = {
                "bytes": round(os.path.getsize(file) / os.path.getsize(a.model), 3),
                **scores(reference, outputs(file, samples), samples.labels),
                "time": round(timing.ratio, 2),
                "encodings": dict(Counter(t.split(", ")[2].split()[0] for t in texts)),
            }
    print(table(rows) if a.table else json.dumps(rows, indent=1))


def outputs(model: Any, samples: Any) -> list[Any]:
    session = runtime.session(model)
    return [session.run(None, feed)[0] for feed in samples]


def scores(reference: list[Any], results: list[Any], labels: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if results is not reference:
        pairs = zip(reference, results, strict=True)
        one, two = (
            np.concatenate([np.ravel(x) for x in side]) for side in zip(*pairs, strict=True)
        )
        out["sqnr_db"] = round(float(sqnr_db(one, two)), 1)
    if labels is None:
        return out
    hits, losses, count = 0, 0.0, 0
    for result, label in zip(results, labels, strict=False):
        rows = np.asarray(result, np.float64).reshape(-1, result.shape[-1])
        wanted = np.ravel(label).astype(np.int64)
        hits += int((rows.argmax(-1) == wanted).sum())
        peak = rows.max(-1)
        sums = peak + np.log(np.exp(rows - peak[:, None]).sum(-1))
        losses += float((sums - rows[np.arange(len(wanted)), wanted]).sum())
        count += wanted.size
    return out | {
        "top1": round(hits / count, 4),
        "perplexity": round(float(np.exp(losses / count)), 4),
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    columns = ("bytes", "sqnr_db", "top1", "perplexity", "time")
    lines = [f"| weights | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(str(row.get(c, '')) for c in columns)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
