"""Weights that are read on threads to become indices: the same bytes, whoever makes them."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from test_parallel import LAYERS, SIDE, write
from test_quantize_weights import CASES, model

from onnxq.core import Skip
from onnxq.errors import RecipeError
from onnxq.model import Model, values_of
from onnxq.parallel import Crew, Work
from onnxq.passes import streamed
from onnxq.passes.codebook_encoding import Coded, IndexStorage
from onnxq.passes.coding import CodeSource
from onnxq.passes.layouts import held_by
from onnxq.passes.quantize_codebook import QuantizeCodebook
from onnxq.scratch import Scratch, Spilled

FORMS = [
    {"bits": 4}, {"bits": 3, "granularity": "tensor"}, {"bits": 8, "granularity": "channel"},
    {"codebook": "vector", "bits": 3, "dim": 2}, {"codebook": "nf4", "layers": ("first=int8",)},
]  # fmt: skip


def coded(path: Path, out: Path, crew: Crew | None, **options: object) -> tuple[bytes, bytes]:
    """The bytes of both files."""
    loaded = Model.load(path)
    QuantizeCodebook(**options, crew=crew)(loaded)  # type: ignore[arg-type]
    loaded.save(out)
    return out.read_bytes(), out.with_name(f"{out.name}.data").read_bytes()


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_threads_make_no_difference(tmp_path: Path, options: dict[str, object]) -> None:
    path, out = write(tmp_path), tmp_path / "out.onnx"
    one = coded(path, out, None, **options)
    for threads in (2, 5):
        assert coded(path, out, Crew(threads), **options) == one
    inside = Model.from_proto(onnx.load(path))
    QuantizeCodebook(**options)(inside)  # type: ignore[arg-type]
    found = {t.name: numpy_helper.to_array(t) for t in onnx.load(out).graph.initializer}
    for tensor in inside.to_proto().graph.initializer:
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), found[tensor.name])


def test_megabytes_are_told_and_the_memory_is_kept(tmp_path: Path) -> None:
    path, told = write(tmp_path), list[tuple[int, int]]()
    crew = Crew(2, tell=lambda done, total: told.append((done, total)))
    QuantizeCodebook(crew=crew)(Model.load(path))
    assert told[-1] == (LAYERS * SIDE * SIDE * 4,) * 2
    with pytest.raises(RecipeError, match=r"weight w0 takes .*--max-memory has to be at least"):
        QuantizeCodebook(crew=Crew(2, 1 << 20))(Model.load(path))


def test_a_weight_that_is_not_finite_is_left(tmp_path: Path) -> None:
    loaded = Model.load(write(tmp_path, bad=3))
    notes = QuantizeCodebook(crew=Crew(2))(loaded)
    assert [n.text for n in notes if not n.changed] == ["its weight has NaN or infinite values"]
    assert [n.changed for n in notes] == [True, True, True, False, True, True]
    assert loaded.nodes("MatMul")[3].inputs[1].name == "w3"


def source(side: int, bits: int = 4) -> CodeSource:
    """The weight of a MatMul, in memory."""
    text = f"""<ir_version: 10, opset_import: ["": 21]>
    g (float[N, {side}] x) => (float[N, {side}] y) {{ y = MatMul (x, w) }}"""
    proto = onnx.parser.parse_model(text)
    w = np.random.default_rng(1).standard_normal((side, side), np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(w, "w"))
    node = Model.from_proto(proto).nodes("MatMul")[0]
    held = list(held_by(node))[-1]
    scheme = QuantizeCodebook(bits=bits).plan.scheme(held)
    return CodeSource(node.inputs[1], held, scheme, IndexStorage.of(bits, 21))


def test_indices_of_a_model_with_data_files_go_to_the_file() -> None:
    weight = source(2048)
    made = [weight.made(Scratch(used), lambda _: None) for used in (True, False)]
    assert isinstance(made[0].indices, Spilled)
    assert not isinstance(made[1].indices, Spilled)
    assert [m.indices.nbytes for m in made] == [2048 * 2048 // 2] * 2
    np.testing.assert_array_equal(made[0].indices.load(), made[1].indices.load())


def test_a_weight_takes_no_more_memory_than_it_said() -> None:
    weight = source(2048)
    work: Work = weight.work()
    assert work.size == 4 * 2048**2
    tracemalloc.start()
    made: Coded = weight.made(Scratch(), lambda _: None)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert made.shape == (2048, 2048)
    assert 0.5 * work.memory < most < work.memory


@pytest.mark.parametrize("name", CASES)
def test_rows_are_read_piece_by_piece(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "PIECE", 50)
    for node in model(*CASES[name]).nodes():
        for held in held_by(node):
            tensor = node.inputs[held.index]
            values = values_of(tensor)
            if values is None:
                continue
            rows = streamed.rows_of(tensor, held, lambda _: None)
            np.testing.assert_array_equal(rows, held.rows(values))
            assert rows.flags.c_contiguous


def test_rows_with_an_infinity_are_declined() -> None:
    weight = source(16)
    values = np.array(values_of(weight.tensor))
    values[3, 4] = np.inf
    weight.tensor.values = values
    with pytest.raises(Skip, match="NaN or infinite"):
        streamed.rows_of(weight.tensor, weight.held, lambda _: None)
