"""Scale and zero point of each quantized activation, from what calibration saw of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import reduce

import numpy as np

from onnxq.model import Model, values_of
from onnxq.passes.ops import activation_inputs, is_constant, useful_range
from onnxq.passes.placement import Placement, keeps_scale
from onnxq.schemes import FORMATS, QParams
from onnxq.statistics import Histogram, Method
from onnxq.targets import Target

Group = frozenset[str]
LEAST_SLOPE = 1e-3
UNWEIGHTED = ("minmax", "percentile", "entropy")
"""Methods that ask how often values occur, not what an error of each costs."""


def activation_params(
    model: Model,
    target: Target,
    placement: Placement,
    statistics: Mapping[str, Histogram],
    method: Method | float,
) -> dict[tuple[str, str], QParams]:
    """The parameters by tensor name and format; those of one group in one format are one object.

    Three things have a say: the range seen, cut to what readers can tell apart; constants that are
    moved or joined, whose values all count; and what the target demands of a result.
    """
    result: dict[tuple[str, str], QParams] = {}
    used = {placement.formats[key] for key in placement.nodes}
    own = placement.own_formats()
    for name in sorted(used):
        fixed = {t: p for t, p in placement.fixed.items() if own.get(t, name) == name}
        found = _in_format(model, target, placement, statistics, method, name, fixed)
        result |= {(tensor, name): params for tensor, params in found.items()}
    return result


def _in_format(
    model: Model,
    target: Target,
    placement: Placement,
    statistics: Mapping[str, Histogram],
    method: Method | float,
    format: str,
    demands: Mapping[str, tuple[float, int]],
) -> dict[str, QParams]:
    """The parameters by tensor name, in one format."""
    activations, numbers = replace(target.activations, format=format), FORMATS[format]
    useful, stored = _useful_ranges(model, placement), _stored_ranges(target, placement)
    slopes = _slopes(model, placement)
    demanded = {
        pair: QParams(np.array(pair[0], np.float32), np.array(pair[1], numbers.dtype))
        for pair in set(demands.values())
    }
    fixed = {name: demanded[pair] for name, pair in demands.items()}
    known: dict[Group, QParams] = {}
    result = {}
    for tensor in placement.tensors():
        group = placement.sources[tensor.name]
        if group not in known:
            merged = reduce(Histogram.merge, (statistics[name] for name in sorted(group)))
            if method not in UNWEIGHTED and (slope := slopes.get(group, 1.0)) < 1:
                merged = merged.leaning(max(slope, LEAST_SLOPE) ** 2)
            found = merged.range(method, bits=numbers.bits, symmetric=activations.symmetric)
            lo, hi = np.clip(found, *useful[group])
            least, most = stored.get(group, (0.0, 0.0))
            known[group] = activations.params(min(lo, least), max(hi, most))
            known[group] = _remembered(model, placement, group, format) or known[group]
            if len({demands.get(name) for name in group}) == 1:
                known[group] = fixed.get(min(group), known[group])
        result[tensor.name] = fixed.get(tensor.name, known[group])
    return result


def _useful_ranges(model: Model, placement: Placement) -> dict[Group, tuple[float, float]]:
    """What at least one reader of a group's tensors can tell apart."""
    useful: dict[Group, tuple[float, float]] = {}
    for tensor in placement.tensors():
        group, (lo, hi) = placement.sources[tensor.name], useful_range(model, tensor)
        before = useful.get(group, (np.inf, -np.inf))
        useful[group] = min(lo, before[0]), max(hi, before[1])
    return useful


def _slopes(model: Model, placement: Placement) -> dict[Group, float]:
    """How steep readers are for negative values, where all of a group's tensors go into LeakyRelu.

    An error of a negative value counts only so much behind it.
    """
    slopes: dict[Group, float] = {}
    for tensor in placement.tensors():
        leaky = all(n.op == "LeakyRelu" for n in tensor.outputs) and not model.is_output(tensor)
        found = [abs(float(n.attrs.get("alpha", 0.01))) for n in tensor.outputs] if leaky else []
        group = placement.sources[tensor.name]
        slopes[group] = max([slopes.get(group, 0.0), *(found or [1.0])])
    return slopes


def _stored_ranges(target: Target, placement: Placement) -> dict[Group, tuple[float, float]]:
    """Of constants that are moved or joined: samples need not show all of their values."""
    found: dict[Group, tuple[float, float]] = {}
    for node in placement.nodes.values():
        group = placement.sources.get(placement.result(node).name)
        if group is None or not keeps_scale(node, target):
            continue
        for i in activation_inputs(node):
            if is_constant(node.inputs[i]) and (v := values_of(node.inputs[i])) is not None:
                lo, hi = found.get(group, (0.0, 0.0))
                found[group] = min(lo, float(v.min())), max(hi, float(v.max()))
    return found


def remembered_ranges(
    model: Model, placement: Placement, wanted: Collection[str]
) -> dict[str, Histogram]:
    """The ranges of tensors that were quantized in the model that floats were recovered from.

    A tensor that shares its scale with others has theirs, if it has none of its own.
    """
    found = {name: _spanned(params) for name, params in model.ranges.items() if params}
    for name, group in placement.sources.items():
        if name in found:
            for other in group:
                found.setdefault(other, found[name])
    return {name: found[name] for name in wanted if name in found}


def _spanned(params: Sequence[QParams]) -> Histogram:
    """The ends of all that the parameters can represent."""
    return reduce(Histogram.merge, (Histogram.of(np.array(one.ends)) for one in params))


def _remembered(model: Model, placement: Placement, group: Group, format: str) -> QParams | None:
    """The parameters that all tensors of a group had in a format, if they are the same."""
    names = {*group, *(name for name, own in placement.sources.items() if own == group)}
    found = [
        params
        for name in names
        for params in model.ranges.get(name, ())
        if str(params.zero_point.dtype) == format
    ]
    each = {(float(p.scale), int(p.zero_point)) for p in found}
    return found[0] if len(each) == 1 else None
