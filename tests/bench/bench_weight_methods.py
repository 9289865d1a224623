"""What each way to choose scales costs, by format and granularity: on the weights of real models.

    python tests/bench/bench_weight_methods.py [MODEL | FOLDER ...] [--formats int4,uint4] [--json]

Without arguments: models/. A folder is searched for *.onnx; activations come from MODEL.calib.npz
or calib.npz beside it. A table for each model: methods x formats x granularities with

    weights   SQNR in dB over all weights of MatMul, Gemm and Conv, each divided by its deviation
    weighted  the same, weighted by the mean squares of the layer's inputs
    lp        sum of |error|^(1/2), 1 for min-max
    outputs   SQNR in dB of the layers' outputs with real inputs: mean of noise / signal
              (importance is from the same inputs)
    MB/s      float32 bytes of weights a second of CPU time
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from onnxq import runtime
from onnxq.numerics.metrics import sqnr_db
from onnxq.schemes import PerChannel, PerGroup, PerTensor, QuantScheme, quantize_weight

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("minmax", "mse", "standardized", "hqq", "importance")
SCHEMES = "int8,uint8a,int4,uint4a,int2,uint2a,int4/15,float8e4m3fn,float8e5m2"
GRANULARITIES = {"tensor": PerTensor(), "channel": PerChannel(), "group32": PerGroup(32)}
SMALLEST, SAMPLES, ROWS = 512, 8, 2048


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A weight with the axes of its operator, and inputs that the operator was seen to get."""

    node: onnx.NodeProto
    w: NDArray[np.float32]
    contraction: int
    channels: int
    x: NDArray[np.float32] | None
    opset: int

    @property
    def importance(self) -> NDArray[np.float64]:
        """Mean squares of the inputs along the contraction axis; ones where they are not known."""
        if self.x is None or self.w.shape[self.contraction] == 1:
            return np.ones((1,) * self.w.ndim)
        squares = np.square(self.x, dtype=np.float64)
        at = 1 if self.node.op_type == "Conv" else squares.ndim - 1
        mean = squares.mean(tuple(i for i in range(squares.ndim) if i != at))
        if mean.size != self.w.shape[self.contraction]:  # Conv with groups
            mean = mean.reshape(-1, self.w.shape[self.contraction]).mean(0)
        shape = [1] * self.w.ndim
        shape[self.contraction] = -1
        return np.asarray(mean.reshape(shape))

    def session(self) -> Any:
        """The operator alone, its weight an input."""
        assert self.x is not None
        node = helper.make_node(self.node.op_type, ["x", "w"], ["y"])
        node.attribute.extend(a for a in self.node.attribute if a.name not in ("alpha", "beta"))
        infos = [
            helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, a.shape)
            for n, a in (("x", self.x), ("w", self.w))
        ]
        out = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
        graph = helper.make_graph([node], "layer", infos, [out])
        opset = [helper.make_opsetid("", self.opset)]
        return runtime.session(helper.make_model(graph, opset_imports=opset, ir_version=8))


def layers(path: Path) -> list[Layer]:
    """The layers of a model with constant weights; with inputs, if there are samples."""
    proto = onnx.load(path)
    constants = {t.name: t for t in proto.graph.initializer}
    constants |= {
        n.output[0]: n.attribute[0].t
        for n in proto.graph.node
        if n.op_type == "Constant" and n.attribute[0].name == "value"
    }
    found = []
    for node in proto.graph.node:
        if node.op_type not in ("MatMul", "Gemm", "Conv") or node.input[1] not in constants:
            continue
        w = numpy_helper.to_array(constants[node.input[1]])
        if w.dtype == np.float32 and w.ndim >= 2 and w.size >= SMALLEST and w.std() > 0:
            found.append((node, w))
    inputs = activations(path, proto, {node.input[0] for node, _ in found})
    opset = next(o.version for o in proto.opset_import if not o.domain)
    return [Layer(node, w, *_axes(node, w), inputs.get(node.input[0]), opset) for node, w in found]


def _axes(node: onnx.NodeProto, w: NDArray[Any]) -> tuple[int, int]:
    """The axis that is summed over, and that of output channels."""
    if node.op_type == "Conv":
        return 1, 0
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    return (1, 0) if transposed else (w.ndim - 2, w.ndim - 1)


def activations(path: Path, proto: onnx.ModelProto, names: set[str]) -> dict[str, NDArray[Any]]:
    """What the tensors were for some samples; nothing without samples."""
    beside = [path.with_suffix(".calib.npz"), path.parent / "calib.npz"]
    source = next((p for p in beside if p.exists()), None)
    if source is None:
        return {}
    data = np.load(source)
    made = {o for n in proto.graph.node for o in n.output} & names
    extra = [onnx.ValueInfoProto(name=n) for n in sorted(made)]
    proto.graph.output.extend(extra)
    session = runtime.session(proto.SerializeToString(), optimize="off")
    seen: dict[str, list[NDArray[Any]]] = {}
    fed = [i.name for i in session.get_inputs()]
    for k in range(SAMPLES):
        feed = {n: data[n][k : k + 1] for n in fed}
        results = session.run(sorted(made), feed)
        for name, value in [*feed.items(), *zip(sorted(made), results, strict=True)]:
            seen.setdefault(name, []).append(value)
    return {n: np.concatenate(seen[n]) for n in names if n in seen and seen[n][0].ndim > 1}


def scheme_of(text: str, granularity: Any) -> QuantScheme:
    """`int4`, `uint4a` (asymmetric) or `int4/15` (levels)."""
    name, _, levels = text.partition("/")
    symmetric = not name.endswith("a")
    return QuantScheme(
        name.removesuffix("a"),
        granularity,
        symmetric=symmetric,
        levels=int(levels) if levels else None,
    )


def measure(found: list[Layer], scheme: QuantScheme, method: str) -> dict[str, float]:
    """The figures of one method over all layers."""
    signal = noise = weighted_signal = weighted_noise = lp = seconds = 0.0
    outputs = []
    for layer in found:
        group = isinstance(scheme.granularity, PerGroup)
        axis = layer.contraction if group else layer.channels
        m = layer.importance
        begin = time.process_time()
        q, params = quantize_weight(layer.w, scheme, axis, method, importance=m)  # type: ignore[arg-type]
        seconds += time.process_time() - begin
        back = params.dequantize(q)
        unit = layer.w.std()
        error = ((back - layer.w) / unit).astype(np.float64)
        w = layer.w / unit
        m = m / max(float(m.mean()), 1e-30)
        signal += float((w * w).sum())
        noise += float((error * error).sum())
        weighted_signal += float((m * w * w).sum())
        weighted_noise += float((m * error * error).sum())
        lp += float(np.sqrt(np.abs(error)).sum())
        if layer.x is not None:
            session = layer.session()
            y = [session.run(None, {"x": layer.x, "w": v})[0] for v in (layer.w, back)]
            outputs.append(10 ** (-sqnr_db(*y) / 10))
    return {
        "weights": 10 * np.log10(signal / noise),
        "weighted": 10 * np.log10(weighted_signal / weighted_noise),
        "lp": lp,
        "outputs": -10 * np.log10(np.mean(outputs)) if outputs else float("nan"),
        "MB/s": sum(layer.w.nbytes for layer in found) / max(seconds, 1e-9) / 1e6,
    }


def rows(found: list[Layer], schemes: list[str]) -> Iterator[dict[str, Any]]:
    """A row for each format, granularity and method."""
    for text in schemes:
        for name, granularity in GRANULARITIES.items():
            first = None
            for method in METHODS:
                figures = measure(found, scheme_of(text, granularity), method)
                first = first or figures["lp"]
                figures["lp"] /= first
                rounded = {k: round(float(v), 3 if k == "lp" else 2) for k, v in figures.items()}
                yield {"format": text, "granularity": name, "method": method, **rounded}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("models", nargs="*", type=Path, default=[ROOT / "models"])
    p.add_argument("--formats", default=SCHEMES)
    p.add_argument("--json", action="store_true")
    a = p.parse_args()
    paths = [q for m in a.models for q in (sorted(m.rglob("*.onnx")) if m.is_dir() else [m])]
    for path in paths:
        found = layers(path)
        if not found:
            continue
        if not a.json:
            size = sum(layer.w.nbytes for layer in found) / 1e6
            print(f"\n{path}: {len(found)} layers, {size:.1f} MB of weights")
            print(
                f"{'format':13}{'granularity':12}{'method':13} weights weighted    lp outputs  MB/s"
            )
        for row in rows(found, a.formats.split(",")):
            if a.json:
                print(json.dumps({"model": str(path), **row}))
                continue
            print(
                f"{row['format']:13}{row['granularity']:12}{row['method']:13}"
                f"{row['weights']:8.2f}{row['weighted']:9.2f}{row['lp']:6.3f}"
                f"{row['outputs']:8.2f}{row['MB/s']:6.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
