"""Passes by name: those that come with onnxq, installed ones, and classes in a user's module.

An installed distribution brings passes by the entry point group `onnxq.passes`; its names stand
beside the built-in ones, which cannot be replaced. `package.module:PassClass` names any other pass
that can be imported, the current directory included. An entry is a pass, or a frozen dataclass
whose fields are its options and whose instances are passes.
"""

from __future__ import annotations

import importlib
import os
import sys
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from onnxq.core import Pass
from onnxq.errors import RecipeError, meant
from onnxq.passes import PASSES

GROUP = "onnxq.passes"


def installed() -> dict[str, EntryPoint]:
    """The entry points of other distributions, by name.

    Raises RecipeError when a name is that of a built-in pass, or is taken twice.
    """
    found: dict[str, EntryPoint] = {}
    for point in _points(tuple((folder, _changed(folder)) for folder in sys.path)):
        other = "onnxq" if point.name in PASSES else _owner(found.get(point.name))
        if other and (other == "onnxq" or found[point.name].value != point.value):
            raise RecipeError(
                f"pass {point.name!r} of {_owner(point)} has the name of a pass of {other}: "
                f"uninstall {_owner(point)}, or rename its entry point"
            )
        found[point.name] = point
    return dict(sorted(found.items()))


@lru_cache(maxsize=1)
def _points(places: tuple[tuple[str, int], ...]) -> tuple[EntryPoint, ...]:
    """All entry points of the group; places: where they are from, and as of when.

    A search reads a file of each distribution that is installed, and every name asks for one.
    """
    return tuple(entry_points(group=GROUP))


def _changed(folder: str) -> int:
    try:
        return os.stat(folder or os.curdir).st_mtime_ns
    except OSError:
        return 0


def _owner(point: EntryPoint | None) -> str:
    if point is None:
        return ""
    return point.dist.name if point.dist is not None else point.value


def names() -> list[str]:
    """Names of all passes, built in and installed."""
    return [*PASSES, *installed()]


def owner(name: str) -> str | None:
    """The distribution that a pass is from; None for those of onnxq and `module:Class`."""
    return None if name in PASSES or ":" in name else _owner(installed().get(name)) or None


def find_pass(name: str) -> Pass | type[Any]:
    """A pass, or a class that makes one of its options.

    Raises RecipeError for names that are not known, cannot be imported, or are no passes.
    """
    if ":" in name:
        module, _, attribute = name.partition(":")
        return _checked(name, _imported(name, module, attribute))
    points = installed()
    if name in PASSES:
        return PASSES[name]
    if name not in points:
        known = [*PASSES, *points]
        raise RecipeError(
            f"unknown pass {name!r}: one of {', '.join(known)}, or package.module:PassClass"
            f"{meant(name, known)}"
        )
    point = points[name]
    return _checked(f"{name} of {_owner(point)}", _imported(name, point.module, point.attr))


def _imported(name: str, module: str, attribute: str) -> Any:
    sys.path.insert(0, os.getcwd())  # as python -m does
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as e:  # whatever the user's module raises
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        raise RecipeError(f"pass {name!r} cannot be imported: {reason}") from e
    finally:
        sys.path.pop(0)
    return found


def _checked(name: str, found: Any) -> Pass | type[Any]:
    has_call = "__call__" in dir(found) if isinstance(found, type) else isinstance(found, Pass)
    if not has_call:
        raise RecipeError(
            f"{name!r} is not a pass: it needs a name, and a __call__ that takes a model "
            "(onnxq.rewrites makes one of a function)"
        )
    return found  # type: ignore[no-any-return]
