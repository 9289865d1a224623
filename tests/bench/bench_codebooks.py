"""Codebooks against linear formats at equal bits, on a transformer, a CNN and a recurrent net.

    python tests/bench/bench_codebooks.py [--models models] [--target ort-cpu] [--json]

Every weight of the models in `models/` that the passes take has the format of the row (what
multiplies a recurrent state has at least 8 bits, if not said), nothing else is changed; `bits` is
what they take in the file, scales, codebooks and zero points included. SQNR is that of the outputs
against the float model, top-1 and perplexity are on the evaluation samples.
Prints Markdown, or JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from math import prod
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs
from bench_weight_formats import outputs, scores

from onnxq import load
from onnxq.data import open_samples
from onnxq.model import Model
from onnxq.recipes import Recipe, plan
from onnxq.targets import load_target
from onnxq.weights import bytes_in

MODELS = {"char_gpt": "perplexity", "digits_cnn": "top1", "lang_lstm": "top1"}
COLUMNS = ("bits", "size", "sqnr_db")
GROUP: dict[str, Any] = {"granularity": "group", "range": "hqq", "symmetric": False}
CHANNEL: dict[str, Any] = {"granularity": "channel"}
LINEAR: dict[str, dict[str, Any]] = {
    "8 int8 channel": {"format": "int8", "range": "mse"},
    "4 int4 channel": {"format": "int4", "range": "mse"},
    "4 uint4 group 64": {**GROUP, "format": "uint4", "group_size": 64},
    "4 uint4 group 32": {**GROUP, "format": "uint4", "group_size": 32},
    "3 int4 channel, 8 levels": {"format": "int4", "range": "mse", "levels": 8},
    "3 uint4 group 64, 8 levels": {**GROUP, "format": "uint4", "group_size": 64, "levels": 8},
    "2 int2 channel": {"format": "int2", "range": "mse"},
    "2 uint2 group 16": {**GROUP, "format": "uint2", "group_size": 16},
}
CODEBOOKS: dict[str, dict[str, Any]] = {
    "8 kmeans channel": {"bits": 8, **CHANNEL},
    "4 nf4 channel": {"codebook": "nf4", **CHANNEL},
    "4 kmeans channel": CHANNEL,
    "4 nf4 group 64": {"codebook": "nf4"},
    "4 kmeans group 64": {},
    "4 kmeans group 64, state too": {"state": "codebook"},
    "4 kmeans group 32": {"group_size": 32},
    "4 power-of-two group 64": {"codebook": "power-of-two"},
    "4 logarithmic group 64": {"codebook": "logarithmic"},
    "4 exponential group 64": {"codebook": "exponential"},
    "4 vector 2, 8 bits, channel": {"codebook": "vector", "bits": 8, "dim": 2, **CHANNEL},
    "3 kmeans channel": {"bits": 3, **CHANNEL},
    "3 kmeans group 64": {"bits": 3},
    "3 exponential group 64": {"codebook": "exponential", "bits": 3},
    "3 vector 2, 6 bits, channel": {"codebook": "vector", "bits": 6, "dim": 2, **CHANNEL},
    "2 kmeans channel": {"bits": 2, **CHANNEL},
    "2 kmeans group 64": {"bits": 2},
    "2 kmeans group 16": {"bits": 2, "group_size": 16},
    "2 vector 4, 8 bits, channel": {"codebook": "vector", "bits": 8, "dim": 4, **CHANNEL},
}
PASSES = ("inline_functions", "raise_opset", "convert_float32", "cleanup")
Row = dict[str, dict[str, Any]]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--models", type=Path, default=Path(__file__).parents[2] / "models")
    p.add_argument("--target", default="ort-cpu")
    p.add_argument("--limit", type=int, default=400)
    p.add_argument("--json", action="store_true")
    a = p.parse_args()
    rows: dict[str, Row] = {"float": {}}
    for model in MODELS:
        path = a.models / f"{model}.onnx"
        samples = open_samples(str(path.with_suffix(".eval.npz")), load(path)).take(a.limit)
        reference = outputs(path, samples)
        found = scores(reference, reference, samples.labels)
        rows["float"][model] = {"bits": 32.0, "size": 1.0, "sqnr_db": "", **found}
        for form in sorted((*LINEAR, *CODEBOOKS), key=lambda form: -int(form.split()[0])):
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "model.onnx"
                bits = write(form, path, file, a.target)
                results = scores(reference, outputs(file, samples), samples.labels)
                size = round(file.stat().st_size / path.stat().st_size, 3)
                rows.setdefault(form, {})[model] = {"bits": bits, "size": size, **results}
    print(json.dumps(rows, indent=1) if a.json else table(rows))


def write(form: str, source: Path, file: Path, target: str) -> float:
    """Write the model with weights in one of the formats; their bits."""
    quantizer = "quantize_weights" if form in LINEAR else "quantize_codebook"
    options = dict(CODEBOOKS.get(form) or LINEAR.get(form, {}))
    if form in LINEAR:
        options |= {"encoding": "storage", "recurrent_group": 0}
    passes = (*PASSES, quantizer, "share_initializers")
    model, clean = load(source).copy(), load(source).copy()
    plan(Recipe(form, form, passes, {quantizer: options}), load_target(target), None)(model)
    clean.raise_opset(model.opset)
    plan(Recipe(form, form, PASSES, {}), load_target(target), None)(clean)
    model.save(file)
    before, after = constants(clean), constants(model)
    made = sum(bytes_in(c) for name, c in after.items() if name not in before)
    values = sum(prod(c.shape) for name, c in before.items() if name not in after)
    return round(float(8 * made / values), 2)


def constants(model: Model) -> dict[str, gs.Constant]:
    found = [t for g in model.graphs() for t in g.tensors().values()]
    return {t.name: t for t in found if isinstance(t, gs.Constant)}


def table(rows: dict[str, Row]) -> str:
    heads = [f"{model}: {', '.join((*COLUMNS, metric))}" for model, metric in MODELS.items()]
    lines = [f"| weights | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for form, row in rows.items():
        cells = [
            " / ".join(str(row[model][c]) for c in (*COLUMNS, metric))
            for model, metric in MODELS.items()
        ]
        lines.append(f"| {form} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
