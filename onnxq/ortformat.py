"""The .ort file of ONNX Runtime Mobile, and the list of operators that a reduced build needs.

Both are made by onnxruntime's converter; here they are put beside the model, whole or not at all.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from onnxq.errors import RecipeError
from onnxq.files import atomic_write
from onnxq.leftovers import temporary_folder
from onnxq.runtime import convert_to_ort

CONFIG = ".required_operators.config"


def check_name(output: str | os.PathLike[str]) -> None:
    """Raise RecipeError for an output that the converter would not take."""
    if Path(output).suffix.lower() != ".onnx":
        raise RecipeError(
            f"{os.fspath(output)}: the .ort file is made beside an .onnx file: name it *.onnx"
        )


def write_ort(model: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write MODEL.ort and MODEL.required_operators.config beside MODEL.onnx.

    Raises ModelError when onnxruntime cannot convert the model or the files cannot be written.
    """
    source = Path(model)
    made = source.with_suffix(".ort"), source.with_suffix(CONFIG)
    with temporary_folder() as folder:
        convert_to_ort(source, folder)
        contents = [(folder / path.name).read_bytes() for path in made]
        contents[1] = contents[1].replace(f"{folder.resolve()}{os.sep}".encode(), b"")
        with ExitStack() as files:
            for path, content in zip(made, contents, strict=True):
                files.enter_context(atomic_write(path)).write(content)
    return made
