"""Results of `optimize` in two runtimes besides ONNX Runtime's own, on models/*.onnx.

    pip install openvino && python tests/bench/bench_runtimes.py [--samples 200]

A row a model: for `--target openvino` the result in OpenVINO and in ONNX Runtime, for `ort-mobile`
the .ort file and the .onnx file beside it. SQNR in dB against the original in ONNX Runtime and of
the two runtimes against each other; top-1 on labels, and how often the two agree. `float biases`
is the OpenVINO result with biases left in floats, `i8` how many of its layers run in int8.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from onnxq import runtime
from onnxq.data import open_samples
from onnxq.model import Model
from onnxq.numerics.metrics import sqnr_db
from onnxq.recipes import load_recipe, plan
from onnxq.targets import load_target
from onnxq.workflow import optimize

MODELS = Path(__file__).parents[2] / "models"
Feed = dict[str, NDArray[Any]]
Array = NDArray[Any]


def feeds(model: Path, count: int) -> Iterator[tuple[Feed, Array]]:
    """Samples of batch size 1, with their labels."""
    with np.load(model.with_suffix(".eval.npz")) as archive:
        arrays = dict(archive)
    labels = arrays.pop("labels")
    for i in range(min(count, len(labels))):
        yield {name: a[i : i + 1] for name, a in arrays.items()}, labels[i]


def in_onnxruntime(model: Path) -> Callable[[Feed], Array]:
    """A function that runs a file in ONNX Runtime; the first output."""
    session = runtime.session(model)
    return lambda feed: np.asarray(next(iter(runtime.run(session, feed).values())))


def in_openvino(model: Path) -> Callable[[Feed], Array]:
    """The same in OpenVINO's CPU plugin."""
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda feed: np.asarray(compiled(feed)[0])


def int8_layers(model: Path) -> str:
    """How many layers with weights OpenVINO executes in int8, of all."""
    runtime_model = ov.Core().compile_model(model, "CPU").get_runtime_model()
    kinds = [
        node.get_rt_info()["runtimePrecision"].astype(str)
        for node in runtime_model.get_ops()
        if node.get_rt_info()["layerType"].astype(str)
        in ("Convolution", "GroupConvolution", "FullyConnected", "MatMul", "Deconvolution")
    ]
    return f"{sum(k in ('i8', 'u8') for k in kinds)}/{len(kinds)}"


def quantized(model: Path, target: str, out: Path) -> Path:
    """`optimize` for a target, on the calibration samples."""
    optimize(
        model,
        out,
        data=str(model.with_suffix(".calib.npz")),
        recipe="int8",
        target=target,
        validate=False,
    )
    return out


def with_float_biases(model: Path, out: Path) -> Path:
    """The same for a target that differs in its biases only."""
    target = replace(load_target("openvino"), bias="float")
    edited = Model.load(model)
    samples = open_samples(str(model.with_suffix(".calib.npz")), edited)
    fitting = samples.take(len(samples) - len(samples) // 4)  # what optimize calibrates on
    for pass_ in plan(load_recipe("int8"), target, fitting).passes:
        pass_(edited)
    edited.save(out)
    return out


def agreement(
    model: Path, one: Callable[[Feed], Array], two: Callable[[Feed], Array], count: int
) -> dict[str, float]:
    """The two against the original and against each other."""
    original = in_onnxruntime(model)
    made: list[list[Array]] = [[], [], []]
    labels = []
    for feed, label in feeds(model, count):
        for outputs, run in zip(made, (original, one, two), strict=True):
            outputs.append(run(feed)[0])
        labels.append(label)
    first, a, b = (np.stack(outputs) for outputs in made)
    best = [outputs.argmax(-1) for outputs in (first, a, b)]
    return {
        "sqnr_db": round(float(sqnr_db(first, a)), 1),
        "sqnr_onnxruntime_db": round(float(sqnr_db(first, b)), 1),
        "sqnr_between_db": round(float(sqnr_db(b, a)), 1),
        "top1": round(float((best[1] == np.stack(labels)).mean()), 4),
        "top1_onnxruntime": round(float((best[2] == np.stack(labels)).mean()), 4),
        "top1_original": round(float((best[0] == np.stack(labels)).mean()), 4),
        "top1_between": round(float((best[1] == best[2]).mean()), 4),
    }


def main() -> None:
    """Print JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=200)
    count = parser.parse_args().samples
    table: dict[str, Any] = {"openvino_version": ov.__version__}
    for model in sorted(MODELS.glob("*.onnx")):
        with tempfile.TemporaryDirectory() as folder:
            path = quantized(model, "openvino", Path(folder) / "openvino.onnx")
            row = {"openvino": agreement(model, in_openvino(path), in_onnxruntime(path), count)}
            row["openvino"]["i8"] = int8_layers(path)  # type: ignore[assignment]
            plain = with_float_biases(model, Path(folder) / "floats.onnx")
            row["float biases"] = agreement(model, in_openvino(plain), in_openvino(path), count)
            path = quantized(model, "ort-mobile", Path(folder) / "mobile.onnx")
            beside = in_onnxruntime(path.with_suffix(".ort"))
            row["ort-mobile"] = agreement(model, beside, in_onnxruntime(path), count)
        table[model.stem] = row
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
