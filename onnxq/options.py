"""The options of passes: what a recipe may set, of which types, with which defaults.

A pass's fields are its options. Types are those of the annotations; a Literal names the choices.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from onnxq.core import Pass
from onnxq.errors import RecipeError, meant

FILLED = ("target", "integer_moves", "samples", "shapes", "calibration", "progress", "crew")
"""Fields that `plan` fills in from the command's own options and the target."""


@dataclass(frozen=True, slots=True)
class Option:
    """One option: its type as text, its default (None too where there is none), its choices."""

    name: str
    type: str
    default: Any
    choices: tuple[Any, ...]
    required: bool


def options_of(entry: Any) -> tuple[Option, ...]:
    """What a recipe may set of a pass; nothing for passes that are no dataclass types."""
    if not isinstance(entry, type) or not is_dataclass(entry):
        return ()
    hints = _hints(entry)
    return tuple(
        Option(
            f.name, type_text(hints[f.name]), _default(f), _choices(hints[f.name]), _is_required(f)
        )
        for f in fields(entry)
        if f.init and f.name not in FILLED
    )


def build(name: str, entry: Any, options: Mapping[str, Any], context: Mapping[str, Any]) -> Pass:
    """The pass with its options, and what `context` has for its other fields.

    Raises RecipeError for an option that the pass does not have or cannot take.
    """
    if not isinstance(entry, type):
        if options:
            raise RecipeError(f"{name} has no options, got {', '.join(options)}")
        made: Pass = entry
        return made
    allowed = {option.name for option in options_of(entry)}
    hints = _hints(entry) if is_dataclass(entry) else {}
    for key, value in options.items():
        if key not in allowed:
            listed = ", ".join(sorted(allowed)) or "it has none"
            raise RecipeError(f"{name} has no option {key!r}: {listed}{meant(key, allowed)}")
        if not fits(value, hints[key]):
            raise RecipeError(f"{name}: {key} = {value!r} is not {type_text(hints[key])}")
    taken = {
        f.name
        for f in (fields(entry) if is_dataclass(entry) else ())
        if f.name in FILLED or _is_required(f)
    }
    filled = {key: value for key, value in context.items() if key in taken} | {
        key: tuple(value) if isinstance(value, list) else value for key, value in options.items()
    }
    try:
        result = entry(**filled)
    except (TypeError, ValueError) as e:
        raise RecipeError(f"{name}: {e}") from e
    if not isinstance(result, Pass):
        raise RecipeError(f"{name!r} is not a pass: it has no name")
    return result


def require_range(option: str, value: float, least: float, most: float = math.inf) -> None:
    """Raise ValueError for a number that an option cannot be: never infinity."""
    if not least <= value <= most or value == math.inf:
        allowed = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
        raise ValueError(f"{option} is {allowed}, not {value!r}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of a TOML file is of the annotated type; unknown types take anything."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin in (Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if hint is bool:
        return isinstance(value, bool)
    if hint in (int, float):
        numbers = int if hint is int else (int, float)
        return isinstance(value, numbers) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    if origin in (tuple, list):
        inner = [a for a in arguments if a is not Ellipsis]
        return isinstance(value, list) and (
            len(inner) != 1 or all(fits(item, inner[0]) for item in value)
        )
    return hint is not type(None)


def _hints(entry: type) -> dict[str, Any]:
    try:
        return get_type_hints(entry)
    except Exception:  # names that exist for type checkers only: the annotations as they are
        return {f.name: f.type for f in fields(entry)}


def type_text(hint: Any) -> str:
    """A type as people write it."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if isinstance(hint, type) and not get_args(hint):
        return hint.__name__
    return str(hint).replace("typing.", "")


def _choices(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) is Literal else ()


def _default(field: Field[Any]) -> Any:
    if field.default is not MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not MISSING else None


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING
