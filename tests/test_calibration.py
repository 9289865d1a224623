from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import parser

from onnxq import calibration
from onnxq.calibration import Feed, calibrate, load_calibration, save_calibration, unmasked
from onnxq.errors import DataError, ModelError
from onnxq.instrument import SAMPLE, WHOLE, stride
from onnxq.model import Model
from onnxq.numerics import histograms
from onnxq.statistics import Histogram, MinMax, Statistic

RNG = np.random.default_rng(3)


def model(shape: str, body: str = "y = Relu(h)", opset: int = 17) -> Model:
    """h = x * 3 - 1, y made of h, of the given shape."""
    return Model.from_proto(
        parser.parse_model(f"""<ir_version: 8, opset_import: ["" : {opset}]>
        g (float[{shape}] x) => (float[{shape}] y) <float three = {{3}}, float one = {{1}}> {{
            t = Mul(x, three)
            h = Sub(t, one)
            {body}
        }}""")
    )


def feeds(*shapes: tuple[int, ...]) -> list[Feed]:
    return [{"x": RNG.normal(size=shape).astype(np.float32)} for shape in shapes]


def truth(data: list[Feed]) -> dict[str, list[np.ndarray]]:
    h = [feed["x"] * np.float32(3) - np.float32(1) for feed in data]
    return {"x": [feed["x"] for feed in data], "h": h, "y": [np.maximum(a, 0) for a in h]}


LARGE = (1, 5, 200, 200)
DIMS = [
    pytest.param("1, 5, 200, 200", LARGE, id="large"),
    pytest.param("N, C, H, W", LARGE, id="large-dynamic"),
    pytest.param("1, 3, 8, 8", (1, 3, 8, 8), id="small"),
    pytest.param("N, C, H, W", (1, 3, 8, 8), id="small-dynamic"),
    pytest.param("N", (WHOLE + 5,), id="large-vector"),
]


@pytest.mark.parametrize("opset", [7, 10, 13, 18, 21])
@pytest.mark.parametrize(("dims", "shape"), DIMS)
@pytest.mark.parametrize("kind", [MinMax, Histogram])
def test_extremes_are_exact(
    dims: str, shape: tuple[int, ...], kind: type[Statistic], opset: int
) -> None:
    data = feeds(shape, shape, shape)
    seen: Any = calibrate(model(dims, opset=opset), dict.fromkeys("xhy", kind), data)
    for name, values in truth(data).items():
        assert seen[name].lo == min(v.min() for v in values)
        assert seen[name].hi == max(v.max() for v in values)
        assert seen[name].count == 3
        assert not seen[name].has_nonfinite


@pytest.mark.parametrize(("dims", "shape"), DIMS)
def test_histograms_are_strided_samples_of_bounded_size(dims: str, shape: tuple[int, ...]) -> None:
    data = feeds(*[shape] * 8)
    seen: Any = calibrate(model(dims), {"h": Histogram, "x": Histogram}, data)
    size = int(np.prod(shape))
    for name in "hx":
        values = np.concatenate([v.reshape(-1) for v in truth(data)[name]])
        assert 8 * min(size, SAMPLE) * 0.9 <= seen[name].counts.sum() <= 8 * min(size, SAMPLE) + 8
        shares = np.cumsum(seen[name].counts) / seen[name].counts.sum()
        for q in (0.1, 0.5, 0.9):
            k = np.searchsorted(shares, q)
            left, _ = histograms.edges_of(seen[name].bins[k : k + 1])
            assert abs(np.mean(values < left) - q) < 0.05


@pytest.mark.parametrize("shape", [(64, 64, 64), (256, 4096), (1, 3, 416, 416), (5, 200, 200)])
def test_a_stride_visits_all_channels_and_columns_evenly(shape: tuple[int, ...]) -> None:
    size = int(np.prod(shape))
    step = stride(size)
    picked = np.concatenate([np.arange((i * 2654435769) % step, size, step) for i in range(16)])
    for index, n in zip(np.unravel_index(picked, shape), shape, strict=True):
        share = np.bincount(index, minlength=n) * n / len(picked)
        assert share.min() > 0.4, n
        assert share.max() < 1.8, n


def test_shapes_may_differ_from_sample_to_sample() -> None:
    data = feeds((1, 3, 8, 8), LARGE, (2, 1, 300, 150), (1, 1, 1, 1))
    for first in (data, data[::-1]):
        seen: Any = calibrate(model("N, C, H, W"), {"h": Histogram}, first)
        values = np.concatenate([v.reshape(-1) for v in truth(data)["h"]])
        assert (seen["h"].lo, seen["h"].hi) == (values.min(), values.max())


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), LARGE])
@pytest.mark.parametrize(
    "pool",
    [
        partial(ThreadPoolExecutor, 2),
        partial(ProcessPoolExecutor, 2, mp_context=get_context("spawn")),
    ],
    ids=["threads", "processes"],
)
def test_shards_merge_to_the_serial_result(
    pool: Callable[[], Executor], shape: tuple[int, ...]
) -> None:
    data = feeds(*[shape] * 19)
    wanted: dict[str, type[Statistic]] = {"x": Histogram, "h": Histogram, "y": MinMax}
    steps: list[int] = []
    with pool() as executor:
        sharded = calibrate(
            model("N, C, H, W"), wanted, data, executor=executor, progress=steps.append
        )
    assert sharded == calibrate(model("N, C, H, W"), wanted, data)
    assert steps == [8, 16, 19]


class Inline(Executor):
    """Runs work at once; counts how far the data was read."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@pytest.mark.parametrize("executor", [None, Inline()])
def test_samples_are_streamed(executor: Executor | None, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    read = done = 0

    def stream() -> Iterator[Feed]:
        nonlocal read
        for feed in feeds(*[(1, 1, 2, 2)] * 100):
            read += 1
            assert read - done <= 3 * calibration.CHUNK
            yield feed

    def progress(n: int) -> None:
        nonlocal done
        done = n

    calibrate(model("1, 1, 2, 2"), {"h": MinMax}, stream(), executor=executor, progress=progress)
    assert done == 100


@pytest.mark.parametrize("dims", ["1, 1, 400, 400", "1, 1, 8, 8"])
@pytest.mark.parametrize("kind", [MinMax, Histogram])
def test_infinities_inside_are_flagged_and_the_finite_part_is_exact(
    dims: str, kind: type[Statistic]
) -> None:
    shape = tuple(int(d) for d in dims.split(","))
    data = feeds(shape, shape)
    masked = model(dims, "z = Log(x)\n y = Exp(z)")
    data = [{"x": np.abs(f["x"])} for f in data]
    data[1]["x"][0, 0, 3, 3] = 0
    seen: Any = calibrate(masked, {"z": kind, "h": kind}, data)
    assert seen["z"].has_nonfinite
    assert not seen["h"].has_nonfinite
    logs = [np.log(f["x"][f["x"] > 0]) for f in data]
    np.testing.assert_allclose(seen["z"].lo, min(v.min() for v in logs), rtol=1e-6)
    np.testing.assert_allclose(seen["z"].hi, max(v.max() for v in logs), rtol=1e-6)


@pytest.mark.parametrize("kind", [MinMax, Histogram])
@pytest.mark.parametrize("side", [8, 400])
def test_half_precision(kind: type[Statistic], side: int) -> None:
    half = Model.from_proto(
        parser.parse_model(f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float16[1, {side}, {side}] x) => (float16[1, {side}, {side}] y) {{
            h = Neg(x)
            y = Neg(h)
        }}""")
    )
    x = RNG.normal(size=(1, side, side)).astype(np.float16)
    seen: Any = calibrate(half, {"h": kind, "x": kind}, [{"x": x}])
    assert (seen["h"].lo, seen["h"].hi) == (-x.max(), -x.min())
    assert (seen["x"].lo, seen["x"].hi) == (x.min(), x.max())


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        pytest.param(
            {"x": np.array([[1, np.nan]], np.float32)}, "sample 1, input 'x' has NaN", id="nan"
        ),
        pytest.param({"x": np.array([[1, np.inf]], np.float32)}, "has infinite values", id="inf"),
        pytest.param(
            {"z": np.array([[1, 2]], np.float32)}, "sample 1 has no input 'x'", id="missing"
        ),
        pytest.param({"x": np.array([1], np.float32)}, "sample 1 does not run: ", id="rank"),
        pytest.param({"x": np.array([[1, 2]], np.int64)}, "sample 1 does not run: ", id="dtype"),
    ],
)
@pytest.mark.parametrize("executor", [None, Inline()])
def test_bad_samples_are_named(feed: Feed, message: str, executor: Executor | None) -> None:
    with pytest.raises(DataError, match=message) as e:
        calibrate(model("1, 2"), {"h": MinMax}, [*feeds((1, 2)), feed], executor=executor)
    assert "\n" not in str(e.value)


def test_no_samples_and_unknown_tensors() -> None:
    with pytest.raises(DataError, match="no samples"):
        calibrate(model("1, 2"), {"h": MinMax}, [])
    with pytest.raises(ModelError, match="no activation 'three'"):
        calibrate(model("1, 2"), {"three": MinMax}, feeds((1, 2)))
    with pytest.raises(ModelError, match="'s': it is of type int64"):
        calibrate(model("1, 2", "s = Shape(h)\n y = Reshape(h, s)"), {"s": MinMax}, feeds((1, 2)))


def test_inputs_alone() -> None:
    data = feeds((1, 2))
    seen = calibrate(model("1, 2"), {"x": MinMax}, data)
    assert seen == {"x": MinMax.of(data[0]["x"])}


def test_nothing_wanted() -> None:
    assert calibrate(model("1, 2"), {}, feeds((1, 2))) == {}


def test_the_model_is_not_modified() -> None:
    m = model("1, 2")
    before = m.to_proto().SerializeToString()
    calibrate(m, {"h": Histogram}, feeds((1, 2)))
    assert m.to_proto().SerializeToString() == before


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "c.npz"
    data = feeds(LARGE)
    stats = calibrate(model("N, C, H, W"), {"h": Histogram, "x": MinMax}, data)
    stats["never"] = MinMax()
    save_calibration(path, stats, meta={"samples": 1})
    assert load_calibration(path) == (stats, {"samples": 1})
    first = path.read_bytes()
    save_calibration(path, stats, meta={"samples": 1})
    assert path.read_bytes() == first
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_foreign_and_newer_files(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "c.npz"
    with pytest.raises(DataError, match=r"cannot read .*No such file"):
        load_calibration(path)
    monkeypatch.setattr(calibration, "VERSION", 99)
    save_calibration(path, {"h": Histogram.of(np.ones(3))}, meta={})
    monkeypatch.undo()
    with pytest.raises(DataError, match="newer onnxq"):
        load_calibration(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not a calibration"):
        load_calibration(path)
    np.savez(path, x=np.ones(3))
    with pytest.raises(DataError, match="not a calibration"):
        load_calibration(path)
    np.save(path.with_suffix(".npy"), np.ones(3))
    with pytest.raises(DataError, match="not a calibration"):
        load_calibration(path.with_suffix(".npy"))
    for content in (b"", b"text", b'{"format": 1}'):
        path.write_bytes(content)
        with pytest.raises(DataError, match="not a calibration"):
            load_calibration(path)


def test_a_model_of_operators_of_others_alone() -> None:
    made = Model.from_proto(
        parser.parse_model("""<ir_version: 8, opset_import: ["com.microsoft" : 1]>
        g (float[2, 3] x) => (float[2, 3] y) {
            h = com.microsoft.Gelu(x)
            y = com.microsoft.Gelu(h)
        }""")
    )
    made.graph.tensors()["h"].dtype = np.dtype(np.float32)
    seen = calibrate(made, {"x": MinMax, "h": MinMax}, [{"x": np.full((2, 3), 9, np.float32)}])
    assert all(isinstance(s, MinMax) and s.lo == s.hi == 9 for s in seen.values())


MASKS = [
    ({"x": np.ones((1, 3)), "attention_mask": np.array([[1, 1, 0]])}, [[True, True, False]]),
    ({"Mask": np.array([[1.0, 0.0]])}, [[True, False]]),
    ({"token_type_ids": np.array([[1, 0]])}, None),
    ({"mask": np.array([1, 0])}, None),
    ({"mask": np.array([[-1e4, 0.0]])}, None),
    ({"mask": np.zeros((1, 2), np.int64)}, None),
]


@pytest.mark.parametrize(("feed", "kept"), MASKS)
def test_which_inputs_are_masks(feed: dict[str, np.ndarray], kept: list[list[bool]] | None) -> None:
    found = unmasked(feed)
    assert (None if found is None else found.tolist()) == kept
