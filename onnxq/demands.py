"""What a result has to fulfil before it is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import onnx

from onnxq import runtime
from onnxq.core import Note
from onnxq.data import Samples
from onnxq.errors import BudgetError, ModelError
from onnxq.layers import WEIGHTS, has_weight, is_packed
from onnxq.lint import conformance
from onnxq.loading import ModelLike, load
from onnxq.model import Model
from onnxq.recipes import NARROWING, PRUNING
from onnxq.targets import Target
from onnxq.validation import layer_fidelity

LAYERS_SAMPLES = 2
INTEGER = frozenset(
    "QLinearConv QLinearMatMul ConvInteger MatMulInteger QGemm QAttention MatMulNBits "
    "QLinearAdd QLinearMul DynamicQuantizeLSTM DynamicQuantizeMatMul MatMulIntegerToFloat "
    "GatherBlockQuantized DequantizeLinear".split()
)
"""Operators that only a quantized model has."""
STORED = tuple(op for op in WEIGHTS if op not in INTEGER)
START_OVER = "start from the float model, or let --requantize recover floats from this one"
NOTHING = "nothing was quantized"
NOTHING_PRUNED = "nothing was pruned"
INVALID = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError)


def require_quantized(notes: Sequence[Note], model: Model) -> None:
    """Raise BudgetError, with the reasons, if nothing was quantized."""
    if any(n.changed and n.rule.startswith(NARROWING) for n in notes):
        return
    raise BudgetError(
        f"{NOTHING}: {why_not(notes, model)}; "
        "nothing was written (--allow-unchanged writes the cleaned model)"
    )


def require_pruned(notes: Sequence[Note], model: Model) -> None:
    """Raise BudgetError, with the reasons, if nothing was pruned."""
    if model.pruned or any(n.changed and n.rule.startswith(PRUNING) for n in notes):
        return
    reasons = Counter(n.text for n in notes if not n.changed and n.rule.startswith(PRUNING))
    why = "; ".join(f"{text} ({count})" for text, count in reasons.most_common(3))
    raise BudgetError(
        f"{NOTHING_PRUNED}: {why or 'the model has no weight that is large enough'}; "
        "nothing was written (--allow-unchanged writes the model as it is)"
    )


def why_not(notes: Sequence[Note], model: Model) -> str:
    """Why nothing was quantized: that the model already is, or the commonest reasons."""
    ops = Counter(node.op for node in model.nodes() if node.op in INTEGER)
    ops = ops or Counter(f"{n.op} of stored weights" for n in model.nodes(*STORED) if is_packed(n))
    if ops:
        listed = ", ".join(f"{count} {op}" for op, count in ops.most_common(3))
        return f"the model is already quantized ({listed}): {START_OVER}"
    reasons = Counter(n.text for n in notes if not n.changed and n.rule.startswith(NARROWING))
    why = "; ".join(f"{text} ({count})" for text, count in reasons.most_common(3))
    if layers := dict.fromkeys(n.op for n in model.nodes(*WEIGHTS) if has_weight(n)):
        held = ", ".join(layers)
        return why or f"its weights ({held}) are too small to gain by it, or not for this target"
    return why or "the model has no layer with a weight"


def broken_rules(model: Model, target: Target, *, strict: bool) -> list[str]:
    """Warnings for rules of the target that the result breaks.

    Raises BudgetError, when strict, for a target that computes nothing in floats but would have to.
    """
    broken = [f for f in conformance(model, target).violations if f.rule != "domains"]
    floats = [f for f in broken if f.rule == "floats"]
    if floats and strict:
        ops = Counter(f.op for f in floats)
        listed = ", ".join(f"{op} {count}" for op, count in ops.most_common(5))
        raise BudgetError(
            f"{target.name} computes nothing in floats, but {len(floats)} nodes cannot be integers "
            f"({listed}): nothing was written (--allow-unchanged writes the result as it is)"
        )
    if not broken:
        return []
    rules = ", ".join(sorted({f.rule for f in broken}))
    return [f"the result breaks rules of {target.name} ({rules}): onnxq check says where"]


def simulated(model: Model, target: Target) -> list[str]:
    """A warning where activations are in formats that the target only imitates."""
    found = {str(np.dtype(n.outputs[0].dtype)) for n in model.nodes("QuantizeLinear")}
    named = ", ".join(sorted(found & {*target.simulated}))
    if not named:
        return []
    return [
        f"{target.name} has no integer kernels for {named} activations: these layers compute in "
        "floats between the pairs, which costs time; the numbers are those of a target that has"
    ]


def require_valid(model: Model, original: ModelLike) -> None:
    """Raise ModelError if the result is not valid: a bug of a pass, which must not reach a file.

    Where the checker does not take the original either, onnxruntime has the last word.
    """
    if sum(model.weight_sizes()) > runtime.LARGE:
        return  # the checker wants it in one proto or file; the session that follows checks as well
    try:
        onnx.checker.check_model(model.to_proto(), full_check=True)
    except INVALID as e:
        try:
            onnx.checker.check_model(load(original).to_proto(), full_check=True)
        except INVALID:
            return
        raise ModelError(
            f"the result is not valid, which is a bug of onnxq: {runtime.one_line(e)}"
        ) from e


def missed(
    original: ModelLike, edited: Model, held: Samples, reached: float, wanted: float
) -> BudgetError:
    """The error for a missed --min-sqnr: what was reached, and the layers to blame."""
    layers = layer_fidelity(load(original), edited, held.take(LAYERS_SAMPLES))
    worst = sorted(layers, key=lambda layer: layer.sqnr_db)[:3]
    named = ", ".join(f"{layer.name} ({layer.op}, {layer.sqnr_db:.1f} dB)" for layer in worst)
    return BudgetError(
        f"reached {reached:.1f} dB, --min-sqnr is {wanted:g}: nothing was written; "
        f"the layers furthest off are {named or 'not known'}"
    )
