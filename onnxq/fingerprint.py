"""Whether two models are the same: structure and weights in 64 hexadecimal digits."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.model import Model, values_of


def fingerprint(model: Model) -> str:
    """Blake2 over what the model computes; reads each weight once, one at a time."""
    digest = hashlib.blake2b(digest_size=32)
    digest.update(model.skeleton().graph.SerializeToString(deterministic=True))
    for graph in model.graphs():
        for name, tensor in graph.tensors().items():
            if isinstance(tensor, gs.Constant):
                values = np.ascontiguousarray(values_of(tensor))
                digest.update(name.encode())
                if values.dtype.hasobject:  # texts
                    digest.update(str(values.tolist()).encode())
                else:
                    digest.update(values.view(np.uint8).data)
    return digest.hexdigest()
