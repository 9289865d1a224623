"""What there is: passes with their options, recipes as files; for people and machines."""

from __future__ import annotations

import inspect
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from onnxq import recipes as recipe_files
from onnxq.core import Fixpoint, Pipeline
from onnxq.options import Option, options_of
from onnxq.plugins import find_pass, names, owner
from onnxq.recipes import Recipe, load_recipe, toml
from onnxq.report import SCHEMA, print_rows, to_json

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True)
class PassInfo:
    """A pass: its documentation, its options, the distribution it is from (None: onnxq)."""

    name: str
    text: str
    options: tuple[Option, ...]
    distribution: str | None = None

    @property
    def summary(self) -> str:
        """The first line of its documentation."""
        return self.text.partition("\n")[0]

    def to_json(self) -> str:
        """The pass for machines."""
        return to_json({"schema": SCHEMA, **asdict(self)})

    def print_to(self, console: Console) -> None:
        """Print the pass for people."""
        source = f" (of {self.distribution})" if self.distribution else ""
        console.print(f"{self.name}{source}\n\n{self.text}\n")
        if not self.options:
            console.print("no options")
            return
        console.print(f'options, in a recipe under ["{self.name}"]')
        print_rows(console, [(o.name, _told(o)) for o in self.options])


def _told(option: Option) -> str:
    if option.required:
        return f"{option.type}, no default (version: the target's opset)"
    return f"{option.type}, default {toml(option.default)}"


@dataclass(frozen=True, slots=True)
class PassList:
    """All passes, built in and installed."""

    passes: tuple[PassInfo, ...]

    def to_json(self) -> str:
        """The list for machines."""
        return to_json({"schema": SCHEMA, **asdict(self)})

    def print_to(self, console: Console) -> None:
        """Print the list for people."""
        rows = [
            (p.name, f"{p.summary} (of {p.distribution})" if p.distribution else p.summary)
            for p in self.passes
        ]
        print_rows(console, rows)


@dataclass(frozen=True, slots=True)
class RecipeInfo:
    """A recipe, shown as the file it is."""

    recipe: Recipe

    def to_json(self) -> str:
        """The recipe for machines, with all options that its passes have."""
        known = {n: [asdict(o) for o in options_of(find_pass(n))] for n in self.recipe.passes}
        return to_json({"schema": SCHEMA, **asdict(self.recipe), "known_options": known})

    def print_to(self, console: Console) -> None:
        """Print the recipe as TOML, unwrapped: it may go to a file."""
        console.print(self.recipe.to_toml(), end="", soft_wrap=True)


@dataclass(frozen=True, slots=True)
class RecipeList:
    """The recipes that come with onnxq."""

    recipes: tuple[Recipe, ...]

    def to_json(self) -> str:
        """The list for machines."""
        return to_json({"schema": SCHEMA, **asdict(self)})

    def print_to(self, console: Console) -> None:
        """Print the list for people."""
        print_rows(console, [(recipe.name, recipe.description) for recipe in self.recipes])


def passes() -> PassList:
    """All passes, built in and installed; raises RecipeError for one that does not load."""
    return PassList(tuple(describe_pass(name) for name in names()))


def describe_pass(name: str) -> PassInfo:
    """One pass; raises RecipeError for a name that is not known."""
    entry = find_pass(name)
    return PassInfo(name, _documentation(entry), options_of(entry), owner(name))


def recipes() -> RecipeList:
    """The recipes that come with onnxq."""
    return RecipeList(tuple(load_recipe(name) for name in recipe_files.names()))


def describe_recipe(name: str) -> RecipeInfo:
    """One recipe, by name or file; raises RecipeError."""
    return RecipeInfo(load_recipe(name))


def _documentation(entry: Any) -> str:
    """Of the module, where the maths stands, and of the rule or class."""
    if isinstance(entry, Fixpoint):
        return f"Repeated until nothing changes any more: {_documentation(entry.inner)}"
    if isinstance(entry, Pipeline):
        return ", ".join(part.name for part in entry.passes)
    rule = getattr(entry, "rule", None)  # of a Rewrite
    home = rule or (entry if isinstance(entry, type) else type(entry))
    own = _written(entry if rule is None else rule)
    if not home.__module__.startswith("onnxq.passes."):
        return own or "(not documented)"
    module = inspect.getdoc(sys.modules[home.__module__]) or ""
    return f"{module}\n\n{own}".strip()


def _written(entry: Any) -> str:
    """The docstring, unless a dataclass has made it of its fields."""
    text = inspect.getdoc(entry) or ""
    return "" if text.startswith(f"{getattr(entry, '__name__', '?')}(") else text
