"""Top-1 accuracy of a model on its samples, with onnxruntime alone.

python models/evaluate.py MODEL.onnx [NAME.eval.npz]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort


def accuracy(model: Path, samples: Path) -> float:
    """Share of labels that are the argmax of the first output's last axis, a sample at a time."""
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    with np.load(samples) as archive:
        arrays = dict(archive)
    labels = arrays.pop("labels")
    hits = 0
    for i in range(len(labels)):
        scores = session.run(None, {name: array[i : i + 1] for name, array in arrays.items()})[0]
        hits += int((scores.argmax(-1)[0] == labels[i]).sum())
    return hits / labels.size


def main() -> None:
    """Print the accuracy."""
    model = Path(sys.argv[1])
    samples = Path(sys.argv[2]) if len(sys.argv) > 2 else model.with_suffix(".eval.npz")
    print(f"{model.stem}: top-1 {accuracy(model, samples):.4f}")


if __name__ == "__main__":
    main()
