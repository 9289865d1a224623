"""What 16-bit floats cost: bytes, SQNR, time, and whether ONNX Runtime's CPU provider runs them.

    python tests/bench/bench_float16.py MODEL DATA [MODEL DATA ...] [--seconds 2] [--limit 16]
        [--formats float16,bfloat16] [--table]

DATA is an .npz file or a folder of them, as for `onnxq optimize`; "-": synthetic samples. The last
quarter is kept from calibration and compared on. Each format is written in both encodings for
ort-cpu. Ratios are to the model as it is, SQNR is the least of any output: with ONNX Runtime's
optimizations, which drop Casts of the compute encoding, and without ("plain_db": each result is
rounded). Prints JSON, or a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from onnxq import load, runtime
from onnxq.data import Samples
from onnxq.errors import OnnxqError
from onnxq.numerics.metrics import ErrorSums
from onnxq.recipes import Recipe, load_recipe, plan
from onnxq.sampling import samples_for, split
from onnxq.targets import load_target


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("pairs", nargs="+", metavar="MODEL DATA")
    p.add_argument("--seconds", type=float, default=2.0)
    p.add_argument("--limit", type=int, default=16)
    p.add_argument("--formats", default="float16,bfloat16")
    p.add_argument("--encodings", default="storage,compute")
    p.add_argument("--table", action="store_true")
    p.add_argument("--here", action="store_true", help="one row, in this process")
    a = p.parse_args()
    if a.here:
        file, data = a.pairs
        print(json.dumps(one(file, data, a.formats, a.encodings, a.limit, a.seconds)))
        return
    rows = []
    for file, data in zip(a.pairs[::2], a.pairs[1::2], strict=True):
        for format in a.formats.split(","):
            for encoding in a.encodings.split(","):
                row = {"model": _name(file), "format": format, "encoding": encoding}
                rows.append(row | apart(file, data, format, encoding, a))
                print(rows[-1], file=sys.stderr, flush=True)
    print(table(rows) if a.table else json.dumps(rows, indent=1))


def apart(file: str, data: str, format: str, encoding: str, a: Any) -> dict[str, Any]:
    """A row from a process of its own: onnxruntime may crash."""
    options = {"--formats": format, "--encodings": encoding, "--limit": a.limit,
               "--seconds": a.seconds}  # fmt: skip
    flags = [str(part) for pair in options.items() for part in pair]
    command = [sys.executable, __file__, file, data, "--here", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode < 0:
        return {"error": f"the process dies of signal {-done.returncode}"}
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def one(
    file: str, data: str, format: str, encoding: str, limit: int, seconds: float
) -> dict[str, Any]:
    samples = samples_for(load(file), None if data == "-" else data).take(limit)
    try:
        return measured(file, format, encoding, *split(samples), seconds)
    except OnnxqError as e:
        return {"error": str(e)}


def _name(file: str) -> str:
    path = Path(file)
    return path.parent.name if path.stem == "model" else path.stem


def measured(
    file: str, format: str, encoding: str, fitting: Samples, held: Samples, seconds: float
) -> dict[str, Any]:
    recipe = load_recipe(format)
    options = {"convert_float16": {"format": format, "encoding": encoding}}
    model = load(file).copy()
    notes = plan(Recipe(format, "", recipe.passes, options), load_target("ort-cpu"), fitting)(model)
    own = [n for n in notes if n.rule == "convert_float16"]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "model.onnx"
        model.save(result)
        size = os.path.getsize(result) / os.path.getsize(file)
        timing = runtime.latency(file, result, next(iter(held)), seconds=seconds)
        row = {
            "bytes": round(size, 3),
            "sqnr_db": sqnr(file, result, held),
            "plain_db": sqnr(file, result, held, plain=True),
            "time": round(timing.ratio, 2),
        }
    casts = sum(node.op == "Cast" for node in model.nodes())
    return row | {"casts": casts, "kept": sum(not n.changed for n in own)}


def sqnr(original: Any, result: Any, samples: Samples, *, plain: bool = False) -> float | None:
    """The least of any output that holds floats, in dB."""
    one, two = (
        runtime.session(original),
        runtime.session(result, optimize="off" if plain else "all"),
    )
    sums: dict[str, ErrorSums] = {}
    for feed in samples:
        a, b = runtime.run(one, feed), runtime.run(two, feed)
        for name, x in a.items():
            if isinstance(x, np.ndarray) and x.dtype.kind == "f":
                sums[name] = sums.get(name, ErrorSums()).merge(ErrorSums.of(x, b[name]))
    return round(min((s.sqnr_db for s in sums.values()), default=np.inf), 1)


def table(rows: list[dict[str, Any]]) -> str:
    columns = ("model", "format", "encoding", "bytes", "sqnr_db", "plain_db", "time", "casts",
               "kept", "error")  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(str(row.get(c, '')) for c in columns)} |" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
