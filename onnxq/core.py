"""Passes: frozen values that edit a model in place and say what they did.

One protocol for every rule: return None (not my pattern), raise `Skip(reason)` before any edit (my
pattern, but not allowed), or edit and return a sentence that says what was done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import onnx_graphsurgeon as gs

from onnxq.model import Model


@dataclass(frozen=True, slots=True)
class Note:
    """What a pass did to a node, or why it declined (`changed=False`).

    curve: how sensitive a layer is: points (share of its weights taken out, dB of the outputs).
    """

    rule: str
    node: str
    text: str
    changed: bool = True
    curve: tuple[tuple[float, float], ...] = ()


class Skip(Exception):
    """A rule declines, before it edited anything; the message is the reason."""


@runtime_checkable
class Pass(Protocol):
    """A frozen value whose fields are its options; calling it edits the model in place."""

    @property
    def name(self) -> str:
        """The pass's name: the name of its file in `passes/`."""
        ...

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Edit the model; return what was done and what was declined."""
        ...


Rule = Callable[[Model, gs.Node], str | None]


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A rule lifted to a pass: tried once on every node of the given operators, bodies included."""

    rule: Rule
    ops: tuple[str, ...]

    @property
    def name(self) -> str:
        """The rule's function name."""
        return self.rule.__name__

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self.rule.__doc__

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Try the rule on each node; a node that another match removed is not tried again."""
        notes = []
        for node in model.nodes(*self.ops):
            if not node.outputs:  # detached by an earlier match
                continue
            try:
                text = self.rule(model, node)
            except Skip as reason:
                notes.append(Note(self.name, node.name, str(reason), changed=False))
            else:
                if text is not None:
                    notes.append(Note(self.name, node.name, text))
        if any(note.changed for note in notes):
            model.sweep()
        return notes

    def __repr__(self) -> str:
        return self.name


def rewrites(*ops: str) -> Callable[[Rule], Rewrite]:
    """Lift a rule over one node to a pass over all nodes of the given operators (none: all nodes).

    >>> @rewrites("Identity")
    ... def drop_identity(model, node): ...
    """
    return lambda rule: Rewrite(rule, ops)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Passes run in order; itself a pass."""

    name: str
    passes: tuple[Pass, ...]

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Run each pass in turn; return all their notes."""
        return [note for pass_ in self.passes for note in pass_(model)]


@dataclass(frozen=True, slots=True)
class Fixpoint:
    """A pass repeated until it changes nothing more; itself a pass."""

    inner: Pass
    limit: int = 20

    @property
    def name(self) -> str:
        """The inner pass's name."""
        return self.inner.name

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Repeat the inner pass; declines are those of the last round.

        Raises RuntimeError when `limit` rounds did not reach a fixpoint: two rules undo each other.
        """
        done: list[Note] = []
        for _ in range(self.limit):
            notes = self.inner(model)
            if not any(note.changed for note in notes):
                return [*done, *notes]
            done += [note for note in notes if note.changed]
        raise RuntimeError(f"{self.name} still changes the graph after {self.limit} rounds")
