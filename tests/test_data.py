"""Samples: what is accepted, how it is cut into feeds, and what each mistake is told."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import parser

from onnxq.data import open_samples
from onnxq.errors import DataError
from onnxq.model import Model
from onnxq.synthetic import synthetic_samples


def model(inputs: str = "float[N, 3] x", body: str = "y = Relu(x)", outputs: str = "float[N, 3] y",
          inits: str = "") -> Model:  # fmt: skip
    head = '<ir_version: 8, opset_import: ["": 17]>'
    return Model.from_proto(
        parser.parse_model(f"{head} g ({inputs}) => ({outputs}) {inits} {{ {body} }}")
    )


ROWS = np.arange(15, dtype=np.float32).reshape(5, 3)


def test_an_npz_is_cut_into_samples(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x=ROWS, labels=np.arange(5))
    samples = open_samples(path, model())
    feeds = list(samples)
    assert len(samples) == len(feeds) == 5
    assert [f["x"].shape for f in feeds] == [(1, 3)] * 5
    np.testing.assert_array_equal(np.concatenate([f["x"] for f in samples]), ROWS)
    assert samples.labels is not None
    last = samples.skip(3)
    np.testing.assert_array_equal(next(iter(last))["x"], ROWS[3:4])
    assert last.labels is not None
    assert last.labels.tolist() == [3, 4]
    assert len(samples.take(2)) == 2


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_large_files_are_not_read_whole(save: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    save(path, x=np.repeat(np.arange(4000, dtype=np.float32), 3000).reshape(4000, 3000))
    wide = model("float[N, 3000] x", outputs="float[N, 3000] y")
    tracemalloc.start()
    samples = open_samples(path, wide).skip(2000)
    assert [float(f["x"][0, 0]) for f in samples.take(5)] == [2000, 2001, 2002, 2003, 2004]
    assert tracemalloc.get_traced_memory()[1] < 2e6  # the array has 48 MB
    tracemalloc.stop()


def test_a_folder_holds_a_sample_a_file(tmp_path: Path) -> None:
    for i, row in enumerate(ROWS):
        np.savez(tmp_path / f"{i}.npz", x=row[None] if i % 2 else row, labels=i)
    samples = open_samples(str(tmp_path), model())
    np.testing.assert_array_equal(np.concatenate([f["x"] for f in samples]), ROWS)
    assert samples.labels is not None
    assert samples.labels.tolist() == list(range(5))


def test_a_function_yields_feeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_samples.py").write_text(
        "import numpy as np\ndef feeds():\n    for i in range(3):\n"
        "        yield {'x': np.full((1, 3), i, np.float32)}\n"
        "def broken():\n    yield {'x': 1 / 0}\n"
    )
    samples = open_samples("my_samples:feeds", model())
    assert [f["x"][0, 0] for f in samples] == [f["x"][0, 0] for f in samples] == [0, 1, 2]
    with pytest.raises(DataError, match=r"my_samples:broken: ZeroDivisionError"):
        open_samples("my_samples:broken", model())
    with pytest.raises(DataError, match="no_such_module"):
        open_samples("no_such_module:feeds", model())


@settings(derandomize=True, deadline=None, max_examples=40)
@given(total=st.integers(1, 20), batch=st.integers(1, 6))
def test_fixed_batches_hold_every_sample_once(total: int, batch: int) -> None:
    x = np.arange(total * 3, dtype=np.float32).reshape(total, 3)
    fixed = model(f"float[{batch}, 3] x", outputs=f"float[{batch}, 3] y")
    samples = open_samples({"x": x, "labels": np.arange(total)}, fixed)
    fed = np.concatenate([f["x"] for f in samples])
    assert all(f["x"].shape == (batch, 3) for f in samples)
    np.testing.assert_array_equal(fed[:total], x)
    np.testing.assert_array_equal(fed[total:], np.repeat(x[-1:], len(fed) - total, 0))


def test_state_and_scalars_are_one_a_sample() -> None:
    stream = model(
        "float[1, 3] x, float[2, 1, 4] state, int64 rate", "y = Identity(x) s = Identity(state)"
        " r = Identity(rate)", "float[1, 3] y, float[2, 1, 4] s, int64 r",
    )  # fmt: skip
    arrays = {"x": ROWS, "state": np.zeros((5, 2, 1, 4)), "rate": np.full(5, 16000)}
    feed = next(iter(open_samples(arrays, stream)))
    assert {k: v.shape for k, v in feed.items()} == {"x": (1, 3), "state": (2, 1, 4), "rate": ()}
    assert {k: str(v.dtype) for k, v in feed.items()} == {
        "x": "float32",
        "state": "float32",
        "rate": "int64",
    }


def test_safe_conversions_are_made() -> None:
    assert (
        next(iter(open_samples({"x": ROWS.astype(np.float64)}, model())))["x"].dtype == np.float32
    )
    assert next(iter(open_samples({"x": ROWS.astype(np.uint8)}, model())))["x"].dtype == np.float32
    ids = model("int64[N, 3] x", "y = Identity(x)", "int64[N, 3] y")
    assert next(iter(open_samples({"x": ROWS.astype(np.int32)}, ids)))["x"].dtype == np.int64


IDS = model("int8[N, 3] x", "y = Identity(x)", "int8[N, 3] y")
MISTAKES = [
    pytest.param({"picture": ROWS}, None, r"'picture' is no input; .* 'x' \[N, 3\] float32", id="name"),
    pytest.param({"labels": ROWS}, None, "input 'x' is missing", id="missing"),
    pytest.param({"x": ROWS[:, :2]}, None, r"sample 0: input 'x' is \[1, 2\], the model wants", id="shape"),
    pytest.param({"x": ROWS[:0]}, None, "no samples", id="empty"),
    pytest.param({"x": ROWS, "labels": np.arange(4)}, None, "4 labels for 5 samples", id="labels"),
    pytest.param({"x": np.where(ROWS > 5, np.inf, ROWS)}, None, "sample 2: input 'x' has infinite", id="inf"),
    pytest.param({"x": ROWS}, IDS, "is float32, the model wants int8", id="float-ids"),
    pytest.param({"x": np.full((1, 3), 300)}, IDS, "is int64, the model wants int8", id="too-large"),
    pytest.param([], None, "no samples", id="no-feeds"),
    pytest.param({"x": ROWS, "z": ROWS[:2]}, model("float[N, 3] x, float[N, 3] z"), "different numbers of samples: x 5, z 2", id="counts"),
    pytest.param(lambda: [{"x": ROWS[:1]}, 3], None, "yields int, not a dict of arrays", id="no-dict"),
    pytest.param(list, None, "yields no samples", id="no-yield"),
    pytest.param("onnxq.data.samples:LABELS", None, "is not a function that yields feeds", id="no-function"),
    pytest.param(__file__, model("", "y = Constant<value_float = 1.0>()", "float y"), "is no kind of samples", id="source"),
    pytest.param("nowhere", None, "no such file", id="path"),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "wanted", "text"), MISTAKES)
def test_mistakes_say_what_is_wrong(spec: Any, wanted: Model | None, text: str) -> None:
    with pytest.raises(DataError, match=text):
        list(open_samples(spec, wanted or model()))


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    for name, content in (("text.npz", b"hello"), ("empty.npz", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="cannot be read as"):
            open_samples(tmp_path / name, model())
    np.savez(tmp_path / "objects.npz", x=np.array([{}, None], object))
    with pytest.raises(DataError, match="cannot be read as"):
        open_samples(tmp_path / "objects.npz", model())


def test_a_model_without_inputs_takes_no_samples(tmp_path: Path) -> None:
    constant = model("", "y = Constant<value_float = 1.0>()", "float y")
    np.savez(tmp_path / "a.npz", x=ROWS)
    with pytest.raises(DataError, match="the model has no inputs"):
        open_samples(tmp_path / "a.npz", constant)


def test_samples_and_functions_in_memory() -> None:
    samples = open_samples(lambda: ({"x": row[None], "labels": 1} for row in ROWS), model())
    assert samples.labels is not None
    assert samples.labels.tolist() == [1] * 5
    assert open_samples(samples, model()) is samples


def test_synthetic_ids_stay_inside_their_table() -> None:
    gather = model(
        "int64[N, T] x", "c = Cast<to = 6>(x) y = Gather(t, c)", "float[N, T, 2] y",
        "<float[5, 2] t = {0,1,2,3,4,5,6,7,8,9}>",
    )  # fmt: skip
    samples = synthetic_samples(gather, 8)
    drawn = np.concatenate([f["x"].ravel() for f in samples])
    assert samples.synthetic
    assert set(drawn) == set(range(5))
    again = synthetic_samples(gather, 8)
    assert all(np.array_equal(a["x"], b["x"]) for a, b in zip(samples, again, strict=True))


def test_synthetic_sizes_are_tried_out() -> None:
    fixed_inside = model(
        "float[N, T] x", "k = Constant<value_ints = [-1, 224]>() y = Reshape(x, k)", "float[a, b] y"
    )
    assert next(iter(synthetic_samples(fixed_inside, 1)))["x"].shape == (1, 224)
    hopeless = model(
        "float[N, T] x",
        "k = Constant<value_ints = [-1, 7919]>() y = Reshape(x, k)",
        "float[a, b] y",
    )
    with pytest.raises(DataError, match="give samples with --data"):
        synthetic_samples(hopeless, 1)


def test_no_synthetic_strings() -> None:
    strings = model("string[2] x", "y = Identity(x)", "string[2] y")
    with pytest.raises(DataError, match="input 'x' is of strings"):
        synthetic_samples(strings, 1)
