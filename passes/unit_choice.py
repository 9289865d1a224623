"""How much of its weights each unit of a model is."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from onnxq.model import values_of
from onnxq.passes.removal import STAYS, Structure, weight_matrix


def norms(found: Structure) -> NDArray[np.float64]:
    """The root mean square of the weights that make each unit: [units].

    Relative to the layer's: where several layers make a unit, theirs are averaged.
    """
    total, count = np.zeros(found.count), np.zeros(found.count)
    for layer in found.layers:
        if layer.is_depthwise or not (layer.outputs != STAYS).any():
            continue
        weight = weight_matrix(layer, np.asarray(values_of(layer.node.inputs[layer.index])))
        squares = np.einsum("goip,goip->go", weight, weight, dtype=np.float64)
        mean = squares.mean() or 1.0
        is_unit = layer.outputs != STAYS
        np.add.at(total, layer.outputs[is_unit], squares[is_unit] / mean)
        np.add.at(count, layer.outputs[is_unit], 1.0)
    return np.sqrt(total / np.maximum(count, 1.0))
