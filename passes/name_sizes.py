"""Write down which free sizes are equal, in front of sums of feature maps.

    y = Add(Conv(a), Conv(b))    a, b: [N, 32, ?, ?]    =>    a, b: [N, 32, free_1, free_2]

onnx's shape inference forgets which free axis is which, and with it ONNX Runtime: a sum of two
tensors in blocks of channels (NCHWc) that it cannot tell to be equally large becomes an Add with
three Reshapes around it, in place of an addition in the convolution's own loop. Names of sizes in
the value infos, which change nothing else, tell it (core/optimizer/nchwc_transformer.cc; networks
with free image sizes: 0.96 of the time). Sizes are named that the model proves to be equal (see
sizes.py), on the way back from each sum to where its operands come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.core import Note
from onnxq.graphs import origin_of, state_of
from onnxq.model import Model, producer
from onnxq.passes.size_algebra import Shape, is_static
from onnxq.passes.sizes import Sizes
from onnxq.serialization import interface
from onnxq.shapes import symbols

NAME = "name_sizes"
# What ONNX Runtime follows sizes through by itself, as long as it stays in blocks.
FOLLOWED = frozenset(
    ["Conv", "Relu", "LeakyRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh"]
)


class NameSizes:
    """The main graph; a pass without options, the last one: a later edit would undo it."""

    name = NAME

    def __repr__(self) -> str:
        return NAME

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Name in place; a note for each sum."""
        if is_static([d for t in model.graph.inputs for d in t.shape or ()]):
            return []
        sizes, taken = Sizes(model), symbols(model.graph)
        names = {f"={name}": name for name in taken}
        documented = {info.name for info in origin_of(model.graph).value_infos}
        notes = []
        for node in model.graph.nodes:
            if node.op not in ("Add", "Sum") or node.domain:
                continue
            shapes = [sizes.shape(t) for t in node.inputs]
            if any(s is None or len(s) != 4 or s != shapes[0] or is_static(s) for s in shapes):
                continue
            count = 0
            for tensor in _behind(node):
                shape = sizes.shape(tensor)
                if shape is None or tensor.name in documented or tensor.dtype != np.float32:
                    continue
                if model.is_output(tensor) or len(shape) != 4:
                    continue
                tensor.shape = _named(shape, names, taken)
                tensor.seen = state_of(tensor)
                origin_of(model.graph).value_infos.append(interface(tensor, None))
                documented.add(tensor.name)
                count += 1
            if count:
                notes.append(Note(NAME, node.name, f"equal sizes of {count} tensors are named"))
        return notes


def _behind(node: gs.Node) -> Iterator[gs.Tensor]:
    """The operands, and what they are made of, up to what is made in another way."""
    todo, seen = list(node.inputs), set[int]()
    while todo:
        tensor = todo.pop()
        maker = producer(tensor)
        if maker is None or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        yield tensor
        if maker.op in FOLLOWED:
            todo.append(maker.inputs[0])


def _named(shape: Shape, names: dict[str, str], taken: set[str]) -> list[int | str]:
    """The shape with one name for each symbol, those of the inputs as they are."""
    found: list[int | str] = []
    for size in shape:
        if isinstance(size, str) and size not in names:
            number = len(names) + 1
            while f"free_{number}" in taken:
                number += 1
            names[size] = f"free_{number}"
            taken.add(names[size])
        found.append(names[size] if isinstance(size, str) else size)
    return found


name_sizes = NameSizes()
