"""Samples from files: .npy, ONNX test data, .wav, token ids; what is fed, and what mistakes are told."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from onnxq.data import Samples, open_samples
from onnxq.errors import DataError
from onnxq.model import Model

ROWS = np.arange(15, dtype=np.float32).reshape(5, 3)


def model(*inputs: str) -> Model:
    """A model that hands on its inputs."""
    names = [text.split()[-1] for text in inputs]
    body = " ".join(f"o{n} = Identity({n})" for n in names)
    outputs = ", ".join(
        f"{text.removesuffix(n)}o{n}" for text, n in zip(inputs, names, strict=True)
    )
    head = '<ir_version: 8, opset_import: ["": 17]>'
    text = f"{head} g ({', '.join(inputs)}) => ({outputs}) {{ {body} }}"
    return Model.from_proto(parser.parse_model(text))


ONE = "float[N, 3] x"
TWO = (ONE, "float[N, 2] z")


def fed(samples: Samples, name: str = "x") -> Any:
    return np.concatenate([feed[name] for feed in samples])


def save(path: Path, array: Any) -> Path:
    np.save(path, array)
    return path


# .npy


def test_a_npy_is_cut_into_samples(tmp_path: Path) -> None:
    samples = open_samples(save(tmp_path / "a.npy", ROWS), model(ONE))
    assert [f["x"].shape for f in samples] == [(1, 3)] * 5
    np.testing.assert_array_equal(fed(samples), ROWS)
    batches = open_samples(tmp_path / "a.npy", model("float[2, 3] x"))
    assert [f["x"].shape for f in batches] == [(2, 3)] * 3


def test_a_npy_is_not_read_whole(tmp_path: Path) -> None:
    big = np.repeat(np.arange(4000, dtype=np.float32), 3000).reshape(4000, 3000)
    path = save(tmp_path / "a.npy", big)
    tracemalloc.start()
    samples = open_samples(path, model("float[N, 3000] x")).skip(2000)
    assert [float(f["x"][0, 0]) for f in samples.take(3)] == [2000, 2001, 2002]
    assert tracemalloc.get_traced_memory()[1] < 2e6  # the array has 48 MB
    tracemalloc.stop()


def test_a_folder_of_npy_holds_a_sample_a_file(tmp_path: Path) -> None:
    for i, row in enumerate(ROWS):
        save(tmp_path / f"{i}.npy", row[None] if i % 2 else row)
    (tmp_path / "README.md").write_text("not a sample")
    (tmp_path / ".hidden.npz").write_text("neither")
    samples = open_samples(tmp_path, model(ONE))
    np.testing.assert_array_equal(fed(samples), ROWS)
    assert samples.description == f"5 files of {tmp_path}"


# ONNX test data


def data_set(folder: Path, *arrays: Any, names: tuple[str, ...] = ()) -> Path:
    folder.mkdir(parents=True)
    for i, array in enumerate(arrays):
        tensor = numpy_helper.from_array(np.asarray(array), names[i] if names else "")
        (folder / f"input_{i}.pb").write_bytes(tensor.SerializeToString())
    return folder


def test_test_data_sets_are_a_sample_each(tmp_path: Path) -> None:
    for i in (10, 2, 0):
        data_set(tmp_path / f"test_data_set_{i}", ROWS[:1] + i, np.zeros((1, 2), np.float32))
    (tmp_path / "test_data_set_0" / "output_0.pb").write_bytes(b"")
    (tmp_path / "model.onnx").write_bytes(b"")
    samples = open_samples(tmp_path, model(*TWO))
    assert [float(f["x"][0, 0]) for f in samples] == [0, 2, 10]
    assert all(f["z"].shape == (1, 2) for f in samples)
    (one,) = open_samples(tmp_path / "test_data_set_2", model(*TWO))
    np.testing.assert_array_equal(one["x"], ROWS[:1] + 2)


def test_names_in_test_data_go_before_the_order(tmp_path: Path) -> None:
    z = np.ones((1, 2), np.float32)
    (feed,) = open_samples(data_set(tmp_path / "s", z, ROWS[:1], names=("z", "x")), model(*TWO))
    np.testing.assert_array_equal(feed["z"], z)


def test_sequences_are_refused() -> None:
    text = '<ir_version: 8, opset_import: ["": 17]> g (seq(float[N]) s) => (int64 n) { n = SequenceLength(s) }'
    with pytest.raises(DataError, match="input 's' is of type sequence: only tensors can be fed"):
        open_samples([{"s": [ROWS[0]]}], Model.from_proto(parser.parse_model(text)))


# .wav


def wav(path: Path, values: Any, *, rate: int = 8000, width: int = 2) -> Path:
    """Write floats (values or values x channels) as PCM of `width` bytes."""
    values = np.asarray(values, np.float64)
    full = 2.0 ** (8 * width - 1)
    whole = np.clip(np.rint(values * full), -full, full - 1).astype(np.int64)
    if width == 1:
        data = (whole + 128).astype(np.uint8).tobytes()
    else:
        data = whole.astype("<i8").reshape(-1, 1).view(np.uint8)[:, :width].tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as stream:
        stream.setnchannels(values.shape[1] if values.ndim == 2 else 1)
        stream.setsampwidth(width)
        stream.setframerate(rate)
        stream.writeframes(data)
    return path


TONE = 0.9 * np.sin(np.arange(100) * 0.3)


@pytest.mark.parametrize(("width", "step"), [(1, 2**-7), (2, 2**-15), (3, 2**-23), (4, 2**-31)])
def test_pcm_of_each_width_is_read(width: int, step: float, tmp_path: Path) -> None:
    wav(tmp_path / "a.wav", TONE, width=width)
    got = fed(open_samples(tmp_path, model("float[1, 100] x")))
    np.testing.assert_allclose(got[0], TONE, atol=max(step, 1e-7))
    wav(tmp_path / "a.wav", [-1.0, 1.0] * 50, width=width)
    extremes = fed(open_samples(tmp_path, model("float[1, 100] x")))
    assert extremes.min() == -1
    assert 1 - 1.5 * step <= extremes.max() <= 1


def extensible(path: Path) -> Path:
    """Rewrite a PCM file as WAVE_FORMAT_EXTENSIBLE, as other programs write 24 bits."""
    old = path.read_bytes()
    tail = b"\x16\0\x18\0\4\0\0\0\1\0\0\0\0\0\x10\0\x80\0\0\xaa\0\x38\x9b\x71"
    head = b"RIFF" + (len(old) + 16).to_bytes(4, "little") + b"WAVEfmt \x28\0\0\0\xfe\xff"
    return broken(path, head + old[22:36] + tail + old[36:])


def test_extensible_files_are_pcm_too(tmp_path: Path) -> None:
    extensible(wav(tmp_path / "a.wav", TONE, width=3))
    got = fed(open_samples(tmp_path, model("float[1, 50] x")))
    np.testing.assert_allclose(got.ravel(), TONE, atol=2**-22)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        pytest.param("float[40] x", (40,), id="n"),
        pytest.param("float[1, 40] x", (1, 40), id="1n"),
        pytest.param("float[1, 1, 40] x", (1, 1, 40), id="11n"),
        pytest.param("float[N, 40] x", (1, 40), id="batch"),
        pytest.param("float[2, 1, 40] x", (2, 1, 40), id="fixed-batch"),
    ],
)
def test_sound_is_cut_into_windows(text: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    wav(tmp_path / "a" / "long.wav", TONE)  # 2 windows and half a one
    wav(tmp_path / "b" / "rest.wav", TONE[:50])  # 1 window, the rest is too short
    wav(tmp_path / "b" / "short.wav", TONE[:5])
    samples = open_samples(tmp_path, model(text))
    assert samples.description.startswith("5 windows of 40 values (0.005 s at 8000 Hz) from 3 .wav")
    assert {f["x"].shape for f in samples} == {shape}
    got = np.concatenate([f["x"].reshape(-1, 40) for f in samples])[:5]
    wanted = np.zeros((5, 40))
    wanted[:3].flat[:100] = TONE
    wanted[3], wanted[4, :5] = TONE[:40], TONE[:5]
    np.testing.assert_allclose(got, wanted, atol=2**-15)


@pytest.mark.parametrize(
    ("text", "axes"), [("float[T] x", 1), ("float[N, T] x", 2), ("float[1, 1, T] x", 3)]
)
def test_sound_of_free_length_is_fed_whole(text: str, axes: int, tmp_path: Path) -> None:
    wav(tmp_path / "a.wav", np.stack([TONE, 0 * TONE], 1))
    wav(tmp_path / "b.wav", TONE[:50])
    feeds = list(open_samples(tmp_path, model(text)))
    assert [f["x"].shape for f in feeds] == [(1,) * (axes - 1) + (n,) for n in (100, 50)]
    np.testing.assert_allclose(feeds[0]["x"].ravel(), TONE / 2, atol=2**-14)  # mean of the channels


def test_long_recordings_of_free_length_are_cut(tmp_path: Path) -> None:
    wav(tmp_path / "a.wav", np.zeros(1600), rate=10)  # 160 s: 5 parts of 30 s and a rest of 10 s
    samples = open_samples(tmp_path, model("float[1, T] x"))
    assert [f["x"].shape[1] for f in samples] == [300] * 5


# token ids


IDS = "int64[N, T] input_ids"


def test_lines_of_ids_are_samples(tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    path.write_text("\ufeff101 7,8, 102\n\n  101\t102,\n", encoding="utf-8")
    feeds = list(open_samples(path, model(IDS)))
    assert [f["input_ids"].tolist() for f in feeds] == [[[101, 7, 8, 102]], [[101, 102]]]
    assert feeds[0]["input_ids"].dtype == np.int64
    (flat, _) = open_samples(path, model("int32[T] tokens"))
    assert flat["tokens"].tolist() == [101, 7, 8, 102]


def test_masks_types_and_positions_go_with_ids(tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    path.write_text("5 6 7\n8\n")
    names = ("attention_mask", "token_type_ids", "position_ids")
    free = open_samples(path, model(*(f"int64[N, T] {n}" for n in names), IDS))
    assert [{n: f[n].tolist() for n in names} for f in free] == [
        {"attention_mask": [[1, 1, 1]], "token_type_ids": [[0, 0, 0]], "position_ids": [[0, 1, 2]]},
        {"attention_mask": [[1]], "token_type_ids": [[0]], "position_ids": [[0]]},
    ]
    fixed = open_samples(path, model("int32[2, 2] input_ids", "float[2, 2] attention_mask"))
    (feed,) = fixed
    assert feed["input_ids"].tolist() == [[5, 6], [8, 0]]
    assert feed["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert fixed.description.endswith("length 2: 1 cut, 1 filled up")
    (feed,) = open_samples(path, model("int64[2, T] input_ids"))
    assert feed["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]


# mistakes


def broken(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def cut_off(path: Path) -> Path:
    wav(path, TONE)
    path.write_bytes(path.read_bytes()[:-20])
    return path


def float_wav(path: Path) -> Path:
    wav(path, TONE)
    content = bytearray(path.read_bytes())
    content[20] = 3  # WAVE_FORMAT_IEEE_FLOAT
    return broken(path, bytes(content))


def two(folder: Path, make: Callable[[Path], Any]) -> Path:
    make(folder)
    return folder


def sequence_pb() -> bytes:
    sequence: bytes = numpy_helper.from_list([ROWS], "s").SerializeToString()
    return sequence


WAVE = "float[1, 40] x"
MISTAKES = [
    pytest.param(lambda d: save(d / "a.npy", np.array([{}, None], object)), ONE, "a.npy: cannot be read as .npy: it holds no array of numbers", id="npy-pickled"),
    pytest.param(lambda d: broken(d / "a.npy", b"\x93NUMPY\x01\x00v\x00{'descr'"), ONE, "a.npy: cannot be read as .npy", id="npy-cut"),
    pytest.param(lambda d: save(d / "a.npy", ROWS.astype("<U4")), ONE, "is <U4, the model wants float32", id="npy-type"),
    pytest.param(lambda d: save(d / "a.npy", ROWS), "int64[N, 3] x", "is float32, the model wants int64", id="npy-floats"),
    pytest.param(lambda d: save(d / "a.npy", ROWS), TWO, "a .npy holds one array, but the model has 2 inputs: 'x' .* give an .npz", id="npy-inputs"),
    pytest.param(lambda d: two(d, lambda f: save(f / "a.npy", ROWS[:, :2])), ONE, r"is \[5, 2\], the model wants \[N, 3\]", id="npy-shape"),
    pytest.param(lambda d: two(d, lambda f: broken(f / "b.npy", b"")), ONE, "b.npy: cannot be read as .npy", id="npy-empty"),
    pytest.param(lambda d: two(d, lambda f: (save(f / "a.npy", ROWS), broken(f / "b.npz", b""))), ONE, "holds 1 .npy and 1 .npz: keep one kind", id="mixed"),
    pytest.param(lambda d: two(d, lambda f: (data_set(f / "test_data_set_0", ROWS), wav(f / "b.wav", TONE))), ONE, "holds 1 .wav and 1 sets|holds 1 sets and 1 .wav", id="mixed-sets"),
    pytest.param(lambda d: d, ONE, "no samples in this folder, it is empty; give an .npz", id="empty"),
    pytest.param(lambda d: two(d, lambda f: broken(f / "a.csv", b"1")), ONE, "no samples in this folder, only .csv", id="other"),
    pytest.param(lambda d: broken(d / "a.csv", b"1"), ONE, "a.csv: is no kind of samples; give an .npz", id="suffix"),
    pytest.param(lambda d: data_set(d / "s", ROWS[:1]), TWO, r"input_1.pb is missing, for input 'z'", id="pb-missing"),
    pytest.param(lambda d: data_set(d / "s", ROWS[:1], ROWS), ONE, "s: has 2 inputs, the model takes 1", id="pb-surplus"),
    pytest.param(lambda d: broken(d / "s" / "input_0.pb", sequence_pb()).parent, ONE, "input_0.pb: is no tensor", id="pb-sequence"),
    pytest.param(lambda d: broken(d / "s" / "input_0.pb", b"\x08").parent, ONE, "input_0.pb: cannot be read as a tensor", id="pb-broken"),
    pytest.param(lambda d: broken(d / "s" / "input_0.pb", onnx.TensorProto(data_type=1, dims=[3]).SerializeToString()).parent, ONE, "input_0.pb: holds no values of its shape", id="pb-short"),
    pytest.param(lambda d: broken(d / "s" / "input_0.pb", onnx.TensorProto(data_type=1, data_location="EXTERNAL").SerializeToString()).parent, ONE, "keeps its values in another file", id="pb-external"),
    pytest.param(lambda d: two(d, lambda f: broken(f / "a.wav", b"RIFF")), WAVE, "a.wav: cannot be read as a PCM .wav: .*convert it to 16-bit PCM", id="wav-broken"),
    pytest.param(lambda d: two(d, lambda f: float_wav(f / "a.wav")), WAVE, "a.wav: cannot be read as a PCM .wav: unknown format", id="wav-floats"),
    pytest.param(lambda d: two(d, lambda f: cut_off(f / "a.wav")), "float[1, T] x", "a.wav: cut off", id="wav-cut"),
    pytest.param(lambda d: two(d, lambda f: wav(f / "a.wav", [])), WAVE, "a.wav: holds no sound", id="wav-empty"),
    pytest.param(lambda d: two(d, lambda f: (wav(f / "a.wav", TONE), wav(f / "b.wav", TONE, rate=16000))), WAVE, "b.wav is at 16000 Hz, .*a.wav at 8000 Hz: resample", id="wav-rates"),
    pytest.param(lambda d: wav(d / "a.wav", TONE), "float[1, 3, 40] x", r"input 'x' \[1, 3, 40\] float32: sound is fed as floats", id="wav-shape"),
    pytest.param(lambda d: wav(d / "a.wav", TONE), "int64[1, 40] x", "sound is fed as floats", id="wav-type"),
    pytest.param(lambda d: wav(d / "a.wav", TONE), (WAVE, "int64[1] sr"), "a .wav holds one array, but the model has 2 inputs", id="wav-inputs"),
    pytest.param(lambda d: broken(d / "a.txt", b"1 2\nhello world\n"), IDS, "line 2: 'hello' is no token id", id="text-words"),
    pytest.param(lambda d: broken(d / "a.txt", b"1 2.5"), IDS, "line 1: '2.5' is no token id", id="text-floats"),
    pytest.param(lambda d: broken(d / "a.txt", b"1 3000000000"), "int32[N, T] x", "line 1: 3000000000 is out of the range of the input's type int32", id="text-range"),
    pytest.param(lambda d: broken(d / "a.txt", b"\n \n"), IDS, "no samples: write token ids", id="text-empty"),
    pytest.param(lambda d: broken(d / "a.txt", b"\xff\xfe1"), IDS, "cannot be read as text", id="text-bytes"),
    pytest.param(lambda d: broken(d / "a.txt", b"1"), ONE, "ids fill one integer input", id="text-float-input"),
    pytest.param(lambda d: broken(d / "a.txt", b"1"), (IDS, "int64[N, H, T, D] past"), "ids fill one integer input .* 'past'", id="text-more-inputs"),
    pytest.param(lambda d: broken(d / "a.txt", b"1"), (IDS, "int64[N, 1, T, T] attention_mask"), r"'attention_mask' is \[N, 1, T, T\], the ids \[N, T\]", id="text-mask-shape"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "inputs", "text"), MISTAKES)
def test_mistakes_say_what_is_wrong(
    make: Callable[[Path], Path], inputs: str | tuple[str, ...], text: str, tmp_path: Path
) -> None:
    wanted = model(*((inputs,) if isinstance(inputs, str) else inputs))
    with pytest.raises(DataError, match=text) as raised:
        list(open_samples(make(tmp_path), wanted))
    assert "\n" not in str(raised.value)


def test_nothing_is_imported_before_it_is_used() -> None:
    code = (
        "import sys, onnxq; assert not {'onnx', 'numpy', 'onnxruntime'} & set(sys.modules);"
        "import onnxq.data;"
        "heavy = {'PIL', 'wave', 'onnxruntime', 'onnxq.data.images', 'onnxq.data.tokens'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
