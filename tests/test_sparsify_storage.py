"""Constants without their zeros: what is written, what it costs, who finds it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import helper, numpy_helper, parser

from onnxq import inspect, runtime
from onnxq.errors import RecipeError
from onnxq.lint import check as check_target
from onnxq.loading import load
from onnxq.looking import compare
from onnxq.model import Model
from onnxq.passes import DequantizeModel, QuantizeStatic, QuantizeWeights, SparsifyStorage, cleanup
from onnxq.passes.bitmaps import Bitmap, Tables, expanded, restored, spread_constant
from onnxq.passes.encodings import Emitter
from onnxq.targets import load_target
from onnxq.testing import check
from onnxq.weight_table import weight_table
from onnxq.weights import bytes_in
from onnxq.workflow import optimize


def zeroed(shape: tuple[int, ...], zeros: float, seed: int = 0) -> np.ndarray:
    """Weights of which exactly that share is zero."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape).astype(np.float32)
    w.reshape(-1)[rng.permutation(w.size)[: round(zeros * w.size)]] = 0
    return w


def matmul(zeros: float = 0.5, dtype: Any = np.float32, shape: tuple[int, int] = (300, 101)) -> Any:
    """y = MatMul(x, Cast(w)) with a weight of that type; without a Cast for float32."""
    k, n = shape
    proto = parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 21]> g (float[a,{k}] x) => (float[a,{n}] y)'
        "{ v = Cast <to = 1> (w)  y = MatMul (x, v) }"
    )
    w = zeroed(shape, zeros)
    if np.dtype(dtype).kind != "f":
        info = np.iinfo(np.dtype(dtype)) if np.dtype(dtype).kind in "iu" else None
        top = 7 if info is None else min(100, info.max)
        w = np.clip(
            np.round(np.sign(w) * (1 + 30 * abs(w))), -top if info is None or info.min else 0, top
        )
    proto.graph.initializer.append(numpy_helper.from_array(w.astype(dtype), "w"))
    if dtype is np.float32:
        del proto.graph.node[0]
        proto.graph.node[0].input[1] = "w"
    return proto


FLOAT16, INT4, UINT4 = (helper.tensor_dtype_to_np_dtype(k) for k in (10, 22, 21))


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [(np.float32, 17), (np.float16, 9), (np.float64, 33), (np.int8, 5), (INT4, 3)],
)
def test_half_of_them_zeros(dtype: Any, bits: float) -> None:
    proto = matmul(0.5, dtype, (300, 501))
    done = check(SparsifyStorage(ratio=0.99), proto)
    assert [n.changed for n in done.notes] == [True]
    assert "50.0% zeros" in done.notes[0].text
    assert "(bitmap)" in done.notes[0].text
    assert stored_bits(done.model, 300 * 501) == pytest.approx(bits, rel=0.02)
    DequantizeModel()(done.model)
    w = done.model.nodes("MatMul", "Cast")[0].inputs[-1]
    assert (w.dtype, w.shape) == (np.dtype(dtype), (300, 501))
    np.testing.assert_array_equal(w.values, numpy_helper.to_array(proto.graph.initializer[0]))


def stored_bits(model: Model, weights: int) -> float:
    """Bits a weight of what is neither a table nor a small constant."""
    sizes = {
        t.name: bytes_in(t) for t in model.graph.tensors().values() if isinstance(t, gs.Constant)
    }
    return 8 * sum(s for n, s in sizes.items() if not n.startswith("bitmap_")) / weights


def test_values_are_the_same_to_the_bit() -> None:
    proto = matmul(0.6)
    model = Model.from_proto(proto)
    SparsifyStorage()(model)
    (row,) = weight_table(model)
    assert row.shape == (300, 101)
    DequantizeModel()(model)
    assert [n.op for n in model.nodes()] == ["MatMul"]
    w = model.nodes("MatMul")[0].inputs[1]
    np.testing.assert_array_equal(w.values, zeroed((300, 101), 0.6))
    again = onnx.load_from_string(model.to_proto().SerializeToString())
    assert again.graph.initializer[0].raw_data == proto.graph.initializer[0].raw_data


def test_almost_all_zeros_are_coordinates_that_the_full_checker_takes() -> None:
    done = check(SparsifyStorage(), matmul(0.995))
    assert "(coo)" in done.notes[0].text
    proto = done.model.to_proto()
    assert [n.op_type for n in proto.graph.node] == ["Constant", "MatMul"]
    assert not proto.graph.sparse_initializer
    again = Model.from_proto(proto)
    (row,) = weight_table(again)
    assert row.bits == pytest.approx(0.005 * 96, rel=0.05)
    cleanup(again)  # makes initializers of Constant nodes: it stays sparse
    assert again.to_proto().graph.node[0].op_type == "Constant"
    assert len(again.copy().to_proto().SerializeToString()) < 4000
    SparsifyStorage()(again)
    assert [n.op for n in again.nodes()] == ["MatMul"]
    assert again.nodes()[0].inputs[1].values.shape == (300, 101)


@pytest.mark.parametrize("form", ["bitmap", "coo"])
def test_one_form_alone(form: Any) -> None:
    done = check(SparsifyStorage(form=form), matmul(0.9))
    assert f"({form})" in done.notes[0].text


def test_integers_leave_out_their_zero_point() -> None:
    model = Model.from_proto(matmul(0.5))
    QuantizeWeights(format="uint8", symmetric=False, granularity="tensor", encoding="storage")(
        model
    )
    notes = SparsifyStorage()(model)
    assert "50." in notes[0].text
    (row,) = weight_table(model)
    assert row.bits == pytest.approx(5, abs=0.2)
    onnx.checker.check_model(model.to_proto(), full_check=True)


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("encoding", ["compute", "storage"])
def test_onnxruntime_fuses_as_it_does_with_dense_weights(
    format: str, encoding: Any, tmp_path: Path
) -> None:
    target = load_target("ort-cpu")
    dense = Model.from_proto(matmul(0.5, shape=(512, 256)))
    QuantizeWeights(format=format, granularity="group", encoding=encoding, target=target)(dense)
    sparse = dense.copy()
    assert any(n.changed for n in SparsifyStorage(target=target)(sparse))
    found = [optimized(m, tmp_path) for m in (dense, sparse)]
    assert found[0] == found[1] == ["MatMulNBits" if encoding == "compute" else "MatMul"]
    assert len(sparse.to_proto().SerializeToString()) < 0.9 * len(
        dense.to_proto().SerializeToString()
    )


def optimized(model: Model, folder: Path) -> list[str]:
    """The operators that onnxruntime runs."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    proto = model.to_proto().SerializeToString()
    ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(folder / "optimized.onnx").graph
    return [n.op_type for n in graph.node]


CONV = """<ir_version: 8, opset_import: ["" : 13]> g (float[1,64,8,8] x) => (float[1,64,8,8] y)
     { y = Conv <pads = [1,1,1,1]> (x, w) }"""


def test_quantized_convolutions_stay_quantized(tmp_path: Path) -> None:
    from onnxq.data import Samples
    from onnxq.synthetic import synthetic_samples

    proto = parser.parse_model(CONV)
    proto.graph.initializer.append(numpy_helper.from_array(zeroed((64, 64, 3, 3), 0.5), "w"))
    dense = Model.from_proto(proto)
    samples: Samples = synthetic_samples(dense, 2)
    QuantizeStatic(target=load_target("generic"), samples=samples)(dense)
    sparse = dense.copy()
    assert any(n.changed for n in SparsifyStorage()(sparse))
    assert optimized(dense, tmp_path) == optimized(sparse, tmp_path)
    feed = next(iter(samples))
    one, two = (runtime.run(runtime.session(m), feed) for m in (dense, sparse))
    np.testing.assert_array_equal(one["y"], two["y"])


def test_what_is_shared_is_written_once_and_bodies_see_it() -> None:
    proto = parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]> g (float[2,64] x, bool c) => (float[2,64] y) {
          h = MatMul (x, w)
          y = If (c) <then_branch = t () => (float[2,64] a) { a = MatMul (h, w) },
                      else_branch = e () => (float[2,64] b) { b = MatMul (h, v) }>
        }""")
    for i, name in enumerate(("w", "v")):
        values = numpy_helper.from_array(zeroed((64, 64), 0.9, i), name)
        proto.graph.initializer.append(values)
    done = check(SparsifyStorage(), proto)
    assert len([n for n in done.notes if n.changed]) == 2
    names = [t.name for t in done.model.to_proto().graph.initializer]
    assert len([n for n in names if n.endswith("bitmap_places")]) == 1


DECLINES = [
    pytest.param(matmul(0.0), SparsifyStorage(), [], id="no-zeros"),
    pytest.param(matmul(0.5, shape=(20, 20)), SparsifyStorage(), [], id="small"),
    pytest.param(
        matmul(0.5), SparsifyStorage(ratio=0.5), ["50.0% zeros, 121200 bytes"], id="ratio"
    ),
    pytest.param(
        matmul(0.5), SparsifyStorage(form="coo"), ["50.0% zeros, 121200 bytes; coo"], id="coo"
    ),
    pytest.param(
        matmul(0.5), SparsifyStorage(target=load_target("generic")),
        ["generic does not read sparse constants"], id="target",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("proto", "pass_", "why"), DECLINES)
def test_declines(proto: Any, pass_: SparsifyStorage, why: list[str]) -> None:
    model = Model.from_proto(proto)
    before = model.to_proto()
    notes = pass_(model)
    assert model.to_proto() == before
    assert len(notes) == len(why)
    for note, text in zip(notes, why, strict=True):
        assert text in note.text
        assert not note.changed


def test_old_opsets_and_outputs_are_left_alone() -> None:
    proto = matmul(0.995)
    proto.opset_import[0].version = 10
    del proto.graph.output[:]
    proto.graph.output.append(helper.make_tensor_value_info("y", 1, ["a", 101]))
    model = Model.from_proto(proto)
    assert not SparsifyStorage()(model)
    assert SparsifyStorage().opset == 12
    proto = matmul(0.9)
    proto.graph.output.append(helper.make_tensor_value_info("w", 1, [300, 101]))
    assert not SparsifyStorage()(Model.from_proto(proto))


def test_too_little_for_the_tables() -> None:
    """Two tables of 9 kB in all are shared by all bitmaps of a model."""
    assert not any(
        n.changed for n in SparsifyStorage()(Model.from_proto(matmul(0.7, shape=(50, 60))))
    )


def test_what_loading_takes_is_bounded() -> None:
    weights = 300 * 501
    for memory, changed in ((weights * 22 >> 20, False), ((weights * 22 >> 20) + 1, True)):
        (note,) = SparsifyStorage(load_memory_mb=memory)(Model.from_proto(matmul(shape=(300, 501))))
        assert note.changed == changed
        assert ("load_memory_mb" in note.text) != changed
    (note,) = SparsifyStorage(load_memory_mb=0)(Model.from_proto(matmul(0.995)))
    assert "(coo)" in note.text


def test_negative_zeros_are_zeros_and_nan_is_not() -> None:
    w = np.array([-0.0, np.nan, 0.0, 2.0], np.float32)
    found = Bitmap.of(w, np.float32(0))
    assert found.bits.tolist() == [0b1010]
    np.testing.assert_array_equal(found.dense(), w)


@pytest.mark.parametrize("zeros", [0.5, 0.995])
def test_data_files(zeros: float, tmp_path: Path) -> None:
    """Bitmaps and coordinates beside the model, read from there by us and by onnxruntime."""
    proto = matmul(zeros, shape=(3000, 101))
    onnx.save(proto, tmp_path / "a.onnx", save_as_external_data=True, location="a.data")
    model = Model.load(tmp_path / "a.onnx")
    assert any(n.changed for n in SparsifyStorage()(model))
    model.save(tmp_path / "b.onnx")
    assert (tmp_path / "b.onnx").stat().st_size < 20_000
    onnx.checker.check_model(str(tmp_path / "b.onnx"), full_check=True)
    again = Model.load(tmp_path / "b.onnx")
    assert bool(again.data_files()) == (zeros == 0.5)  # coordinates are in the model itself
    assert weight_table(again)[0].bits < 18
    feed = {"x": np.ones((1, 3000), np.float32)}
    one, two = (runtime.run(runtime.session(tmp_path / f), feed) for f in ("a.onnx", "b.onnx"))
    np.testing.assert_allclose(one["y"], two["y"], rtol=1e-5, atol=1e-4)
    again.save(tmp_path / "b.onnx")
    np.testing.assert_array_equal(
        runtime.run(runtime.session(tmp_path / "b.onnx"), feed)["y"], two["y"]
    )


@pytest.mark.parametrize("is_asked", [True, False])
@pytest.mark.parametrize("zeros", [0.6, 0.995])
def test_inspect_compare_and_quantize(zeros: float, is_asked: bool, tmp_path: Path) -> None:
    onnx.save(matmul(zeros), tmp_path / "a.onnx")
    model = load(tmp_path / "a.onnx")
    SparsifyStorage()(model)
    model.save(tmp_path / "b.onnx")
    (row,) = inspect(tmp_path / "b.onnx").stored
    assert row.bits < 14
    assert row.op == "MatMul"
    found = compare(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert found.fidelity.sqnr_db > 100
    report = optimize(
        tmp_path / "b.onnx", tmp_path / "c.onnx", recipe="int8-weights", requantize=is_asked
    )
    assert report.stored[0].format == "int8"
    assert (tmp_path / "c.onnx").stat().st_size < 40_000
    before = (tmp_path / "b.onnx").stat().st_size
    kept = optimize(tmp_path / "b.onnx", tmp_path / "c.onnx", recipe="cleanup")
    assert kept.size_bytes[1] <= before  # a clean-up leaves it sparse


@pytest.mark.parametrize("recipe", ["sparse", "slim"])
def test_a_sparse_model_again(recipe: str, tmp_path: Path) -> None:
    """What is looked at is dense, and as large as that; sparse again where the recipe stores so."""
    model = Model.from_proto(matmul(0.6, shape=(300, 104)))
    SparsifyStorage()(model)
    model.save(tmp_path / "b.onnx")
    dense = model.copy()
    restored(dense, floats=True)
    assert sum(dense.weight_sizes()) >= 4 * 300 * 104
    made = optimize(tmp_path / "b.onnx", tmp_path / "c.onnx", recipe=recipe, allow_unchanged=True)
    before, after = made.size_bytes
    assert after < 1.02 * before if recipe == "sparse" else after > 4 * 300 * 104


@pytest.mark.parametrize("zeros", [0.6, 0.995])
def test_check_knows_who_reads_it(zeros: float, tmp_path: Path) -> None:
    model = Model.from_proto(matmul(zeros))
    SparsifyStorage()(model)
    model.save(tmp_path / "b.onnx")
    assert check_target(tmp_path / "b.onnx", target="ort-cpu").is_clean
    found = check_target(tmp_path / "b.onnx", target="openvino")
    assert [v.rule for v in found.violations] == ["sparse_weights"]


def test_targets_name_forms_that_are_known(tmp_path: Path) -> None:
    base = 'extends = "generic"\nsparse_weights = ["bitmask"]\n'
    (tmp_path / "mine.toml").write_text(base)
    with pytest.raises(RecipeError, match="sparse_weights knows no bitmask: bitmap, coo"):
        load_target(str(tmp_path / "mine.toml"))
    assert not load_target("ort-mobile").sparse_weights
    assert load_target("ort-arm64").sparse_weights == ("bitmap", "coo")


@pytest.mark.parametrize("seed", range(12))
def test_random_weights_come_back(seed: int) -> None:
    """Any shape, any share of zeros: what is written is what onnxruntime unpacks, to the bit."""
    rng = np.random.default_rng(seed)
    shape = tuple(int(d) for d in rng.integers(1, 40, rng.integers(1, 5)))
    w = zeroed(shape, float(rng.random()), seed)
    bitmap = Bitmap.of(w, np.float32(0))
    np.testing.assert_array_equal(bitmap.dense(), w)
    dims = ",".join(map(str, shape))
    proto = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 13]> g (float[{dims}] x) => (float[{dims}] y)'
        "{ y = Add(x, w) }"
    )
    proto.graph.initializer.append(numpy_helper.from_array(w, "w"))
    model = Model.from_proto(proto)
    node = model.nodes("Add")[0]
    on = Emitter(model, node, node.inputs[1])
    node.inputs[1] = made = expanded(on, bitmap, Tables(model), keep=True)
    constant = spread_constant(made)
    assert constant is not None
    np.testing.assert_array_equal(constant.values, w)
    onnx.checker.check_model(model.to_proto(), full_check=True)
    feed = {"x": np.zeros(shape, np.float32)}
    for level in ("off", "all"):
        found = runtime.run(runtime.session(model, optimize=level), feed)["y"]
        np.testing.assert_array_equal(found, w)
    assert len(restored(model)) == 1
    assert [n.op for n in model.nodes()] == ["Add"]
