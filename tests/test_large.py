"""Models of gigabytes: what is not held in memory, and what is then left out."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

import onnxq
from onnxq import datafiles, runtime
from onnxq.core import Pass
from onnxq.model import Model, values_of
from onnxq.passes import cleanup, fold_mul, share_initializers
from onnxq.scratch import Scratch, Spilled

TEXT = """<ir_version: 8, opset_import: ["": 17]>
g (float[N, 512] x) => (float[N, 512] y) {
    a = MatMul (x, w)  b = Mul (a, c)  d = MatMul (b, v)  y = Relu (d) }"""
RNG = np.random.default_rng(0)
WEIGHTS = {
    "w": RNG.random((512, 512), np.float32), "v": RNG.random((512, 512), np.float32),
    "c": np.linspace(0.5, 2, 512, dtype=np.float32),
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with a data file; its weights take a MiB each."""
    proto = parser.parse_model(TEXT)
    for name, values in WEIGHTS.items():
        proto.graph.initializer.append(numpy_helper.from_array(values, name))
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data")
    return tmp_path / "m.onnx"


def test_weights_that_passes_make_go_to_a_file(model: Path) -> None:
    loaded = Model.load(model)
    assert any(note.changed for note in fold_mul(loaded))
    made = loaded.nodes("MatMul")[0].inputs[1]
    assert isinstance(made._values, Spilled)
    folded = values_of(made)
    assert folded is not None
    np.testing.assert_array_equal(folded, WEIGHTS["w"] * WEIGHTS["c"])
    assert not folded.flags.writeable
    copy = loaded.copy()
    out = model.with_name("out.onnx")
    for version in (loaded, copy):
        version.save(out)
        found = {t.name: numpy_helper.to_array(t) for t in onnx.load(out).graph.initializer}
        np.testing.assert_array_equal(found[made.name], folded)
    assert loaded.to_proto().ByteSize() > 2 << 20


def test_a_model_without_data_files_stays_in_memory(model: Path) -> None:
    loaded = Model.from_proto(onnx.load(model))
    fold_mul(loaded)
    assert isinstance(loaded.nodes("MatMul")[0].inputs[1]._values, np.ndarray)


def test_the_file_has_no_name_and_goes_with_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    scratch = Scratch()
    kept = [scratch.put(np.full(1 << 18, i, np.float32)) for i in range(3)]
    assert os.listdir(tmp_path) == []
    assert [v.load()[-1] for v in kept] == [0, 1, 2]
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del scratch, kept
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("dtype", ["float16", "int8", "bool", "bfloat16", "float8_e4m3fn"])
def test_types_that_go_to_the_file(dtype: str) -> None:
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    values = RNG.integers(0, 2, 1 << 20).astype(kind)
    kept = Scratch().put(values)
    assert isinstance(kept, Spilled)
    np.testing.assert_array_equal(kept.load().astype(np.float32), values.astype(np.float32))


def test_what_does_not_go_to_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    small, packed = np.ones(100, np.float32), np.ones(1 << 20, ml_dtypes.int4)
    large = np.ones(1 << 20, np.float32)
    assert Scratch().put(small) is small
    assert Scratch().put(packed) is packed
    monkeypatch.setattr("tempfile.tempdir", "/proc")  # a place where nothing can be written
    assert Scratch().put(large) is large


def test_only_weights_that_may_have_an_equal_are_read(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of one shape are; if one of them changes its shape, none is."""
    read: list[int] = []
    plain = datafiles.DataFile.read

    def watched(file: datafiles.DataFile, offset: int, out: Any) -> None:
        read.append(out.size)
        plain(file, offset, out)

    monkeypatch.setattr(datafiles.DataFile, "read", watched)
    share: Pass = share_initializers
    assert share(Model.load(model)) == []
    assert 0 < sum(read) < 10_000  # they differ in what is looked at first
    proto = onnx.load(model)
    equal = numpy_helper.to_array(proto.graph.initializer[0])
    proto.graph.initializer[1].CopyFrom(numpy_helper.from_array(equal, "v"))
    onnx.save(proto, model, save_as_external_data=True, location="e.data")
    assert len(share(Model.load(model))) == 1
    assert sum(read) > 2 * equal.nbytes
    last = equal.copy()
    last[-1, -1] += 1
    proto.graph.initializer[1].CopyFrom(numpy_helper.from_array(last, "v"))
    onnx.save(proto, model, save_as_external_data=True, location="f.data")
    assert share(Model.load(model)) == []
    proto = onnx.load(model)
    del proto.graph.node[2:]
    proto.graph.node.extend([onnx.helper.make_node("Relu", ["b"], ["y"])])
    del proto.graph.initializer[1]
    onnx.save(proto, model, save_as_external_data=True, location="n.data")
    read.clear()
    share(Model.load(model))
    assert read == []


def test_a_large_model_is_compared_when_asked(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = model.with_name("out.onnx")
    monkeypatch.setattr(runtime, "LARGE", 1 << 20)
    report = onnxq.optimize(model, out, recipe="cleanup")
    assert report.fidelity is None
    assert report.samples == "none: the model was not run"
    assert report.size_bytes[0] == sum(
        model.with_name(n).stat().st_size for n in ("m.onnx", "m.data")
    )
    (warning,) = report.warnings
    assert warning.startswith("not compared with the original")
    assert "--validate" in warning
    asked = onnxq.optimize(model, out, recipe="cleanup", validate=True)
    assert asked.fidelity is not None
    assert asked.fidelity.sqnr_db > 100
    assert asked.warnings == ()
    budget = onnxq.optimize(model, out, recipe="cleanup", min_sqnr=60)
    assert budget.fidelity is not None


def test_without_a_comparison_the_model_is_not_run(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["": 17, "my.domain": 1]>
    g (float[N] x) => (float[N] y) { a = Identity (x)  y = my.domain.Unknown (a) }"""
    (tmp_path / "m.onnx").write_bytes(parser.parse_model(text).SerializeToString())
    out = tmp_path / "out.onnx"
    report = onnxq.optimize(tmp_path / "m.onnx", out, recipe="cleanup", validate=False)
    assert (report.nodes, report.warnings) == ((2, 1), ())


GROWING = [
    ("ConstantOfShape (k)", "int64[1] n = {68719476736}"),
    ("Expand (one, k)", "int64[1] n = {68719476736}, float[1] one = {1}"),
    ("Tile (one, k)", "int64[1] n = {68719476736}, float[1] one = {1}"),
    ("Range (a, k, one)", "float a = {0}, float n = {1e12}, float one = {1}"),
]


@pytest.mark.parametrize(("made", "constants"), GROWING, ids=[g[0] for g in GROWING])
def test_constants_that_would_fill_the_memory_are_not_computed(made: str, constants: str) -> None:
    """Their size is not known before what says it is computed: `Abs` hides it."""
    text = f"""<ir_version: 8, opset_import: ["": 17]>
    g (float[1] x, int64 i) => (float[1] y) <{constants}> {{
        k = Abs (n)  big = {made}  e = Gather (big, i)  y = Add (x, e) }}"""
    model = Model.from_proto(parser.parse_model(text))
    notes = cleanup(model)
    op = made.split()[0]
    assert [n.op for n in model.nodes(op)] == [op]
    assert not model.nodes("Abs")
    assert any("MB in the file" in note.text for note in notes if not note.changed)
