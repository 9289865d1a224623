"""simplify_qdq: which pairs go, which stay, and that the integers come out the same."""

import numpy as np
import onnx
import pytest
from onnx import parser

from onnxq import runtime
from onnxq.model import Model
from onnxq.passes import simplify_qdq
from onnxq.testing import check

HEAD = '<ir_version: 8, opset_import: ["": 17]>'
INITS = (
    "float s = {0.1}, uint8 z = {128}, float s2 = {0.2}, uint8 z2 = {7}, int64[2] shape = {2, 6}"
)


def model(body: str, outputs: str = "float[a, b] y", opset: int = 17) -> Model:
    head = HEAD.replace("17", str(opset))
    text = f"{head} g (float[1, 3, 4] x) => ({outputs}) <{INITS}> {{ {body} }}"
    return Model.from_proto(parser.parse_model(text))


def run(model: Model) -> dict[str, np.ndarray]:
    x = np.linspace(-20, 20, 12, dtype=np.float32).reshape(1, 3, 4)
    session = runtime.session(model.to_proto(), optimize="off")
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(None, {"x": x}), strict=True))


def ops(model: Model) -> list[str]:
    return [node.op for node in model.graph.nodes]


CASES = [
    pytest.param(
        "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) q2 = QuantizeLinear(d, s, z)"
        " y = DequantizeLinear(q2, s, z)",
        ["QuantizeLinear", "DequantizeLinear"],
        id="chain",
    ),
    pytest.param(
        "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) q2 = QuantizeLinear(x, s, z)"
        " d2 = DequantizeLinear(q2, s, z) y = Add(d, d2)",
        ["QuantizeLinear", "DequantizeLinear", "Add"],
        id="twins",
    ),
    pytest.param(
        "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) m = Reshape(d, shape)"
        " q2 = QuantizeLinear(m, s, z) y = DequantizeLinear(q2, s, z)",
        ["QuantizeLinear", "Reshape", "DequantizeLinear"],
        id="move",
    ),
    pytest.param(
        "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) m = Reshape(d, shape)"
        " q2 = QuantizeLinear(m, s, z) d2 = DequantizeLinear(q2, s, z) t = Transpose(d2)"
        " q3 = QuantizeLinear(t, s, z) y = DequantizeLinear(q3, s, z)",
        ["QuantizeLinear", "Reshape", "Transpose", "DequantizeLinear"],
        id="two-moves",
    ),
    pytest.param(
        "pads = Constant<value_ints = [0, 0, 1, 0, 0, 1]>() q = QuantizeLinear(x, s, z)"
        " d = DequantizeLinear(q, s, z) m = Pad(d, pads) q2 = QuantizeLinear(m, s, z)"
        " f = DequantizeLinear(q2, s, z) y = Flatten(f)",
        ["Constant", "QuantizeLinear", "Pad", "DequantizeLinear", "Flatten"],
        id="pad-with-the-zero-point",
    ),
]


@pytest.mark.parametrize(("body", "left"), CASES)
def test_pairs_that_do_nothing_go(body: str, left: list[str]) -> None:
    is_moved = {"Reshape", "Flatten"} & set(left)
    before = model(body, "float[a, b] y" if is_moved else "float[a, b, c] y")
    after = before.copy()
    assert any(note.changed for note in simplify_qdq(after))
    onnx.checker.check_model(after.to_proto(), full_check=True)
    assert ops(after) == left
    np.testing.assert_array_equal(run(after)["y"], run(before)["y"])
    assert not simplify_qdq(after)


STAYS = [
    pytest.param(
        "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) q2 = QuantizeLinear(d, s2, z2)"
        " y = DequantizeLinear(q2, s2, z2)",
        "float[a, b, c] y",
        id="another-scale",
    ),
    pytest.param(
        "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = QuantizeLinear(d, s, z)",
        "uint8[a, b, c] y",
        id="integer-output",
    ),
    pytest.param(
        "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) m = Reshape(d, shape)"
        " q2 = QuantizeLinear(m, s, z) y = DequantizeLinear(q2, s, z)",
        "float[a, b] y, float[c, d] m",
        id="moved-tensor-is-an-output",
    ),
]


@pytest.mark.parametrize(("body", "outputs"), STAYS)
def test_pairs_that_do_something_stay(body: str, outputs: str) -> None:
    before = model(body, outputs)
    after = before.copy()
    assert not simplify_qdq(after)
    assert ops(after) == ops(before)


def test_another_scale_behind_a_move_becomes_the_first() -> None:
    """Values that are only moved are rounded once, to the scale they had."""
    after = model(
        "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) m = Reshape(d, shape)"
        " q2 = QuantizeLinear(m, s2, z2) y = DequantizeLinear(q2, s2, z2)"
    )
    simplify_qdq(after)
    assert ops(after) == ["QuantizeLinear", "Reshape", "DequantizeLinear"]
    x = np.linspace(-20, 20, 12, dtype=np.float32)
    once = np.clip(np.rint(x / np.float32(0.1)) + 128, 0, 255) - 128
    np.testing.assert_allclose(run(after)["y"].ravel(), once * np.float32(0.1), rtol=1e-6)


def test_max_pool_of_an_old_opset_keeps_floats() -> None:
    text = (
        f'<ir_version: 8, opset_import: ["": 11]> g (float[1, 1, 4, 4] x) => (float[a, b, c, d] y)'
        f" <{INITS}> {{ q = QuantizeLinear(x, s, z) f = DequantizeLinear(q, s, z)"
        " m = MaxPool<kernel_shape = [2, 2]>(f) q2 = QuantizeLinear(m, s, z)"
        " y = DequantizeLinear(q2, s, z) }"
    )
    after = Model.from_proto(parser.parse_model(text))
    assert not simplify_qdq(after)


# Models that other tools quantized: without zero points, or with operators that are no move.
BARE, FULL = "d = DequantizeLinear(x, s) ", "d = DequantizeLinear(x, s, z) "
BARE_END = " q = QuantizeLinear(m, s) y = DequantizeLinear(q, s)"
FULL_END = " q = QuantizeLinear(m, s, z) y = DequantizeLinear(q, s, z)"
FOREIGN = [
    pytest.param("int8[2, 4]", BARE + BARE_END.replace("m,", "d,"), 2, id="int8-to-uint8"),
    pytest.param("uint8[2, 4]", BARE + "m = Transpose(d)" + BARE_END, 2, id="no-zero-points"),
    pytest.param(
        "uint8[1, 1, 3, 3]",
        FULL + 'm = Resize<mode = "linear">(d, , twice)' + FULL_END,
        4,
        id="linear-resize",
    ),
    pytest.param("uint8[2, 4]", FULL + "m = Pad(d, pads, half)" + FULL_END, 2, id="pad-of-a-half"),
]


@pytest.mark.parametrize(("kind", "body", "rank"), FOREIGN)
def test_models_of_other_tools_compute_the_same(kind: str, body: str, rank: int) -> None:
    sizes = ", ".join("abcd"[:rank])
    proto = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g ({kind} x) => (float[{sizes}] y)'
        " <float s = {0.1}, uint8 z = {128}, float half = {0.5}, int64[4] pads = {0, 1, 0, 0},"
        f" float[4] twice = {{1, 1, 2, 2}}> {{ {body} }}"
    )
    assert not [note for note in check(simplify_qdq, proto).notes if note.changed]
