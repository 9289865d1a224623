"""Options of a recipe's passes that a caller sets, and overrides for single layers.

A setting goes to every pass of the recipe that has an option of that name. In quantize_static
`range` has always been that of activations: there the setting `range` is its `weight_range`, as
everywhere else `range` is about weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_type_hints

from onnxq.amounts import Amounts
from onnxq.errors import RecipeError
from onnxq.layers import Layers
from onnxq.options import fits, options_of, type_text
from onnxq.plugins import find_pass
from onnxq.recipes import Recipe, load_recipe, names

PRUNING = ("prune", "prune_channels", "nm")
"""Settings that bring their passes along."""

# (pass, setting) -> the pass's option, where that has another name.
ALIASES = {
    ("correct_bias", "range"): "weight_range",
    ("quantize_static", "range"): "weight_range",
    ("quantize_static", "activation_range"): "range",
    ("quantize_weights", "weights"): "format",
    ("reconstruct_weights", "weights"): "format",
    ("scale_salient", "weights"): "format",
    ("smooth_activations", "range"): "weight_range",
    ("smooth_activations", "activation_range"): "range",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """What to change of a recipe's options; None: nothing. The names are those of the flags.

    weights, activations: formats (int4, int8, int16 ...); activations are those with fixed ranges.
    granularity: one scale a tensor, channel or group; group_size: values of a group. symmetric: no
    zero points in weights. range, activation_range: how ranges of weights, of activations are
    chosen. bias: int32 or float. encoding: how weights are written (auto, compute or storage).
    codebook, bits, dim: kind of codebooks, bits of an index, weights that share one.
    interface: inputs and outputs of float32 in 16 bits, too (kept or half). prune, prune_channels,
    nm: how much is pruned, in any recipe (`onnxq.amounts`): share of the weights (0.5, "50%",
    "0.5:wanda"), share of the multiply-accumulates (0.3, "30%"), N of each M weights that stay
    ("2:4").
    """

    weights: str | None = None
    activations: str | None = None
    granularity: str | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    range: str | None = None
    activation_range: str | None = None
    bias: str | None = None
    encoding: str | None = None
    codebook: str | None = None
    bits: int | None = None
    dim: int | None = None
    interface: str | None = None
    prune: float | str | None = None
    prune_channels: float | str | None = None
    nm: str | None = None

    def __post_init__(self) -> None:
        hints = get_type_hints(Settings)
        for name, value in self.given.items():
            if not fits(value, hints[name]):
                expected = type_text(hints[name]).removesuffix(" | None")
                raise RecipeError(f"setting {name} = {value!r} is not {expected}")
        _ = self.amounts

    @property
    def given(self) -> dict[str, Any]:
        """Those that are set."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    @property
    def amounts(self) -> Amounts:
        """How much is pruned."""
        return Amounts.of(self.prune, self.prune_channels, self.nm)


def configured(recipe: Recipe, settings: Settings | None, layers: Sequence[str] = ()) -> Recipe:
    """The recipe with settings, and overrides behind its own; of a choice, what takes them all.

    Raises RecipeError for a setting that none of its passes has, and overrides that are none.
    """
    if not isinstance(settings, Settings | None):
        raise RecipeError(f"settings are a Settings(weights='int4', ...), not {settings!r}")
    given = {} if settings is None else settings.given
    if settings is not None:
        recipe = settings.amounts.applied(recipe)
        given = {name: value for name, value in given.items() if name not in PRUNING}
    if isinstance(layers, str):
        layers = (layers,)
    Layers.parse(layers)
    wanted = dict.fromkeys([*given, *(["layers"] if layers else [])])
    for setting in wanted:
        if not any(_takers(one, setting) for one in recipe.candidates):
            raise RecipeError(_nobody(recipe, setting))
    fitting = tuple(one for one in recipe.candidates if all(_takers(one, s) for s in wanted))
    if not fitting:
        flags = ", ".join(map(_flag, wanted))
        raise RecipeError(f"none of what {recipe.name} chooses from takes all of {flags}")
    changed = [_with(one, given, layers) for one in fitting]
    if "group_size" in given and not (changed := [one for one in changed if _has_groups(one)]):
        raise RecipeError(
            f"recipe {recipe.name} shares no scales in groups: --group-size needs "
            "--granularity group"
        )
    return replace(recipe, choose=tuple(changed)) if recipe.choose else changed[0]


def _with(recipe: Recipe, given: Mapping[str, Any], layers: Sequence[str]) -> Recipe:
    options = {name: dict(chosen) for name, chosen in recipe.options.items()}
    for setting, value in given.items():
        for name, option in _takers(recipe, setting).items():
            options.setdefault(name, {})[option] = value
    for name in _takers(recipe, "layers") if layers else ():
        own = options.setdefault(name, {})
        own["layers"] = [*own.get("layers", ()), *layers]
    return replace(recipe, options=options)


def _has_groups(recipe: Recipe) -> bool:
    """Whether one of the passes that take a group size shares scales in groups."""
    for name in _takers(recipe, "group_size"):
        default = next(o.default for o in options_of(find_pass(name)) if o.name == "granularity")
        if recipe.options.get(name, {}).get("granularity", default) == "group":
            return True
    return False


def _takers(recipe: Recipe, setting: str) -> dict[str, str]:
    """The recipe's passes that have the setting, with the name of their option."""
    found = {}
    for name in dict.fromkeys(recipe.passes):
        option = ALIASES.get((name, setting), setting)
        if any(known.name == option for known in options_of(find_pass(name))):
            found[name] = option
    return found


def _nobody(recipe: Recipe, setting: str) -> str:
    others = [
        name for name in names() if any(_takers(r, setting) for r in load_recipe(name).candidates)
    ]
    return f"recipe {recipe.name} has no pass that takes {_flag(setting)}: use {', '.join(others)}"


def _flag(setting: str) -> str:
    return "--layer" if setting == "layers" else "--" + setting.replace("_", "-")
