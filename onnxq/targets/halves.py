"""What a target says of models in 16-bit floats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Encoding = Literal["compute", "storage"]


@dataclass(frozen=True, slots=True)
class HalfRule:
    """How a target takes one format, float16 or bfloat16.

    encoding: what is best there: operators that compute in 16 bits, or in float32 with constants
    that are stored in 16. operators: that run in the format; None: all that ONNX has in it, but for
    those that it lacks.
    """

    encoding: Encoding = "storage"
    operators: tuple[str, ...] | None = None
    lacks: tuple[str, ...] = ()

    def runs(self, op: str) -> bool:
        """Whether the operator runs in the format."""
        return op not in self.lacks and (self.operators is None or op in self.operators)


def half_rules(table: Mapping[str, Any]) -> dict[str, HalfRule]:
    """A target's [halves]; raises ValueError for what it cannot be."""
    rules = {}
    for name, row in table.items():
        if name not in ("float16", "bfloat16"):
            raise ValueError(f"halves are float16 and bfloat16, not {name!r}")
        if unknown := set(row) - {"encoding", "operators", "lacks"}:
            raise ValueError(f"halves.{name}: unknown key {', '.join(sorted(unknown))}")
        lists = {key: tuple(row[key]) for key in ("operators", "lacks") if key in row}
        encoding = row.get("encoding", "storage")
        if encoding not in get_args(Encoding):
            raise ValueError(f"halves.{name}: encoding is compute or storage, not {encoding!r}")
        rules[name] = HalfRule(encoding, lists.get("operators"), lists.get("lacks", ()))
    return rules
