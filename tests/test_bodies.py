from __future__ import annotations

import numpy as np
import pytest
from onnx import parser

from onnxq.calibration import calibrate
from onnxq.errors import ModelError
from onnxq.model import Model
from onnxq.numerics import histograms
from onnxq.statistics import Histogram

HEAD = '<ir_version: 8, opset_import: ["": 17]>\n'

IF = """g (float[2,3] x) => (float[2,3] y) {
    s = ReduceSum<keepdims=0>(x)
    zero = Constant<value = float {0.0}>()
    c = Greater(s, zero)
    y = If(c) <then_branch = a () => (float[2,3] t) { p = Add(x, x)  t = Neg(p) },
               else_branch = b () => (float[2,3] e) { e = Relu(x) }>
}"""

LOOP = """g (float[2,3] x) => (float[2,3] y) <int64 n = {3}, bool go = {1}> {
    y = Loop(n, go, x) <body = b (int64 i, bool c, float[2,3] h) => (bool d, float[2,3] k) {
        d = Identity(c)  k = Add(h, h) }>
}"""

SCAN = """g (float[4,3] x, float[3] h0) => (float[3] y) {
    y = Scan<num_scan_inputs = 1, body = b (float[3] h, float[3] v) => (float[3] k) {
        q = Mul(v, v)  k = Add(h, q) }>(h0, x)
}"""

IF_IN_LOOP = """g (float[3] x) => (float[3] y) <int64 n = {4}, bool go = {1}, int64 two = {2}> {
    y = Loop(n, go, x) <body = b (int64 i, bool c, float[3] h) => (bool d, float[3] k) {
        d = Identity(c)
        late = GreaterOrEqual(i, two)
        m = If(late) <then_branch = t () => (float[3] u) { r = Add(h, h)  u = Neg(r) },
                      else_branch = e () => (float[3] w) { w = Identity(h) }>
        k = Identity(m) }>
}"""

LOOP_IN_LOOP = """g (float[3] x) => (float[3] y) <int64 n = {2}, bool go = {1}> {
    y = Loop(n, go, x) <body = b (int64 i, bool c, float[3] h) => (bool d, float[3] k) {
        d = Identity(c)
        k = Loop(n, go, h) <body = b2 (int64 i2, bool c2, float[3] h2) => (bool d2, float[3] k2) {
            d2 = Identity(c2)  k2 = Add(h2, h2) }> }>
}"""


def seen(text: str, tensor: str, *feeds: dict[str, list]) -> Histogram:  # type: ignore[type-arg]
    model = Model.from_proto(parser.parse_model(HEAD + text))
    arrays = [{k: np.array(v, np.float32) for k, v in feed.items()} for feed in feeds]
    found = calibrate(model, {tensor: Histogram}, arrays)[tensor]
    assert isinstance(found, Histogram)
    return found


PLUS = {"x": [[1, 2, 3], [4, 5, 6]]}
MINUS = {"x": [[-1, -2, -3], [-4, -5, -7]]}

# A zero is always among what is seen in a body.
CASES = [
    pytest.param(IF, "p", [PLUS, MINUS], (0, 12, 1), id="branch-taken-once"),
    pytest.param(IF, "p", [MINUS], (np.inf, -np.inf, 0), id="branch-never-taken"),
    pytest.param(LOOP, "h", [PLUS], (0, 24, 1), id="what-a-loop-carries"),
    pytest.param(LOOP, "k", [PLUS, MINUS], (-56, 48, 2), id="result-of-a-loop's-body"),
    pytest.param(
        SCAN, "q", [{"x": np.arange(12).reshape(4, 3), "h0": [0, 0, 0]}], (0, 121, 1), id="scan"
    ),
    pytest.param(IF_IN_LOOP, "r", [{"x": [1, 2, 3]}], (-12, 6, 1), id="branch-in-a-loop"),
]


@pytest.mark.parametrize(("text", "tensor", "feeds", "expected"), CASES)
def test_extremes(text: str, tensor: str, feeds: list, expected: tuple) -> None:  # type: ignore[type-arg]
    found = seen(text, tensor, *feeds)
    assert (found.lo, found.hi, found.count) == expected


def test_values_of_all_runs_are_counted_evenly() -> None:
    found = seen(LOOP, "h", PLUS)
    by_bin = dict(zip(found.bins.tolist(), found.counts.tolist(), strict=True))
    (bins, _), _ = histograms.count(histograms.halves_of(np.array([1, 5, 24], np.float32)))
    counts = [by_bin[int(b)] for b in bins]  # 510 values of 6 and a zero, in each of three runs
    assert counts == pytest.approx([510 / 7] * 3, abs=2)


def test_a_loop_in_a_loop_is_refused() -> None:
    with pytest.raises(ModelError, match="'k2': it is in a loop inside of a loop"):
        seen(LOOP_IN_LOOP, "k2", {"x": [1, 2, 3]})


def test_infinities_in_a_body_are_noted() -> None:
    text = IF.replace("t = Neg(p)", "q = Log(x)  t = Neg(q)")
    assert seen(text, "q", {"x": [[0, 2, 3], [4, 5, 6]]}).has_nonfinite
