"""How images are made into arrays: size, colour, scale, mean and standard deviation."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import isfinite, prod
from typing import Any

from onnxq.errors import DataError

SCALE = 1 / 255
RESIZES = ("stretch", "crop", "letterbox")
MOST_PIXELS = 1 << 26  # 0.8 GB of three float32 channels
MODEST = 2.0  # no mean or deviation of values in [0, 1] is above this


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """What is fed for a pixel of 0..255: (pixel * scale - mean) / std, channel by channel.

    None is "not given": size from the model's input, or from the first image where that is free;
    scale 1/255; mean 0; std 1; resize "stretch"; RGB. A mean or std is one number, or one a channel
    in the order in which channels are fed (with bgr: blue first). preset gives defaults for the
    rest: see PRESETS. An input of type uint8 gets the pixels as they are.

    resize: "stretch" to the size; "crop" scales until the image covers it and cuts the middle out;
    "letterbox" scales until it fits in and fills the borders with grey (114). keep: how much of the
    shorter side "crop" keeps (0.875 is 224 of 256).

    Raises DataError for values that make no sense together.
    """

    size: tuple[int, int] | None = None  # height, width
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float | None = None
    bgr: bool | None = None
    resize: str | None = None
    keep: float | None = None
    preset: str | None = None

    def __post_init__(self) -> None:
        if self.preset is not None and self.preset not in PRESETS:
            raise DataError(f"unknown preset {self.preset!r}: one of {', '.join(PRESETS)}")
        if self.resize is not None and self.resize not in RESIZES:
            raise DataError(f"unknown resize {self.resize!r}: one of {', '.join(RESIZES)}")
        if self.size is not None and min(self.size) < 1:
            raise DataError(f"size {self.size[0]}x{self.size[1]}: height and width start at 1")
        if self.size is not None and prod(self.size) > MOST_PIXELS:
            raise DataError(
                f"size {self.size[0]}x{self.size[1]}: give {MOST_PIXELS} pixels at most"
            )
        for name, numbers in (
            ("mean", self.mean),
            ("std", self.std),
            ("scale", (self.scale or 1,)),
        ):
            if not all(map(isfinite, numbers or ())):
                raise DataError(f"{name} is not finite: give numbers such as 0.5")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) not in (1, 3):
                raise DataError(f"{name} has {len(values)} values: give one, or one a channel")
        if self.std is not None and min(self.std) <= 0:
            raise DataError(f"std is {min(self.std):g}: it must be above 0")
        if self.scale is not None and self.scale <= 0:
            raise DataError(f"scale is {self.scale:g}: it must be above 0")
        largest = max(map(abs, (*(self.mean or (0,)), *(self.std or (0,)))))
        if self.scale is None and largest > MODEST:
            raise DataError(
                f"mean or std of {largest:g}, but pixels are scaled to 0..1 before: add scale 1 "
                "if they are in units of 0..255"
            )
        scaled = self.preset is not None and PRESETS[self.preset].mean is not None
        if scaled and self.scale is not None and self.mean is None:
            raise DataError(f"preset {self.preset} has a mean of values in 0..1: leave out scale")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise DataError(f"keep is {self.keep:g}: it must be above 0, and 1 at most")
        if self.keep is not None and self.full.resize != "crop":
            raise DataError("keep is for resize crop only")

    @property
    def full(self) -> ImageOptions:
        """The options with the preset's for what is not given."""
        if self.preset is None:
            return self
        base = PRESETS[self.preset]
        given: dict[str, Any] = {
            f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None
        }
        kept = {f.name: value for f in fields(base) if (value := getattr(base, f.name)) is not None}
        if given.get("resize", "crop") != "crop":
            kept.pop("keep", None)
        return ImageOptions(**{**kept, **given, "preset": None})


PRESETS = {
    "imagenet": ImageOptions(  # torchvision: Resize(256), CenterCrop(224), Normalize
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resize="crop", keep=0.875
    ),
    "yolo": ImageOptions(resize="letterbox"),  # ultralytics: LetterBox, then division by 255
}
