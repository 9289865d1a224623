"""reconstruct_codebook: closer results with as many entries, and indices that survive."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper, parser

from onnxq import runtime
from onnxq.codebooks import CodebookScheme, fit_codebook, is_of
from onnxq.data import Samples, open_samples
from onnxq.errors import DataError
from onnxq.model import Model
from onnxq.numerics.metrics import sqnr_db
from onnxq.packed import Grid, remembered
from onnxq.passes import QuantizeCodebook, ReconstructCodebook
from onnxq.schemes import PerChannel, PerGroup, PerTensor
from onnxq.synthetic import synthetic_samples

SHAPES = {
    "m": (64, 96), "mt": (96, 64), "w": (48, 16, 3, 3), "wg": (48, 8, 3, 3), "wt": (16, 32, 3, 3),
    "lw": (1, 256, 64), "lr": (1, 256, 64), "table": (64, 64),
}  # fmt: skip
ROWS, IMAGE, OUT, FOUR = (
    "float[20, 64] x", "float[1, 16, 6, 6] x", "float[p, q] y", "float[p, q, r, s] y",
)  # fmt: skip
CASES = {
    "MatMul": ("y = MatMul(x, m)", ROWS, OUT),
    "Gemm": ("y = Gemm<transB = 1>(x, mt)", ROWS, OUT),
    "Conv": ("y = Conv(x, w)", IMAGE, FOUR),
    "Conv-groups": ("y = Conv<group = 2>(x, wg)", IMAGE, FOUR),
    "ConvTranspose": ("y = ConvTranspose(x, wt)", IMAGE, FOUR),
    "LSTM": ("y = LSTM<hidden_size = 64>(x, lw, lr)", "float[9, 1, 64] x", FOUR),
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "3 bits": {"bits": 3, "group_size": 32},
    "channel": {"bits": 4, "granularity": "channel"},
    "tensor": {"bits": 4, "granularity": "tensor"},
    "nf4": {"codebook": "nf4", "group_size": 32},
    "powers": {"codebook": "power-of-two", "bits": 4, "granularity": "channel"},
    "logarithms": {"codebook": "logarithmic", "bits": 4, "granularity": "channel"},
    "exponential": {"codebook": "exponential", "bits": 4, "group_size": 32},
    "2 bits": {"bits": 2, "group_size": 24},
    "state": {"bits": 4, "state": "codebook"},
}  # fmt: skip


def model(body: str, inputs: str, outputs: str) -> Model:
    proto = parser.parse_model(
        f'<ir_version: 11, opset_import: ["": 21]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    rng = np.random.default_rng(2)
    for name, shape in SHAPES.items():
        if f"{name}," in body or f"{name})" in body:
            value = (rng.standard_t(6, shape) * 0.1).astype(np.float32)
            proto.graph.initializer.append(numpy_helper.from_array(value, name))
    return Model.from_proto(proto)


def correlated(model: Model, count: int = 32) -> Samples:
    rng = np.random.default_rng(5)
    shape = (count, *model.graph.inputs[0].shape)
    axis = 2 if len(shape) == 5 else len(shape) - 1
    size = shape[axis]
    mix = rng.normal(size=(size, size // 6)) @ rng.normal(size=(size // 6, size))
    x = np.moveaxis(rng.normal(size=shape), axis, -1)
    values = np.moveaxis(x @ (mix / size + 0.1 * np.eye(size)), -1, axis)
    return open_samples([{"x": v.astype(np.float32)} for v in values], model)


def closeness(before: Model, after: Model, samples: Samples) -> float:
    one, two = runtime.session(before), runtime.session(after)
    pairs = [(one.run(None, f)[0], two.run(None, f)[0]) for f in samples]
    return sqnr_db(np.stack([a for a, _ in pairs]), np.stack([b for _, b in pairs]))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", CASES)
def test_results_are_closer_and_indices_survive(name: str, options: str) -> None:
    before = model(*CASES[name])
    samples, chosen = correlated(before), OPTIONS[options]
    left, plain = before.copy(), before.copy()
    assert all(n.changed for n in ReconstructCodebook(samples=samples, **chosen)(left))
    packed = left.copy()
    assert all(n.changed for n in QuantizeCodebook(**chosen)(packed))
    QuantizeCodebook(**chosen, range="importance", samples=samples)(plain)
    assert packed.to_proto().ByteSize() == plain.to_proto().ByteSize()
    held = samples.skip(24)
    assert closeness(left, packed, held) > 100
    assert closeness(before, packed, held) > closeness(before, plain, held) + 1


def test_other_options_round_again() -> None:
    before = model(*CASES["MatMul"])
    samples = correlated(before)
    ReconstructCodebook(samples=samples, bits=3)(before)
    after = before.copy()
    QuantizeCodebook(bits=2)(after)
    assert closeness(before, after, samples) < 30


def test_which_schemes_take_a_table() -> None:
    rows = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    schemes = {
        kind: CodebookScheme(kind, 4, PerGroup(16, 1))
        for kind in ("kmeans", "nf4", "power-of-two", "logarithmic", "exponential")
    }
    for kind, scheme in schemes.items():
        codes = fit_codebook(rows, scheme)
        taking = {k for k, other in schemes.items() if is_of(other, codes.codebook)}
        assert {kind, "kmeans"} <= taking
        assert kind == "kmeans" or "nf4" not in taking - {kind}
        grid = Grid.of(codes.indices, codes.scale, None, axis=1, block=16, table=codes.codebook)
        np.testing.assert_array_equal(grid.values(), codes.values(64))
        back = grid.coded(scheme)
        assert back is not None
        np.testing.assert_array_equal(back.values(64), codes.values(64))
        for other in (PerChannel(0), PerTensor(), PerGroup(24, 1)):
            assert grid.coded(CodebookScheme(scheme.kind, 4, other)) is None
        assert grid.coded(CodebookScheme("kmeans", 3, PerGroup(16, 1))) is None
    assert not is_of(CodebookScheme("vector", 4, PerChannel(0), 2), np.arange(16, dtype=np.float32))
    assert not is_of(schemes["kmeans"], np.arange(16, 0, -1).astype(np.float32))


def test_the_table_is_remembered() -> None:
    before = model(*CASES["MatMul"])
    ReconstructCodebook(samples=correlated(before), bits=3)(before)
    grid = remembered(before.nodes("MatMul")[0].inputs[1])
    assert grid is not None
    assert grid.table is not None
    assert len(grid.table) == 8
    assert grid.numbers.dtype == np.uint8
    assert grid.numbers.max() == 7


def test_vectors_are_left_to_quantize_codebook() -> None:
    before = model(*CASES["MatMul"])
    samples = correlated(before)
    proto = before.to_proto()
    (note,) = ReconstructCodebook(samples=samples, codebook="vector", bits=4, dim=2)(before)
    assert (note.changed, note.text) == (
        False, "indices of several values: nothing makes up for their errors",
    )  # fmt: skip
    assert before.to_proto() == proto


def test_it_needs_real_samples() -> None:
    before = model(*CASES["MatMul"])
    with pytest.raises(DataError, match="give --data"):
        ReconstructCodebook(samples=correlated(before).take(0))(before)
    notes = ReconstructCodebook(samples=synthetic_samples(before, 8))(before)
    assert [(n.changed, "synthetic" in n.text) for n in notes] == [(False, True)]


WRONG = [({"damping": -1.0}, "damping"), ({"sweeps": -1}, "sweeps"), ({"rounds": 0}, "rounds"),
         ({"memory_mb": 0}, "memory_mb"), ({"bits": 9}, "1 to 8"), ({"smallest": 0}, "smallest"),
         ({"codebook": "nf4", "bits": 3}, "nf4")]  # fmt: skip


@pytest.mark.parametrize(("options", "match"), WRONG)
def test_options(options: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ReconstructCodebook(samples=correlated(model(*CASES["MatMul"]), 2), **options)
