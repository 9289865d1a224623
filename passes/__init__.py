"""All passes: one file a pass, the file's name is the pass's name, and this is the one list."""

from __future__ import annotations

from typing import Any

from onnxq.core import Fixpoint, Pass, Pipeline
from onnxq.passes.convert_float32 import convert_float32
from onnxq.passes.drop_dead_nodes import drop_dead_nodes
from onnxq.passes.drop_noops import drop_noops
from onnxq.passes.fold_add import fold_add
from onnxq.passes.fold_batchnorm import fold_batchnorm
from onnxq.passes.fold_constants import fold_constants
from onnxq.passes.fold_mul import fold_mul
from onnxq.passes.inline_functions import inline_functions
from onnxq.passes.quantize_static import QuantizeStatic
from onnxq.passes.quantize_weights import QuantizeWeights
from onnxq.passes.raise_opset import RaiseOpset
from onnxq.passes.share_initializers import share_initializers
from onnxq.passes.simplify_qdq import SimplifyQdq, simplify_qdq

# All float-preserving passes until nothing changes.
cleanup = Fixpoint(
    Pipeline(
        "cleanup",
        (
            fold_constants, drop_noops, fold_batchnorm, fold_mul, fold_add, drop_dead_nodes,
            share_initializers,
        ),
    )
)  # fmt: skip

# Values are passes; classes take options.
PASSES: dict[str, Pass | type[Any]] = {
    "cleanup": cleanup,
    "convert_float32": convert_float32,
    "drop_dead_nodes": drop_dead_nodes,
    "drop_noops": drop_noops,
    "fold_add": fold_add,
    "fold_batchnorm": fold_batchnorm,
    "fold_constants": fold_constants,
    "fold_mul": fold_mul,
    "inline_functions": inline_functions,
    "quantize_static": QuantizeStatic,
    "quantize_weights": QuantizeWeights,
    "raise_opset": RaiseOpset,
    "share_initializers": share_initializers,
    "simplify_qdq": SimplifyQdq,
}

__all__ = [
    "PASSES",
    "QuantizeStatic",
    "QuantizeWeights",
    "RaiseOpset",
    "SimplifyQdq",
    "cleanup",
    "convert_float32",
    "drop_dead_nodes",
    "drop_noops",
    "fold_add",
    "fold_batchnorm",
    "fold_constants",
    "fold_mul",
    "inline_functions",
    "share_initializers",
    "simplify_qdq",
]
