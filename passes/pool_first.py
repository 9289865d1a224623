"""Pool before an elementwise operator that keeps order: it then works on fewer values.

    MaxPool(LeakyRelu(x))           =>    LeakyRelu(MaxPool(x))
    MaxPool(Q(LeakyRelu(DQ(q))))    =>    Q(LeakyRelu(DQ(MaxPool(q))))

Exact: the greatest of values is also the greatest after an operator that never falls, and Q and DQ
are of this kind. In front of a QuantizeLinear it is done to floats as well: ONNX Runtime lifts a
QuantizeLinear over a MaxPool that stands right before it, which then runs on integers in the layout
of floats, many times slower (see ort-cpu.toml). Other floats stay: there the operator is a part of
the convolution's kernel.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxq.core import rewrites
from onnxq.model import Model, producer, values_of

# Never falling for any input; LeakyRelu if its slope is not negative.
RISING = frozenset(("LeakyRelu", "Sigmoid", "Tanh"))


@rewrites("MaxPool")
def pool_first(model: Model, pool: gs.Node) -> str | None:
    """MaxPool(f(x)) => f(MaxPool(x)) for a rising f, on integers and in front of a Q."""
    if len([t for t in pool.outputs if t.name]) != 1 or model.is_output(pool.outputs[0]):
        return None
    chain = _rising(model, pool)
    if not chain or any(model.graph_of(n) is not model.graph_of(pool) for n in chain):
        return None
    first, last = chain[-1], chain[0]
    start, middle, end = first.inputs[0], last.outputs[0], pool.outputs[0]
    if start.dtype != middle.dtype:
        return None
    end_shape = end.shape
    pooled = gs.Variable(model.unique(f"{end.name}_pooled"), start.dtype, end_shape)
    pool.inputs[0] = start
    pool.outputs[0] = pooled
    first.inputs[0] = pooled
    last.outputs[0] = end
    for node in chain[1:]:
        node.outputs[0].shape = end_shape
    return f"before {' and '.join(n.op for n in chain if n.op in RISING)}"


def _rising(model: Model, pool: gs.Node) -> list[gs.Node]:
    """What stands in front of the MaxPool and can stand behind it, the nearest first."""
    before = producer(pool.inputs[0])
    if before is None or not _is_alone(model, pool.inputs[0]):
        return []
    if before.op != "QuantizeLinear":
        behind = pool.outputs[0].outputs
        is_quantized = bool(behind) and all(n.op == "QuantizeLinear" for n in behind)
        return [before] if is_quantized and _rises(before) else []
    chain = [before]
    for wanted in (_rises, _is_dequantize):
        node = producer(chain[-1].inputs[0])
        if node is None or not _is_alone(model, chain[-1].inputs[0]) or not wanted(node):
            return []
        chain.append(node)
    scales = (chain[0].inputs[1], chain[2].inputs[1])
    zeros = [n.inputs[2].dtype for n in (chain[0], chain[2]) if len(n.inputs) > 2]
    is_plain = all((v := values_of(s)) is not None and v.ndim == 0 for s in scales)
    return chain if is_plain and len(set(zeros)) == 1 and len(zeros) == 2 else []


def _is_alone(model: Model, tensor: gs.Tensor) -> bool:
    return len(tensor.outputs) == 1 and not model.is_output(tensor)


def _is_dequantize(node: gs.Node) -> bool:
    return node.op == "DequantizeLinear" and not isinstance(node.inputs[0], gs.Constant)


def _rises(node: gs.Node) -> bool:
    return node.op in RISING and float(node.attrs.get("alpha", 0.01)) >= 0
