"""Targets: what a runtime can execute, one TOML file each, with the source of each fact."""

from __future__ import annotations

import platform
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from math import inf
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from onnxq.errors import RecipeError, meant
from onnxq.options import fits, type_text
from onnxq.schemes import FORMATS, PerChannel, PerTensor, QuantScheme
from onnxq.targets.dynamic import DynamicRule, dynamic_rule
from onnxq.targets.halves import HalfRule, half_rules

HERE = Path(__file__).parent

Output = Literal["quantized", "any", "float"]
Bias = Literal["int32", "float", "either"]
FileFormat = Literal["onnx", "ort"]


@dataclass(frozen=True, slots=True)
class OpRule:
    """How a target runs one operator in integers.

    output: "quantized" when the integer kernel exists only with integer output, "any" when it may
    also return floats, "float" when it reads integers and returns floats. attributes: values that
    an attribute may have (the first is ONNX's default). shared: inputs and output must have one
    scale. fixed: scale and zero point that the output must have, by activation format. weights:
    how this operator's weights are quantized, where that is not the target's way. weight_formats:
    that this operator takes besides.
    """

    output: Output = "quantized"
    attributes: Mapping[str, tuple[str, ...]] | None = None
    shared: bool = False
    fixed: Mapping[str, tuple[float, int]] | None = None
    weights: QuantScheme | None = None
    weight_formats: tuple[str, ...] = ()
    source: str = ""


@dataclass(frozen=True, slots=True)
class Rate:
    """Nanoseconds of one operator; `onnxq.passes.costs` says how they are put together.

    hoisted: an element of a float node's result when that is quantized: where the runtime lifts the
    QuantizeLinear over the node, to run it in integers in the layout of floats.
    """

    float_element: float = 0.0
    float_mac: float = 0.0
    float_rows: float = 0.0
    integer_element: float = 0.0
    integer_mac: float = 0.0
    integer_rows: float = 0.0
    tap: float = 0.0
    patch: float = 0.0
    hoisted: float = 0.0


@dataclass(frozen=True, slots=True)
class Costs:
    """What things cost on a target, in nanoseconds, measured; only ratios matter.

    float_node, integer_node: for a node, whatever its size. quantize, dequantize: an element that
    changes between floats and integers; layout: what the change of memory layout adds to that
    around convolutions. block: channels that one vector of floats holds.
    input_lanes, output_lanes, depthwise_lanes: the fast integer convolution takes channels in
    multiples of the first and the last, and writes at least the second; others take twice the time.
    """

    float_node: float
    integer_node: float
    quantize: float
    dequantize: float
    block: int
    operators: Mapping[str, Rate]
    layout: float = 0.0
    input_lanes: int = 1
    output_lanes: int = 1
    depthwise_lanes: int = 1


@dataclass(frozen=True, slots=True)
class KernelCost:
    """Nanoseconds of a matrix product; `onnxq.passes.weight_kernels` puts them together.

    node: for a node. weight: to read one. product: to multiply and add. value: to bring one value
    of the other operand to integers.
    """

    node: float
    weight: float
    product: float
    value: float = 0.0


SPARSE_FORMS = ("bitmap", "coo")


@dataclass(frozen=True, slots=True)
class WeightKernels:
    """What multiplies floats with integer weights, written as DequantizeLinear and an operator.

    operators: whose right operand may be integers. formats: of the weights. groups: sizes that
    share a scale; channels: one scale a column, or a matrix, is allowed as well. symmetric: no zero
    points. costs: by bits of the weight, and "float"; without them a kernel always pays.
    """

    operators: tuple[str, ...]
    formats: tuple[str, ...]
    groups: tuple[int, ...] = ()
    channels: bool = True
    symmetric: bool = False
    costs: Mapping[str, KernelCost] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Target:
    """A runtime: number formats, the operators that it runs in integers, and what that costs.

    activations, weights: how onnxq quantizes for it. activation_formats, weight_formats: what it
    runs, those first. narrow: signed weights do not use their least value. bias: as int32 in the
    scale s_x s_w, as floats, or either (int32 is written); bias_bits: how many of the 32 it keeps.
    floats: operators that may compute in floats; None: all. opset: what a recipe raises the model
    to; max_opset: what it reads. domains: of operators that it knows. integer_operators: operators
    on integers (QLinearConv, ...) that it reads. integer_moves: Reshape, MaxPool and the like may
    stand on integers, without a pair around them. stored_weights: constants that are computed
    from integers (Cast, Mul) are folded at load; stored_formats: of such integers, all that onnxq
    writes if none are named. sparse_weights: forms of constants without their zeros that it reads
    (bitmap, coo: `onnxq.passes.sparsify_storage`). weight_kernels: for float layers with integer
    weights. static_shapes:
    free dimensions must be fixed. saturates: u8s8 products are added in pairs in saturating 16
    bits. simulated: activation formats that it reads, and computes in floats. widened: weight
    formats that a Cast at load brings to those of its kernels. grouped: weights of less than 8 bits
    may have scales of groups beside quantized activations. requantizes: float weights of Conv
    and Gemm between pairs are quantized at load, with one scale (`onnxq.passes.float_layers` says
    what helps). file_format: what is written beside the .onnx. machines: on which ONNX Runtime's
    CPU times are the target's own. Without costs, every operator that can run in integers does.
    dynamic: operators that it runs with activations quantized at run time, see
    `onnxq.targets.dynamic`. halves: how it takes float16 and bfloat16; without a word on one, that
    is stored, if constants are computed at load.

    sources: where each fact is from, by its name here; an operator without a source of its own has
    that of "operators".
    """

    name: str
    description: str
    activations: QuantScheme
    weights: QuantScheme
    operators: Mapping[str, OpRule]
    activation_formats: tuple[str, ...] = ()
    weight_formats: tuple[str, ...] = ()
    narrow: bool = False
    bias: Bias = "int32"
    bias_bits: int = 32
    floats: tuple[str, ...] | None = None
    opset: int = 13
    max_opset: int | None = None
    domains: tuple[str, ...] = ("",)
    integer_operators: tuple[str, ...] = ()
    integer_moves: bool = False
    stored_weights: bool = True
    stored_formats: tuple[str, ...] = ()
    sparse_weights: tuple[str, ...] = ()
    weight_kernels: WeightKernels | None = None
    static_shapes: bool = False
    saturates: bool = False
    simulated: tuple[str, ...] = ()
    widened: tuple[str, ...] = ()
    grouped: bool = False
    requantizes: bool = False
    file_format: FileFormat = "onnx"
    machines: tuple[str, ...] = ()
    costs: Costs | None = None
    dynamic: Mapping[str, DynamicRule] = field(default_factory=dict)
    halves: Mapping[str, HalfRule] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    def weights_of(self, op: str) -> QuantScheme:
        """How weights of an operator are quantized."""
        rule = self.operators.get(op)
        return rule.weights if rule is not None and rule.weights is not None else self.weights

    def formats_of(self, op: str) -> tuple[str, ...]:
        """In which formats weights of an operator may be written beside quantized activations."""
        return (*self.kernel_formats(op), *self.widened)

    def kernel_formats(self, op: str) -> tuple[str, ...]:
        """Which formats an operator's kernels read, beside quantized activations."""
        rule = self.operators.get(op, OpRule())
        own = rule.weights is not None and rule.weights.format != self.weights.format
        first = (self.weights_of(op).format,) if own else self.weight_formats
        return (*first, *rule.weight_formats)

    def without_channels(self) -> Target:
        """The target with one scale a weight: before opset 13 DequantizeLinear has no axis."""
        operators = {
            op: rule
            if rule.weights is None
            else replace(rule, weights=replace(rule.weights, granularity=PerTensor()))
            for op, rule in self.operators.items()
        }
        weights = replace(self.weights, granularity=PerTensor())
        return replace(self, weights=weights, operators=operators)

    def source(self, fact: str, op: str = "") -> str:
        """Where a fact, of an operator if one is named, is from."""
        rule = self.operators.get(op)
        if rule is not None and rule.source:
            return rule.source
        return self.sources.get(fact) or self.sources.get("operators", "")


def is_here(target: Target) -> bool:
    """Whether times on this machine are the target's own."""
    return platform.machine() in target.machines


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
        return _target(path.stem, _table(path, ()))
    except KeyError as e:
        raise RecipeError(f"{path}: not a target: it has no {e}") from e
    except (tomllib.TOMLDecodeError, TypeError, ValueError, AttributeError) as e:
        raise RecipeError(f"{path}: not a target: {e}") from e


def _table(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The file's table over that of the target it extends: a name, or a file beside it."""
    table = tomllib.loads(path.read_text())
    base = table.pop("extends", None)
    if base is None:
        return table
    parent = path.parent / base if base.endswith(".toml") else HERE / f"{base}.toml"
    if parent in (path, *seen) or not parent.is_file():
        raise ValueError(f"extends {base!r}, which is not another target")
    return _merged(_table(parent, (*seen, path)), table)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(below[key], value)
        if isinstance(value, dict) and isinstance(below.get(key), dict)
        else value
        for key, value in above.items()
    }
    return below | both


def _target(name: str, table: dict[str, Any]) -> Target:
    formats = {
        kind: (table[kind]["format"], *table[kind].pop("accepts", ()))
        for kind in ("activations", "weights")
    }
    if unknown := set(table) - {f.name for f in fields(Target)}:
        raise ValueError(f"unknown key {', '.join(sorted(unknown))}")
    named = [*formats.values(), table.get("stored_formats", ())]
    named += [table.get(key, ()) for key in ("simulated", "widened")]
    named += [table.get("weight_kernels", {}).get("formats", ())]
    if strange := {f for found in named for f in found} - set(FORMATS):
        raise ValueError(f"unknown format {', '.join(sorted(strange))}")
    if stray := set(table.get("sources", {})) - set(table):
        raise ValueError(f"sources of {', '.join(sorted(stray))}, which it does not state")
    if strange := set(table.get("sparse_weights", ())) - {*SPARSE_FORMS}:
        raise ValueError(f"sparse_weights knows no {', '.join(sorted(strange))}: bitmap, coo")
    for key, kind in (("bias", Bias), ("file_format", FileFormat)):
        _one_of(key, table.get(key, get_args(kind)[0]), get_args(kind))
    hints = get_type_hints(Target)
    for key in set(table) - {"activations", "weights", "operators", "costs", "sources"}:
        if not fits(table[key], hints[key]):
            raise ValueError(f"{key} = {table[key]!r} is not {type_text(hints[key])}")
    weights = table.pop("weights")
    operators = {op: _rule(op, row, weights) for op, row in table.pop("operators").items()}
    if table.get("saturates") and (weights["format"], weights["symmetric"]) != ("int8", True):
        raise ValueError("saturates is a matter of symmetric int8 weights")
    if "dynamic" in table:
        table["dynamic"] = {op: dynamic_rule(op, row) for op, row in table["dynamic"].items()}
    if "halves" in table:
        table["halves"] = half_rules(table["halves"])
    if "costs" in table:
        table["costs"] = _costs(table["costs"])
    if "weight_kernels" in table:
        table["weight_kernels"] = _weight_kernels(table["weight_kernels"])
    plain: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in table.items()
    }
    return Target(
        name=name,
        activations=QuantScheme(granularity=PerTensor(), **plain.pop("activations")),
        weights=_weights(weights),
        operators=operators,
        activation_formats=formats["activations"],
        weight_formats=formats["weights"],
        **plain,
    )


def _weights(table: dict[str, Any]) -> QuantScheme:
    rest = {key: value for key, value in table.items() if key != "per_channel"}
    return QuantScheme(granularity=PerChannel() if table["per_channel"] else PerTensor(), **rest)


def _one_of(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        listed = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{what} is one of {listed}, not {value!r}")


def _costs(table: dict[str, Any]) -> Costs:
    numbers = {k: v for k, v in table.items() if not isinstance(v, dict)}
    rates = {k: Rate(**v) for k, v in table.items() if isinstance(v, dict)}
    return Costs(operators=rates, **numbers)


def _weight_kernels(table: dict[str, Any]) -> WeightKernels:
    costs = {k: KernelCost(**v) for k, v in table.pop("costs", {}).items()}
    if costs and "float" not in costs:
        raise ValueError("weight_kernels.costs lacks those of float, to compare with")
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
    return WeightKernels(costs=costs, **plain)


def _fixed(what: str, pair: Any) -> tuple[float, int]:
    """Scale and zero point, of two numbers."""
    if not fits(pair, list[float]) or len(pair) != 2 or not 0 < pair[0] < inf:
        raise ValueError(f"{what} is a scale above 0 and a zero point, not {pair!r}")
    return float(pair[0]), int(pair[1])


def _rule(op: str, row: dict[str, Any], weights: dict[str, Any]) -> OpRule:
    _one_of(f"{op}: output", row.get("output", "any"), get_args(Output))
    rest = dict(row)
    for key, value in row.get("attributes", {}).items():
        if not isinstance(value, list):
            raise ValueError(f"{op}: attribute {key} is a list of values, not {value!r}")
    attributes = {k: tuple(v) for k, v in rest.pop("attributes", {}).items()}
    fixed = {k: _fixed(f"{op}: fixed {k}", v) for k, v in rest.pop("fixed", {}).items()}
    own = rest.pop("weights", None)
    further = tuple(rest.pop("weight_formats", ()))
    if strange := set(further) - set(FORMATS):
        raise ValueError(f"{op}: unknown format {', '.join(sorted(strange))}")
    return OpRule(
        attributes=attributes or None,
        fixed=fixed or None,
        weights=None if own is None else _weights(weights | own),
        weight_formats=further,
        **rest,
    )
