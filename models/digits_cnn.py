"""Train digits_cnn: a residual CNN on MNIST, written with its BatchNormalization unfolded."""

from __future__ import annotations

import torch
from common import export, mnist, save_samples, shifted, train
from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.short = nn.Conv2d(inputs, outputs, 1, stride) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.short(x))


def main() -> None:
    """Train, write the model and its samples."""
    torch.manual_seed(0)
    x, y = mnist()
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        Block(16, 32, 2), Block(32, 32, 1), Block(32, 48, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip
    train(model, x[:4000], y[:4000], epochs=12, augment=shifted)
    export(
        "digits_cnn", model, x[:1], opset=13, input_names=["image"],
        dynamic_axes={"image": {0: "N"}, "logits": {0: "N"}},
        training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False,
    )  # fmt: skip
    save_samples("digits_cnn", "calib", image=x[4000:4160], labels=y[4000:4160])
    save_samples("digits_cnn", "eval", image=x[4200:], labels=y[4200:])


if __name__ == "__main__":
    main()
