"""Small models for tests of what fits weights to samples, and samples worth fitting to."""

from __future__ import annotations

import numpy as np
from onnx import numpy_helper, parser

from onnxq import runtime
from onnxq.data import Samples, open_samples
from onnxq.model import Model
from onnxq.numerics.metrics import sqnr_db

SHAPES = {
    "w": (16, 8, 3, 3), "wg": (16, 4, 3, 3), "wd": (24, 1, 5, 5), "wt": (8, 16, 3, 3),
    "wtg": (8, 8, 3, 3), "w1": (16, 8, 5), "m": (32, 48), "mt": (48, 32), "m2": (48, 40),
    "left": (40, 20), "lw": (1, 64, 32), "lr": (1, 64, 16), "bw": (2, 48, 32),
    "br": (2, 48, 16), "table": (40, 32), "stack": (2, 32, 24), "tiny": (32, 8),
    "rgb": (64, 3, 3, 3),
}  # fmt: skip
IMAGE, ROWS, FOUR = "float[1, 8, 6, 6] x", "float[20, 32] x", "float[a, b, c, d] y"
OUT, SEQUENCE = "float[a, b] y", "float[9, 1, 32] x"
# Bodies, inputs, outputs.
CASES = {
    "MatMul": ("y = MatMul(x, m)", ROWS, OUT),
    "MatMul-left": ("y = MatMul(left, x)", ROWS, OUT),
    "MatMul-stack": ("y = MatMul(x, stack)", "float[2, 20, 32] x", "float[a, b, c] y"),
    "Gemm": ("y = Gemm<transB = 1>(x, mt)", ROWS, OUT),
    "Gemm-transA": ("y = Gemm<transA = 1>(x, m)", "float[32, 20] x", OUT),
    "Conv": ("y = Conv<strides = [2, 1], pads = [1, 0, 1, 0]>(x, w)", IMAGE, FOUR),
    "Conv-groups": ("y = Conv<group = 2>(x, wg)", IMAGE, FOUR),
    "Conv-depthwise": ("y = Conv<group = 24>(x, wd)", "float[1, 24, 9, 9] x", FOUR),
    "Conv-1D": ("y = Conv(x, w1)", "float[1, 8, 16] x", "float[a, b, c] y"),
    "ConvTranspose": ("y = ConvTranspose<strides = [2, 2]>(x, wt)", IMAGE, FOUR),
    "ConvTranspose-groups": ("y = ConvTranspose<group = 2>(x, wtg)", IMAGE, FOUR),
    "LSTM": ("y = LSTM<hidden_size = 16>(x, lw, lr)", SEQUENCE, FOUR),
    "GRU": ('y = GRU<hidden_size = 16, direction = "bidirectional">(x, bw, br)', SEQUENCE, FOUR),
    "chain": ("h = MatMul(x, m) r = Relu(h) y = MatMul(r, m2)", ROWS, OUT),
}  # fmt: skip
AXES = {2: 1, 3: 2, 4: 1}  # of what is summed over, by rank; SUMMED: where it is another
SUMMED = {"MatMul-left": 0, "Gemm-transA": 0, "Conv-1D": 1}


def model(body: str, inputs: str, outputs: str, seed: int = 2) -> Model:
    proto = parser.parse_model(
        f'<ir_version: 11, opset_import: ["": 25]> g ({inputs}) => ({outputs}) {{ {body} }}'
    )
    rng = np.random.default_rng(seed)
    for name, shape in SHAPES.items():
        if any(f"{name}{end}" in body for end in (",", ")")):
            value = rng.normal(0, 0.2, shape).astype(np.float32)
            proto.graph.initializer.append(numpy_helper.from_array(value, name))
    made = Model.from_proto(proto)
    made.sweep()
    return made


def correlated(model: Model, count: int = 32, axis: int | None = None) -> Samples:
    """Samples whose vectors follow few causes, and some noise; neighbours in space are alike."""
    rng = np.random.default_rng(5)
    shape = (count, *model.graph.inputs[0].shape)
    axis = 1 + (AXES[len(shape) - 1] if axis is None else axis)
    size = shape[axis]
    mix = rng.normal(size=(size, max(size // 6, 2))) @ rng.normal(size=(max(size // 6, 2), size))
    x = rng.normal(size=shape)
    if len(shape) == 5:
        x = x + np.roll(x, 1, 4) + np.roll(x, 2, 4) + np.roll(x, 1, 3)
    values = np.moveaxis(np.moveaxis(x, axis, -1) @ (mix / size + 0.1 * np.eye(size)), -1, axis)
    return open_samples([{"x": v.astype(np.float32)} for v in values], model)


def closeness(before: Model, after: Model, samples: Samples) -> float:
    one, two = runtime.session(before), runtime.session(after)
    pairs = [(one.run(None, f)[0], two.run(None, f)[0]) for f in samples]
    return sqnr_db(np.stack([a for a, _ in pairs]), np.stack([b for _, b in pairs]))
