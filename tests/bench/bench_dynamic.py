"""What dynamic quantization costs and gains: whole models, and the operators behind the paces.

    python tests/bench/bench_dynamic.py [MODEL[:SAMPLES] ...] [--limit 100] [--seconds 3]
    python tests/bench/bench_dynamic.py --paces [--seconds 0.3]

For each model (default: models/, scored on its .eval.npz) and each kind of range a line of JSON:
SQNR in dB over all outputs, top-1 of float and result where there are labels, size ratio, time
ratios on one and two threads, layers that became dynamic. --paces times single MatMuls and LSTMs in
floats and dynamically, fits the paces of `onnxq.targets.dynamic` to them, and prints both ratios
for each size: measured, and predicted by the target's file.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper, parser

from onnxq import load, optimize, runtime
from onnxq.data import open_samples
from onnxq.model import Model
from onnxq.numerics.metrics import sqnr_db
from onnxq.passes import QuantizeDynamic
from onnxq.passes.dynamic_costs import products
from onnxq.targets import Target, load_target
from onnxq.targets.dynamic import Pace, Product

MODELS = Path(__file__).parents[2] / "models"
RECIPE = """description = "dynamic"
passes = ["inline_functions", "raise_opset", "convert_float32", "cleanup", "quantize_dynamic",
          "quantize_weights"]
[quantize_dynamic]
per_row = %s
[quantize_weights]
encoding = "storage"
"""
MATMULS = [
    (m, k, n)
    for k, n in (
        (8, 8), (16, 16), (32, 32), (64, 64), (64, 256), (256, 64), (128, 128), (256, 256),
        (384, 384), (512, 512), (256, 1024), (1024, 256), (384, 1536), (1024, 1024),
    )
    for m in (1, 4, 16, 64, 256)
]  # fmt: skip
LSTMS = [  # steps, batch, inputs, hidden, directions
    (1, 1, 16, 16, 1), (10, 1, 16, 16, 1), (1, 1, 32, 32, 1), (10, 1, 32, 32, 1),
    (1, 1, 64, 64, 1), (10, 1, 64, 64, 1), (50, 1, 64, 64, 1), (50, 1, 64, 64, 2),
    (1, 1, 128, 128, 1), (20, 1, 128, 128, 1), (20, 8, 128, 128, 1), (20, 32, 128, 128, 1),
    (1, 1, 256, 256, 1), (20, 1, 256, 256, 1), (20, 8, 256, 256, 1), (10, 1, 512, 512, 1),
    (20, 1, 16, 128, 1), (20, 1, 512, 64, 1), (20, 64, 32, 32, 1), (30, 1, 40, 32, 2),
]  # fmt: skip


def main() -> None:
    """Measure and print."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("models", nargs="*")
    p.add_argument("--limit", type=int, default=100)
    p.add_argument("--seconds", type=float, default=3.0)
    p.add_argument("--paces", action="store_true")
    a = p.parse_args()
    if a.paces:
        paces(load_target("ort-cpu"), a.seconds)
        return
    for given in a.models or sorted(map(str, MODELS.glob("*.onnx"))):
        path, _, samples = given.partition(":")
        for kind in ("tensor", "row"):
            data = samples or path.replace(".onnx", ".eval.npz")
            print(json.dumps(figures(path, data, kind, a)), flush=True)


def figures(path: str, data: str, kind: str, a: argparse.Namespace) -> dict[str, Any]:
    recipe, out = Path("/tmp/bench_dynamic.toml"), Path("/tmp/bench_dynamic.onnx")
    recipe.write_text(RECIPE % ("true" if kind == "row" else "false"))
    report = optimize(path, out, data=data, recipe=str(recipe), validate=False)
    samples = open_samples(data, load(path)).take(a.limit)
    sessions = [runtime.session(model) for model in (path, out)]
    made = [[session.run(None, feed_of(session, f)) for f in samples] for session in sessions]
    floats, results = (np.concatenate([np.ravel(o) for run in runs for o in run]) for runs in made)
    feed = next(iter(samples))
    found: dict[str, Any] = {
        "model": path,
        "range": kind,
        "dynamic": sum(n.changed for n in report.notes if n.rule == "quantize_dynamic"),
        "sqnr_db": round(float(sqnr_db(floats, results)), 2),
        "size": round(report.size_bytes[1] / report.size_bytes[0], 3),
    }
    for threads in (1, 2):
        timed = runtime.latency(path, out, feed, seconds=a.seconds, threads=threads)
        found[f"time_{threads}"] = round(timed.ratio, 3)
    if samples.labels is not None:
        found["top1"] = [round(top1(runs, samples.labels), 4) for runs in made]
    return found


def feed_of(session: Any, feed: Any) -> dict[str, Any]:
    return {i.name: feed[i.name] for i in session.get_inputs() if i.name in feed}


def top1(runs: list[Any], labels: Any) -> float:
    guesses = np.concatenate([np.asarray(run[0]).argmax(-1).reshape(-1) for run in runs])
    return float((guesses == np.asarray(labels).reshape(-1)).mean())


# Single operators.


def paces(target: Target, seconds: float) -> None:
    eager = {op: replace(r, floats=None, integers=None) for op, r in target.dynamic.items()}
    always = replace(target, dynamic=eager)
    for op, sizes in (
        ("MatMul", [matmul(*s) for s in MATMULS]),
        ("LSTM", [lstm(*s) for s in LSTMS]),
    ):
        rule = target.dynamic[op]
        assert rule.floats is not None
        assert rule.integers is not None
        rows, times = [], []
        for proto in sizes:
            model = Model.from_proto(proto)
            (node,) = model.nodes(op)
            made = products(node, {})
            taken = timed(model, always, seconds)
            rows.append(made)
            times.append(taken)
            guess = rule.integers.ns(made) / rule.floats.ns(made)
            print(
                f"{op} {[(p.count, p.rows, p.depth, p.columns) for p in made]}:"
                f" measured x{taken[1] / taken[0]:.2f}, predicted x{guess:.2f}",
                flush=True,
            )
        for name, column in (("floats", 0), ("integers", 1)):
            print(op, name, fitted(rows, np.array(times)[:, column]))


def timed(model: Model, target: Target, seconds: float) -> tuple[float, float]:
    """Nanoseconds in floats and dynamically, those of an empty session taken off."""
    after = model.copy()
    QuantizeDynamic(target)(after)
    x = model.graph.inputs[0]
    feed = {x.name: np.random.default_rng(0).normal(0, 1, x.shape).astype(np.float32)}
    dims = ", ".join(map(str, x.shape))
    empty = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 13]> g (float[{dims}] x) => (float[{dims}] y)'
        " { y = Identity(x) }"
    )
    both = runtime.latency(model, after, feed, seconds=seconds)
    base = runtime.latency(empty, empty, feed, seconds=seconds / 4).original_ms
    return 1e6 * (both.original_ms - base), 1e6 * (both.result_ms - base)


def fitted(rows: list[list[Product]], ns: NDArray[Any]) -> Pace:
    """Paces that are not negative, with the least relative squares."""
    names = [f.name for f in fields(Pace)]
    table = np.array([[Pace(**{n: 1.0}).ns(r) for n in names if n not in ("mac", "rows")]
                      + [sum(p.count * p.rows * p.depth * p.columns for p in r),
                         sum(p.count * p.depth * p.columns for p in r)] for r in rows])  # fmt: skip
    table /= ns[:, None]
    kept = list(range(table.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(table[:, kept], np.ones(len(ns)), rcond=None)
        if (found >= 0).all():
            break
        worst = np.argmin(found * np.linalg.norm(table[:, kept], axis=0))
        kept.pop(int(worst))
    values = np.zeros(table.shape[1])
    values[kept] = found
    rest = dict(zip([n for n in names if n not in ("mac", "rows")], values[:-2], strict=True))
    return Pace(**rest, mac=values[-2], rows=values[-1] / values[-2] if values[-2] else 0.0)


def matmul(rows: int, depth: int, columns: int) -> onnx.ModelProto:
    return single(
        f"float[{rows}, {depth}] x", "float[a, b] y", "y = MatMul(x, w)", w=(depth, columns)
    )


def lstm(steps: int, batch: int, inputs: int, hidden: int, directions: int) -> onnx.ModelProto:
    kind = "bidirectional" if directions == 2 else "forward"
    return single(
        f"float[{steps}, {batch}, {inputs}] x",
        "float[a, b, c, d] y",
        f'y = LSTM<hidden_size = {hidden}, direction = "{kind}">(x, w, r, b)',
        w=(directions, 4 * hidden, inputs),
        r=(directions, 4 * hidden, hidden),
        b=(directions, 8 * hidden),
    )


def single(inputs: str, outputs: str, body: str, **weights: tuple[int, ...]) -> onnx.ModelProto:
    proto = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 13]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    rng = np.random.default_rng(0)
    for name, shape in weights.items():
        values = rng.normal(0, 0.1, shape).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(values, name))
    return proto


if __name__ == "__main__":
    main()
