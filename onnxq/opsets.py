"""Raising the operator set of a model: onnx's version converter, and what it would lose."""

from __future__ import annotations

import re

import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto, version_converter

from onnxq.errors import ModelError
from onnxq.serialization import bodies_of, local_tensors, origin_of
from onnxq.shapes import copy_type


def converted(proto: onnx.ModelProto, version: int) -> onnx.ModelProto:
    """The model with version `version` of the default operator set.

    Raises ModelError, naming the operator where that is known, when the converter cannot do it.
    """
    if version > onnx.defs.onnx_opset_version():
        raise ModelError(
            f"opset {version} is newer than onnx {onnx.__version__} knows; install a newer onnx"
        )
    try:
        return version_converter.convert_version(proto, version)
    except Exception as e:  # the converter raises what C++ throws: RuntimeError and others
        text = " ".join(str(e).split())
        used = {node.op_type for node in proto.graph.node}
        named = [word for word in re.findall(r"\w+", text) if word in used]
        what = f"operator {named[-1]}" if named else text
        raise ModelError(
            f"cannot be converted to opset {version} ({what}); export it with a newer opset"
        ) from e


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
