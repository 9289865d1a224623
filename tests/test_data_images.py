"""Folders of images: layouts, sizes, options, what they become, and what mistakes are told."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from onnx import parser
from PIL import Image

from onnxq.cli import main
from onnxq.data import ImageOptions, open_samples
from onnxq.errors import DataError
from onnxq.model import Model

HEAD = '<ir_version: 8, opset_import: ["": 17]>'
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (3, 6, 8, 3), dtype=np.uint8)  # three images of 6 x 8


def model(text: str, body: str = "y = Identity(x)", inits: str = "") -> Model:
    kind = text.split("[")[0]
    return Model.from_proto(
        parser.parse_model(f"{HEAD} g ({text}) => ({kind}[a, b, c, d] y) {inits} {{ {body} }}")
    )


def write(folder: Path, pixels: Any = RGB, suffix: str = "png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, one in enumerate(pixels):
        Image.fromarray(one).save(folder / f"{i}.{suffix}")
    return folder


def fed(folder: Path, wanted: Model, **options: Any) -> Any:
    images = ImageOptions(**options) if options else None
    return np.concatenate([f["x"] for f in open_samples(folder, wanted, images=images)])


NCHW = "float[N, 3, 6, 8] x"


def test_an_image_is_fed_as_the_input_is_laid_out(tmp_path: Path) -> None:
    folder = write(tmp_path)
    floats = RGB.astype(np.float32) / 255
    np.testing.assert_array_equal(fed(folder, model(NCHW)), floats.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(fed(folder, model("float[N, 6, 8, 3] x")), floats)
    np.testing.assert_array_equal(fed(folder, model("uint8[N, 6, 8, 3] x")), RGB)
    half = fed(folder, model("float16[1, 6, 8, 3] x"))
    np.testing.assert_array_equal(half, floats.astype(np.float16))
    unbatched = model(
        "float[6, 8, 3] x", "one = Constant<value_ints = [0]>() y = Unsqueeze(x, one)"
    )
    feeds = list(open_samples(folder, unbatched))
    np.testing.assert_array_equal(np.stack([f["x"] for f in feeds]), floats)
    batch = list(open_samples(folder, model("float[2, 3, 6, 8] x")))
    assert [f["x"].shape for f in batch] == [(2, 3, 6, 8)] * 2


def test_one_channel_is_grey(tmp_path: Path) -> None:
    folder = write(tmp_path)
    grey = np.stack([np.asarray(Image.fromarray(one).convert("L")) for one in RGB])
    got = fed(folder, model("uint8[N, 1, 6, 8] x"))
    np.testing.assert_array_equal(got[:, 0], grey)
    np.testing.assert_array_equal(fed(folder, model("uint8[N, 6, 8, 1] x"))[..., 0], grey)


def test_free_channels_are_read_from_the_first_layer(tmp_path: Path) -> None:
    folder = write(tmp_path)
    weight = "<float[2, {}, 1, 1] w = {{{}}}>"
    grey = model("float[N, C, H, W] x", "y = Conv(x, w)", weight.format(1, "1, 1"))
    assert fed(folder, grey).shape == (3, 1, 6, 8)
    last = model(
        "float[N, H, W, C] x", "t = Transpose<perm = [0, 3, 1, 2]>(x) y = Conv(t, w)",
        weight.format(3, "1, 1, 1, 1, 1, 1"),
    )  # fmt: skip
    assert fed(folder, last).shape == (3, 6, 8, 3)
    assert fed(folder, model("float[N, C, H, W] x")).shape == (3, 3, 6, 8)


def test_options_are_applied_channel_by_channel(tmp_path: Path) -> None:
    folder = write(tmp_path)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    got = fed(folder, model("float[N, 6, 8, 3] x"), mean=mean, std=std, bgr=True)
    wanted = (RGB[..., ::-1] / 255 - mean) / std
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    got = fed(folder, model("float[N, 6, 8, 3] x"), scale=1.0, mean=(127.5,), std=(128.0,))
    np.testing.assert_allclose(got, (RGB - 127.5) / 128, atol=1e-6)
    said = open_samples(folder, model(NCHW), images=ImageOptions(preset="imagenet")).description
    assert said == (
        f"3 images of {folder}, 3x6x8, channels first, float32, RGB, resize crop, "
        "(x/255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)"
    )


def stripes(width: int, height: int) -> Any:
    """Columns that get brighter from left to right, alike in all rows."""
    row = np.linspace(0, 255, width).astype(np.uint8)
    return np.broadcast_to(row[None, :, None], (height, width, 3)).copy()


def test_resize_stretch_crop_letterbox(tmp_path: Path) -> None:
    folder = write(tmp_path, [stripes(40, 20)])
    square = model("uint8[N, 20, 20, 3] x")
    (stretched,) = fed(folder, square)
    assert stretched[0, 0, 0] < 10
    assert stretched[0, -1, 0] > 245
    (cropped,) = fed(folder, square, resize="crop")
    np.testing.assert_array_equal(cropped, stripes(40, 20)[:, 10:30])
    (boxed,) = fed(folder, square, resize="letterbox")
    assert set(boxed[:5].ravel()) == set(boxed[15:].ravel()) == {114}
    assert boxed[10, 0, 0] < 10
    assert boxed[10, -1, 0] > 245
    (grey,) = fed(folder, model("uint8[N, 20, 20, 1] x"), preset="yolo")
    assert set(grey[:5].ravel()) == {114}


def test_the_imagenet_preset_crops_the_middle(tmp_path: Path) -> None:
    folder = write(tmp_path, [stripes(256, 256)])
    (got,) = fed(folder, model("float[N, 3, 224, 224] x"), preset="imagenet")
    wanted = (stripes(256, 256)[16:-16, 16:-16] / 255 - (0.485, 0.456, 0.406)) / (
        0.229, 0.224, 0.225,
    )  # fmt: skip
    np.testing.assert_allclose(got, wanted.transpose(2, 0, 1), atol=1e-5)
    (own,) = fed(folder, model("float[N, 3, 256, 256] x"), preset="imagenet", resize="stretch",
                 mean=(0.0,), std=(1.0,))  # fmt: skip
    np.testing.assert_allclose(own[0], stripes(256, 256)[..., 0] / 255, atol=1e-6)


def test_a_free_size_is_the_first_images_or_the_one_asked_for(tmp_path: Path) -> None:
    folder = write(tmp_path, [stripes(40, 20), stripes(10, 10)])
    free = model("float[N, 3, H, W] x")
    assert fed(folder, free).shape == (2, 3, 20, 40)
    assert fed(folder, free, size=(8, 16)).shape == (2, 3, 8, 16)
    assert fed(folder, model("float[N, 3, 32, W] x"), size=(32, 16)).shape == (2, 3, 32, 16)
    assert fed(folder, model("float[N, 3, 32, W] x")).shape == (2, 3, 32, 40)


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG", "bmp", "webp", "gif", "tiff"])
def test_kinds_of_files(suffix: str, tmp_path: Path) -> None:
    flat = np.full((1, 6, 8, 3), 200, np.uint8)
    got = fed(write(tmp_path, flat, suffix), model("uint8[N, 6, 8, 3] x"))
    assert abs(got.astype(int) - 200).max() <= 4


def test_images_may_be_one_level_down_and_are_sorted(tmp_path: Path) -> None:
    for name, value in (("dog", 20), ("cat", 10)):
        write(tmp_path / name, np.full((2, 6, 8, 3), value, np.uint8))
    (tmp_path / "cat" / ".DS_Store").write_text("")
    (tmp_path / "classes.txt").write_text("cat dog")
    got = fed(tmp_path, model("uint8[N, 6, 8, 3] x"))
    assert got[:, 0, 0, 0].tolist() == [10, 10, 20, 20]
    assert fed(tmp_path / "cat" / "0.png", model("uint8[N, 6, 8, 3] x")).shape == (1, 6, 8, 3)


def test_modes_of_images(tmp_path: Path) -> None:
    grey = RGB[0, :, :, 0]
    wide = model("uint8[N, 6, 8, 1] x")
    pictures = {
        "deep": Image.fromarray(grey.astype(np.uint16) * 257),
        "alpha": Image.merge("LA", [Image.fromarray(grey), Image.fromarray(grey)]),
        "palette": Image.fromarray(grey).convert("P"),
    }
    for name, picture in pictures.items():
        (tmp_path / name).mkdir()
        if name == "palette":
            picture.info["transparency"] = b"\0\x80"
        picture.save(tmp_path / name / "a.png")
        np.testing.assert_array_equal(fed(tmp_path / name, wide)[0, :, :, 0], grey)


def test_a_camera_held_sideways(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(RGB[0]).save(tmp_path / "a.png", exif=exif)
    got = fed(tmp_path, model("uint8[N, 8, 6, 3] x"))
    np.testing.assert_array_equal(got[0], np.rot90(RGB[0], -1))


def deep(folder: Path) -> Path:
    Image.fromarray(np.ones((6, 8), np.float32)).save(folder / "a.tiff")
    return folder


def cut_off(folder: Path) -> Path:
    write(folder, RNG.integers(0, 256, (1, 60, 80, 3), dtype=np.uint8))
    (folder / "0.png").write_bytes((folder / "0.png").read_bytes()[:3000])
    return folder


def fake(folder: Path) -> Path:
    (folder / "a.jpg").write_text("<html>not found</html>")
    return folder


def mixed(folder: Path) -> Path:
    np.savez(write(folder) / "a.npz", x=RGB)
    return folder


GREY, PIXELS = "float[N, 1, 6, 8] x", "uint8[N, 6, 8, 3] x"
MISTAKES = [
    pytest.param(cut_off, NCHW, {}, "0.png: cannot be read as an image", id="cut-off"),
    pytest.param(fake, NCHW, {}, "a.jpg: cannot be read as an image: cannot identify", id="fake"),
    pytest.param(deep, NCHW, {}, "a.tiff: has 32 bits a pixel", id="32-bits"),
    pytest.param(mixed, NCHW, {}, "holds 3 images and 1 .npz: keep one kind|holds 1 .npz and 3 images", id="mixed"),
    pytest.param(write, "float[N, 10] x", {}, r"'x' \[N, 10\] float32: an image wants \[N, C, H, W\]", id="rank"),
    pytest.param(write, "float[N, 4, 6, 8] x", {}, "with C 1 or 3", id="four-channels"),
    pytest.param(write, "int64[N, 3, 6, 8] x", {}, "float or uint8", id="type"),
    pytest.param(write, "float[N, 3, 6, 8] x, float[N, 2] s", {}, "an image is one array, but the model has 2 inputs", id="inputs"),
    pytest.param(write, NCHW, {"size": (8, 8)}, "size 8x8 contradicts it; leave size out", id="size"),
    pytest.param(write, PIXELS, {"mean": (0.5,)}, "takes pixels as they are: mean has no effect", id="uint8-mean"),
    pytest.param(write, PIXELS, {"preset": "imagenet"}, "mean has no effect", id="uint8-preset"),
    pytest.param(write, PIXELS, {"scale": 1.0}, "scale has no effect", id="uint8-scale"),
    pytest.param(write, GREY, {"bgr": True}, "has one channel: bgr has no effect", id="grey-bgr"),
    pytest.param(write, GREY, {"mean": (0.1, 0.2, 0.3)}, "has one channel: give one mean", id="grey-mean"),
    pytest.param(lambda d: {"x": RGB}, PIXELS, {"bgr": True}, "image options, but the samples are no folder of images", id="arrays"),
    pytest.param(lambda d: d / "nowhere", PIXELS, {"bgr": True}, "nowhere: no such file or folder", id="nowhere"),
    pytest.param(lambda d: mixed(d) / "a.npz", PIXELS, {"bgr": True}, "a.npz: image options, but these are no images", id="npz"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "inputs", "options", "text"), MISTAKES)
def test_mistakes_say_what_is_wrong(
    make: Callable[[Path], Any], inputs: str, options: dict[str, Any], text: str, tmp_path: Path
) -> None:
    images = ImageOptions(**options) if options else None
    with pytest.raises(DataError, match=text) as raised:
        list(open_samples(make(tmp_path), model(inputs), images=images))
    assert "\n" not in str(raised.value)


OPTIONS = [
    pytest.param({"preset": "coco"}, "unknown preset 'coco': one of imagenet, yolo", id="preset"),
    pytest.param({"resize": "fit"}, "unknown resize 'fit': one of stretch, crop", id="resize"),
    pytest.param({"size": (0, 8)}, "height and width start at 1", id="size"),
    pytest.param({"mean": (1.0, 2.0)}, "mean has 2 values", id="mean"),
    pytest.param({"std": (1.0, 0.0, 1.0)}, "std is 0: it must be above 0", id="std"),
    pytest.param({"scale": -1.0}, "scale is -1: it must be above 0", id="scale"),
    pytest.param({"scale": float("nan")}, "scale is not finite", id="nan-scale"),
    pytest.param({"mean": (float("nan"),)}, "mean is not finite", id="nan-mean"),
    pytest.param({"size": (99999, 99999)}, "give 67108864 pixels at most", id="huge"),
    pytest.param({"mean": (123.7,)}, "mean or std of 123.7, but pixels are scaled to 0..1", id="units"),
    pytest.param({"preset": "imagenet", "scale": 1.0}, "leave out scale", id="preset-scale"),
    pytest.param({"keep": 1.5, "resize": "crop"}, "keep is 1.5", id="keep"),
    pytest.param({"keep": 0.5}, "keep is for resize crop", id="keep-alone"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "text"), OPTIONS)
def test_options_that_make_no_sense(options: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError, match=text):
        ImageOptions(**options)


def test_without_pillow_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)  # as if it were not installed
    with pytest.raises(DataError, match=r"^images need pillow: pip install 'onnxq\[images\]'$"):
        open_samples(tmp_path, model(NCHW))


# the command line

DIGITS = Path(__file__).parent.parent / "models" / "digits_cnn.onnx"


def run(*args: Any) -> Any:
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """The digits model's own samples as PNG files."""
    with np.load(DIGITS.with_suffix(".calib.npz")) as arrays:
        images = arrays["image"][:12, 0]
    pixels = np.rint((images * 0.3081 + 0.1307) * 255).clip(0, 255).astype(np.uint8)
    return write(tmp_path / "digits", pixels)


def test_images_on_the_command_line(digits: Path, tmp_path: Path) -> None:
    how = ("--data", digits, "--mean", "0.1307", "--std", "0.3081")
    out = tmp_path / "out.onnx"
    shown = run("optimize", DIGITS, out, *how, "--dry-run")
    assert shown.exit_code == 0
    assert "12 images of" in shown.output
    assert "grey, resize stretch, (x/255 - (0.1307)) / (0.3081)" in " ".join(shown.output.split())
    assert "warning" not in shown.output
    done = run("optimize", DIGITS, out, *how, "--recipe", "int8", "--no-validate")
    assert (done.exit_code, done.stderr) == (0, "")
    compared = run("compare", DIGITS, out, *how)
    assert compared.exit_code == 0
    assert "SQNR" in compared.output


def test_pixels_that_are_not_scaled_are_warned_of(digits: Path, tmp_path: Path) -> None:
    how = ("--data", digits, "--scale", "1")
    shown = run("optimize", DIGITS, tmp_path / "out.onnx", *how, "--dry-run")
    assert "warning: input 'image' is fed values of 0 to 255, which spread" in shown.output
    done = run("optimize", DIGITS, tmp_path / "out.onnx", *how, "--recipe", "int8", "--no-validate")
    assert "onnxq: warning: input 'image' is fed values of 0 to 255" in done.stderr


WRONG = [
    pytest.param(("--mean", "a,b"), "--mean a,b: give one number", id="mean"),
    pytest.param(("--scale", "0"), "scale is 0: it must be above 0", id="zero"),
    pytest.param(("--mean", ""), "--mean : give one number", id="empty"),
    pytest.param(("--size", "big"), "--size big: give height x width", id="size"),
    pytest.param(("--size", "14x14"), "size 14x14 contradicts it", id="fixed"),
    pytest.param(("--preset", "cifar"), "unknown preset 'cifar'", id="preset"),
    pytest.param(("--resize", "fit"), "unknown resize 'fit'", id="resize"),
]


@pytest.mark.parametrize(("options", "text"), WRONG)
def test_wrong_options_are_exit_2(options: tuple[str, ...], text: str, digits: Path) -> None:
    done = run("optimize", DIGITS, digits / "out.onnx", "--data", digits, *options)
    assert done.exit_code == 2
    assert text in done.stderr


def test_image_options_need_images(digits: Path) -> None:
    data = DIGITS.with_suffix(".calib.npz")
    for args, text in (((), "give a folder of images"), (("--data", data), "these are no images")):
        for command in (("optimize", DIGITS, digits / "out.onnx"), ("compare", DIGITS, DIGITS)):
            done = run(*command, *args, "--bgr")
            assert done.exit_code == 2
            assert text in done.stderr
            assert done.stderr.count("\n") == 1
