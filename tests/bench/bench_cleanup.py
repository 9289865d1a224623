"""onnxq's clean-up beside onnxslim's, for every model of a folder: nodes and latency.

    python tests/bench/bench_cleanup.py FOLDER_OR_MODEL ... [--seconds 3] [--json FILE]

Needs onnxslim in the environment (it is no dependency of the project). For each model: nodes of the
original, of onnxq's result and of onnxslim's, bodies included; both results' time over the
original's, and onnxq's over onnxslim's, each from runs in alternation with one thread on made-up
samples; and how far each result's outputs are from the original's (largest difference over the
largest value, onnxruntime's optimizations off).
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxq import runtime
from onnxq.errors import OnnxqError
from onnxq.model import Model
from onnxq.passes import cleanup
from onnxq.synthetic import synthetic_samples

Feed = Mapping[str, Any]


def distance(original: onnx.ModelProto, result: onnx.ModelProto, feed: Feed) -> float:
    """The largest difference of an output over its largest value; infinite for another shape."""
    one, two = (runtime.run(runtime.session(p, optimize="off"), feed) for p in (original, result))
    worst = 0.0
    for name, a in one.items():
        b = two[name]
        if np.shape(a) != np.shape(b):
            return float("inf")
        if np.size(a) and np.asarray(a).dtype.kind in "fiu":
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            worst = max(worst, float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-9)))
    return worst


def slimmed(path: Path) -> onnx.ModelProto:
    """What onnxslim makes of a model; raises whatever it raises."""
    import onnxslim  # type: ignore[import-not-found,unused-ignore]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result: onnx.ModelProto = onnxslim.slim(str(path))
    return result


def measure(path: Path, seconds: float) -> dict[str, Any]:
    """One row of the table."""
    original = onnx.load(path)
    model = Model.load(path)
    row: dict[str, Any] = {"model": name_of(path), "nodes": len(model.nodes())}
    feed = next(iter(synthetic_samples(model, 1)))
    cleanup(model)
    ours = model.to_proto()
    row["onnxq_nodes"] = len(model.nodes())
    row["onnxq_distance"] = distance(original, ours, feed)
    row["onnxq_time"] = runtime.latency(original, ours, feed, seconds=seconds).ratio
    try:
        theirs = slimmed(path)
        row["slim_nodes"] = len(Model.from_proto(theirs).nodes())
        row["slim_distance"] = distance(original, theirs, feed)
        row["slim_time"] = runtime.latency(original, theirs, feed, seconds=seconds).ratio
        row["onnxq_over_slim"] = runtime.latency(theirs, ours, feed, seconds=seconds).ratio
    except Exception as e:  # another tool's: anything may come
        row["slim_error"] = f"{type(e).__name__}: {runtime.one_line(e)}"
    return row


def name_of(path: Path) -> str:
    """`folder/file`, as short as it is unique in practice."""
    return path.parent.name if path.stem == "model" else path.stem


def text(row: Mapping[str, Any]) -> str:
    """A row of the table as text."""
    if "error" in row:
        return f"{row['model']:24} {row['error']}"
    ours = f"{row['nodes']:6} {row['onnxq_nodes']:6} x{row['onnxq_time']:5.3f}"
    ours += f" {row['onnxq_distance']:8.1e}"
    if "slim_error" in row:
        return f"{row['model']:24} {ours}   onnxslim: {row['slim_error']}"
    slim = f"{row['slim_nodes']:6} x{row['slim_time']:5.3f} {row['slim_distance']:8.1e}"
    return f"{row['model']:24} {ours}   {slim}   x{row['onnxq_over_slim']:5.3f}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    files = [
        file
        for path in options.paths
        for file in (sorted(path.rglob("*.onnx")) if path.is_dir() else [path])
    ]
    print(f"{'model':24}  nodes  onnxq   time distance     slim   time distance  onnxq/slim")
    rows = []
    for file in files:
        try:
            row = measure(file, options.seconds)
        except OnnxqError as e:
            row = {"model": name_of(file), "error": str(e)}
        rows.append(row)
        print(text(row), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
