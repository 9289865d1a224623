"""What `onnxq targets` prints: the targets, and the facts of one with their sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from onnxq.report import SCHEMA, print_rows, to_json
from onnxq.schemes import PerChannel, QuantScheme
from onnxq.targets import OpRule, Target, WeightKernels, load_target, names
from onnxq.targets.halves import HalfRule

if TYPE_CHECKING:
    from rich.console import Console

UNSAID = ("name", "description", "operators", "costs", "dynamic", "halves", "sources")
ALWAYS = ("bias", "opset")  # said even where they are what most targets have


@dataclass(frozen=True, slots=True)
class TargetList:
    """Names and descriptions."""

    targets: Mapping[str, str]

    def to_json(self) -> str:
        """The list for machines."""
        return to_json({"schema": SCHEMA, **asdict(self)})

    def print_to(self, console: Console) -> None:
        """Print the list for people."""
        print_rows(console, list(self.targets.items()))


@dataclass(frozen=True, slots=True)
class TargetFacts:
    """One target: facts by name, operators with what is special about them, sources by fact."""

    name: str
    description: str
    facts: Mapping[str, str]
    operators: Mapping[str, str]
    sources: Mapping[str, str]

    def to_json(self) -> str:
        """The facts for machines."""
        return to_json({"schema": SCHEMA, **asdict(self)})

    def print_to(self, console: Console) -> None:
        """Print the facts for people."""
        from rich.table import Table

        console.print(f"{self.name}: {self.description}")
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for fact, text in self.facts.items():
            table.add_row(fact, text)
        plain = [op for op, text in self.operators.items() if not text]
        table.add_row("operators", ", ".join(plain))
        for op, text in self.operators.items():
            if text:
                table.add_row(f"  {op}", text)
        console.print(table)
        console.print("sources")
        for fact, source in self.sources.items():
            console.print(f"  {fact}: {source}")


def targets() -> TargetList:
    """The targets that come with onnxq."""
    return TargetList({name: load_target(name).description for name in names()})


def describe_target(name: str) -> TargetFacts:
    """What is known of a target (a name or a .toml file); raises RecipeError for an unknown one."""
    target = load_target(name)
    defaults = {f.name: f.default for f in fields(Target)}
    facts = {
        f.name: _said(getattr(target, f.name))
        for f in fields(Target)
        if f.name in ALWAYS
        or (f.name not in UNSAID and getattr(target, f.name) not in (defaults[f.name], None))
    }
    facts["dynamic"] = (
        ", ".join(
            f"{op} ({rule.kernel}, {_said(rule.weights)})" for op, rule in target.dynamic.items()
        )
        or "none: activations are not quantized at run time"
    )
    facts["halves"] = (
        ", ".join(f"{name} ({_half(rule)})" for name, rule in target.halves.items()) or "stored"
        if target.stored_weights or target.halves
        else "none"
    )
    facts["costs"] = "measured" if target.costs else "none: all that can runs in integers"
    operators = {op: _rule(rule, target) for op, rule in target.operators.items()}
    sources = dict(target.sources)
    sources |= {op: rule.source for op, rule in target.operators.items() if rule.source}
    return TargetFacts(target.name, target.description, facts, operators, sources)


def _half(rule: HalfRule) -> str:
    words = ["computed in" if rule.encoding == "compute" else "stored"]
    if rule.operators is not None:
        words.append(f"operators: {' '.join(rule.operators)}")
    words += [f"not {' '.join(rule.lacks)}"] * bool(rule.lacks)
    return "; ".join(words)


def _said(value: Any) -> str:
    if isinstance(value, QuantScheme):
        words = [value.format, "symmetric" if value.symmetric else "asymmetric"]
        words += ["per channel" if isinstance(value.granularity, PerChannel) else "per tensor"]
        words += ["scales are powers of two"] * value.power_of_two
        return ", ".join(words)
    if isinstance(value, WeightKernels):
        words = [", ".join(value.operators), "weights as " + ", ".join(value.formats)]
        words += [f"groups of {', '.join(map(str, value.groups))}"] * bool(value.groups)
        words += ["one scale a column"] * value.channels + ["no zero points"] * value.symmetric
        return "; ".join([*words, "costs measured" if value.costs else "always"])
    if isinstance(value, tuple):
        return ", ".join("ai.onnx" if v == "" else str(v) for v in value) or "none"
    return {True: "yes", False: "no"}.get(value, str(value)) if value is not None else ""


def _rule(rule: OpRule, target: Target) -> str:
    words = []
    if rule.output != "quantized":
        words.append("may return floats" if rule.output == "any" else "returns floats")
    if rule.shared:
        words.append("one scale for inputs and output")
    if fixed := (rule.fixed or {}).get(target.activations.format):
        words.append(f"output has scale {fixed[0]:g}, zero point {fixed[1]}")
    if rule.weights is not None:
        words.append(f"weights {_said(rule.weights)}")
    words += [f"{key} {' or '.join(values)}" for key, values in (rule.attributes or {}).items()]
    return "; ".join(words)
