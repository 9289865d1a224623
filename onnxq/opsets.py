"""Raising the operator set of a model: onnx's version converter, and what it would lose."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto, version_converter
from onnx.numpy_helper import to_array

from onnxq.errors import ModelError
from onnxq.graphs import DEFAULT_DOMAIN, bodies_of, local_tensors, origin_of
from onnxq.shapes import copy_type

MISCONVERTED = {"Scan": 9, "Hardmax": 13, "GroupNormalization": 21}
"""Operators that changed their meaning in that version, which the converter passes over."""

DEFAULTS: dict[str, tuple[int, dict[str, str]]] = {
    "Resize": (11, {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}),
    "RoiAlign": (16, {"coordinate_transformation_mode": "output_half_pixel"}),
}
"""Attributes that came with that version, by default other than what was before: the converter
does not write them."""

_UNKNOWN = (
    AttributeProto.SPARSE_TENSOR,
    AttributeProto.SPARSE_TENSORS,
    AttributeProto.TYPE_PROTO,
    AttributeProto.TYPE_PROTOS,
)
"""Attributes that the converter cannot read; `carry` puts them back."""


def convert(proto: onnx.ModelProto, old: int, new: int) -> onnx.ModelProto:
    """Convert a model from one version of the default operator set to another; `proto` is used up.

    Raises ModelError, naming the operator where that is known, when the converter cannot do it.
    """
    if new > onnx.defs.onnx_opset_version():
        raise ModelError(
            f"opset {new} is newer than onnx {onnx.__version__} knows; install a newer onnx"
        )
    proto.ir_version = max(proto.ir_version, 8)  # below, it wants initializers listed as inputs
    used = set()
    for node in _nodes(proto.graph):
        if node.domain in DEFAULT_DOMAIN:
            used.add(node.op_type)
        known = [a for a in node.attribute if a.type not in _UNKNOWN and not a.ref_attr_name]
        if len(known) < len(node.attribute):
            del node.attribute[:]
            node.attribute.extend(known)
    for op, changed in MISCONVERTED.items():
        if op in used and old < changed <= new:
            raise _refusal(new, f"operator {op}")
    try:
        converted = version_converter.convert_version(proto, new)
    except Exception as e:  # whatever C++ throws
        text = " ".join(str(e).split())
        named = max((op for op in used if op in text), key=len, default=None)
        raise _refusal(new, f"operator {named}" if named else text) from e
    for op, (changed, attributes) in DEFAULTS.items():
        if old < changed <= new:
            for node in _nodes(converted.graph):
                if node.op_type == op and node.domain in DEFAULT_DOMAIN:
                    _set(node, attributes)
                    if op == "Resize" and _shrinks(node, converted.graph, new):
                        _set(node, {"nearest_mode": "ceil"})
    return converted


def _shrinks(resize: onnx.NodeProto, graph: onnx.GraphProto, version: int) -> bool:
    """Whether a nearest Resize of opset 10 shrinks: ONNX Runtime then takes the next pixel.

    Raises ModelError when it shrinks one axis and enlarges another, which has no newer equivalent.
    """
    if any(a.name == "mode" and a.s != b"nearest" for a in resize.attribute):
        return False
    scales = [to_array(t) for t in graph.initializer if t.name == resize.input[2]]
    scales += [
        to_array(node.attribute[0].t)
        for node in _nodes(graph)
        if node.op_type == "Constant" and resize.input[2] in node.output
    ]
    if not scales or not (scales[0] < 1).any():
        return False
    if (scales[0] > 1).any():
        raise _refusal(version, "operator Resize, which shrinks one axis and enlarges another")
    return True


def _set(node: onnx.NodeProto, attributes: dict[str, str]) -> None:
    kept = [a for a in node.attribute if a.name not in attributes]
    del node.attribute[:]
    node.attribute.extend(kept)
    node.attribute.extend(onnx.helper.make_attribute(k, v) for k, v in attributes.items())


def _refusal(version: int, what: str) -> ModelError:
    return ModelError(f"cannot be converted to opset {version} ({what}); export it with that opset")


def _nodes(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from _nodes(body)


def align_functions(proto: onnx.ModelProto) -> None:
    """Let functions import the model's version of the default operators, where it is the same.

    The inliner takes only functions with the model's very versions; onnx's checker also those whose
    operators did not change between the two.
    """
    version = max((e.version for e in proto.opset_import if e.domain in DEFAULT_DOMAIN), default=0)
    for function in proto.functions:
        for entry in function.opset_import:
            if entry.domain not in DEFAULT_DOMAIN or entry.version == version:
                continue
            used = {n.op_type for n in _nodes(function) if n.domain in DEFAULT_DOMAIN}
            if all(_since(op, entry.version) == _since(op, version) for op in used):
                entry.version = version


def _since(op: str, version: int) -> int:
    try:
        return int(onnx.defs.get_schema(op, version).since_version)
    except onnx.defs.SchemaError:
        return 0


def carry(old: gs.Graph, new: gs.Graph) -> None:
    """Give a converted graph back what the converter lost, by the names of nodes and tensors."""
    before, after = origin_of(old), origin_of(new)
    after.shell, after.inputs, after.outputs = before.shell, before.inputs, before.outputs
    after.value_infos, after.loose = before.value_infos, before.loose
    new.name, new.doc_string = old.name, old.doc_string
    types = local_tensors(old)
    for name, tensor in local_tensors(new).items():
        known = types.get(name)
        if isinstance(tensor, gs.Variable) and isinstance(known, gs.Variable):
            copy_type(known, tensor)
    nodes = {node.name: node for node in old.nodes}
    for node in new.nodes:
        source = nodes.get(node.name)
        if source is None:
            continue
        node.origin = source.origin
        for key, value in source.attrs.items():
            if isinstance(value, AttributeProto):
                node.attrs.setdefault(key, value)
        for inner, body in zip(bodies_of(source), bodies_of(node), strict=False):
            carry(inner, body)
