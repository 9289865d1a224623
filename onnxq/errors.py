"""What can go wrong, as users see it: one line that says what to do next.

OnnxqError
+-- ModelError        the file is not a model we can read or write
|   +-- RefusedError  onnxruntime does not take it
+-- DataError         samples that do not fit the model's inputs
+-- RecipeError       the request contradicts itself or the target
+-- BudgetError       the result is further from the original than was allowed, or nothing was done
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OnnxqError(Exception):
    """Base of all errors that a user can cause and mend; `exit_code` is the command's."""

    exit_code = 2


class ModelError(OnnxqError):
    """The file is not a model that can be read or written."""


class RefusedError(ModelError):
    """Onnxruntime does not take the model: it has operators or versions that it does not know."""


class DataError(OnnxqError):
    """The samples do not fit the model's inputs."""


class RecipeError(OnnxqError):
    """The request contradicts itself, the model or the target."""


class BudgetError(OnnxqError):
    """The result is further from the original than was allowed; nothing was written."""

    exit_code = 1


def meant(name: str, known: Iterable[str]) -> str:
    """For the end of a message: which known name is likely meant, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
