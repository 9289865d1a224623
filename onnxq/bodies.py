"""Observe tensors in the bodies of If, Loop and Scan.

Each run of a body makes a row of a tensor: its least and greatest value, and LOGGED of its values.
The rows are handed out through outputs that are added to the body and to its node: stacked by Loop
and Scan; If gives a row of NaN for the branch that was not taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

LOGGED = 510  # values of a tensor that one run of a body adds to its histogram
ROW = LOGGED + 2
SPREAD = 1_000_003  # a prime: i * SPREAD mod size goes through a tensor evenly
LOOPS = ("Loop", "Scan")


@dataclass(frozen=True, slots=True)
class Level:
    """A body, the node and its attribute that have it, and the graph that holds the node."""

    holder: onnx.GraphProto
    node: onnx.NodeProto
    attribute: str
    body: onnx.GraphProto


Path = tuple[Level, ...]


def paths(graph: onnx.GraphProto, outer: Path = ()) -> Iterator[tuple[str, Path]]:
    """Each tensor made or taken by a body, with the way to it from the main graph."""
    for node in graph.node:
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                if attribute.type not in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
                    continue
                path = (*outer, Level(graph, node, attribute.name, body))
                names = [name for inner in body.node for name in inner.output if name]
                for name in (*names, *(i.name for i in body.input)):
                    yield name, path
                yield from paths(body, path)


def is_observable(path: Path) -> bool:
    """Whether rows can be handed out: not from a loop in a loop, whose rows vary in number."""
    known = all(level.node.op_type in (*LOOPS, "If") for level in path)
    return known and sum(level.node.op_type in LOOPS for level in path) < 2


@dataclass(slots=True)
class Log:
    """Adds rows to a model; `count` makes names."""

    count: int = 0

    def add(self, tensor: str, kind: int, path: Path) -> str:
        """Observe a tensor of a body; return the tensor of rows, of the main graph."""
        row = self._row(path[-1].body, tensor, kind)
        for level in reversed(path):
            row = self._handed_out(level, row)
        return row

    def _row(self, body: onnx.GraphProto, tensor: str, kind: int) -> str:
        """float32 [1, ROW] of a tensor; a zero is added to it, so that it is never empty."""
        source = tensor
        if kind != TensorProto.FLOAT:
            source = self._node(body, "Cast", tensor, to=TensorProto.FLOAT)
        flat = self._node(body, "Reshape", source, self._constant(body, [-1], np.int64))
        zero = self._constant(body, [0], np.float32)
        full = self._node(body, "Concat", flat, zero, axis=0)
        steps = self._constant(body, np.arange(LOGGED) * SPREAD, np.int64)
        places = self._node(body, "Mod", steps, self._node(body, "Size", full))
        lo, hi = (self._node(body, op, full, keepdims=1) for op in ("ReduceMin", "ReduceMax"))
        values = self._node(body, "Gather", full, places)
        row = self._node(body, "Concat", lo, hi, values, axis=0)
        return self._node(body, "Reshape", row, self._constant(body, [1, ROW], np.int64))

    def _handed_out(self, level: Level, row: str) -> str:
        """Make the rows of a body those of its node's graph."""
        node, out = level.node, self._name("out")
        if node.op_type == "If":
            for attribute in node.attribute:
                is_other = attribute.name != level.attribute
                nothing = np.full((1, ROW), np.nan)
                _add_output(
                    attribute.g,
                    self._constant(attribute.g, nothing, np.float32) if is_other else row,
                )
            node.output.append(out)
            return out
        names = [name or self._name("unread") for name in node.output]
        made = len(level.body.output) - (1 if node.op_type == "Loop" else 0)
        names += [self._name("unread") for _ in range(made - len(names))]
        _add_output(level.body, row)
        for attribute in node.attribute:
            if attribute.name in ("scan_output_axes", "scan_output_directions"):
                attribute.ints.append(0)
        del node.output[:]
        node.output.extend([*names, out])
        shape = self._constant(level.holder, [-1, ROW], np.int64)
        return self._node(level.holder, "Reshape", out, shape)

    def _name(self, what: str) -> str:
        self.count += 1
        return f"onnxq/log_{what}_{self.count}"

    def _node(self, graph: onnx.GraphProto, op: str, *inputs: str, **attributes: Any) -> str:
        name = self._name(op)
        graph.node.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def _constant(self, graph: onnx.GraphProto, values: Any, dtype: Any) -> str:
        tensor = numpy_helper.from_array(np.asarray(values, dtype), "")
        return self._node(graph, "Constant", value=tensor)


def _add_output(body: onnx.GraphProto, name: str) -> None:
    body.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
