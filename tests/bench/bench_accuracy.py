"""What each method of accuracy, or of pruning, brings: methods x models, as Markdown tables.

    python tests/bench/bench_accuracy.py [MODEL | FOLDER ...] [--recipes int8,a8w4,sparse,slim]
        [--methods reconstruct] [--limit 100] [--json FILE]

Without models: those in models/. Beside NAME.onnx stand calibration samples, NAME.calib.npz or the
folder NAME.calib, and those that are scored, NAME.eval.npz or NAME.eval. In each cell: SQNR of all
outputs in dB against the float model; with labels the share of them that the first output's last
axis points at, or perplexity where a sample has more than one; of pruned models the size and the
time in ONNX Runtime as ratios to the float model; and the seconds of CPU time that the passes took.
--methods: only rows with that text in their name.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from onnxq import load, runtime
from onnxq.data import Samples, open_samples
from onnxq.errors import OnnxqError
from onnxq.loading import size_of
from onnxq.numerics.metrics import ErrorSums
from onnxq.recipes import Recipe, load_recipe, plan
from onnxq.targets import load_target

ROOT = Path(__file__).resolve().parents[2]
STATIC, STORED = "quantize_static", "quantize_weights"


@dataclass(frozen=True, slots=True)
class Method:
    """What is changed of a recipe: passes in front of and behind another, or left out; options."""

    name: str
    before: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    behind: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    recipe: str | None = None

    def of(self, recipe: Recipe) -> Recipe:
        """The recipe, or the one that is named instead, so changed."""
        if self.recipe is not None:
            recipe = load_recipe(self.recipe)
        passes: list[str] = []
        for name in (p for p in recipe.passes if p not in self.without):
            passes += [*self.before.get(name, ()), name, *self.behind.get(name, ())]
        options = {
            name: {**recipe.options.get(name, {}), **self.options.get(name, {})} for name in passes
        }
        return replace(recipe, passes=tuple(passes), options=options)


CHOOSING = ("reconstruct_static", "round_adaptively")
BEFORE = ("equalize_layers", "smooth_activations")


def behind(*passes: str) -> Mapping[str, tuple[str, ...]]:
    """Passes behind quantize_static."""
    return {STATIC: passes}


def weights(**options: Any) -> Mapping[str, Mapping[str, Any]]:
    """Options of prune_weights."""
    return {"prune_weights": options}


def channels(**options: Any) -> Mapping[str, Mapping[str, Any]]:
    """Options of prune_channels."""
    return {"prune_channels": options}


METHODS: dict[str, tuple[Method, ...]] = {
    "int8": (
        Method("ranges minmax", without=BEFORE, options={STATIC: {"range": "minmax"}}),
        Method("ranges mse", without=BEFORE, options={STATIC: {"range": "mse"}}),
        Method("ranges careful", without=BEFORE, options={STATIC: {"range": "careful"}}),
        Method("ranges output", without=BEFORE),
        Method("ranges output + equalize_layers", without=BEFORE[1:]),
        Method("ranges output + smooth_activations", without=BEFORE[:1]),
        Method("int8"),
        Method("int8 + reconstruct_static", behind=behind("reconstruct_static")),
        Method("int8 + round_adaptively", behind=behind("round_adaptively")),
        Method("int8 + correct_bias", behind=behind("correct_bias")),
        Method("int8-accurate", recipe="int8-accurate"),
        Method("int8-datafree", recipe="int8-datafree"),
    ),
    "a8w4": (
        Method("a8w4, nearest", without=CHOOSING),
        Method("nearest + correct_bias", without=CHOOSING, behind=behind("correct_bias")),
        Method("nearest + reconstruct_static", without=CHOOSING[1:]),
        Method("nearest + round_adaptively", without=CHOOSING[:1]),
        Method("a8w4"),
        Method("a8w4 + correct_bias", behind={CHOOSING[1]: ("correct_bias",)}),
    ),
    "int4-weights": (
        Method("int4-weights"),
        Method("int4-weights + scale_salient", before={STORED: ("scale_salient",)}),
        Method("int4-accurate", recipe="int4-accurate"),
    ),
    "sparse": (
        Method("50 %, magnitude", options=weights(amount=0.5, criterion="magnitude")),
        Method("50 %, wanda", options=weights(amount=0.5, criterion="wanda")),
        Method("50 % of each, obs", options=weights(amount=0.5, scope="layer")),
        Method("sparse (50 %, obs, by sensitivity)"),
        Method("2:4, magnitude", recipe="sparse-2-4", options=weights(criterion="magnitude")),
        Method("2:4, obs", recipe="sparse-2-4"),
        Method("sparse-int4", recipe="sparse-int4"),
    ),
    "slim": (
        Method("norm", options=channels(criterion="norm", compensation=False)),
        Method("activation", options=channels(criterion="activation", compensation=False)),
        Method("reconstruction", options=channels(compensation=False)),
        Method("norm, compensated", options=channels(criterion="norm")),
        Method("activation, compensated", options=channels(criterion="activation")),
        Method("slim (reconstruction, compensated)"),
        Method("slim-int8", recipe="slim-int8"),
        Method("int8 alone", recipe="int8"),
    ),
}  # fmt: skip
PRUNING = ("sparse", "slim")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("models", nargs="*", type=Path, default=[ROOT / "models"])
    p.add_argument("--recipes", default=",".join(METHODS))
    p.add_argument("--methods", default="")
    p.add_argument("--limit", type=int, default=100)
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    paths = [q for m in a.models for q in (sorted(m.glob("*.onnx")) if m.is_dir() else [m])]
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in a.recipes.split(","):
        methods = [m for m in METHODS[name] if a.methods in m.name]
        rows: dict[str, dict[str, Any]] = {"float": {}, **{m.name: {} for m in methods}}
        found[name] = rows
        for path in paths:
            calib, held = (beside(path, kind) for kind in ("calib", "eval"))
            fitting = open_samples(calib, load(path))
            samples = open_samples(held, load(path)).take(a.limit)
            exact = outputs(path, samples)
            rows["float"][path.stem] = scores(exact, exact, samples)
            for method in methods:
                rows[method.name][path.stem] = cell(
                    path, method.of(load_recipe(name)), fitting, samples, exact,
                    is_timed=name in PRUNING,
                )  # fmt: skip
                if a.json:
                    a.json.write_text(json.dumps(found, indent=1))
        print(f"\n### {name}\n\n{table(rows)}", flush=True)


def cell(
    path: Path,
    recipe: Recipe,
    fitting: Samples,
    samples: Samples,
    exact: Sequence[Any],
    *,
    is_timed: bool,
) -> dict[str, Any]:
    """One recipe's result on one model."""
    model, begin = load(path).copy(), time.process_time()
    try:
        plan(recipe, load_target("ort-cpu"), fitting)(model)
    except OnnxqError as e:
        return {"error": str(e)}
    seconds = time.process_time() - begin
    found = scores(exact, outputs(model, samples), samples)
    if is_timed:
        latency = runtime.latency(path, model, next(iter(samples)), seconds=3.0)
        found["size"] = f"{size_of(model, model) / path.stat().st_size:.2f}x"
        found["time"] = f"{latency.ratio:.2f}x" if latency is not None else "-"
    return {**found, "seconds": round(seconds, 1)}


def beside(path: Path, kind: str) -> Path:
    """The samples that belong to a model."""
    folder = path.with_suffix(f".{kind}")
    return folder if folder.is_dir() else path.with_suffix(f".{kind}.npz")


def outputs(model: Any, samples: Samples) -> list[list[Any]]:
    """All outputs of floats, for each sample."""
    session = runtime.session(model)
    return [
        [v for v in runtime.run(session, feed).values() if v.dtype.kind == "f"] for feed in samples
    ]


def scores(
    exact: Sequence[Sequence[Any]], made: Sequence[Sequence[Any]], samples: Samples
) -> dict[str, Any]:
    """SQNR in dB, the mean of the outputs; and what the labels say of the first one."""
    found: dict[str, Any] = {}
    if made is not exact:
        sums = [ErrorSums()] * len(exact[0])
        for one, other in zip(exact, made, strict=True):
            new = [ErrorSums.of(r, y) for r, y in zip(one, other, strict=True)]
            sums = [s.merge(n) for s, n in zip(sums, new, strict=True)]
        found["sqnr_db"] = round(float(np.mean([s.sqnr_db for s in sums])), 1)
    if samples.labels is None:
        return found
    hits, losses, count = 0, 0.0, 0
    for (first, *_), label in zip(made, samples.labels, strict=False):
        rows = np.asarray(first, np.float64).reshape(-1, first.shape[-1])
        wanted = np.ravel(label).astype(np.int64)
        hits += int((rows.argmax(-1) == wanted).sum())
        peak = rows.max(-1)
        sums_of = peak + np.log(np.exp(rows - peak[:, None]).sum(-1))
        losses += float((sums_of - rows[np.arange(len(wanted)), wanted]).sum())
        count += wanted.size
    if count > len(made):
        return found | {"perplexity": round(float(np.exp(losses / count)), 3)}
    return found | {"top1": round(hits / count, 3)}


def table(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Methods down, models across: dB / top-1 or perplexity / size / time / seconds."""
    models = list(rows["float"])
    lines = [f"| | {' | '.join(models)} |", f"|---|{'---|' * len(models)}"]
    for name, row in rows.items():
        cells = (" / ".join(str(v) for v in row[m].values()) for m in models)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
