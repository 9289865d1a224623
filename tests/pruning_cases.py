"""What removal is measured against: the model whose consumers have zeros for the units that go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxq import runtime
from onnxq.model import Model, values_of
from onnxq.passes.removal import Structure, remove, structure, weight_from, weight_matrix
from onnxq.passes.unit_budget import even
from onnxq.synthetic import synthetic_samples


def chosen(found: Structure, scores: NDArray[np.float64], amount: float) -> NDArray[np.bool_]:
    """Keep the units with the highest scores, the same share of each group; ties by number."""
    keep = np.ones(found.count, np.bool_)
    for group in found.groups:
        order = np.argsort(scores[group], kind="stable")
        keep[group[order[: even(len(group), amount)]]] = False
    return keep


def zeroed(proto: onnx.ModelProto, keep: NDArray[np.bool_]) -> onnx.ModelProto:
    """Zeros in the columns of weights that read units which are not kept; nothing else."""
    model = Model.from_proto(proto)
    for layer in structure(model, "test").layers:
        gone = ~np.append(keep, True)[layer.inputs]
        if layer.is_depthwise or not gone.any():
            continue
        old = np.asarray(values_of(layer.node.inputs[layer.index]))
        matrix = weight_matrix(layer, old).astype(np.float64)
        matrix = np.where(gone[:, None, :, None], 0.0, matrix)
        new = weight_from(layer, matrix, old)
        layer.node.inputs[layer.index] = model.constant("zeroed", new)
    return model.to_proto()


def _floats(proto: onnx.ModelProto) -> int:
    """Numbers in weights."""
    model = Model.from_proto(proto)
    inputs = {id(t): t for node in model.nodes() for t in node.inputs if t.name}
    values = [values_of(t) for t in inputs.values()]
    return sum(v.size for v in values if v is not None and v.dtype.kind == "f")


def compared(
    proto: onnx.ModelProto,
    amount: float = 0.4,
    *,
    seed: int = 0,
    feeds: Sequence[Mapping[str, NDArray[Any]]] | None = None,
) -> tuple[Structure, Model]:
    """Remove a share of each group at random; assert that the result is what the zeroed model is.

    Returns what was found in the original, and the result.
    """
    onnx.checker.check_model(proto, full_check=True)
    model = Model.from_proto(proto).copy()
    found = structure(model, "test")
    keep = chosen(found, np.random.default_rng(seed).random(found.count), amount)
    remove(model, found, keep, "test")
    result = model.to_proto()
    onnx.checker.check_model(result, full_check=True)
    original = Model.from_proto(proto)
    original.infer_shapes()
    for kind in ("input", "output"):
        protos = (original.to_proto(), result)
        one, two = ([*map(str, getattr(p.graph, kind))] for p in protos)
        assert one == two
    used = feeds if feeds is not None else list(synthetic_samples(Model.from_proto(proto), 2))
    exact = runtime.Client(runtime.session(zeroed(proto, keep), optimize="off"))
    small = runtime.Client(runtime.session(result, optimize="off"))
    for feed in used:
        for a, b in zip(exact.run(feed), small.run(feed), strict=True):
            a, b = np.asarray(a), np.asarray(b)
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert np.isfinite(a).all()
            scale = float(np.abs(a).max(initial=0.0)) if a.dtype.kind == "f" else 0.0
            np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4 * scale + 1e-7)
    if not keep.all():
        assert _floats(result) < _floats(proto)
    return found, model
