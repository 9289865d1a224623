"""The only module that makes onnxruntime sessions."""

from __future__ import annotations

import os
from typing import Any

import onnx
import onnxruntime as ort

LEVELS = {
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "off": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}


def session(
    model: onnx.ModelProto | str | os.PathLike[str],
    *,
    optimize: str = "all",
    threads: int | None = None,
) -> Any:
    """An onnxruntime CPU session."""
    options = ort.SessionOptions()
    options.graph_optimization_level = LEVELS[optimize]
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else os.fspath(model)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
