"""What a target says of layers whose activations are quantized at run time.

    floats      node + sum over products of  step + c N + i M K + o M N + m (M + r) K N
    integers    the same, with paces of its own

with a product [M, K] x [K, N] as often as the layer makes it: a MatMul makes one, an LSTM one for
all inputs and one a step for its state. Few rows M are bound by reading the weight: r is the number
of rows that this is worth. (c: `column`, i: `input`, o: `output`, m: `mac`, r: `rows`.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from onnxq.schemes import PerChannel, PerTensor, QuantScheme

Kernel = Literal["MatMulInteger", "ConvInteger", "DynamicQuantizeLSTM"]
ACTIVATIONS = "uint8"  # onnx Operators.md: DynamicQuantizeLinear writes nothing else


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product [rows, depth] x [depth, columns], made `count` times."""

    rows: float
    depth: float
    columns: float
    count: float = 1.0


@dataclass(frozen=True, slots=True)
class Pace:
    """Nanoseconds of the parts of a layer: see the module's text."""

    node: float = 0.0
    step: float = 0.0
    column: float = 0.0
    input: float = 0.0
    output: float = 0.0
    mac: float = 0.0
    rows: float = 0.0

    def ns(self, products: Iterable[Product]) -> float:
        """Nanoseconds of one run of a layer."""
        return self.node + sum(
            p.count
            * (
                self.step
                + self.column * p.columns
                + self.input * p.rows * p.depth
                + self.output * p.rows * p.columns
                + self.mac * (p.rows + self.rows) * p.depth * p.columns
            )
            for p in products
        )


@dataclass(frozen=True, slots=True)
class DynamicRule:
    """How a target runs one operator with activations quantized at run time.

    kernel: the operator that multiplies. weights: their format. floats, integers: what the layer
    costs; without them it always pays. rowwise: what a range for each row costs on top of integers.
    """

    kernel: Kernel
    weights: QuantScheme
    floats: Pace | None = None
    integers: Pace | None = None
    rowwise: Pace = Pace()


def dynamic_rule(op: str, row: dict[str, Any]) -> DynamicRule:
    """A row of a target's [dynamic] table; raises ValueError for what it cannot be."""
    rest = dict(row)
    if rest.get("kernel") not in get_args(Kernel):
        listed = ", ".join(map(repr, get_args(Kernel)))
        raise ValueError(f"dynamic {op}: kernel is one of {listed}, not {rest.get('kernel')!r}")
    weights = dict(rest.pop("weights"))
    granularity = PerChannel() if weights.pop("per_channel") else PerTensor()
    paces = {key: Pace(**rest.pop(key)) for key in ("floats", "integers") if key in rest}
    rowwise = Pace(**rest.pop("rowwise", {}))
    if unknown := set(rest) - {"kernel"}:
        raise ValueError(f"dynamic {op}: unknown key {', '.join(sorted(unknown))}")
    if len(paces) == 1:
        raise ValueError(f"dynamic {op}: floats and integers are measured against each other")
    scheme = QuantScheme(granularity=granularity, **weights)
    return DynamicRule(rest["kernel"], scheme, paces.get("floats"), paces.get("integers"), rowwise)
