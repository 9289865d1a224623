"""Overrides for single layers: which layers "PATTERN=FORMAT" means, and what it asks of them.

PATTERN     a glob on node names (`*/mlp/*`, or a name as it is); `op:LSTM`, a glob on operators;
            `first`: layers with weights that have none before them; `last`: those that have none
            behind them. With several inputs or outputs there are several of either.
FORMAT      what it means with fixed ranges (static)          in weight-only and dynamic passes
  float       the layer computes in floats                      its weights stay floats
  int8        8-bit activations and weights                     int8 weights
  int16       16-bit activations, 8-bit weights                 int16 weights
  int4 ...    4-bit weights; activations as the recipe says     int4 weights
  a16         16-bit activations; weights as the recipe says    nothing
  a16w4       16-bit activations, 4-bit weights                 int4 weights
  w4          4-bit weights, where the layer is quantized       int4 weights
  dense       nothing; passes that prune leave the layer alone, whatever its format

All but a width of weights alone (w4) ask for integers also where rules or costs are against them.
Of several that match a layer the last wins. With fixed ranges a width is what counts: the target
says whether activations, or the weights of an operator, have a sign.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import onnx_graphsurgeon as gs

from onnxq.errors import RecipeError, meant
from onnxq.graphs import bodies_of, walk
from onnxq.model import Model, producer
from onnxq.schemes import FORMATS
from onnxq.weights import data_type_of

DENSE = "dense"
ACTIVATION_BITS, WEIGHT_BITS = ("8", "16"), ("2", "4", "8", "16")
# Inputs that hold a layer's weight; in integer operators too: another pass may have been there.
WEIGHTS: dict[str, tuple[int, ...]] = {
    "Conv": (1,), "ConvTranspose": (1,), "Gemm": (1,), "MatMul": (0, 1), "Gather": (0,),
    "LSTM": (1,), "GRU": (1,), "RNN": (1,),
    "ConvInteger": (1,), "MatMulInteger": (1,), "QLinearConv": (3,), "QLinearMatMul": (3,),
    "MatMulNBits": (1,), "DynamicQuantizeMatMul": (1,), "DynamicQuantizeLSTM": (1,),
}  # fmt: skip
CONTRIB = ("MatMulNBits", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM")
# What a stored weight is unpacked with.
UNPACKING = (
    "DequantizeLinear", "Cast", "Sub", "Mul", "Add", "Gather", "Reshape", "Transpose", "Identity",
    "Slice", "Div", "Mod", "ReduceSum",
)  # fmt: skip

NARROW = {data_type_of(f.dtype) for name, f in FORMATS.items() if name != "int32"}


@dataclass(frozen=True, slots=True)
class Choice:
    """What one override asks of a layer; None: nothing, the recipe's options hold.

    activations: bits of its activations, with fixed ranges. static_weights: the format of its
    weights there; weights: that in passes that quantize weights alone, or activations at run time.
    """

    pattern: str
    format: str
    activations: int | None = None
    weights: str | None = None
    static_weights: str | None = None

    @property
    def is_float(self) -> bool:
        """Whether the layer is to stay as it is."""
        return self.format == "float"

    @property
    def is_asked(self) -> bool:
        """Whether the layer is to be quantized, whatever rules and costs say."""
        return not self.is_float and re.fullmatch(rf"w\d+|{DENSE}|", self.format) is None

    @property
    def reason(self) -> str:
        """Why, for notes."""
        return f"asked for by the override '{self.pattern}={self.format}'"


@dataclass(frozen=True, slots=True)
class Layers:
    """Overrides in order; of those that match a layer the last wins."""

    all: tuple[Choice, ...] = ()

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Layers:
        """Read overrides, or one; raises RecipeError for what is none, or has no known format."""
        if not isinstance(texts, Iterable):
            raise RecipeError(f"layers are overrides such as 'op:LSTM=float', not {texts!r}")
        return cls(tuple(_parse(text) for text in ([texts] if isinstance(texts, str) else texts)))

    def choices(self, model: Model) -> dict[int, Choice]:
        """What is asked of which node of the model as it is now, bodies included; by node id."""
        found: dict[int, Choice] = {}
        for choice, nodes in self._matches(model):
            if choice.format != DENSE:
                found.update((id(node), choice) for node in nodes)
        return found

    def dense(self, model: Model) -> dict[int, Choice]:
        """Nodes that are not to be pruned, whatever else is asked of them; by node id."""
        return {
            id(node): choice
            for choice, nodes in self._matches(model)
            if choice.format == DENSE
            for node in nodes
        }

    def matched(self, model: Model) -> set[Choice]:
        """Those that match at least one node."""
        return {choice for choice, nodes in self._matches(model) if nodes}

    def _matches(self, model: Model) -> Iterator[tuple[Choice, list[gs.Node]]]:
        if not self.all:
            return
        nodes, found = model.nodes(), _ends(model, self.all)
        for choice in self.all:
            if choice.pattern in found:
                yield choice, found[choice.pattern]
            else:
                yield choice, [node for node in nodes if _fits(node, choice.pattern)]


def no_match(choice: Choice, model: Model) -> str:
    """The warning for an override that matches nothing, with what may have been meant."""
    if choice.pattern.startswith("op:"):
        known = [f"op:{op}" for op in dict.fromkeys(node.op for node in model.nodes())]
    else:
        known = [*("first", "last"), *(node.name for node in model.nodes())]
    hint = meant(choice.pattern, known)
    return f"--layer '{choice.pattern}={choice.format}' matches no layer of the model{hint}"


def formats() -> tuple[str, ...]:
    """All that may stand behind the `=`."""
    activations = [f"a{a}" for a in ACTIVATION_BITS]
    both = [f"a{a}w{w}" for a in ACTIVATION_BITS for w in WEIGHT_BITS]
    return (*_plain(), DENSE, *activations, *both, *(f"w{w}" for w in WEIGHT_BITS))


def _plain() -> tuple[str, ...]:
    return ("float", *(name for name in FORMATS if name != "int32"))


def _parse(text: str) -> Choice:
    pattern, equals, asked = (part.strip() for part in str(text).rpartition("="))
    if not equals or not pattern:
        raise RecipeError(
            f"--layer {text!r}: write PATTERN=FORMAT, such as 'op:LSTM=float' or 'first=int8'"
        )
    if asked not in formats():
        raise RecipeError(
            f"--layer {text!r}: unknown format {asked!r}: one of {', '.join((*_plain(), DENSE))}, "
            f"or widths of activations and weights as in a16w8, a16, w4{meant(asked, formats())}"
        )
    if asked in ("float", DENSE):
        return Choice(pattern, asked)
    widths = re.fullmatch(r"(?:a(\d+))?(?:w(\d+))?", asked)
    if widths is not None:
        a, w = widths.groups()
        weights = f"int{w}" if w else None
        return Choice(pattern, asked, int(a) if a else None, weights, weights)
    numbers = FORMATS[asked]
    if numbers.bits == 16:
        return Choice(pattern, asked, 16, asked, "int8")
    return Choice(pattern, asked, 8 if asked in ("int8", "uint8") else None, asked, asked)


def _fits(node: gs.Node, pattern: str) -> bool:
    if pattern.startswith("op:"):
        return fnmatchcase(node.op, pattern[3:])
    return node.name == pattern or fnmatchcase(node.name, pattern)


def _ends(model: Model, choices: Sequence[Choice]) -> dict[str, list[gs.Node]]:
    """The nodes that `first` and `last` mean, if they are asked for."""
    asked = {choice.pattern for choice in choices} & {"first", "last"}
    layers = [node for node in model.nodes(*WEIGHTS) if has_weight(node)] if asked else []
    found = {}
    for end in asked:
        reached = reached_from(model, layers, forwards=end == "first")
        found[end] = [node for node in layers if id(node) not in reached]
    return found


def has_weight(node: gs.Node) -> bool:
    """Whether it is a layer with a weight: a matrix or more that is stored in the file."""
    if node.op not in WEIGHTS or (node.domain and node.op not in CONTRIB) or is_lookup(node):
        return False
    held = [node.inputs[i] for i in WEIGHTS[node.op] if i < len(node.inputs)]
    return any(_is_stored(t) and (t.shape is None or len(t.shape) > 1) for t in held)


def is_lookup(node: gs.Node) -> bool:
    """Whether it takes stored values at stored indices: a part of how a weight is unpacked."""
    return node.op == "Gather" and all(_is_stored(t) for t in node.inputs)


def is_packed(node: gs.Node) -> bool:
    """Whether it is a layer with a weight that is unpacked from integers (or float8)."""
    if not has_weight(node):
        return False
    held = [node.inputs[i] for i in WEIGHTS[node.op] if i < len(node.inputs)]
    return any(_is_stored(t) and any(map(_is_narrow, _stored_in(t))) for t in held)


def _stored_in(tensor: gs.Tensor) -> Iterator[gs.Tensor]:
    """The constants that a stored tensor is unpacked from."""
    if isinstance(tensor, gs.Constant):
        yield tensor
    elif (node := producer(tensor)) is not None and node.op in UNPACKING:
        for source in node.inputs:
            yield from _stored_in(source)


def _is_narrow(constant: gs.Tensor) -> bool:
    """Whether it holds a weight's numbers: not a shape, scale or float."""
    if constant.dtype is None or len(constant.shape or ()) < 2:
        return False
    return data_type_of(constant.dtype) in NARROW


def _is_stored(tensor: gs.Tensor) -> bool:
    if isinstance(tensor, gs.Constant):
        return True
    node = producer(tensor)
    if node is None:
        return False
    return node.op == "Constant" or (
        node.op in UNPACKING and all(_is_stored(t) for t in node.inputs if t.name)
    )


def reached_from(model: Model, starts: Sequence[gs.Node], *, forwards: bool) -> set[int]:
    """Ids of the nodes behind (or before) the given ones; what reaches a node reaches its bodies.

    What leaves a body goes on behind its node, which it reaches as well.
    """
    homes = {id(body): node for node in model.nodes() for body in bodies_of(node)}
    reached, todo = set[int](), list(starts)
    gone_through = {id(node) for node in starts}

    def go_on(node: gs.Node) -> None:
        if id(node) not in gone_through:
            gone_through.add(id(node))
            todo.append(node)

    while todo:
        node = todo.pop()
        if (around := homes.get(id(model.graph_of(node)))) is not None:
            reached.add(id(around))
            go_on(around)
        for tensor in node.outputs if forwards else node.inputs:
            for other in tensor.outputs if forwards else tensor.inputs:
                inside = [n for body in bodies_of(other) for g in walk(body) for n in g.nodes]
                for each in (other, *inside):
                    reached.add(id(each))
                    go_on(each)
    return reached
