"""Two small matrices in the place of a large one, where that loses little and saves measured time.

    MatMul(x, W)                 =>    MatMul(MatMul(x, B), A)                  W [K, N] about B A
    Gemm(x, W, c)                =>    Gemm(MatMul(x, B), A, c)
    Conv 1x1 (x, W, c)           =>    Conv 1x1 (Conv 1x1 (x, B), A, c)

The rank is the least whose results are within `sqnr_db` of the layer's own: on samples that were
kept back from the fit, or without samples of W itself (`onnxq.numerics.lowrank`). Most layers of
trained models are not of low rank: at 30 dB there is nothing to save.

Whether it is faster is measured: the layer alone, on the shapes of the first sample, against the
two, in turn, in onnxruntime on one thread. So what is factorized may differ from run to run where
a layer is near the margin; the factors themselves do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq import runtime
from onnxq.core import Note, Skip
from onnxq.data import Samples
from onnxq.layers import Layers
from onnxq.model import Model, readers, values_of
from onnxq.numerics.lowrank import directions
from onnxq.options import require_range
from onnxq.passes.grams import Layer, Seen, db
from onnxq.passes.layouts import Held, held_by
from onnxq.passes.observing import Observing
from onnxq.passes.ops import is_constant
from onnxq.targets import Target, is_here

NAME = "factorize_weights"
OPERATORS = ("MatMul", "Gemm", "Conv")
MULTIPLE = 8  # of ranks, where a smaller one saves less than it costs kernels
SECONDS = 0.4  # for timing one layer
Factors = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class FactorizeWeights:
    """MatMul, Gemm and 1x1 Conv with constant weights of at least `smallest` values.

    sqnr_db: how far the error of a layer's results is below them. gain: the pair takes at most this
    share of the layer's time, so measured; and of its multiply-accumulates. layers: overrides; what
    is to be dense stays whole.
    """

    samples: Samples | None = field(default=None, repr=False)
    sqnr_db: float = 30.0
    gain: float = 0.9
    smallest: int = 16384
    memory_mb: int = 1024
    layers: tuple[str, ...] = ()
    target: Target | None = None
    progress: Callable[[int], None] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_range("sqnr_db", self.sqnr_db, 0, 200)
        require_range("gain", self.gain, 0, 1)
        require_range("smallest", self.smallest, 1)
        require_range("memory_mb", self.memory_mb, 1)
        _ = Layers.parse(self.layers)

    @property
    def name(self) -> str:
        """The pass's name."""
        return NAME

    @staticmethod
    def wants(field: str, options: Mapping[str, Any]) -> bool:
        """Whether it has to be given `field`; samples that are there are used anyway."""
        return False

    def __call__(self, model: Model, /) -> Sequence[Note]:
        """Rewrite in place; a note for each layer, or why it stays whole."""
        if self.target is not None and not is_here(self.target):
            text = f"times of {self.target.name} cannot be measured on this machine"
            return [Note(NAME, "", text, changed=False)]
        return _Work(self, model).run()


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """A layer that may become two."""

    node: gs.Node
    held: Held
    layers: tuple[Layer, ...] = ()


class _Work:
    """One run of the pass over one model."""

    def __init__(self, options: FactorizeWeights, model: Model) -> None:
        self.options, self.model = options, model
        model.separate_names()
        samples = options.samples
        is_real = samples is not None and len(samples) > 0 and not samples.synthetic
        self.samples = samples if is_real else None
        model.infer_shapes()
        self.shapes = self._shapes()

    def run(self) -> list[Note]:
        notes = []
        for task, seen in self._seen():
            try:
                if isinstance(seen, Skip):
                    raise seen
                notes.append(Note(NAME, task.node.name, self._factorized(task, seen)))
            except Skip as reason:
                notes.append(Note(NAME, task.node.name, str(reason), changed=False))
        if any(note.changed for note in notes):
            self.model.sweep()
        return notes

    def _shapes(self) -> Mapping[str, Sequence[int]]:
        """Shapes of what layers multiply with their weights: seen on the first sample, or inferred.

        Inference does not know what depends on values.
        """
        if self.samples is None:
            return self.model.shapes_for({})
        feed = next(iter(self.samples))
        model, main = self.model, self.model.graph
        nodes = [node for node in model.nodes(*OPERATORS) if model.graph_of(node) is main]
        known = self.model.shapes_for({name: np.shape(v) for name, v in feed.items()})
        asked = {n.inputs[0].name for n in nodes} - {*known}
        if not asked or sum(model.weight_sizes()) > runtime.LARGE:
            return known
        proto = self.model.to_proto()
        for i, name in enumerate(sorted(asked)):
            proto.graph.node.add(op_type="Shape", input=[name], output=[f"{name}#{i}"])
            info = onnx.helper.make_tensor_value_info(f"{name}#{i}", onnx.TensorProto.INT64, [None])
            proto.graph.output.append(info)
        with runtime.blames_sample(0):
            found = runtime.run(runtime.session(proto), feed)
        seen = {n: [int(d) for d in found[f"{n}#{i}"]] for i, n in enumerate(sorted(asked))}
        return {**known, **seen}

    def _seen(self) -> Iterator[tuple[_Task, Seen | Skip | None]]:
        """Each layer with what its weight is multiplied with; None without samples."""
        tasks, dense = [], Layers.parse(self.options.layers).dense(self.model)
        for node in self.model.nodes(*OPERATORS):
            held = next((h for h in held_by(node) if h.index == 1), None)
            if held is None or not is_constant(node.inputs[1]):
                continue
            if prod(held.shape) < self.options.smallest:
                continue
            task = _Task(node, held)
            if id(node) in dense:
                yield task, Skip("asked for by an override: it stays whole")
            elif (why := _why_not(node, held)) is not None:
                yield task, Skip(why)
            else:
                tasks.append(task)
        if self.samples is None:
            yield from ((task, None) for task in tasks)
            return
        options = self.options
        observing = Observing(NAME, self.samples, 1, options.memory_mb, options.progress)
        watched = []
        for task in tasks:
            try:
                layers = observing.layers(self.model, [(task.node, task.held)])
                watched.append(_Task(task.node, task.held, layers))
            except Skip as reason:
                yield task, reason
        yield from observing.each(self.model, watched)

    def _factorized(self, task: _Task, seen: Seen | None) -> str:
        """Factorize a layer; what was done. Raises Skip where it stays whole."""
        node, held = task.node, task.held
        rows = np.asarray(held.rows(np.asarray(values_of(node.inputs[1]))), np.float32)
        if not np.isfinite(rows).all():
            raise Skip("its weight has NaN or infinite values")
        channels, length = rows.shape
        most = int(self.options.gain * rows.size / (channels + length))
        products = None if seen is None else seen.trusted[0]
        found = directions(rows, products, None if seen is None else seen.judging[0])
        rank = found.rank(self.options.sqnr_db)
        if rank > most:
            raise Skip(
                f"{self.options.sqnr_db:g} dB take rank {rank} of {min(rows.shape)}: less work is "
                f"up to {most}"
            )
        rank = min(max(1, -(-rank // MULTIPLE) * MULTIPLE), max(most, 1), found.vectors.shape[1])
        factors = found.factors(rows, rank)
        ratio = self._ratio(node, rows, factors)
        if ratio > self.options.gain:
            raise Skip(f"rank {rank} takes {ratio:.2f}x the time of the layer")
        work = rank * (channels + length) / rows.size
        self._put(node, factors)
        where = "of its weight" if seen is None else "of its results on samples kept back"
        within = db(1.0, float(found.errors[rank]))
        return (
            f"rank {rank} of {min(rows.shape)}, within {within} {where}: {ratio:.2f}x the "
            f"time, {work:.2f}x the multiply-accumulates"
        )

    def _ratio(self, node: gs.Node, rows: NDArray[np.float32], factors: Factors) -> float:
        """Time of the two over the time of the one, on the layer's real shapes."""
        shape = self.shapes.get(node.inputs[0].name)
        if not shape or not all(isinstance(d, int) and d > 0 for d in shape):
            raise Skip("the shape of its input is not known: give --data")
        left, right = factors
        one = _alone(node, shape, [rows])
        two = _alone(node, shape, [right, left])
        rng = np.random.default_rng(0)
        feed = {"x": rng.standard_normal(shape, dtype=np.float32)}
        return runtime.latency(one, two, feed, seconds=SECONDS).ratio

    def _put(self, node: gs.Node, factors: Factors) -> None:
        """Let the node read what the first factor makes of its input."""
        left, right = factors
        model, x, old = self.model, node.inputs[0], node.inputs[1]
        dtype, out = old.dtype, node.outputs[0]
        first, second = (
            model.constant(f"{old.name}_{name}", _laid(node, part).astype(dtype))
            for name, part in (("right", right), ("left", left))
        )
        shape = None if x.shape is None else list(x.shape)
        attributes: dict[str, Any] = {}
        op = "Conv" if node.op == "Conv" else "MatMul"
        if op == "Conv":
            attributes = {k: v for k, v in node.attrs.items() if k in ("strides", "kernel_shape")}
            shape = None
        elif shape is not None:
            shape[-1] = len(right)
        hidden = model.emit(
            op, x, first, name=f"{out.name}_low", dtype=dtype, shape=shape, at=node, **attributes
        )
        node.inputs[0], node.inputs[1] = hidden, second
        node.attrs.pop("transB", None)
        node.attrs.pop("strides", None)


def _why_not(node: gs.Node, held: Held) -> str | None:
    """Why a layer cannot become two; None: it can."""
    if len(list(readers(node.inputs[1]))) > 1:
        return "its weight is shared"
    if str(node.inputs[1].dtype) not in ("float32", "float16"):
        return f"its weight is {node.inputs[1].dtype}"
    if node.op != "Conv":
        is_turned = node.attrs.get("transA", 0)
        return "a stack of matrices" if len(held.shape) != 2 else "transA" if is_turned else None
    is_point = prod(held.shape[2:]) == 1 and node.attrs.get("group", 1) == 1
    return None if is_point and not any(node.attrs.get("pads", ())) else "not a 1x1 convolution"


def _laid(node: gs.Node, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows [channels, values] as the operator takes them, without transB."""
    if node.op != "Conv":
        return np.ascontiguousarray(rows.T)
    rank = len(node.inputs[1].shape) - 2
    return rows.reshape(*rows.shape, *[1] * rank)


def _alone(
    node: gs.Node, shape: Sequence[int], parts: Sequence[NDArray[np.float32]]
) -> onnx.ModelProto:
    """A model of one layer, or two, without biases."""
    op = "Conv" if node.op == "Conv" else "MatMul"
    graph, at = onnx.GraphProto(name="layer"), "x"
    for i, part in enumerate(parts):
        graph.initializer.append(onnx.numpy_helper.from_array(_laid(node, part), f"w{i}"))
        strides = {"strides": node.attrs["strides"]} if "strides" in node.attrs and not i else {}
        graph.node.append(onnx.helper.make_node(op, [at, f"w{i}"], [f"y{i}"], **strides))
        at = f"y{i}"
    float32 = onnx.TensorProto.FLOAT
    graph.input.append(onnx.helper.make_tensor_value_info("x", float32, shape))
    graph.output.append(onnx.helper.make_tensor_value_info(at, float32, None))
    opset = [onnx.helper.make_opsetid("", 13)]
    return onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
