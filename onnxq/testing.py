"""Test a pass: `check` runs it on a model and holds the result against the original."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import parser

from onnxq import runtime
from onnxq.core import Note, Pass
from onnxq.model import Model
from onnxq.synthetic import synthetic_samples


@dataclass(frozen=True, slots=True)
class Checked:
    """The rewritten model, and what the pass said."""

    model: Model
    notes: tuple[Note, ...]

    @property
    def ops(self) -> Counter[str]:
        """How many nodes there are of each operator, bodies included."""
        return Counter(node.op for node in self.model.nodes())

    @property
    def declined(self) -> list[str]:
        """The reasons of what was declined."""
        return [note.text for note in self.notes if not note.changed]


def check(
    pass_: Pass,
    model: onnx.ModelProto | str,
    *,
    feeds: Sequence[Mapping[str, NDArray[Any]]] | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-5,
) -> Checked:
    """Run a float-preserving pass; raise AssertionError for whatever is wrong with the result.

    model: a proto, or ONNX text (`onnx.parser`). feeds: inputs to compare on; drawn with a seed
    if not given. The result has to pass the full checker, keep its interface, give the same
    finite outputs in onnxruntime with optimizations off, and be left alone by a second run.
    """
    proto = parser.parse_model(model) if isinstance(model, str) else model
    onnx.checker.check_model(proto, full_check=True)
    original, edited = Model.from_proto(proto), Model.from_proto(proto).copy()
    notes = tuple(pass_(edited))
    result = edited.to_proto()
    onnx.checker.check_model(result, full_check=True)
    _same_interface(proto, result)
    used = list(feeds) if feeds is not None else list(synthetic_samples(original, 3))
    one, two = (runtime.session(p, optimize="off") for p in (proto, result))
    for feed in used:
        for name, a, b in zip(
            [o.name for o in one.get_outputs()],
            one.run(None, feed),
            two.run(None, feed),
            strict=True,
        ):
            _same_values(name, np.asarray(a), np.asarray(b), rtol, atol)
    again = [note for note in pass_(edited) if note.changed]
    if again or edited.to_proto() != result:
        raise AssertionError(f"a second run changes the model again: {again}")
    return Checked(edited, notes)


def _same_interface(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    for kind in ("input", "output"):
        one, two = (
            [(v.name, v.type.tensor_type.elem_type) for v in getattr(p.graph, kind)]
            for p in (before, after)
        )
        if one != two:
            raise AssertionError(f"{kind}s were {one}, are {two}")


def _same_values(
    name: str, reference: NDArray[Any], output: NDArray[Any], rtol: float, atol: float
) -> None:
    if reference.dtype.kind == "f" and not np.isfinite(reference).all():
        raise AssertionError(f"{name}: the original's values are not finite; they prove nothing")
    if reference.dtype != output.dtype or reference.shape != output.shape:
        raise AssertionError(
            f"{name} was {reference.dtype} {reference.shape}, is {output.dtype} {output.shape}"
        )
    np.testing.assert_allclose(output, reference, rtol=rtol, atol=atol, err_msg=name)
