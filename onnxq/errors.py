"""What can go wrong, as users see it: one line that says what to do next.

OnnxqError
+-- ModelError        the file is not a model we can read or write
|   +-- RefusedError  onnxruntime does not take it
+-- DataError         samples that do not fit the model's inputs
+-- RecipeError       the request contradicts itself or the target
+-- BudgetError       the result is further from the original than was allowed, or nothing was done
"""


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
