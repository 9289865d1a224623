"""Which weights are stored in few bits, and how all that read one come to read it unpacked.

For passes that rewrite weights of layers that compute in floats, whatever the numbers look like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.core import Note
from onnxq.layers import Choice, Layers, is_lookup
from onnxq.model import Model, readers
from onnxq.passes.encodings import STORAGE_SINCE, Emitter, Encoding, opset_for
from onnxq.passes.layouts import WEIGHTS, Held, held_by
from onnxq.passes.ops import is_constant
from onnxq.passes.sensitive import OUTPUT_SHARE, output_convolutions
from onnxq.schemes import FORMATS, Granularity, PerGroup, PerTensor, QuantScheme
from onnxq.targets import Target
from onnxq.weights import data_type_of, stored_size

OVERHEAD = 256  # bytes of the nodes and names that unpack a weight, about
# Operators that a weight may go through; they read it unpacked, or it would be stored twice.
MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity")


@dataclass(frozen=True, slots=True)
class Found:
    """A float weight of a node, and what an override asks of the node, if one does."""

    node: gs.Node
    held: Held
    choice: Choice | None = None

    @property
    def tensor(self) -> gs.Tensor:
        """The weight."""
        tensor: gs.Tensor = self.node.inputs[self.held.index]
        return tensor

    @property
    def size(self) -> int:
        """How many values it has."""
        return prod(self.held.shape)

    def is_worth(self, bits: float) -> bool:
        """Whether the file gets smaller with so many bits a value."""
        before = self.size * np.dtype(self.tensor.dtype).itemsize
        return bool(self.size * bits / 8 + OVERHEAD < before)


def require_formats(formats: Iterable[str], target: Target | None) -> None:
    """Raise ValueError for a linear format of weights that the target cannot run."""
    allowed = stored_formats(target)
    for format in formats:
        if format not in FORMATS or format == "int32" or (allowed and format not in allowed):
            runs = "ONNX Runtime" if target is None else target.name
            listed = ", ".join(allowed or (f for f in FORMATS if f != "int32"))
            raise ValueError(
                f"format {format!r}: {runs} cannot run weights in it: use one of {listed}"
            )


def stored_formats(target: Target | None) -> tuple[str, ...]:
    """The formats of weights that the target runs; empty: all."""
    return target.stored_formats if target is not None else ()


def find_weights(
    model: Model, layers: Sequence[str], smallest: int, rule: str
) -> tuple[list[Found], list[Note]]:
    """Float weights of at least `smallest` values, none 1-D, bodies included; and what is spared.

    layers: overrides. Spared, with a note under `rule`: layers that an override keeps float, and
    small output layers without one.
    """
    spared, choices = _output_layers(model), Layers.parse(layers).choices(model)
    found: list[Found] = []
    notes: list[Note] = []
    for node in model.nodes(*WEIGHTS):
        if is_lookup(node):
            continue
        choice = choices.get(id(node))
        why = "a small output layer: its result shows each step" if id(node) in spared else None
        if choice is not None:
            why = choice.reason if choice.is_float else None
        if why is not None:
            notes.append(Note(rule, node.name, why, changed=False))
            continue
        for held in held_by(node):
            tensor = node.inputs[held.index]
            if not is_constant(tensor) or tensor.dtype not in (np.float32, np.float16):
                continue
            if len(held.shape) >= 2 and prod(held.shape) >= smallest:
                found.append(Found(node, held, choice))
    return found, notes


def _output_layers(model: Model) -> set[int]:
    """Ids of convolutions that write an output, if their weights are a small share of all."""
    last = output_convolutions(model)
    total = sum(prod(t.shape) for t in model.graph.tensors().values() if isinstance(t, gs.Constant))
    small = sum(prod(node.inputs[1].shape or ()) for node in last) <= OUTPUT_SHARE * total
    return {id(node) for node in last} if small else set()


@dataclass(frozen=True, slots=True)
class Unpacked:
    """The weights of a model that were written in storage encoding: each once for all readers."""

    model: Model
    done: dict[tuple[int, tuple[int, ...], str], gs.Tensor] = field(default_factory=dict)

    def use(self, weight: Found, form: str, write: Callable[[Emitter], gs.Tensor]) -> None:
        """Let the node, and what moves the weight, read it unpacked.

        form: what tells apart numbers that one weight is stored in; write: adds what unpacks them,
        called where that was not yet done. What several graphs read is unpacked once, in the main
        one; bodies capture it.
        """
        tensor = weight.tensor
        key = id(tensor), weight.held.key, form
        if key not in self.done:
            users = {id(self.model.graph_of(user)) for user in tensor.outputs}
            at = weight.node if len(users) == 1 else None
            self.done[key] = write(Emitter(self.model, at, tensor))
        weight.node.inputs[weight.held.index] = self.done[key]
        for reader, index in list(readers(tensor)):
            if reader.op in MOVES and index == 0:
                reader.inputs[0] = self.done[key]


def linear_bits(held: Held, scheme: QuantScheme) -> float:
    """Bits a weight in a linear format, with scales (32 bits) and zero points."""
    channels = prod(held.shape) // held.length
    size = scheme.group_size
    scales = channels * -(-held.length // size) if size is not None else channels
    scales = 1 if isinstance(scheme.granularity, PerTensor) else scales
    kind = data_type_of(scheme.numbers.dtype)
    total = 8 * stored_size(kind, held.shape) + 32 * scales
    total += 0 if scheme.symmetric else 8 * stored_size(kind, (scales,))
    return float(total / prod(held.shape))


def why_too_old(model: Model, scheme: QuantScheme, encoding: Encoding) -> str | None:
    """Why the model's opset cannot unpack weights of a linear format; None: it can."""
    needed = opset_for(
        scheme.format, encoding,
        groups=scheme.group_size is not None,
        channels=not isinstance(scheme.granularity, PerTensor),
    )  # fmt: skip
    if model.opset >= needed:
        return None
    what = scheme.format if model.opset >= STORAGE_SINCE else "Mul"
    return f"opset {model.opset} has no {what} as needed: opset {needed} has"


def told(held: Held, scheme: QuantScheme) -> str:
    """What a weight in a linear format is, for notes."""
    shared = shared_by(scheme.granularity)
    return f"weights as {scheme.format} {shared}, {linear_bits(held, scheme):.1f} bits each"


def shared_by(granularity: Granularity) -> str:
    """Which values share a scale, for notes."""
    if isinstance(granularity, PerGroup):
        return f"in groups of {granularity.size}"
    return "per tensor" if isinstance(granularity, PerTensor) else "per channel"
