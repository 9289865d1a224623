"""In which formats the activations and weights of each node are quantized with fixed ranges.

Options of the pass and overrides for single layers ask for widths, or formats by name; the target
says what it executes, and whether activations or the weights of an operator have a sign. Operators
without a weight have the widest format of what feeds them, so that nothing is narrowed between two
wide layers; a tensor that is read in two formats gets two pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import onnx_graphsurgeon as gs

from onnxq.errors import RecipeError
from onnxq.layers import Choice
from onnxq.model import Model
from onnxq.passes.encodings import CAST_SINCE
from onnxq.passes.ops import OPS
from onnxq.schemes import FORMATS, PerChannel, PerGroup, PerTensor, QuantScheme
from onnxq.targets import Target

Activations = Literal["auto", "a8", "a16", "int8", "uint8", "int16", "uint16"]
Weights = Literal["auto", "int8", "uint8", "int16", "int4", "uint4", "int2"]
Granularity = Literal["auto", "tensor", "channel", "group"]
Range = Literal["minmax", "percentile", "entropy", "mse", "careful", "output"]
WIDTHS = {"a8": 8, "a16": 16}
WIDE_SINCE = 21  # QuantizeLinear and DequantizeLinear of 16 and of 4 bits


@dataclass(frozen=True, slots=True)
class Formats:
    """What each node is quantized in, by node id; nodes that are not named have the target's own.

    activations: formats. weights: how a layer's weight is quantized. floats: nodes that have to
    stay float, and why. asked: nodes that somebody wants in integers, whatever rules and costs say.
    simulated: nodes in formats that the target computes in floats: what its kernels cost says
    nothing of them.
    """

    activations: Mapping[int, str]
    weights: Mapping[int, QuantScheme]
    floats: Mapping[int, str]
    asked: frozenset[int]
    simulated: frozenset[int]


def activation_format(target: Target, asked: str | int) -> str:
    """The target's format for activations of that name, or of that many bits (16, or "a16").

    Raises RecipeError where it has none.
    """
    bits = asked if isinstance(asked, int) else WIDTHS.get(asked) or FORMATS[asked].bits
    named = [f for f in target.activation_formats if f == asked]
    signed = FORMATS[target.activations.format].signed
    same = [f for f in target.activation_formats if FORMATS[f].bits == bits]
    same.sort(key=lambda f: FORMATS[f].signed != signed)
    if not named and not same:
        listed = ", ".join(target.activation_formats)
        raise RecipeError(
            f"{target.name} executes no activations of {bits} bits; use one of: {listed}"
        )
    return (named or same)[0]


def weight_scheme(target: Target, op: str, asked: str | None) -> QuantScheme:
    """How weights of an operator are quantized; asked: a format, or another of its width.

    Raises RecipeError where the target executes none of that width.
    """
    own = target.weights_of(op)
    if asked is None or asked == own.format:
        return own
    possible = target.formats_of(op)
    numbers = FORMATS[asked]
    if asked in possible:
        return _of(own, asked)
    same = [f for f in possible if FORMATS[f].bits == numbers.bits and "int" in asked]
    same.sort(key=lambda f: FORMATS[f].signed != FORMATS[own.format].signed)
    if not same:
        raise RecipeError(
            f"{target.name} executes no {asked} weights in {op} beside quantized activations; "
            f"use one of: {', '.join(possible)}"
        )
    return own if own.format in same else _of(own, same[0])


def _of(own: QuantScheme, format: str) -> QuantScheme:
    """The scheme in another format; few bits without the least value, so that scales are positive.

    (To use it, `quantize_weight` makes scales negative: biases and other runtimes want none.)
    """
    numbers = FORMATS[format]
    narrow = own.symmetric and numbers.signed and numbers.bits < 8
    return replace(own, format=format, levels=2**numbers.bits - 1 if narrow else None)


def with_granularity(target: Target, scheme: QuantScheme, asked: str, size: int) -> QuantScheme:
    """The scheme with one scale a tensor, a channel (where the operator may have it) or a group.

    "auto": as the target has it. Groups are for weights below 8 bits. Raises RecipeError for groups
    where the target has none.
    """
    if asked == "group":
        if not target.grouped:
            raise RecipeError(
                f"{target.name} executes no weights with scales of groups beside quantized "
                "activations; use granularity channel"
            )
        return replace(scheme, granularity=PerGroup(size)) if scheme.numbers.bits < 8 else scheme
    if asked == "tensor" and isinstance(scheme.granularity, PerChannel):
        return replace(scheme, granularity=PerTensor())
    return scheme


def require_formats(target: Target, activations: str, weights: str) -> None:
    """Raise RecipeError for formats, given as options, that the target does not execute."""
    if activations != "auto":
        activation_format(target, activations)
    if weights != "auto":
        layers = [op for op in target.operators if OPS[op].role == "linear"]
        if not any(_takes(target, op, weights) for op in layers):
            weight_scheme(target, layers[0], weights)


def _takes(target: Target, op: str, weights: str) -> bool:
    try:
        weight_scheme(target, op, weights)
    except RecipeError:
        return False
    return True


def formats_of(
    model: Model,
    target: Target,
    choices: Mapping[int, Choice],
    *,
    activations: str,
    weights: str,
    granularity: str,
    group_size: int,
) -> Formats:
    """Resolve options ("auto": the target's own) and overrides for the model's nodes.

    Operators without kernels for the weights that the options name keep the target's own. Raises
    RecipeError for an override that the target does not execute.
    """
    default = target.activations.format
    if activations != "auto":
        default = activation_format(target, activations)
    nodes = [n for n in model.nodes(*OPS) if n.op in target.operators]
    schemes, floats, asked = dict[int, QuantScheme](), dict[int, str](), set[int]()
    own: dict[int, str] = {}
    for node in nodes:
        choice = choices.get(id(node), Choice("", ""))
        if choice.is_float:
            floats[id(node)] = choice.reason
            continue
        try:
            if choice.activations is not None:
                own[id(node)] = activation_format(target, choice.activations)
            if OPS[node.op].role == "linear":
                own.setdefault(id(node), default)
                wanted = None if weights == "auto" else weights
                wanted = wanted if wanted and _takes(target, node.op, wanted) else None
                scheme = weight_scheme(target, node.op, choice.static_weights or wanted)
                schemes[id(node)] = with_granularity(target, scheme, granularity, group_size)
        except RecipeError as e:
            raise RecipeError(f"{node.name}, {choice.reason}: {e}") from e
        if choice.is_asked:
            asked.add(id(node))
    by_node = _spread(nodes, own, default)
    for node in nodes:
        formats = [by_node[id(node)], *(s.format for s in [schemes.get(id(node))] if s)]
        need, named = max((opset_for(f), f) for f in formats)
        if need > model.opset and id(node) not in floats:
            floats[id(node)] = f"opset {model.opset} has no {named}: opset {need} is needed"
    simulated = {key for key, name in by_node.items() if name in target.simulated}
    return Formats(by_node, schemes, floats, frozenset(asked - floats.keys()), frozenset(simulated))


def _spread(nodes: list[gs.Node], own: Mapping[int, str], default: str) -> dict[int, str]:
    """Each node's activation format: its own, or the widest among the nodes that feed it."""
    known, found = {id(node) for node in nodes}, dict(own)
    todo = [node for node in nodes if id(node) not in own]
    while todo:
        waiting = []
        for node in todo:
            feeding = [n for t in node.inputs for n in t.inputs if id(n) in known]
            if all(id(n) in found for n in feeding):
                formats = [found[id(n)] for n in feeding]
                found[id(node)] = max(formats, key=lambda f: FORMATS[f].bits, default=default)
            else:
                waiting.append(node)
        if len(waiting) == len(todo):
            found.update((id(node), default) for node in waiting)
            break
        todo = waiting
    return found


def opset_for(format: str) -> int:
    """The least opset whose Q/DQ (and Cast) take a format."""
    wide = FORMATS[format].bits not in (8, 32)
    return max(WIDE_SINCE if wide else 10, CAST_SINCE.get(format, 0))


def opset_needed(target: Target, activations: str, weights: str, choices: Iterable[Choice]) -> int:
    """The least opset for all that the options and overrides may ask for."""
    layers = [op for op in target.operators if OPS[op].role == "linear"]
    pairs = [(activations, None if weights == "auto" else weights)]
    for choice in choices:
        bits = choice.activations
        found = activations if bits is None else "int16" if bits == 16 else "int8"
        pairs.append((found, choice.static_weights))
    need = 10
    for asked, weight in pairs:
        try:
            form = (
                target.activations.format if asked == "auto" else activation_format(target, asked)
            )
        except RecipeError:  # of an override: said when it is known whether it matches anything
            continue
        for op in layers:
            if weight is None or _takes(target, op, weight):
                scheme = weight_scheme(target, op, weight)
                need = max(need, opset_for(form), opset_for(scheme.format))
    return need
