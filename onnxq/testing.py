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
from onnxq.ports import Affine, ports_of
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

    Inputs and outputs that the pass has made integers and explained (`onnxq.ports`) are no other
    interface: both models are then fed values that the integers can be, and outputs may differ by
    one step.
    """
    proto = parser.parse_model(model) if isinstance(model, str) else model
    onnx.checker.check_model(proto, full_check=True)
    original, edited = Model.from_proto(proto), Model.from_proto(proto).copy()
    notes = tuple(pass_(edited))
    result = edited.to_proto()
    onnx.checker.check_model(result, full_check=True)
    ports = {n: p.affine for n, p in ports_of(edited).items() if n not in ports_of(original)}
    _same_interface(proto, result, ports)
    used = list(feeds) if feeds is not None else list(synthetic_samples(original, 3))
    one, two = (runtime.Client(runtime.session(p, optimize="off")) for p in (proto, result))
    for feed in used:
        exact = {n: _on_grid(np.asarray(v), ports[n]) if n in ports else v for n, v in feed.items()}
        for name, a, b in zip(one.names, one.run(exact), two.run(exact), strict=True):
            if name in ports:
                a = _on_grid(a, ports[name])
                b = np.asarray(b, a.dtype)
            step = 1.001 * ports[name].scale if name in ports else 0.0
            _same_values(name, np.asarray(a), np.asarray(b), rtol, max(atol, step))
    again = [note for note in pass_(edited) if note.changed]
    if again or edited.to_proto() != result:
        raise AssertionError(f"a second run changes the model again: {again}")
    return Checked(edited, notes)


def _on_grid(x: NDArray[Any], affine: Affine) -> NDArray[Any]:
    """The nearest values that integers stand for."""
    return affine.dequantize(affine.quantize(x)).astype(x.dtype)


def _same_interface(
    before: onnx.ModelProto, after: onnx.ModelProto, ports: Mapping[str, Affine]
) -> None:
    for kind in ("input", "output"):
        one, two = (
            [
                (v.name, None if v.name in ports else v.type.tensor_type.elem_type)
                for v in getattr(p.graph, kind)
            ]
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
