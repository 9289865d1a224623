"""How much is pruned, as callers ask for it: in any recipe.

    prune 0.5, 50%, 0.5:wanda      share of the weights, and which ones         prune_weights
    nm 2:4                         2 of each 4 inputs of a layer stay           prune_weights
    prune_channels 0.3, 30%        share of the multiply-accumulates            prune_channels

A recipe that has the pass gets its options. Another recipe gets the pass: behind its clean-up,
channels first; without one in front of what quantizes, or else at the end.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from onnxq.errors import RecipeError, meant
from onnxq.numerics.sparsity import LARGEST, Pattern
from onnxq.recipes import NARROWING, PRUNING, Recipe

CRITERIA = ("magnitude", "wanda", "obs")
WEIGHTS, CHANNELS = "prune_weights", "prune_channels"
HOW_MUCH = ("amount", "threshold", "nm")
"""Options of prune_weights of which one is given."""
SAVINGS = ("amount", "macs", "size", "latency")
"""Those of prune_channels."""
PREPARING = (
    *NARROWING, "equalize_layers", "smooth_activations", "scale_salient", "reconstruct",
    "round_adaptively",
)  # fmt: skip
"""What the names begin with of passes that quantize, or fit weights to what comes."""


@dataclass(frozen=True, slots=True)
class Amounts:
    """What a caller asks for; None: as the recipe says."""

    weights: float | None = None
    criterion: str | None = None
    nm: str | None = None
    macs: float | None = None

    @classmethod
    def of(cls, prune: float | str | None, channels: float | str | None, nm: str | None) -> Amounts:
        """From settings; raises RecipeError for what is no amount, and what contradicts itself."""
        weights, criterion = None, None
        if prune is not None:
            text, colon, named = str(prune).partition(":")
            weights = share("prune", text)
            criterion = named if colon else None
            if colon and named not in CRITERIA:
                listed = ", ".join(CRITERIA)
                raise RecipeError(
                    f"--prune {prune}: unknown criterion {named!r}: {listed}"
                    f"{meant(named, CRITERIA)}"
                )
        if nm is not None and weights is not None and abs(weights - gone(nm)) > 1e-9:
            raise RecipeError(
                f"--nm {nm} makes {gone(nm):.0%} of the weights zero, --prune asks for "
                f"{weights:.0%}: leave one of them out"
            )
        if nm is not None:
            gone(nm)
        macs = None if channels is None else share("prune_channels", str(channels))
        return cls(weights, criterion, nm, macs)

    def applied(self, recipe: Recipe) -> Recipe:
        """The recipe with all that; every one of a choice."""
        if recipe.choose:
            return replace(recipe, choose=tuple(map(self.applied, recipe.choose)))
        if self.macs is not None:
            recipe = _with(recipe, CHANNELS, {"macs": self.macs}, {*SAVINGS})
        if self.weights is None and self.nm is None:
            return recipe
        return self._thinned(recipe)

    def _thinned(self, recipe: Recipe) -> Recipe:
        """The recipe that prunes weights."""
        options: dict[str, Any] = {"nm": self.nm} if self.nm else {"amount": self.weights}
        if self.criterion is not None:
            options["criterion"] = self.criterion
        own = recipe.options.get(WEIGHTS, {})
        drop = {*HOW_MUCH, *(["scope"] if self.nm else [])}
        if self.nm is None and "nm" in own:
            raise RecipeError(
                f"recipe {recipe.name} prunes {own['nm']}: --nm changes that, and --prune goes "
                "with recipes such as sparse"
            )
        return _with(recipe, WEIGHTS, options, drop)


def share(name: str, text: str) -> float:
    """A share as a number or in percent; raises RecipeError for anything else."""
    flag = "--" + name.replace("_", "-")
    found = re.fullmatch(r"\s*(\d*\.?\d+(?:e-?\d+)?)\s*(%?)\s*", text)
    value = float(found[1]) / (100 if found[2] else 1) if found else -1.0
    if not 0 < value < 1:
        of = "multiply-accumulates" if name == "prune_channels" else "weights"
        raise RecipeError(f"{flag} {text}: a share of the {of}, above 0 and below 1: 0.5, or 50%")
    return value


def gone(nm: str) -> float:
    """The share of weights that N:M takes out; raises RecipeError for what is no pattern."""
    try:
        return Pattern.parse(nm).amount
    except ValueError as e:
        text = f"--nm {nm}: N of each M weights stay, N below M, M up to {LARGEST}, as in 2:4"
        raise RecipeError(text) from e


def _with(recipe: Recipe, name: str, chosen: dict[str, Any], drop: set[str]) -> Recipe:
    """The recipe with a pass that has these options; `drop`: options of its own that go."""
    passes = list(recipe.passes)
    if name not in passes:
        passes.insert(_place(passes, name), name)
    kept = {k: v for k, v in recipe.options.get(name, {}).items() if k not in drop}
    return replace(
        recipe, passes=tuple(passes), options={**recipe.options, name: {**kept, **chosen}}
    )


def _place(passes: list[str], name: str) -> int:
    """Where a pass that prunes goes."""
    if name == WEIGHTS and CHANNELS in passes:
        return passes.index(CHANNELS) + 1
    if name == CHANNELS and WEIGHTS in passes:
        return passes.index(WEIGHTS)
    if "cleanup" in passes:
        return passes.index("cleanup") + 1
    behind = (i for i, n in enumerate(passes) if n.startswith((*PREPARING, *PRUNING)))
    return next(behind, len(passes))
