"""Integer inputs and outputs, as microcontrollers and TFLite pipelines want them.

    x float -> QuantizeLinear -> ...         =>    x int8 -> ...
    ... -> DequantizeLinear -> y float       =>    ... -> y int8
    ... -> Softmax -> y float                =>    ... -> Softmax -> QuantizeLinear -> y int8

The names stay. What is quantized inside gives scale and zero point; data movement between an
interface and the first or last pair then moves integers. What is computed in floats has the range
that samples show, or that its operator is known to have (Softmax), or stays float: no scale is made
up. All other readers of an input read it through DequantizeLinear.

    type auto:   of the sign that is used inside
    int8, uint8: of this sign, at the width used inside (int16, uint16 in front of 16-bit layers);
                 integers of the other sign inside are the same steps, their zero point shifted by
                 half of the range, so that Q(DQ(q)) between the two is exact

Scale and zero point go into the model's metadata, see `onnxq.ports`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Literal, cast

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.calibration import calibrate
from onnxq.core import Note, Skip
from onnxq.data import Samples
from onnxq.model import Model, producer
from onnxq.passes.float_layers import spread_scales
from onnxq.passes.ops import is_constant
from onnxq.passes.pairs import FLOATS, Pairs
from onnxq.ports import Affine, Port, Role, ports_of, record
from onnxq.schemes import FORMATS, QuantScheme
from onnxq.statistics import MinMax
from onnxq.targets import Target
from onnxq.tensors import index_of, readers, redirect

RULE = "integer_io"
STAYS = "stays float, "  # in notes of what could not be made an integer
Type = Literal["auto", "int8", "uint8"]
# Ranges that operators have whatever they read; where no sample tells a closer one.
BOUNDED = {
    "Softmax": (0.0, 1.0),
    "Sigmoid": (0.0, 1.0),
    "HardSigmoid": (0.0, 1.0),
    "Tanh": (-1.0, 1.0),
}
Found = list[tuple[gs.Tensor, Affine | None]]


@dataclass(frozen=True, slots=True)
class IntegerIo:
    """Make float inputs and outputs integers; those that are integers already stay as they are.

    type: int8 or uint8 for a sign, auto for the one used inside. keep: globs on names of inputs and
    outputs that stay as they are (a state that goes round, say). samples: give ranges to what is
    computed in floats. integer_moves: whether data movement may stand on integers.
    """

    target: Target | None = None
    samples: Samples | None = None
    type: Type = "auto"
    keep: tuple[str, ...] = ()
    integer_moves: bool = True
    progress: Callable[[int], None] | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The pass's name."""
        return RULE

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Inputs, then outputs; nothing is edited before samples have been run.

        Raises DataError for samples that do not fit.
        """
        if model.opset < 10:
            text = f"{STAYS}opset {model.opset} has no QuantizeLinear: opset 10 is needed"
            return [Note(RULE, model.graph.name, text, changed=False)]
        return _Edit(self, model).run()


class _Edit:
    """One run of the pass: what it found and what it has done."""

    def __init__(self, options: IntegerIo, model: Model) -> None:
        self.options, self.model = options, model
        self.pairs = Pairs(model, integer_moves=options.integer_moves)
        self.scheme = self.scheme_of_floats()
        self.notes: list[Note] = []
        self.ports: list[Port] = []

    def run(self) -> list[Note]:
        """Decide all scales, then edit."""
        graph = self.model.graph
        inputs = self.decided(graph.inputs, "input", self.most_wanted)
        outputs = self.decided(graph.outputs, "output", self.pairs.behind)
        ranged = self.ranges([t for t, found in (*inputs, *outputs) if found is None])
        front = [
            self.open_input(tensor, known)
            for tensor, inside in inputs
            if (known := inside or self.ranged(tensor, ranged, "input"))
        ]
        while front:
            front += self.pairs.push(front.pop(0))
        for tensor, inside in outputs:
            if known := inside or self.ranged(tensor, ranged, "output"):
                self.open_output(tensor, known)
        if self.ports:
            self.model.sweep()
            record(self.model, self.ports)
            if self.options.target and self.options.target.requantizes and self.model.opset >= 13:
                spread_scales(self.model)
        return self.notes

    def decided(
        self, tensors: Sequence[gs.Tensor], role: Role, told: Callable[[gs.Tensor], Affine | None]
    ) -> Found:
        """The tensors to make integers, with what the graph tells of their scale."""
        known, found = ports_of(self.model), []
        for tensor in tensors:
            try:
                if tensor.name in known:
                    raise Skip(f"{role}: is {tensor.dtype} already")
                if tensor.dtype is None or np.dtype(tensor.dtype) not in FLOATS:
                    raise Skip(f"{role}: is of {_type_text(tensor)}, no floats")
                if any(fnmatchcase(tensor.name, pattern) for pattern in self.options.keep):
                    raise Skip(f"{role}: {STAYS}it is in keep")
                if role == "output" and (not tensor.inputs or is_constant(tensor)):
                    raise Skip(f"output: {STAYS}nothing in the model computes it")
                if any(n.op in ("Resize", "Upsample") and i for n, i in readers(tensor)):
                    raise Skip(f"{role}: {STAYS}it tells the size of what is computed")
                if role == "input" and self.model.is_output(tensor):
                    raise Skip(f"input: {STAYS}it is an output as it is")
                found.append((tensor, told(tensor)))
            except Skip as reason:
                self.decline(tensor, str(reason))
        return found

    def decline(self, tensor: gs.Tensor, text: str) -> None:
        self.notes.append(Note(RULE, tensor.name, text, changed=False))

    def most_wanted(self, tensor: gs.Tensor) -> Affine | None:
        """What most QuantizeLinear that the input goes into use; the first one's of equals."""
        seen = Counter(self.pairs.wanted(tensor))
        return seen.most_common(1)[0][0] if seen else None

    def ranges(self, tensors: Sequence[gs.Tensor]) -> Mapping[str, MinMax]:
        """What samples show of the tensors."""
        samples = self.options.samples
        if not tensors or samples is None or not len(samples):
            return {}
        wanted = dict.fromkeys(sorted({t.name for t in tensors}), MinMax)
        found = calibrate(self.model, wanted, samples, progress=self.options.progress)
        return cast(Mapping[str, MinMax], found)

    def ranged(self, tensor: gs.Tensor, ranges: Mapping[str, MinMax], role: Role) -> Affine | None:
        """Parameters of what is computed in floats; None, with a note, where no range is known."""
        node = producer(tensor)
        op = node.op if node is not None else ""
        if (fixed := self.fixed(op)) is not None:
            return fixed
        seen = ranges.get(tensor.name)
        if seen is not None and seen.has_nonfinite:
            self.decline(tensor, f"{role}: {STAYS}it has values that are not finite")
            return None
        if seen is not None and seen.lo <= seen.hi:
            lo, hi = seen.lo, seen.hi
        elif op in BOUNDED:
            lo, hi = BOUNDED[op]
        else:
            self.decline(tensor, f"{role}: {STAYS}no samples tell its range")
            return None
        params = self.scheme.params(lo, hi)
        return Affine(self.scheme.format, float(params.scale), int(params.zero_point))

    def scheme_of_floats(self) -> QuantScheme:
        """How what is computed in floats is quantized: as what is inside, in the type asked for."""
        target = self.options.target
        scheme = QuantScheme(symmetric=False) if target is None else target.activations
        used = Counter(affine.type for affine in self.pairs.known.values())
        inside = used.most_common(1)[0][0] if used else scheme.format
        return replace(scheme, format=self.typed(inside))

    def fixed(self, op: str) -> Affine | None:
        """What the target demands of the operator's result, in whichever sign it says that."""
        rule = None if self.options.target is None else self.options.target.operators.get(op)
        wanted = FORMATS[self.scheme.format]
        for format, (scale, zero_point) in ((rule and rule.fixed) or {}).items():
            if FORMATS[format].bits == wanted.bits:
                found = Affine(format, float(np.float32(scale)), zero_point)
                return found.signed_as(wanted.name)
        return None

    def typed(self, type: str) -> str:
        """A type that is used inside, with the sign that is asked for."""
        asked = self.options.type
        return type if asked == "auto" else asked.replace("8", str(FORMATS[type].bits))

    def open_input(self, tensor: gs.Tensor, inside: Affine) -> gs.Node:
        """Make the input integer; all that read it do so through the returned DequantizeLinear.

        The input becomes a new tensor: samples hold on to the old one.
        """
        name, inputs = tensor.name, self.model.graph.inputs
        real = gs.Variable(self.model.unique(f"{name}_float"), tensor.dtype, tensor.shape)
        redirect(tensor, real)
        outside = inside.signed_as(self.typed(inside.type))
        made = gs.Variable(name, FORMATS[outside.type].dtype, tensor.shape)
        inputs[index_of(inputs, tensor)] = made
        self.opened(name, "input", outside)
        integers = self.pairs.resigned(made, outside, inside, name)
        return self.pairs.dequantize(integers, inside, real)

    def open_output(self, tensor: gs.Tensor, inside: Affine) -> None:
        """Make the output integer: what comes before its DequantizeLinear, or a new Q behind it."""
        name, graph = tensor.name, self.model.graph
        place = index_of(graph.outputs, tensor)
        self.pairs.pull(tensor, inside)
        before, outside = producer(tensor), inside.signed_as(self.typed(inside.type))
        while before is not None and before.op == "Cast":
            before = producer(before.inputs[0])
        tensor.name = self.model.unique(f"{name}_float")
        if before is None or before.op != "DequantizeLinear" or self.pairs.of(before) != inside:
            made = self.pairs.quantize(tensor, outside, name)
        elif outside != inside:
            made = self.pairs.resigned(before.inputs[0], inside, outside, name)
        else:
            made = self.apart(before.inputs[0])
        made.name = name
        graph.outputs[place] = made
        self.opened(name, "output", outside)

    def apart(self, integers: gs.Tensor) -> gs.Tensor:
        """The integers as a new tensor, which may take an output's name."""
        model, maker = self.model, producer(integers)
        if maker is None or model.is_output(integers):
            return model.emit("Identity", integers, name=f"{integers.name}_copy", like=integers)
        made = gs.Variable(integers.name, integers.dtype, integers.shape)
        maker.outputs[index_of(maker.outputs, integers)] = made
        redirect(integers, made)
        return made

    def opened(self, name: str, role: Role, affine: Affine) -> None:
        self.ports.append(Port(name, role, affine))
        text = f"{role}: {affine.type}, scale {affine.scale:.6g}, zero point {affine.zero_point}"
        self.notes.append(Note(RULE, name, text))


def _type_text(tensor: gs.Tensor) -> str:
    if tensor.dtype is None:
        return "unknown type"
    return "strings" if tensor.dtype == object else str(np.dtype(tensor.dtype))
