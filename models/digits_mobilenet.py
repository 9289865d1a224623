"""Train digits_mobilenet: a small MobileNetV2 on MNIST, batch size fixed to 1."""

from __future__ import annotations

import torch
from common import export, mnist, save_samples, shifted, train
from torch import Tensor, nn


def layer(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Convolution, BatchNormalization, ReLU6."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())


class InvertedResidual(nn.Module):
    """Expand, depthwise, project; a residual where the shape allows it."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int = 4) -> None:
        super().__init__()
        hidden = inputs * expand
        self.is_residual = stride == 1 and inputs == outputs
        self.layers = nn.Sequential(
            layer(inputs, hidden, 1),
            layer(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        return x + self.layers(x) if self.is_residual else self.layers(x)


def main() -> None:
    """Train, write the model and its samples."""
    torch.manual_seed(0)
    x, y = mnist()
    model = nn.Sequential(
        layer(1, 16, 3, 2), InvertedResidual(16, 24, 1), InvertedResidual(24, 24, 1),
        InvertedResidual(24, 40, 2), InvertedResidual(40, 40, 1), InvertedResidual(40, 40, 1),
        layer(40, 160, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(160, 10),
    )  # fmt: skip
    train(model, x[:4000], y[:4000], epochs=14, augment=shifted)
    export("digits_mobilenet", model, x[:1], opset=17, input_names=["image"])
    save_samples("digits_mobilenet", "calib", image=x[4000:4160], labels=y[4000:4160])
    save_samples("digits_mobilenet", "eval", image=x[4200:], labels=y[4200:])


if __name__ == "__main__":
    main()
