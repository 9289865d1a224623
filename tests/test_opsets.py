from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, parser

from onnxq import runtime
from onnxq.errors import ModelError
from onnxq.model import Model
from onnxq.passes import RaiseOpset

THREE = "<float[3] a = {1, 2, 3}, float[3] b = {4, 5, 6}>"
# opset, body, initializers: whose meaning is to be the same after the version converter.
OLD = [
    (7, "y = Upsample<mode = 'nearest', scales = [1.0, 1.0, 2.0, 2.5]>(x)", ""),
    (9, "y = Upsample<mode = 'nearest'>(x, s)", "<float[4] s = {1, 1, 1.5, 2.7}>"),
    (9, "y = Upsample<mode = 'linear'>(x, s)", "<float[4] s = {1, 1, 2, 2}>"),
    (10, "y = Resize<mode = 'nearest'>(x, s)", "<float[4] s = {1, 1, 1.3, 2}>"),
    (10, "y = Resize<mode = 'nearest'>(x, s)", "<float[4] s = {1, 1, 0.7, 0.5}>"),
    (10, "y = Resize<mode = 'linear'>(x, s)", "<float[4] s = {1, 1, 0.7, 2}>"),
    (9, "y = Slice<axes = [2], starts = [1], ends = [3]>(x)", ""),
    (10, "y = Pad<pads = [0, 0, 1, 1, 0, 0, 1, 1], mode = 'reflect'>(x)", ""),
    (9, "y, i = TopK<k = 2>(x)", ""),
    (10, "y = Clip<min = 0.0, max = 1.0>(x)", ""),
    (10, "y = Softmax(x)", ""),
    (12, "y = LogSoftmax<axis = 2>(x)", ""),
    (11, "y, z = Split<axis = 1, split = [1, 2]>(x)", ""),
    (11, "z = Unsqueeze<axes = [0]>(x)  y = Squeeze<axes = [0]>(z)", ""),
    (11, "y = ReduceSum<axes = [1]>(x)", ""),
    (8, "y = BatchNormalization<epsilon = 0.001>(x, a, b, a, b)", THREE),
    (7, "y = Dropout<ratio = 0.5>(x)", ""),
    (10, "y = RoiAlign<output_height = 2, output_width = 2>(x, r, i)",
     "<float[1, 4] r = {0, 0, 3, 3}, int64[1] i = {0}>"),
    (16, "y = GridSample<mode = 'bilinear'>(x, r)", "<float[1, 1, 2, 2] r = {0, 0.3, 0.2, 0.1}>"),
]  # fmt: skip


def old(opset: int, body: str, inits: str) -> ModelProto:
    body = body.replace("'", '"')
    proto = parser.parse_model(
        f'<ir_version: 7, opset_import: ["": {opset}]> '
        f"g (float[1, 3, 4, 4] x) => (y) {inits} {{ {body} }}"
    )
    proto.graph.output[0].ClearField("type")
    return proto


@pytest.mark.parametrize("version", [13, 21])
@pytest.mark.parametrize(("opset", "body", "inits"), OLD, ids=lambda v: str(v)[:24])
def test_a_raised_opset_means_the_same(opset: int, body: str, inits: str, version: int) -> None:
    proto = old(opset, body, inits)
    model = Model.from_proto(proto)
    model.raise_opset(version)
    assert model.opset == max(version, opset)
    x = np.random.default_rng(5).normal(0, 1, (1, 3, 4, 4)).astype(np.float32)
    before, after = (
        runtime.session(p, optimize="off").run(["y"], {"x": x})[0]
        for p in (proto, model.to_proto())
    )
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)


def test_a_resize_without_a_newer_equivalent_is_refused() -> None:
    scales = "<float[4] s = {1, 1, 0.7, 2}>"
    model = Model.from_proto(old(10, "y = Resize<mode = 'nearest'>(x, s)", scales))
    with pytest.raises(ModelError, match="Resize, which shrinks one axis and enlarges"):
        model.raise_opset(13)


def test_as_new_as_can_be_when_the_wanted_opset_cannot() -> None:
    model = Model.from_proto(old(9, "y = Hardmax(x)", ""))
    refused, done = RaiseOpset(17)(model)
    assert "cannot be converted to opset 17 (operator Hardmax)" in refused.text
    assert (done.text, model.opset) == ("opset 9 to 12", 12)
