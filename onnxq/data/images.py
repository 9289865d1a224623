"""Samples from image files: decoded by pillow, resized, and laid out as the model's input is."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.data.columns import stacked
from onnxq.data.fitting import only_input, shape_text
from onnxq.data.options import SCALE, ImageOptions
from onnxq.data.samples import Samples
from onnxq.errors import DataError
from onnxq.front import front
from onnxq.model import Model

if TYPE_CHECKING:
    from PIL.Image import Image

GREY = 114  # what the borders of a letterbox are filled with, as YOLO is trained


@dataclass(frozen=True, slots=True)
class Layout:
    """How an input holds an image; a height or width of None is free."""

    channels: int
    channels_first: bool
    height: int | None
    width: int | None
    dtype: np.dtype[Any]

    def text(self, size: tuple[int, int]) -> str:
        """The layout in words."""
        order = "channels first" if self.channels_first else "channels last"
        return f"{self.channels}x{size[0]}x{size[1]}, {order}, {self.dtype}"


def from_images(files: list[Path], text: str, model: Model, options: ImageOptions) -> Samples:
    """A sample an image, resized to the input's size (where that is free: to the first image's).

    Raises DataError: pillow is missing, the input is no image, options that do not fit the input,
    files that are no images (when they are read).
    """
    _require_pillow()
    tensor = only_input(model, text, "an image is one array")
    layout = _layout(tensor)
    full = options.full
    _check(full, layout, tensor)
    size = _size(full, layout, files[0])
    column = _Images(tuple(files), layout, size, full)
    said = f"{len(files)} images of {text}, {layout.text(size)}, {told(full, layout)}"
    samples = stacked({tensor.name: column}, None, model, said)
    return replace(samples, preprocess=_preprocess(full, layout))


def told(options: ImageOptions, layout: Layout) -> str:
    """What is done with a pixel, in words."""
    order = "grey" if layout.channels == 1 else "BGR" if options.bgr else "RGB"
    parts = [order, f"resize {options.resize or 'stretch'}"]
    if layout.dtype.kind == "f":
        scale = options.scale or SCALE
        value = "x" if scale == 1 else "x/255" if scale == SCALE else f"x*{scale:g}"
        if options.mean is not None:
            value = f"{value} - ({', '.join(f'{v:g}' for v in options.mean)})"
        if options.std is not None:
            value = f"({value}) / ({', '.join(f'{v:g}' for v in options.std)})"
        parts.append(value)
    return ", ".join(parts)


def _preprocess(options: ImageOptions, layout: Layout) -> dict[str, Any]:
    """What is done with an image, for who has to do the same on a device."""
    is_float = layout.dtype.kind == "f"
    return {
        "channels": "grey" if layout.channels == 1 else "BGR" if options.bgr else "RGB",
        "layout": "channels first" if layout.channels_first else "channels last",
        "resize": options.resize or "stretch",
        "keep": options.keep,
        "values": "x = (pixel * scale - mean) / std" if is_float else "x = pixel",
        "scale": (options.scale or SCALE) if is_float else None,
        "mean": options.mean,
        "std": options.std,
    }


def _require_pillow() -> None:
    try:
        importlib.import_module("PIL.Image")
    except ImportError as e:
        raise DataError("images need pillow: pip install 'onnxq[images]'") from e


def _layout(tensor: gs.Variable) -> Layout:
    """The input's layout, from its shape; from the first layer where the shape does not tell."""
    where = f"input {tensor.name!r} {shape_text(tensor.shape)} {tensor.dtype}"
    wanted = "an image wants [N, C, H, W] or [N, H, W, C] with C 1 or 3, float or uint8"
    if tensor.shape is None or len(tensor.shape) not in (3, 4) or tensor.dtype is None:
        raise DataError(f"{where}: {wanted}; give an .npz instead")
    dtype = np.dtype(tensor.dtype)
    if dtype.kind != "f" and dtype != np.uint8:
        raise DataError(f"{where}: {wanted}; give an .npz instead")
    dims = [d if isinstance(d, int) else None for d in tensor.shape[-3:]]
    seen = front(tensor)
    first, last = dims[0] in (1, 3), dims[2] in (1, 3)
    if first == last:
        first = not seen.channels_last
    channels = dims[0] if first else dims[2]
    if channels is None:
        channels = seen.channels or 3
    if channels not in (1, 3):
        raise DataError(f"{where}: {wanted}; give an .npz instead")
    height, width = dims[1:] if first else dims[:2]
    return Layout(channels, first, height, width, dtype)


def _check(options: ImageOptions, layout: Layout, tensor: gs.Variable) -> None:
    """Raise DataError for options that contradict the input, or would do nothing."""
    where = f"input {tensor.name!r} {shape_text(tensor.shape)} {tensor.dtype}"
    if layout.dtype == np.uint8:
        names = [n for n in ("mean", "std", "scale") if getattr(options, n) is not None]
        if names:
            raise DataError(f"{where} takes pixels as they are: {names[0]} has no effect")
    if layout.channels == 1:
        if options.bgr:
            raise DataError(f"{where} has one channel: bgr has no effect")
        if any(values is not None and len(values) > 1 for values in (options.mean, options.std)):
            raise DataError(f"{where} has one channel: give one mean and one std")
    if options.size is not None:
        for asked, fixed in zip(options.size, (layout.height, layout.width), strict=True):
            if fixed not in (None, asked):
                asked_text = "x".join(map(str, options.size))
                raise DataError(f"{where}: size {asked_text} contradicts it; leave size out")


def _size(options: ImageOptions, layout: Layout, first: Path) -> tuple[int, int]:
    """Height and width that all images get."""
    if layout.height is not None and layout.width is not None:
        return layout.height, layout.width
    if options.size is not None:
        return options.size
    shown = _opened(first)
    return layout.height or shown.height, layout.width or shown.width


@dataclass(frozen=True, slots=True)
class _Images:
    """A column of images that are decoded when they are asked for."""

    files: tuple[Path, ...]
    layout: Layout
    size: tuple[int, int]
    options: ImageOptions

    @property
    def shape(self) -> tuple[int, ...]:
        """Samples first."""
        one = (*self.size, self.layout.channels)
        return len(self.files), *((one[2], one[0], one[1]) if self.layout.channels_first else one)

    def rows(self, start: int, size: int) -> Iterator[NDArray[Any]]:
        """Runs of images."""
        for i in range(start, len(self.files), size):
            yield np.stack([self._array(path) for path in self.files[i : i + size]])

    def _array(self, path: Path) -> NDArray[Any]:
        picture = _opened(path).convert("L" if self.layout.channels == 1 else "RGB")
        pixels = np.asarray(_resized(picture, self.size, self.options))
        if self.layout.channels == 1:
            pixels = pixels[:, :, None]
        elif self.options.bgr:
            pixels = pixels[:, :, ::-1]
        if self.layout.channels_first:
            pixels = pixels.transpose(2, 0, 1)
        if self.layout.dtype == np.uint8:
            return pixels
        return _scaled(pixels, self.options, channel_axis=0 if self.layout.channels_first else 2)


def _scaled(
    pixels: NDArray[np.uint8], options: ImageOptions, *, channel_axis: int
) -> NDArray[np.float32]:
    """(pixel * scale - mean) / std."""

    def along(values: tuple[float, ...]) -> NDArray[np.float32]:
        shape = [1, 1, 1]
        shape[channel_axis] = len(values)
        return np.asarray(values, np.float32).reshape(shape)

    scale = options.scale or SCALE
    values = pixels.astype(np.float32)
    values = values / np.float32(255) if scale == SCALE else values * np.float32(scale)
    if options.mean is not None:
        values = values - along(options.mean)
    if options.std is not None:
        values = values / along(options.std)
    return values


def _opened(path: Path) -> Image:
    """The image with 8 bits a channel, upright as its camera was held."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            picture.load()
            upright = ImageOps.exif_transpose(picture)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as e:
        text = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise DataError(f"{path}: cannot be read as an image: {text}") from e
    if upright.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    if upright.mode in ("I", "F"):
        raise DataError(f"{path}: has 32 bits a pixel: save it with 8, or give an .npz")
    has_clear_colours = upright.mode == "P" and "transparency" in upright.info
    return upright.convert("RGBA") if has_clear_colours else upright


def _resized(picture: Image, size: tuple[int, int], options: ImageOptions) -> Image:
    """The picture at height x width, bilinear; unchanged if it is of that size."""
    from PIL import Image

    height, width = size
    how = options.resize or "stretch"
    share = options.keep or 1.0
    if how == "stretch" or (share == 1 and picture.size == (width, height)):
        if picture.size == (width, height):
            return picture
        return picture.resize((width, height), Image.Resampling.BILINEAR)
    ratios = width / picture.width, height / picture.height
    ratio = max(ratios) / share if how == "crop" else min(ratios)
    wide, high = max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio))
    scaled = picture.resize((wide, high), Image.Resampling.BILINEAR)
    left, top = round((wide - width) / 2), round((high - height) / 2)
    if how == "crop":
        return scaled.crop((left, top, left + width, top + height))
    filled = Image.new(picture.mode, (width, height), GREY if picture.mode == "L" else (GREY,) * 3)
    filled.paste(scaled, (-left, -top))
    return filled
