"""How a folder of images is fed: the options, as one keyword."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from onnxq.cli.common import errors

if TYPE_CHECKING:
    from onnxq.data import ImageOptions

OPTIONS = (
    click.option(
        "--preset", metavar="NAME",
        help="For images: imagenet (mean and std of ImageNet, crop) or yolo (letterbox); "
        "the options below change single values of it.",
    ),
    click.option(
        "--size", metavar="HxW",
        help="For images, where the model's input leaves it free; default: the first image's.",
    ),
    click.option(
        "--scale", type=float, metavar="FACTOR",
        help="For images: pixels of 0..255 are multiplied by this first; default: 1/255.",
    ),
    click.option(
        "--mean", metavar="M[,M,M]",
        help="For images: taken off after --scale, one for all or one a channel; default: 0.",
    ),
    click.option(
        "--std", metavar="S[,S,S]",
        help="For images: divided by after --mean, one for all or one a channel; default: 1.",
    ),
    click.option(
        "--bgr", is_flag=True, help="For images: blue first (and in --mean, --std); default: RGB."
    ),
    click.option(
        "--resize", metavar="HOW",
        help="For images: stretch (default), crop (cover the size, cut the middle out) or "
        "letterbox (fit in, grey borders).",
    ),
)  # fmt: skip


def image_options(command: Any) -> Any:
    """The options for images, as the one keyword `images`; everywhere the same."""

    @wraps(command)
    def run(*args: Any, size: str | None, mean: str | None, std: str | None, **kwargs: Any) -> None:
        names = ("scale", "bgr", "resize", "preset")
        values = {n: kwargs.pop(n) for n in names}  # 0 is given, and wrong; it equals False
        given = {n: v for n, v in values.items() if v is not None and v is not False}
        texts = (("mean", mean), ("std", std))
        given |= {n: _numbers(n, text) for n, text in texts if text is not None}
        if size is not None:
            given["size"] = _size(size)
        with errors(debug=kwargs["debug"]):
            images = _images(given) if given else None
        command(*args, images=images, **kwargs)

    for option in reversed(OPTIONS):
        run = option(run)
    return run


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise click.UsageError(f"--{name} {text}: give one number, or three with commas") from None


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    try:
        return int(height), int(width or height)
    except ValueError:
        raise click.UsageError(f"--size {text}: give height x width, as in 224x224") from None


def _images(given: dict[str, Any]) -> ImageOptions:
    from onnxq.data import ImageOptions

    return ImageOptions(**given)
