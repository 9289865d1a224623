"""All passes: one file a pass, the file's name is the pass's name, and this is the one list."""

from __future__ import annotations

from typing import Any

from onnxq.core import Fixpoint, Pass, Pipeline
from onnxq.passes.absorb_bias import absorb_bias
from onnxq.passes.cancel_transposes import cancel_transposes
from onnxq.passes.convert_float16 import ConvertFloat16
from onnxq.passes.convert_float32 import convert_float32
from onnxq.passes.correct_bias import CorrectBias
from onnxq.passes.dequantize_model import DequantizeModel
from onnxq.passes.drop_dead_nodes import drop_dead_nodes
from onnxq.passes.drop_noops import drop_noops
from onnxq.passes.drop_traces import drop_traces
from onnxq.passes.drop_zero_states import drop_zero_states
from onnxq.passes.equalize_layers import EqualizeLayers
from onnxq.passes.factorize_weights import FactorizeWeights
from onnxq.passes.fill_blocks import FillBlocks
from onnxq.passes.fold_add import fold_add
from onnxq.passes.fold_batchnorm import fold_batchnorm
from onnxq.passes.fold_constants import fold_constants
from onnxq.passes.fold_focus import fold_focus
from onnxq.passes.fold_mul import fold_mul
from onnxq.passes.fold_pad import fold_pad
from onnxq.passes.fold_shapes import fold_shapes
from onnxq.passes.fuse_activations import fuse_activations
from onnxq.passes.fuse_normalisations import fuse_normalisations
from onnxq.passes.inline_functions import inline_functions
from onnxq.passes.inline_if import inline_if
from onnxq.passes.integer_io import IntegerIo
from onnxq.passes.merge_reshapes import merge_reshapes
from onnxq.passes.merge_slices import merge_slices
from onnxq.passes.name_sizes import name_sizes
from onnxq.passes.pool_first import pool_first
from onnxq.passes.prune_channels import PruneChannels
from onnxq.passes.prune_weights import PruneWeights
from onnxq.passes.quantize_codebook import QuantizeCodebook
from onnxq.passes.quantize_dynamic import QuantizeDynamic
from onnxq.passes.quantize_static import QuantizeStatic
from onnxq.passes.quantize_weights import QuantizeWeights
from onnxq.passes.raise_opset import RaiseOpset
from onnxq.passes.read_last_state import read_last_state
from onnxq.passes.reconstruct_codebook import ReconstructCodebook
from onnxq.passes.reconstruct_static import ReconstructStatic
from onnxq.passes.reconstruct_weights import ReconstructWeights
from onnxq.passes.round_adaptively import RoundAdaptively
from onnxq.passes.scale_salient import ScaleSalient
from onnxq.passes.share_initializers import share_initializers
from onnxq.passes.share_nodes import share_nodes
from onnxq.passes.simplify_qdq import SimplifyQdq, simplify_qdq
from onnxq.passes.smooth_activations import SmoothActivations
from onnxq.passes.sparsify_storage import SparsifyStorage
from onnxq.passes.split_units import split_units
from onnxq.passes.widen_channels import WidenChannels

# All float-preserving passes until nothing changes.
cleanup = Fixpoint(
    Pipeline(
        "cleanup",
        (
            fold_constants, drop_noops, fold_shapes, inline_if, merge_slices, share_nodes, fold_pad,
            drop_traces, drop_zero_states, cancel_transposes, merge_reshapes, split_units,
            read_last_state, fuse_normalisations,
            fuse_activations, fold_batchnorm, fold_mul, fold_add, fold_focus, drop_dead_nodes,
            share_initializers,
        ),
    )
)  # fmt: skip

# Values are passes; classes take options.
PASSES: dict[str, Pass | type[Any]] = {
    "absorb_bias": absorb_bias,
    "cancel_transposes": cancel_transposes,
    "cleanup": cleanup,
    "convert_float16": ConvertFloat16,
    "convert_float32": convert_float32,
    "correct_bias": CorrectBias,
    "dequantize_model": DequantizeModel,
    "drop_dead_nodes": drop_dead_nodes,
    "drop_noops": drop_noops,
    "drop_traces": drop_traces,
    "drop_zero_states": drop_zero_states,
    "equalize_layers": EqualizeLayers,
    "factorize_weights": FactorizeWeights,
    "fill_blocks": FillBlocks,
    "fold_add": fold_add,
    "fold_batchnorm": fold_batchnorm,
    "fold_constants": fold_constants,
    "fold_focus": fold_focus,
    "fold_mul": fold_mul,
    "fold_pad": fold_pad,
    "fold_shapes": fold_shapes,
    "fuse_activations": fuse_activations,
    "fuse_normalisations": fuse_normalisations,
    "inline_functions": inline_functions,
    "inline_if": inline_if,
    "integer_io": IntegerIo,
    "merge_reshapes": merge_reshapes,
    "merge_slices": merge_slices,
    "name_sizes": name_sizes,
    "pool_first": pool_first,
    "prune_channels": PruneChannels,
    "prune_weights": PruneWeights,
    "quantize_codebook": QuantizeCodebook,
    "quantize_dynamic": QuantizeDynamic,
    "quantize_static": QuantizeStatic,
    "quantize_weights": QuantizeWeights,
    "raise_opset": RaiseOpset,
    "read_last_state": read_last_state,
    "reconstruct_codebook": ReconstructCodebook,
    "reconstruct_static": ReconstructStatic,
    "reconstruct_weights": ReconstructWeights,
    "round_adaptively": RoundAdaptively,
    "scale_salient": ScaleSalient,
    "share_initializers": share_initializers,
    "share_nodes": share_nodes,
    "simplify_qdq": SimplifyQdq,
    "smooth_activations": SmoothActivations,
    "sparsify_storage": SparsifyStorage,
    "split_units": split_units,
    "widen_channels": WidenChannels,
}

__all__ = [
    "PASSES",
    "ConvertFloat16",
    "CorrectBias",
    "DequantizeModel",
    "EqualizeLayers",
    "FactorizeWeights",
    "FillBlocks",
    "IntegerIo",
    "PruneChannels",
    "PruneWeights",
    "QuantizeCodebook",
    "QuantizeDynamic",
    "QuantizeStatic",
    "QuantizeWeights",
    "RaiseOpset",
    "ReconstructCodebook",
    "ReconstructStatic",
    "ReconstructWeights",
    "RoundAdaptively",
    "ScaleSalient",
    "SimplifyQdq",
    "SmoothActivations",
    "SparsifyStorage",
    "WidenChannels",
    "absorb_bias",
    "cancel_transposes",
    "cleanup",
    "convert_float32",
    "drop_dead_nodes",
    "drop_noops",
    "drop_traces",
    "drop_zero_states",
    "fold_add",
    "fold_batchnorm",
    "fold_constants",
    "fold_focus",
    "fold_mul",
    "fold_pad",
    "fold_shapes",
    "fuse_activations",
    "fuse_normalisations",
    "inline_functions",
    "inline_if",
    "merge_reshapes",
    "merge_slices",
    "name_sizes",
    "pool_first",
    "read_last_state",
    "share_initializers",
    "share_nodes",
    "simplify_qdq",
    "split_units",
]
