"""Is one operator slower than the several that it stands for? The figures in the fusing passes.

    python tests/bench/bench_fusions.py [--seconds 3]

Prints, for each form and size, the one operator's time over the other's: runs in alternation, one
thread, all of onnxruntime's optimizations on (it makes some of these fusions by itself).
"""

from __future__ import annotations

import argparse

import numpy as np
import onnx
from onnx import parser

from onnxq import runtime

SIZES = ((1, 16, 64), (1, 197, 768), (1, 64, 56, 56))
CONSTANTS = (
    "float zero = {0.0}, float half = {0.5}, float one = {1.0}, float root = {1.4142135},"
    " float two = {2.0}, float three = {3.0}, float six = {6.0}, float k = {0.7978846},"
    " float c = {0.044715}, float e = {0.00001}, int64[1] last = {-1}"
)
NORMAL = "p = Pow(d, two) v = ReduceMean(p, last) w = Add(v, e) s = Sqrt(w) n = Div(d, s)"
SIGMOID = "y = HardSigmoid<alpha = 0.16666667, beta = 0.5>(h)"
ERF = "u = Div(h, root) r = Erf(u) a = Add(r, one) q = Mul(h, a) y = Mul(q, half)"
TANH = (
    "p = Pow(h, three) q = Mul(p, c) i = Add(h, q) j = Mul(i, k) t = Tanh(j) a = Add(t, one)"
    " m = Mul(h, a) y = Mul(m, half)"
)
CLIPPED = "a = Add(h, three) s = Clip(a, zero, six)"
LAYER = f"m = ReduceMean(h, last) d = Sub(h, m) {NORMAL} g = Mul(n, scale) y = Add(g, scale)"
FORMS = {  # name: opset, several operators, one operator
    "Gelu, erf": (20, ERF, "y = Gelu(h)"),
    "Gelu, tanh": (20, TANH, 'y = Gelu<approximate = "tanh">(h)'),
    "HardSwish, HardSigmoid": (
        14, SIGMOID.replace("y", "s", 1) + " y = Mul(h, s)", "y = HardSwish(h)"
    ),
    "HardSwish, Clip": (14, f"{CLIPPED} m = Mul(h, s) y = Div(m, six)", "y = HardSwish(h)"),
    "HardSigmoid, Clip": (14, f"{CLIPPED} y = Div(s, six)", SIGMOID),
    "Mish": (18, "s = Softplus(h) t = Tanh(s) y = Mul(h, t)", "y = Mish(h)"),
    "Swish (not done)": (24, "s = Sigmoid(h) y = Mul(h, s)", "y = Swish(h)"),
    "LayerNormalization": (18, LAYER, "y = LayerNormalization(h, scale, scale)"),
    "RMSNormalization": (
        23, f"d = Identity(h) {NORMAL} y = Mul(n, scale)", "y = RMSNormalization(h, scale)"
    ),
}  # fmt: skip


def model(body: str, opset: int, shape: tuple[int, ...]) -> onnx.ModelProto:
    """A Neg, so that the form is not at the input, and the form."""
    dims = ", ".join(map(str, shape))
    proto = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}]> g (float[{dims}] x) => (float[{dims}] y)'
        f" <{CONSTANTS}> {{ h = Neg(x) {body} }}"
    )
    scale = onnx.numpy_helper.from_array(np.full(shape[-1], 1.1, np.float32), "scale")
    proto.graph.initializer.append(scale)
    return proto


def main() -> None:
    """Measure and print."""
    parser_ = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser_.add_argument("--seconds", type=float, default=3.0)
    options = parser_.parse_args()
    rng = np.random.default_rng(0)
    for name, (opset, several, one) in FORMS.items():
        ratios = []
        for shape in SIZES:
            feed = {"x": rng.normal(0, 1, shape).astype(np.float32)}
            before, after = (model(body, opset, shape) for body in (several, one))
            timed = runtime.latency(before, after, feed, seconds=options.seconds)
            ratios.append(timed.ratio)
        print(f"{name:24} " + "  ".join(f"x{ratio:.2f}" for ratio in ratios), flush=True)


if __name__ == "__main__":
    main()
