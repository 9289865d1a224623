"""Files: atomic writing, external data, and files that are no models."""

import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

import onnxq.datafiles
import onnxq.files
import onnxq.model
from onnxq.errors import ModelError
from onnxq.files import atomic_write
from onnxq.model import Model, values_of
from onnxq.weights import Stored

LINEAR = """
<ir_version: 8, opset_import: ["": 17]>
g (float[N,64] x) => (float[N,64] y) { h = MatMul(x, w)  y = Add(h, b) }
"""
RNG = np.random.default_rng(0)
W = RNG.standard_normal((64, 64)).astype(np.float32)
B = np.arange(64, dtype=np.float32)


def linear() -> onnx.ModelProto:
    proto = parser.parse_model(LINEAR)
    proto.graph.initializer.append(numpy_helper.from_array(W, "w"))
    proto.graph.initializer.append(numpy_helper.from_array(B, "b"))
    return proto


@pytest.fixture
def external(tmp_path: Path) -> Path:
    """A model with its weights in w.bin, both of them."""
    path = tmp_path / "m.onnx"
    onnx.save(linear(), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    return path


def relocate(path: Path, **entries: str) -> None:
    """Change where the model's first weight is said to be."""
    proto = onnx.load(path, load_external_data=False)
    weight = proto.graph.initializer[0]
    kept = {e.key: e.value for e in weight.external_data} | entries
    del weight.external_data[:]
    for key, value in kept.items():
        weight.external_data.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())


def one_line(error: pytest.ExceptionInfo[ModelError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# --- atomic writing -------------------------------------------------------------------------------


def test_a_new_file_has_the_usual_permissions(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "f") as file:
            file.write(b"new")
    finally:
        os.umask(old)
    assert (tmp_path / "f").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640


def test_a_replaced_file_keeps_its_permissions(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old")
    (tmp_path / "f").chmod(0o604)
    with atomic_write(tmp_path / "f") as file:
        file.write(b"new")
    assert (tmp_path / "f").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o604


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    (tmp_path / "f").write_bytes(b"old")
    with pytest.raises(error):  # noqa: PT012, SIM117
        with atomic_write(tmp_path / "f") as file:
            file.write(b"half")
            raise error
    assert (tmp_path / "f").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("unnamed", [True, False])
def test_a_named_temporary_file_works_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unnamed: bool
) -> None:
    if not unnamed:
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    (tmp_path / "f").write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "f") as file:  # noqa: PT012
        assert len(os.listdir(tmp_path)) == (1 if unnamed and hasattr(os, "O_TMPFILE") else 2)
        raise RuntimeError
    with atomic_write(tmp_path / "f") as file:
        file.write(b"new")
    assert (tmp_path / "f").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="files without a name: Linux")
def test_a_killed_run_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old")
    code = (
        "import os, signal, sys; from onnxq.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as f:\n"
        "    f.write(bytes(1 << 20)); f.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    folder = Path(onnxq.files.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "f")], cwd=folder, check=False)
    assert run.returncode == -signal.SIGKILL
    assert (tmp_path / "f").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(ModelError, match="cannot be written") as error:
            Model.from_proto(linear()).save(tmp_path / "f")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    one_line(error)
    assert (tmp_path / "f").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_unwritable_places_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for place in ("folder", "missing/f", "file/f"):
        with pytest.raises(ModelError, match="choose another output") as error:
            Model.from_proto(linear()).save(tmp_path / place)
        assert str(tmp_path / place) in one_line(error)
    os.mkfifo(tmp_path / "pipe")  # as /dev/null would be, were it replaced by a plain file
    with pytest.raises(ModelError, match="not a regular file"), atomic_write(tmp_path / "pipe"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "pipe"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_file_or_folder_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old")
    (tmp_path / "f").chmod(0o400)
    with pytest.raises(ModelError, match="denied"), atomic_write(tmp_path / "f"):
        pass
    tmp_path.chmod(0o500)
    with pytest.raises(ModelError, match="denied"), atomic_write(tmp_path / "g"):
        pass
    tmp_path.chmod(0o700)


def test_a_link_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    with atomic_write(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "real").read_bytes() == b"old"
    assert (tmp_path / "link").read_bytes() == b"new"


# --- external data --------------------------------------------------------------------------------


def test_external_weights_are_read_when_looked_at_and_not_kept(external: Path) -> None:
    model = Model.load(external)
    w = model.nodes("MatMul")[0].inputs[1]
    for values in (values_of(w), w.values):
        assert values is not None
        np.testing.assert_array_equal(values, W)
        assert not values.flags.writeable
    assert isinstance(w._values, Stored)
    assert w.dtype == np.float32
    assert w.shape == (64, 64)


def test_a_model_with_a_data_file_is_saved_with_one(external: Path, tmp_path: Path) -> None:
    Model.load(external).save(tmp_path / "out.onnx")
    out = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    places = {t.name: {e.key: e.value for e in t.external_data} for t in out.graph.initializer}
    assert places["w"] == {"location": "out.onnx.data", "offset": "0", "length": str(W.nbytes)}
    assert places["b"] == {}  # small: inside
    onnx.checker.check_model(tmp_path / "out.onnx", full_check=True)
    again = Model.load(tmp_path / "out.onnx").to_proto()
    assert [numpy_helper.to_array(t).tolist() for t in again.graph.initializer] == [
        W.tolist(),
        B.tolist(),
    ]


def test_a_data_file_is_written_above_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model.from_proto(linear())
    model.save(tmp_path / "one.onnx")
    monkeypatch.setattr(onnxq.model, "EXTERNAL_ABOVE", 1000)
    model.save(tmp_path / "two.onnx")
    assert sorted(os.listdir(tmp_path)) == ["one.onnx", "two.onnx", "two.onnx.data"]
    for name in ("one.onnx", "two.onnx"):
        np.testing.assert_array_equal(
            numpy_helper.to_array(onnx.load(tmp_path / name).graph.initializer[0]), W
        )


def test_every_kind_of_value_goes_through_a_data_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxq.model, "EXTERNAL_ABOVE", 0)
    proto = linear()
    texts = helper.make_tensor("texts", TensorProto.STRING, [300], [b"text"] * 300)  # type: ignore[list-item]
    codes = helper.make_tensor("codes", TensorProto.INT4, [4001], list(np.arange(4001) % 16 - 8))
    halves = helper.make_tensor("halves", TensorProto.BFLOAT16, [3000], np.arange(3000))
    proto.graph.initializer.extend([texts, codes, halves])
    model = Model.from_proto(proto)
    fresh = model.constant("fresh", np.arange(4001).astype(">i4"))
    small = model.constant("packed", numpy_helper.to_array(codes))
    model.emit("Foo", fresh, small, name="foo", domain="custom")
    model.save(tmp_path / "m.onnx")
    back = {t.name: t for t in onnx.load(tmp_path / "m.onnx").graph.initializer}
    for tensor in (texts, codes, halves):
        want, got = numpy_helper.to_array(tensor), numpy_helper.to_array(back[tensor.name])
        assert want.dtype == got.dtype
        assert want.tolist() == got.tolist()
    assert numpy_helper.to_array(back["fresh"]).tolist() == list(range(4001))
    assert back["packed"].raw_data == back["codes"].raw_data
    assert len(back["codes"].raw_data) == 2001
    proto = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    places = [{e.key: e.value for e in t.external_data} for t in proto.graph.initializer]
    offsets = [int(place["offset"]) for place in places if place]
    assert len(offsets) > 3
    assert all(offset % 4096 == 0 for offset in offsets)
    lazily = Model.load(tmp_path / "m.onnx").copy().to_proto()
    for tensor in lazily.graph.initializer:
        want, got = numpy_helper.to_array(back[tensor.name]), numpy_helper.to_array(tensor)
        assert want.tolist() == got.tolist()


def test_in_place_with_a_data_file_that_is_being_read(external: Path) -> None:
    Model.load(external).save(external)
    model = Model.load(external)  # reads m.onnx.data, which the next line replaces
    extra = model.constant("extra", np.ones((64, 64), np.float32))
    w = model.nodes("MatMul")[0].inputs[1]
    model.graph.outputs[0].inputs[0].inputs[1] = extra
    origin = model.graph.origin.initializers
    origin.insert(0, extra)  # shifts w in the new file
    model.save(external)
    np.testing.assert_array_equal(values_of(w), W)
    model.save(external)
    back = {t.name: numpy_helper.to_array(t) for t in onnx.load(external).graph.initializer}
    np.testing.assert_array_equal(back["w"], W)
    np.testing.assert_array_equal(back["extra"], 1)


def test_a_failure_while_saving_leaves_both_old_files(
    external: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Model.load(external).save(external)
    before = {f: (external.parent / f).read_bytes() for f in os.listdir(external.parent)}
    model = Model.load(external)
    model.constant("w", W)
    cyclic = model.nodes("MatMul")[0]
    cyclic.inputs[0] = model.graph.outputs[0]
    with pytest.raises(ModelError, match="cycle"):
        model.save(external)
    model = Model.load(external)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # fails in the data file
    try:
        with pytest.raises(ModelError, match=r"m\.onnx\.data: cannot be written"):
            model.save(external)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert before == {f: (external.parent / f).read_bytes() for f in os.listdir(external.parent)}


def test_an_old_data_file_that_is_not_needed_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "m.onnx.data").write_bytes(b"of another model")
    Model.from_proto(linear()).save(tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx.data").read_bytes() == b"of another model"


def test_data_files_beyond_the_open_ones_are_checked_for_changes(
    external: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxq.datafiles.DataFolder, "KEEP", 0)
    model = Model.load(external)
    w = model.nodes("MatMul")[0].inputs[1]
    np.testing.assert_array_equal(values_of(w), W)
    (external.parent / "w.bin").write_bytes(bytes(64 * 65 * 4))
    with pytest.raises(ModelError, match="changed after the model was loaded"):
        values_of(w)
    (external.parent / "w.bin").unlink()
    with pytest.raises(ModelError, match="cannot be read any more"):
        values_of(w)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "../w.bin"}, "not inside the model's folder"),
        ({"location": "a\\..\\..\\w.bin"}, "not inside the model's folder"),
        ({"location": "/etc/passwd"}, "not inside the model's folder"),
        ({"location": "C:\\w.bin"}, "not inside the model's folder"),
        ({"location": ""}, "not inside the model's folder"),
        ({"location": "w.bin\0"}, "not inside the model's folder"),
        ({"location": "."}, "is missing"),
        ({"location": "gone.bin"}, "is missing"),
        ({"location": "link.bin"}, "is a link that leaves"),
        ({"location": "loop.bin"}, "data file 'loop.bin'"),
        ({"offset": "600"}, "needs 16384 bytes at 600"),
        ({"offset": "-1"}, "needs 16384 bytes at -1"),
        ({"length": "100"}, "declared 100"),
        ({"length": "99999999"}, "declared 99999999"),
        ({"offset": "far"}, "not a number"),
    ],
)
def test_external_data_stay_inside_of_the_folder_and_the_file(
    external: Path, tmp_path_factory: pytest.TempPathFactory, entries: dict[str, str], message: str
) -> None:
    secret = tmp_path_factory.mktemp("elsewhere") / "secret.bin"
    secret.write_bytes(bytes(1 << 16))
    (external.parent / "link.bin").symlink_to(secret)
    (external.parent / "loop.bin").symlink_to("loop.bin")
    relocate(external, **entries)
    with pytest.raises(ModelError) as error:
        Model.load(external)
    text = one_line(error)
    assert message in text
    assert "'w'" in text
    assert str(external) in text


def test_a_length_may_be_left_out(external: Path) -> None:
    proto = onnx.load(external, load_external_data=False)
    entries = [e for e in proto.graph.initializer[0].external_data if e.key == "location"]
    del proto.graph.initializer[0].external_data[:]
    proto.graph.initializer[0].external_data.extend(entries)
    external.write_bytes(proto.SerializeToString())
    np.testing.assert_array_equal(values_of(Model.load(external).nodes("MatMul")[0].inputs[1]), W)


def test_the_body_of_a_branch_may_have_external_data(tmp_path: Path) -> None:
    proto = parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        g (bool c, float[N,64] x) => (float[N,64] y) {
          y = If (c) <then_branch = t () => (float[N,64] a) { a = MatMul(x, w) },
                      else_branch = e () => (float[N,64] b) { b = Identity(x) }>
        }""")
    proto.graph.node[0].attribute[0].g.initializer.append(numpy_helper.from_array(W, "w"))
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0)
    model = Model.load(tmp_path / "m.onnx")
    np.testing.assert_array_equal(values_of(model.nodes("MatMul")[0].inputs[1]), W)


def test_a_model_of_many_gigabytes_loads_at_once(tmp_path: Path) -> None:
    proto = linear()
    for i in range(20):  # 5 GB, with no bytes on the disk
        tensor = proto.graph.initializer.add(name=f"big{i}", dims=[1 << 26], data_type=1)
        tensor.data_location = TensorProto.EXTERNAL
        place = {"location": "w.bin", "offset": str(i << 28), "length": str(1 << 28)}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=value)
        proto.graph.node.add(op_type="Foo", domain="c", input=[f"big{i}"], output=[f"o{i}"])
    with open(tmp_path / "w.bin", "wb") as file:
        file.truncate(20 << 28)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = Model.load(tmp_path / "m.onnx").copy()
    model.raise_opset(18)
    for node in model.nodes("Foo"):
        values = values_of(node.inputs[0])
        assert values is not None
        assert values[-1] == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB
    with pytest.raises(ModelError, match="save it to a file"):
        model.to_proto()


# --- files that are no models ---------------------------------------------------------------------


def _future() -> bytes:
    proto = linear()
    proto.ir_version = onnx.IR_VERSION + 1
    return bytes(proto.SerializeToString())


def _without(field: str) -> bytes:
    proto = linear()
    proto.ClearField(field)
    return bytes(proto.SerializeToString())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "is empty", id="empty"),
        pytest.param(b"hello world\n" * 20, "not an ONNX model", id="text"),
        pytest.param(LINEAR.encode(), "not an ONNX model", id="onnx-text"),
        pytest.param(linear().SerializeToString()[:5000], "cut short", id="truncated"),
        pytest.param(np.random.default_rng(1).bytes(5000), "not an ONNX model", id="noise"),
        pytest.param(_without("graph"), "no graph", id="no-graph"),
        pytest.param(_without("opset_import"), "no opset_import", id="no-opset"),
        pytest.param(
            linear().SerializeToString().replace(b"Add", b"\xff\xff\xff"), "UTF-8", id="name"
        ),
        pytest.param(_future(), "install a newer onnx", id="future"),
    ],
)
def test_files_that_are_no_models(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as error:
        Model.load(path)
    assert one_line(error).startswith(f"{path}: ")


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none", "No such file"), (tmp_path, "is a folder")):
        with pytest.raises(ModelError, match=message) as error:
            Model.load(path)
        assert one_line(error).startswith(f"{path}: ")
    with pytest.raises(ModelError, match="null"):
        Model.load("a\0b")


def test_a_file_over_two_gigabytes_is_told_what_to_do(tmp_path: Path) -> None:
    with open(tmp_path / "m.onnx", "wb") as file:
        file.truncate(2**31)
    with pytest.raises(ModelError, match="save it with external data"):
        Model.load(tmp_path / "m.onnx")


def test_weights_that_do_not_fill_their_shape(tmp_path: Path) -> None:
    proto = linear()
    proto.graph.initializer[0].raw_data = bytes(100)
    model = Model.from_proto(proto)
    with pytest.raises(ModelError, match="'w': its data do not fit its shape"):
        values_of(model.nodes("MatMul")[0].inputs[1])


def test_a_data_type_from_the_future() -> None:
    proto = linear()
    proto.graph.initializer[0].data_type = 999
    with pytest.raises(ModelError, match="'w': data type 999"):
        Model.from_proto(proto)


def test_a_proto_with_external_data_has_no_folder(external: Path) -> None:
    with pytest.raises(ModelError, match="load the model by its path"):
        Model.from_proto(onnx.load(external, load_external_data=False))


def test_the_same_model_is_written_as_the_same_bytes(external: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Model.load(external).save(tmp_path / name / "m.onnx")
    for name in ("m.onnx", "m.onnx.data"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
