"""onnxq: make an ONNX model smaller and faster, and say what that cost.

import onnxq
report = onnxq.optimize("in.onnx", "out.onnx", data="samples.npz")
print(report.text())
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxq.core import Fixpoint, Note, Pass, Pipeline, Skip, rewrites
    from onnxq.data import ImageOptions, Samples, open_samples
    from onnxq.errors import BudgetError, DataError, ModelError, OnnxqError, RecipeError
    from onnxq.lint import check
    from onnxq.loading import load
    from onnxq.looking import compare, inspect
    from onnxq.model import Model
    from onnxq.precalibration import calibrate
    from onnxq.report import Report
    from onnxq.settings import Settings
    from onnxq.workflow import optimize

_HOMES = {
    "core": ("Fixpoint", "Note", "Pass", "Pipeline", "Skip", "rewrites"),
    "data": ("ImageOptions", "Samples", "open_samples"),
    "loading": ("load",),
    "errors": ("BudgetError", "DataError", "ModelError", "OnnxqError", "RecipeError"),
    "lint": ("check",),
    "model": ("Model",),
    "precalibration": ("calibrate",),
    "report": ("Report",),
    "settings": ("Settings",),
    "looking": ("compare", "inspect"),
    "workflow": ("optimize",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "BudgetError",
    "DataError",
    "Fixpoint",
    "ImageOptions",
    "Model",
    "ModelError",
    "Note",
    "OnnxqError",
    "Pass",
    "Pipeline",
    "RecipeError",
    "Report",
    "Samples",
    "Settings",
    "Skip",
    "calibrate",
    "check",
    "compare",
    "inspect",
    "load",
    "open_samples",
    "optimize",
    "rewrites",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: `import onnxq` itself costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module 'onnxq' has no attribute {name!r}")
    return getattr(import_module(f"onnxq.{_HOME[name]}"), name)
