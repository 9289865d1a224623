"""Threads over tensors: order, memory, errors; a run that is stopped or killed leaves nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

import onnxq
from onnxq.errors import ModelError, RecipeError
from onnxq.files import atomic_write
from onnxq.leftovers import remove_leftovers, temporary_folder
from onnxq.model import Model
from onnxq.numerics import slabs
from onnxq.parallel import Crew, Stopped, Tick, Work, resident
from onnxq.passes.quantize_weights import QuantizeWeights
from onnxq.settings import Settings

SIDE, LAYERS = 512, 6
RNG = np.random.default_rng(0)


def write(folder: Path, *, bad: int | None = None) -> Path:
    """A stack of MatMuls with a data file; the weight `bad` has a NaN."""
    body = " ".join(f"t{i + 1} = MatMul (t{i}, w{i})" for i in range(LAYERS))
    proto = parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 21]>
        g (float[N, {SIDE}] t0) => (float[N, {SIDE}] t{LAYERS}) {{ {body} }}"""
    )
    for i in range(LAYERS):
        w = RNG.standard_normal((SIDE, SIDE), np.float32)
        w[0, 0] = np.nan if i == bad else 1
        proto.graph.initializer.append(numpy_helper.from_array(w, f"w{i}"))
    folder.mkdir(exist_ok=True)
    path = folder / "m.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="m.data")
    return path


def quantized(path: Path, threads: int, out: Path, **options: object) -> tuple[bytes, bytes]:
    """The bytes of both files."""
    model = Model.load(path)
    given = {"format": "int4", "granularity": "group", "group_size": 32} | options
    QuantizeWeights(**given, crew=Crew(threads))(model)  # type: ignore[arg-type]
    model.save(out)
    return out.read_bytes(), out.with_name(f"{out.name}.data").read_bytes()


@pytest.mark.parametrize("range", ["minmax", "hqq"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_threads_and_slabs_make_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, range: str, granularity: str
) -> None:
    path, out = write(tmp_path), tmp_path / "out.onnx"
    options = {"range": range, "granularity": granularity}
    one = quantized(path, 1, out, **options)
    assert quantized(path, 2, out, **options) == one
    assert quantized(path, 5, out, **options) == one
    if range == "minmax":  # searches add up other parts, and differ in the last digit
        monkeypatch.setattr(slabs, "PIECE", 1000)
        assert quantized(path, 2, out, **options) == one


def test_a_model_in_memory_is_quantized_the_same(tmp_path: Path) -> None:
    path = write(tmp_path)
    quantized(path, 2, tmp_path / "out.onnx")
    inside = Model.from_proto(onnx.load(path))
    QuantizeWeights("int4", "group", 32)(inside)
    found = {t.name: t for t in onnx.load(tmp_path / "out.onnx").graph.initializer}
    for tensor in inside.to_proto().graph.initializer:
        assert tensor.raw_data == found[tensor.name].raw_data


def test_results_come_in_order_and_few_wait() -> None:
    begun: list[int] = []

    def do(number: int, tick: Tick) -> int:
        begun.append(number)
        time.sleep(0.02 if number == 0 else 0)
        return number

    work = [Work(1, 1, str(i)) for i in range(50)]
    told: list[tuple[int, int]] = []
    crew = Crew(3, tell=lambda done, total: told.append((done, total)))
    with closing(crew.run(work, do)) as results:
        assert next(results).result() == 0
        assert len(begun) < 10
        assert [r.result() for r in results] == list(range(1, 50))
    assert told[-1][1] == 50


def test_memory_bounds_how_many_are_at_work() -> None:
    at_work, most = 0, 0
    lock = threading.Lock()

    def do(number: int, tick: Tick) -> None:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        time.sleep(0.005)
        with lock:
            at_work -= 1

    work = [Work(1, 100, str(i)) for i in range(8)]
    for memory, bound in ((250, 2), (100, 1), (None, 4)):
        most = 0
        list(Crew(4, memory).run(work, do))
        assert 1 <= most <= bound
    with pytest.raises(RecipeError, match=r"5 takes 1 MB .*--max-memory has to be at least"):
        Crew(4, 100).run([*work[:5], Work(1, 101, "5")], do)


def test_an_error_stops_the_others() -> None:
    stopped = threading.Event()

    def do(number: int, tick: Tick) -> None:
        if number == 0:
            raise ModelError("broken")
        with suppress_and_set(stopped):
            while True:
                tick(1)
                time.sleep(0.001)

    work = [Work(1, 1, str(i)) for i in range(4)]
    with (
        pytest.raises(ModelError, match="broken"),
        closing(Crew(2).run(work, do)) as results,
    ):
        next(results).result()
    assert stopped.is_set()


class suppress_and_set(suppress):  # noqa: N801
    """Notes that work was stopped."""

    def __init__(self, event: threading.Event) -> None:
        super().__init__(Stopped)
        self.event = event

    def __exit__(self, kind: object, error: object, trace: object) -> bool:
        if kind is Stopped:
            self.event.set()
        return kind is Stopped


def test_a_file_that_got_shorter_is_one_error_and_no_file(tmp_path: Path) -> None:
    path = write(tmp_path)
    model = Model.load(path)
    os.truncate(tmp_path / "m.data", 4 * SIDE * SIDE * 4)
    with pytest.raises(ModelError, match="became shorter"):
        QuantizeWeights("int4", "group", 32, crew=Crew(2))(model)
    assert sorted(os.listdir(tmp_path)) == ["m.data", "m.onnx"]
    assert not [t for t in threading.enumerate() if t.name.startswith("onnxq")]


def test_a_weight_that_is_not_finite_is_left(tmp_path: Path) -> None:
    notes = QuantizeWeights("int4", "group", 32)(model := Model.load(write(tmp_path, bad=2)))
    (left,) = [note for note in notes if not note.changed]
    assert "NaN" in left.text
    assert len(model.nodes("Cast")) == LAYERS - 1


def test_little_memory_is_refused_in_one_line(tmp_path: Path) -> None:
    path, out = write(tmp_path), tmp_path / "out.onnx"
    int4 = Settings(weights="int4", range="minmax", symmetric=True)
    with pytest.raises(RecipeError, match=r"weight w\d takes .* --max-memory has to be at least"):
        onnxq.optimize(path, out, recipe="int4-weights", settings=int4, max_memory=1 << 20)
    with pytest.raises(RecipeError, match="recipe auto has to run the model"):
        onnxq.optimize(path, out, max_memory=1 << 20)
    with pytest.raises(RecipeError, match=r"the comparison has to run .* --no-validate"):
        onnxq.optimize(path, out, recipe="cleanup", validate=True, max_memory=1 << 20)
    assert not out.exists()
    little = onnxq.optimize(path, recipe="cleanup", max_memory=resident() + (1 << 20))
    assert re.search(r"take [\d,.]+ MB beside the \d+ MB .* --max-memory", little.warnings[0])
    enough = onnxq.optimize(
        path, out, recipe="int4-weights", settings=int4, max_memory=resident() + (1 << 30)
    )
    assert enough.fidelity is not None


RUN = """
import sys, time
from pathlib import Path
from onnxq.model import Model
from onnxq.parallel import Crew
from onnxq import weights
from onnxq.passes.quantize_weights import QuantizeWeights
model = Model.load(sys.argv[1])
model.scratch.folder = Path(sys.argv[1]).parent
def tell(done, total):
    if done:
        print("at work", flush=True)
crew = Crew(2, tell=tell)
for _ in range(200):
    QuantizeWeights("int4", "group", 32, range="mse", crew=crew)(model.copy())
"""


@pytest.mark.parametrize("named", [False, True])
def test_a_killed_run_leaves_nothing_that_the_next_one_does_not_remove(
    tmp_path: Path, named: bool
) -> None:
    """named: as where files cannot be without a name."""
    path = write(tmp_path / "model")
    before = sorted(os.listdir(path.parent))
    prefix = "import os; del os.O_TMPFILE\n" if named and hasattr(os, "O_TMPFILE") else ""
    code = prefix + RUN
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "at work\n"
        remove_leftovers(path.parent)  # it is alive: what it uses stays
        process.send_signal(signal.SIGKILL)
        process.wait()
    remove_leftovers(path.parent)
    assert sorted(os.listdir(path.parent)) == before


HOLD = """
import os, sys, time
{prefix}
from onnxq.files import atomic_write
from onnxq.leftovers import temporary_folder
with temporary_folder() as folder, atomic_write(sys.argv[1]) as file:
    (folder / "inside").write_text("x")
    file.write(b"half")
    print("at work", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(os.name == "nt", reason="locks of files")
def test_leftovers_of_a_killed_run_go_and_those_of_a_living_one_stay(tmp_path: Path) -> None:
    temporary, output = tmp_path / "temporary", tmp_path / "output"
    temporary.mkdir()
    output.mkdir()
    code = HOLD.format(prefix="os.__dict__.pop('O_TMPFILE', None)")
    with subprocess.Popen(
        [sys.executable, "-c", code, str(output / "f")], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"TMPDIR": str(temporary)},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "at work\n"
        for _ in range(2):
            remove_leftovers(output)
            remove_leftovers(temporary)
            assert len(os.listdir(output)) == 1
            (folder,) = temporary.iterdir()
            assert (folder / "inside").exists()
        process.send_signal(signal.SIGKILL)
        process.wait()
    (left,) = output.iterdir()
    assert left.read_bytes() in (b"", b"half")
    with atomic_write(output / "g") as file:
        file.write(b"whole")
    assert os.listdir(output) == ["g"]
    remove_leftovers(temporary)
    assert os.listdir(temporary) == []


def test_what_is_not_ours_is_no_leftover(tmp_path: Path) -> None:
    (tmp_path / ".onnxq-notes").write_text("mine")
    (tmp_path / "onnxq-models").mkdir()
    (tmp_path / "onnxq-results.csv").write_text("mine")
    (tmp_path / ".onnxq-link.tmp").symlink_to(tmp_path / "onnxq-results.csv")
    for file in tmp_path.iterdir():
        os.utime(file, (0, 0), follow_symlinks=False)
    remove_leftovers(tmp_path)
    assert len(os.listdir(tmp_path)) == 4


def test_a_temporary_folder_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with temporary_folder() as folder:
        assert folder.parent == tmp_path
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_an_interrupt_stops_promptly(tmp_path: Path) -> None:
    path = write(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", RUN, str(path)], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # nohup ignores it
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "at work\n"
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.wait(20)
        assert time.monotonic() - start < 10
        assert process.returncode in (1, -signal.SIGINT, 130)
    assert sorted(os.listdir(tmp_path)) == ["m.data", "m.onnx"]
