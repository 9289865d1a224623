"""Targets: what a runtime can execute, one TOML file each, with the source of each fact."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from onnxq.errors import RecipeError
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
class Target:
    """A runtime: number formats, and the operators that it runs in integers."""

    name: str
    description: str
    activations: QuantScheme
    weights: QuantScheme
    operators: Mapping[str, OpRule]
    opset: int = 13


def names() -> list[str]:
    """Names of the targets that come with onnxq."""
    return sorted(path.stem for path in HERE.glob("*.toml"))


def load_target(name: str) -> Target:
    """A target by name, or from a TOML file by its path.

    Raises RecipeError for a name that is not known and for a file that is not a target.
    """
    path = Path(name) if name.endswith(".toml") else HERE / f"{name}.toml"
    if not path.is_file():
        raise RecipeError(f"unknown target {name!r}: one of {', '.join(names())}, or a .toml file")
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
    return Target(name=name, activations=activations, weights=scheme, operators=operators, **table)


def _rule(op: str, row: dict[str, Any]) -> OpRule:
    if row.get("output", "any") not in ("quantized", "any"):
        raise ValueError(f"{op}: output is 'quantized' or 'any', not {row['output']!r}")
    attributes = {k: tuple(v) for k, v in row.pop("attributes", {}).items()}
    return OpRule(attributes=attributes or None, **row)
