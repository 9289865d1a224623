"""What `check` says of a model: where it breaks a target's rules, what falls back to floats."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from onnxq.report import SCHEMA, to_json

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = 8  # entries of a long list that people see; machines get all


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found at one node (or at the model as a whole: node is then empty).

    rule: which fact of the target it is about, by its name in the target's file. source: where
    that fact is from.
    """

    rule: str
    node: str
    op: str
    text: str
    source: str


@dataclass(frozen=True, slots=True)
class Conformance:
    """A model against a target: what the target cannot run, and what it runs in floats."""

    model: str
    target: str
    violations: tuple[Finding, ...]
    fallbacks: tuple[Finding, ...]
    integer_nodes: int

    @property
    def is_clean(self) -> bool:
        """Whether no rule is broken."""
        return not self.violations

    def to_json(self) -> str:
        """The findings for machines."""
        return to_json({"schema": SCHEMA, **asdict(self)})

    def print_to(self, console: Console) -> None:
        """Print the findings for people: each source once."""
        count = len(self.violations)
        said = "no violations" if not count else f"{count} violation{'s' * (count > 1)}"
        console.print(f"{self.model} on {self.target}: {said}")
        sources = list(dict.fromkeys(f.source for f in self.violations if f.source))
        for found in self.violations[:SHOWN]:
            mark = f" [{sources.index(found.source) + 1}]" if found.source else ""
            where = f"{found.op} {found.node}".strip() or "model"
            console.print(f"  {found.rule}: {where}: {found.text}{mark}")
        if count > SHOWN:
            rest = Counter(found.rule for found in self.violations[SHOWN:])
            listed = ", ".join(f"{rule} {n}" for rule, n in rest.items())
            console.print(f"  ... and {count - SHOWN} more ({listed}): --json has all")
        for i, source in enumerate(sources, 1):
            console.print(f"  [{i}] {source}")
        console.print(f"{self.integer_nodes} nodes in integers, {len(self.fallbacks)} in floats")
        reasons = Counter((found.op, found.text) for found in self.fallbacks).most_common()
        for (op, text), n in reasons[:SHOWN]:
            console.print(f"  {n} x {op}: {text}" if op else f"  {text}")
        if len(reasons) > SHOWN:
            console.print(f"  ... and {len(reasons) - SHOWN} more reasons: --json has all")
