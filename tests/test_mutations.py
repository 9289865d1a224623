"""Models with fields changed at random: well-formed protobuf, but not what ONNX allows."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import onnx
import pytest
from google.protobuf.descriptor import FieldDescriptor  # type: ignore[import-untyped]
from onnx import parser

from onnxq import OnnxqError, check, inspect, optimize

EYE = "1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1"
SOURCES = [
    f"""<ir_version: 10, opset_import: ["": 21, "own": 1]>
    g (float[N, 4] x, bool c) => (float[N, 4] y, float[N, 4] z) <float[4, 4] w = {{{EYE}}}, int64 t = {{3}}>
    {{ a = own.f (x, w)
      y = If (c) <then_branch = g1 () => (float[N, 4] o) {{ o = MatMul (a, w) }},
        else_branch = g2 () => (float[N, 4] q) <float[4, 4] v = {{{EYE}}}> {{ m = MatMul (a, v) q = Relu (m) }}>
      z = Loop (t, c, y) <body = b (int64 i, bool d, float[N, 4] s) => (bool d, float[N, 4] u)
        {{ k = MatMul (s, w) u = Tanh (k) }}> }}
    <domain: "own", opset_import: ["": 21]> f (x, w) => (y) {{ u = MatMul (x, w) y = Sigmoid (u) }}""",
    f"""<ir_version: 10, opset_import: ["": 21]> g (float[1, 4, 4, 4] x) => (float[4, 4] y)
    <float s = {{0.1}}, uint8 z = {{128}}, int8[4, 4, 1, 1] w = {{{EYE}}}, float[4] ws = {{1, 2, 1, 3}},
     int8[4] wz = {{0, 0, 0, 0}}, int64[2] shape = {{4, -1}}, float[4] g0 = {{1, 1, 1, 1}}, float[16, 4] v = {{{EYE},{EYE},{EYE},{EYE}}}>
    {{ q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) e = DequantizeLinear <axis = 0> (w, ws, wz)
      c = Conv <pads = [0, 0, 0, 0]> (d, e) n = BatchNormalization (c, g0, g0, g0, g0) r = Relu (n)
      a = Reshape (r, shape) t = Transpose <perm = [1, 0]> (a) p = Transpose <perm = [1, 0]> (t) y = MatMul (p, v) }}""",
    f"""<ir_version: 8, opset_import: ["": 14]> g (int64[1, 3] ids) => (float[1, a, b] y)
    <float[4, 4] e = {{{EYE}}}, int64[1] ax = {{1}}, int64[1] zero = {{0}}, int64[1] two = {{2}}>
    {{ em = Gather <axis = 0> (e, ids) m = MatMul (em, e) n = ReduceMean <axes = [-1]> (m) o = Sub (m, n)
      u = Unsqueeze (o, zero) q = Squeeze (u, zero) l = Slice (q, zero, two, ax) y = Concat <axis = 1> (l, o) }}""",
]  # fmt: skip
NUMBERS = (0, 1, 2, 3, -1, 7, 10, 16, 2**31 - 1, -(2**31), 2**40)
FLOATS = (0.0, float("nan"), float("inf"), 1e38, -1.0)
BYTES = (b"", b"\0", b"\xff" * 16, b"nope")
NAMES = ("", "x", "y", "w", "a", "axis", "perm", "Conv", "Reshape", "If", "own", "nope")
VALUES: dict[int, tuple[Any, ...]] = {
    **dict.fromkeys(
        (FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_UINT64,
         FieldDescriptor.TYPE_ENUM), NUMBERS,
    ),
    **dict.fromkeys((FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE), FLOATS),
    FieldDescriptor.TYPE_BYTES: BYTES,
    FieldDescriptor.TYPE_STRING: NAMES,
}  # fmt: skip


def fields(message: Any) -> Iterator[tuple[Any, Any]]:
    """Each message in a message, with each of its fields that is set."""
    for field, value in message.ListFields():
        yield message, field
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for inner in value if field.is_repeated else [value]:
                yield from fields(inner)


def mutate(proto: onnx.ModelProto, rng: random.Random) -> None:
    """Clear a field, drop or double one of its elements, or give it another value."""
    message, field = rng.choice(list(fields(proto)))
    value, action = getattr(message, field.name), rng.randrange(4)
    if action == 0:
        message.ClearField(field.name)
    elif action == 1 and field.is_repeated:
        del value[rng.randrange(len(value))]
    elif action == 2 and field.is_repeated:
        value.extend([value[rng.randrange(len(value))]])
    elif field.type in VALUES:
        new = rng.choice(VALUES[field.type])
        try:
            if field.is_repeated:
                value[rng.randrange(len(value))] = new
            else:
                setattr(message, field.name, new)
        except ValueError:  # a number that the field cannot hold
            message.ClearField(field.name)


@pytest.mark.parametrize("seed", range(6))
def test_mutated_models_are_refused_or_work(seed: int, tmp_path: Path) -> None:
    """No other exception than ours, whatever is looked at or run."""
    rng = random.Random(seed)
    path, out = tmp_path / "m.onnx", tmp_path / "out.onnx"
    commands: list[Callable[[], Any]] = [
        lambda: inspect(path),
        lambda: check(path, target="tflite-int8"),
        lambda: optimize(path, out, recipe="cleanup", validate=False),
        lambda: optimize(path, out, target="generic", validate=False),
    ]
    for _ in range(20):
        proto = parser.parse_model(rng.choice(SOURCES))
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            mutate(proto, rng)
        path.write_bytes(proto.SerializeToString())
        for command in commands:
            with suppress(OnnxqError):
                command()
