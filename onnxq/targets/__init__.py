"""Targets: what a runtime can execute, one TOML file each, with the source of each fact."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from onnxq.errors import RecipeError, meant
from onnxq.schemes import PerChannel, PerTensor, QuantScheme

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class OpRule:
    """How a target runs one operator in integers.

    output: "quantized" when the integer kernel exists only with integer output, "any" when it may
    also return floats. attributes: values that an attribute may have (the first is ONNX's default).
    shared: inputs and output must have one scale.
    """

    output: Literal["quantized", "any"] = "quantized"
    attributes: Mapping[str, tuple[str, ...]] | None = None
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Rate:
    """Nanoseconds of one operator; `onnxq.passes.costs` says how they are put together."""

    float_element: float = 0.0
    float_mac: float = 0.0
    float_rows: float = 0.0
    integer_element: float = 0.0
    integer_mac: float = 0.0
    integer_rows: float = 0.0
    patch: float = 0.0
    narrow: float = 1.0


@dataclass(frozen=True, slots=True)
class Costs:
    """What things cost on a target, in nanoseconds, measured; only ratios matter.

    float_node, integer_node: for a node, whatever its size. quantize, dequantize: an element that
    changes between floats and integers, the change of memory layout included. block: channels that
    one vector holds.
    """

    float_node: float
    integer_node: float
    quantize: float
    dequantize: float
    block: int
    operators: Mapping[str, Rate]


@dataclass(frozen=True, slots=True)
class Target:
    """A runtime: number formats, the operators that it runs in integers, and what that costs.

    Without costs, every operator that can run in integers does.
    """

    name: str
    description: str
    activations: QuantScheme
    weights: QuantScheme
    operators: Mapping[str, OpRule]
    opset: int = 13
    costs: Costs | None = None


def names() -> list[str]:
    """Names of the targets that come with onnxq."""
    return sorted(path.stem for path in HERE.glob("*.toml"))


def load_target(name: str) -> Target:
    """A target by name, or from a TOML file by its path.

    Raises RecipeError for a name that is not known and for a file that is not a target.
    """
    path = Path(name) if name.endswith(".toml") else HERE / f"{name}.toml"
    if not path.is_file():
        raise RecipeError(
            f"unknown target {name!r}: one of {', '.join(names())}, or a .toml file"
            f"{meant(name, names())}"
        )
    try:
        table = tomllib.loads(path.read_text())
        return _target(path.stem, table)
    except (tomllib.TOMLDecodeError, TypeError, ValueError, KeyError) as e:
        raise RecipeError(f"{path}: not a target: {e}") from e


def _target(name: str, table: dict[str, Any]) -> Target:
    unknown = set(table) - {f.name for f in fields(Target)}
    if unknown:
        raise ValueError(f"unknown key {', '.join(sorted(unknown))}")
    operators = {op: _rule(op, row) for op, row in table.pop("operators").items()}
    activations = QuantScheme(granularity=PerTensor(), **table.pop("activations"))
    weights = table.pop("weights")
    per_channel = weights.pop("per_channel")
    scheme = QuantScheme(granularity=PerChannel() if per_channel else PerTensor(), **weights)
    if "costs" in table:
        table["costs"] = _costs(table["costs"])
    return Target(name=name, activations=activations, weights=scheme, operators=operators, **table)


def _costs(table: dict[str, Any]) -> Costs:
    numbers = {k: v for k, v in table.items() if not isinstance(v, dict)}
    rates = {k: Rate(**v) for k, v in table.items() if isinstance(v, dict)}
    return Costs(operators=rates, **numbers)


def _rule(op: str, row: dict[str, Any]) -> OpRule:
    if row.get("output", "any") not in ("quantized", "any"):
        raise ValueError(f"{op}: output is 'quantized' or 'any', not {row['output']!r}")
    attributes = {k: tuple(v) for k, v in row.pop("attributes", {}).items()}
    return OpRule(attributes=attributes or None, **row)
