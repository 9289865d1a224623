"""Where channels can be rescaled: a tensor and the layers that multiply it with constant weights.

    (x / s) (s W1), (x / s) (s W2)        one factor s for all layers that read x

`Trial` tells what a factor does to the results of these layers once numbers are rounded: computed
layer by layer on excerpts of activations (`onnxq.excerpts`), without running the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import TensorProto, helper

from onnxq import runtime
from onnxq.core import Skip
from onnxq.data import Samples
from onnxq.errors import DataError
from onnxq.excerpts import Excerpt, Place, excerpts
from onnxq.model import Model
from onnxq.packed import remembered
from onnxq.passes.layouts import Held, held_by
from onnxq.passes.linear import LINEAR, constant
from onnxq.passes.ops import is_constant
from onnxq.passes.rescaling import Division, Factor, along, multiplied
from onnxq.sampling import divided
from onnxq.schemes import Method, PerChannel, PerGroup, PerTensor, QuantScheme, quantize_weight

Array = NDArray[np.float32]
Rounded = Callable[[Array], Array]
UNREAL = "synthetic samples do not tell which channels are large: give --data"
RUNS, JUDGED = 8, 4  # samples that are run at most, to choose on and to judge on
OUTPUTS = 96  # of a layer that errors are computed of


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A tensor with `channels` along `axis`, and all the linear layers that read it.

    elsewhere: why the tensor cannot be divided where it is made, as far as its readers go.
    """

    tensor: gs.Tensor
    axis: int
    channels: int
    layers: tuple[gs.Node, ...]
    elsewhere: str = ""

    @property
    def name(self) -> str:
        """The first layer's."""
        return str(self.layers[0].name)

    @property
    def place(self) -> Place:
        """What is looked at."""
        return self.tensor.name, self.axis

    def division(
        self, model: Model, factor: Factor, takes: Callable[[gs.Node], bool] = lambda _: True
    ) -> Division:
        """How the tensor is divided by [channels] where it is made. Raises Skip where not."""
        if self.elsewhere:
            raise Skip(self.elsewhere)
        plan = Division(model, takes)
        plan.divide(self.tensor, along(factor, self.axis, len(self.tensor.shape)))
        return plan

    def insert(self, model: Model, factor: Factor) -> None:
        """Divide the tensor in a node of its own, for the layers alone."""
        tensor, shape = self.tensor, along(1 / factor, self.axis, len(self.tensor.shape))
        inverse = model.constant(f"{tensor.name}_inverse", shape.astype(tensor.dtype))
        divided = model.emit("Mul", tensor, inverse, name=f"{tensor.name}_smoothed", like=tensor)
        for node in self.layers:
            node.inputs[0] = divided

    def multiply(self, model: Model, factor: Factor) -> None:
        """Multiply the layers' weights, input channel by input channel."""
        for node in self.layers:
            weight = node.inputs[1]
            made = multiplied(node, constant(node, 1), factor)
            node.inputs[1] = model.constant(f"{weight.name}_scaled", made)

    def weights(self) -> NDArray[np.float64]:
        """All that a channel is multiplied with, over all layers: [channels, values]."""
        return np.concatenate([_by_channel(n, constant(n, 1)) for n in self.layers], 1)


def find_sites(
    model: Model, wanted: Callable[[gs.Node], bool]
) -> tuple[list[Site], list[tuple[gs.Node, str]]]:
    """Tensors of the main graph that layers which are wanted read, in graph order.

    And the layers with constant weights that cannot be rescaled, with the reasons.
    """
    found: dict[tuple[int, int, int], Site] = {}
    unfit: list[tuple[gs.Node, str]] = []
    for node in model.graph.nodes:
        if node.op not in LINEAR or node.domain or not is_constant(node.inputs[1]):
            continue
        if not wanted(node) or is_constant(node.inputs[0]):
            continue
        if why := _unfit(node):
            unfit.append((node, why))
            continue
        tensor = node.inputs[0]
        axis = 1 if node.op in ("Conv", "ConvTranspose") else len(tensor.shape) - 1
        key = id(tensor), axis, _channels(node)
        site = found.get(key, Site(*(tensor, *key[1:]), ()))
        found[key] = replace(site, layers=(*site.layers, node))
    return [replace(s, elsewhere=_elsewhere(model, s)) for s in found.values()], unfit


def _elsewhere(model: Model, site: Site) -> str:
    """What hinders that all that reads the tensor reads it divided; empty: nothing."""
    layers = {id(node) for node in site.layers}
    if model.is_output(site.tensor):
        return f"{site.tensor.name} is an output"
    for node in site.tensor.outputs:
        if id(node) not in layers:
            return f"{site.tensor.name} is also read by {node.op} {node.name}"
    return ""


def _unfit(node: gs.Node) -> str:
    """Why the input channels of a layer cannot be rescaled; empty: they can."""
    tensor, weight = node.inputs[:2]
    rank = len(weight.shape)
    if node.attrs.get("transA", 0):
        return f"{node.name} reads {tensor.name} transposed"
    if tensor.shape is None:
        return f"the rank of {tensor.name} is not known"
    if rank < 2 or (node.op == "MatMul" and rank > 2):
        return f"{weight.name} is of rank {rank}"
    if len(weight.outputs) > 1:
        return f"{weight.name} is also used elsewhere"
    if remembered(weight) is not None:
        return f"{weight.name} keeps its integers"
    try:
        values = constant(node, 1)
    except Skip as reason:
        return str(reason)
    return "" if np.isfinite(values).all() else f"{weight.name} has NaN or infinite values"


def _channels(node: gs.Node) -> int:
    shape = node.inputs[1].shape
    if node.op == "Conv":
        return int(shape[1] * node.attrs.get("group", 1))
    return int(shape[1 if node.op == "Gemm" and node.attrs.get("transB", 0) else 0])


def _by_channel(node: gs.Node, weight: NDArray[Any]) -> NDArray[np.float64]:
    wide = weight.astype(np.float64)
    if node.op == "Conv":  # [outputs, inputs / group, ...]
        group = int(node.attrs.get("group", 1))
        wide = wide.reshape(group, len(wide) // group, wide.shape[1], -1).swapaxes(1, 2)
    elif node.op == "Gemm" and node.attrs.get("transB", 0):
        wide = wide.T
    return wide.reshape(_channels(node), -1)


def excerpts_of(
    model: Model, sites: Sequence[Site], samples: Samples
) -> tuple[Mapping[Place, Excerpt], Mapping[Place, Excerpt]]:
    """To choose on, and of the last quarter of the samples to judge on; one sample does for both.

    Raises DataError without samples, or with ones that do not fit.
    """
    if not len(samples):
        raise DataError("rescaling looks at samples: give --data")
    places = list(dict.fromkeys(site.place for site in sites))
    fitting, judging = divided(samples)
    if judging is samples:
        (both,) = excerpts(model, places, (samples, RUNS))
        return both, both
    near, apart = excerpts(model, places, (fitting, RUNS), (judging, JUDGED))
    return near, apart


def product_of(node: gs.Node, opset: int) -> Callable[[Array, Array], Array]:
    """The layer without its bias, as a function of input and weight."""
    if node.op in ("Gemm", "MatMul"):
        turned = node.op == "Gemm" and node.attrs.get("transB", 0)
        return lambda x, w: x @ (w.T if turned else w)
    rank = len(node.inputs[1].shape)
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * rank) for n in "xwy"]
    made = helper.make_node(node.op, ["x", "w"], ["y"], **node.attrs)
    graph = helper.make_graph([made], "layer", values[:2], values[2:])
    proto = helper.make_model(
        graph, ir_version=8, opset_imports=[helper.make_opsetid("", min(opset, 18))]
    )
    session = runtime.session(proto)
    return lambda x, w: np.asarray(session.run(None, {"x": x, "w": w})[0])


def some_outputs(node: gs.Node, weight: NDArray[Any], scheme: QuantScheme) -> Array:
    """The weight, of at most about OUTPUTS of its output channels where they can be left out."""
    if scheme.granularity != PerTensor() and node.attrs.get("group", 1) == 1:
        by_row = node.op == "Conv" or node.attrs.get("transB", 0)
        axis = 0 if by_row else 1
        step = -(-weight.shape[axis] // OUTPUTS)
        weight = weight[::step] if by_row else weight[:, ::step]
    return np.ascontiguousarray(weight, np.float32)


def rounded_weight(
    held: Held, values: NDArray[Any], scheme: QuantScheme, method: Method
) -> NDArray[np.float32]:
    """The weight as it is once it was quantized; a channel is a row of `Held.rows`."""
    granularity = scheme.granularity
    if isinstance(granularity, PerGroup):
        granularity = PerGroup(min(granularity.size, held.length), 1)
    elif isinstance(granularity, PerChannel):
        granularity = PerChannel(0)
    scheme = replace(scheme, granularity=granularity)
    rows = np.ascontiguousarray(held.rows(values))
    numbers, params = quantize_weight(rows, scheme, method=method)
    return np.ascontiguousarray(held.unrolled(params.dequantize(numbers)))


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """A layer of a trial, and its exact results for each part of the excerpt."""

    node: gs.Node
    held: Held
    weight: Array
    scheme: QuantScheme
    product: Callable[[Array, Array], Array]
    exact: Sequence[Array]
    energy: float


class Trial:
    """The error of a site's results on an excerpt, by factor.

    Relative: squared errors over squares, the mean over the layers.
    """

    def __init__(
        self,
        site: Site,
        excerpt: Excerpt,
        schemes: Mapping[int, QuantScheme],
        method: Method,
        opset: int,
    ) -> None:
        self.excerpt, self.method = excerpt, method
        self.parts: list[_Part] = []
        for node in site.layers:
            held = next(h for h in held_by(node) if h.index == 1)
            scheme, product = schemes[id(node)], product_of(node, opset)
            weight = some_outputs(node, constant(node, 1), scheme)
            exact = [product(x, weight) for x in excerpt.parts]
            energy = float(sum(np.square(y, dtype=np.float64).sum() for y in exact))
            held = replace(held, shape=weight.shape)
            self.parts.append(_Part(node, held, weight, scheme, product, exact, energy or 1.0))

    def error(self, factor: Factor, rounded: Rounded = lambda x: x) -> float:
        """With x / s rounded by `rounded` and s W in the layer's scheme."""
        inputs = [rounded(x) for x in self.excerpt.divided(factor)]
        total = 0.0
        for part in self.parts:
            weight = multiplied(part.node, part.weight, factor)
            weight = rounded_weight(part.held, weight, part.scheme, self.method)
            errors = (
                np.square(part.product(x, weight) - y, dtype=np.float64).sum()
                for x, y in zip(inputs, part.exact, strict=True)
            )
            total += float(sum(errors)) / part.energy
        return total / len(self.parts)


def told(error: float) -> str:
    """A relative squared error as SQNR."""
    return f"{-10 * np.log10(max(error, 1e-20)):.1f} dB"
