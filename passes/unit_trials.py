"""A model beside a copy of it in which units are switched off: zeros where layers read them.

That computes what the model without them will compute. Weights of the copy are replaced as layers
make up for what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq import runtime
from onnxq.calibration import check_feed
from onnxq.data import Samples
from onnxq.model import Model, values_of
from onnxq.numerics.metrics import ErrorSums
from onnxq.numerics.sequences import weyl
from onnxq.passes.removal import STAYS, Structure, weight_from, weight_matrix
from onnxq.passes.unit_readers import Reading, Rows

Fetched = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Distance:
    """Error of outputs as a share of their squares, averaged over the outputs of floats."""

    noise: float

    @property
    def db(self) -> float:
        """As SQNR."""
        return float(-10 * np.log10(max(self.noise, 1e-20)))


@dataclass(slots=True)
class Trials:
    """The original, its copy, and what the original gives on the samples that judge.

    memory: bytes of outputs, about; as many samples judge.
    """

    model: Model
    found: Structure
    judging: Samples
    memory: int
    copy: Model = field(init=False)
    nodes: dict[str, gs.Node] = field(init=False)
    original: list[list[NDArray[Any]]] = field(init=False)
    replaced: dict[str, list[gs.Tensor]] = field(default_factory=dict)
    puts: set[tuple[str, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.copy = self.model.copy()
        self.nodes = {node.name: node for node in self.copy.nodes()}
        self.original = []
        size = 0
        for outputs in _outputs(self.model, self.judging):
            size += sum(v.nbytes for v in outputs if isinstance(v, np.ndarray))
            if self.original and size > self.memory:
                break
            self.original.append(outputs)
        self.judging = self.judging.take(len(self.original))

    def distance(self) -> Distance:
        """How far the copy's outputs are from the original's."""
        sums: dict[int, ErrorSums] = {}
        for exact, made in zip(self.original, _outputs(self.copy, self.judging), strict=True):
            for i, (r, y) in enumerate(zip(exact, made, strict=True)):
                if isinstance(r, np.ndarray) and r.dtype.kind == "f":
                    same = np.shape(r) == np.shape(y)
                    one = ErrorSums.of(r, y if same else np.full_like(r, np.nan))
                    sums[i] = sums[i].merge(one) if i in sums else one
        shares = [min(s.noise / s.signal, 1e6) for s in sums.values() if s.signal > 0]
        return Distance(float(np.mean(shares)) if shares else 0.0)

    def switch_off(self, gone: NDArray[np.bool_]) -> None:
        """Zeros where layers of the copy read units that are gone, in the original's weights."""
        done = set[tuple[int, int]]()
        for layer in self.found.layers:
            is_gone = np.append(gone, False)[layer.inputs] & (layer.inputs != STAYS)
            key = id(layer.node), layer.index
            if layer.is_depthwise or key in done or not is_gone.any():
                continue
            done.add(key)
            weight = np.asarray(values_of(layer.node.inputs[layer.index]))
            matrix = weight_matrix(layer, weight).astype(np.float64)
            matrix = np.where(is_gone[:, None, :, None], 0.0, matrix)
            self._put(layer.node.name, layer.index, weight_from(layer, matrix, weight))

    def put(self, reading: Reading, rows: NDArray[Any], bias: NDArray[Any] | None) -> None:
        """Other rows, and a bias where there can be one."""
        self._put(reading.name, 1, reading.weight(rows))
        self.puts.add((reading.name, 1))
        if bias is None or reading.bias is None:
            return
        node, index = reading.bias
        shape = (len(bias),)
        if index < len(node.inputs) and node.inputs[index].name:
            shape = tuple(node.inputs[index].shape)
        kind = reading.node.inputs[1].dtype
        self._put(node.name, index, np.asarray(bias).reshape(shape).astype(kind))
        self.puts.add((str(node.name), index))

    def _put(self, name: str, index: int, values: NDArray[Any]) -> None:
        node = self.nodes[name]
        self.replaced.setdefault(name, list(node.inputs))
        made = self.copy.constant(f"{name}_trial", values)
        while len(node.inputs) <= index:
            node.inputs.append(made)
        node.inputs[index] = made

    def reset(self) -> None:
        """The copy is as the original again."""
        for name, inputs in self.replaced.items():
            node = self.nodes[name]
            node.inputs.clear()
            node.inputs.extend(inputs)
        self.replaced.clear()
        self.puts.clear()

    def fitted(self) -> dict[tuple[str, int], NDArray[Any]]:
        """What layers make up with: new constants, by node and input."""
        found = {}
        for name, index in sorted(self.puts):
            values = values_of(self.nodes[name].inputs[index])
            assert values is not None
            found[name, index] = np.asarray(values)
        return found


def _outputs(model: Model, samples: Samples) -> Iterator[list[NDArray[Any]]]:
    client = runtime.Client(runtime.session(model))
    for index, feed in enumerate(samples):
        with runtime.blames_sample(index):
            yield client.run(feed)


def fetched(model: Model, names: Sequence[str], samples: Samples) -> Iterator[Fetched]:
    """The values of tensors, sample by sample; inputs among them."""
    part = model.copy()
    made = {t.name: t for node in part.graph.nodes for t in node.outputs}
    wanted = [name for name in dict.fromkeys(names) if name in made]
    first = part.graph.nodes[0].outputs[0].name  # a graph must have an output
    part.graph.outputs = [made[name] for name in wanted or [first]]
    part.sweep()
    used = {id(t) for node in part.nodes() for t in node.inputs}
    part.graph.inputs = [t for t in part.graph.inputs if id(t) in used]
    session = runtime.session(part.to_proto())
    needed = [i.name for i in session.get_inputs()]
    for index, feed in enumerate(samples):
        check_feed(feed, index, needed)
        values: dict[str, NDArray[Any]] = {n: np.asarray(v) for n, v in feed.items()}
        if wanted:
            with runtime.blames_sample(index):
                given = {name: values[name] for name in needed}
                values |= zip(wanted, session.run(wanted, given), strict=True)
        yield values


def vectors(
    model: Model,
    readings: Sequence[Reading],
    samples: Samples,
    limit: int,
    see: Callable[[Reading, Rows], None],
) -> None:
    """Show what each layer reads in each sample, `limit` vectors of all samples at most."""
    each = -(-limit // max(1, len(samples)))
    names = [reading.source.name for reading in readings]
    for index, values in enumerate(fetched(model, names, samples)):
        for reading in readings:
            see(reading, reading.vectors(values[reading.source.name], each, weyl(index)))
