"""What removing channels costs and saves: criteria x models, as a Markdown table.

    python tests/bench/bench_channels.py [MODEL ...] [--macs 0.3] [--samples 64] [--limit 400]

Without models: the convolutional ones in models/. Beside NAME.onnx stand NAME.calib.npz and
NAME.eval.npz. In each row: the share of labels that the first output points at, SQNR of all outputs
in dB, and what is left of multiply-accumulates, file and time (onnxruntime, alternated).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from onnxq import runtime
from onnxq.data import Samples, open_samples
from onnxq.model import Model
from onnxq.passes import PASSES
from onnxq.passes.prune_channels import PruneChannels
from onnxq.passes.work import macs
from onnxq.targets import load_target
from onnxq.validation import compare

MODELS = Path(__file__).resolve().parents[2] / "models"
METHODS: dict[str, dict[str, Any]] = {
    "norm, nothing makes up for it": {"criterion": "norm", "compensation": False},
    "norm": {"criterion": "norm"},
    "activation": {"criterion": "activation"},
    "reconstruction, nothing makes up for it": {"compensation": False},
    "reconstruction": {},
}


def row(original: Model, samples: Samples, scored: Samples, share: float, how: Any) -> str:
    """Prune a copy, and score it."""
    model = original.copy()
    start = time.process_time()
    PruneChannels(macs=share, samples=samples, target=load_target("ort-cpu"), **how)(model)
    seconds = time.process_time() - start
    found = compare(original, model, scored)
    feed = next(iter(scored))
    left = [sum(macs(m).values()) for m in (model, original)]
    size = [sum(m.weight_sizes()) for m in (model, original)]
    ratio = runtime.latency(original, model, feed, seconds=1.5).ratio
    accuracy = [found.original_accuracy, found.result_accuracy]
    told = " -> ".join("-" if a is None else f"{a:.4f}" for a in accuracy)
    return (
        f"{told} | {found.sqnr_db:.1f} | {left[0] / left[1]:.2f} | {size[0] / size[1]:.2f} "
        f"| {ratio:.2f} | {seconds:.0f}"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--macs", type=float, default=0.3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--limit", type=int, default=400)
    options = parser.parse_args()
    print("| model | criterion | accuracy | dB | work | weights | time | CPU s |")
    print("|---|---|---|---|---|---|---|---|")
    for path in options.models or [MODELS / "digits_cnn.onnx", MODELS / "digits_mobilenet.onnx"]:
        model = Model.load(path)
        PASSES["cleanup"](model)
        model.infer_shapes()
        samples = open_samples(path.with_suffix(".calib.npz"), model).take(options.samples)
        scored = open_samples(path.with_suffix(".eval.npz"), model).take(options.limit)
        for name, how in METHODS.items():
            cells = row(model, samples, scored, options.macs, how)
            print(f"| {path.stem} | {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
