"""What a name of several ingredients stands for, for the weights and for the cache."""

from __future__ import annotations

from dataclasses import dataclass, field

from nsvd.linalg import METHODS, Method, SplitMethod, by_name


@dataclass(frozen=True)
class Recipe:
    """A method, and the arguments of ``compress_`` and ``compress_kv_`` that go with it; each can be overridden."""

    method: str
    weights: dict = field(default_factory=dict)
    cache: dict = field(default_factory=dict)


RECIPES: dict[str, Recipe] = {
    "best": Recipe(
        "kfac",
        weights={"allocation": "fisher", "factors": "pivoted", "shifted": True},
        cache={"allocation": "fisher", "joint": True},
    ),
}


def recipe(name: str) -> Recipe:
    """The recipe of that name, or that of nothing but a method; raises ``ValueError`` with the known names."""
    if name not in RECIPES and name not in METHODS:
        raise ValueError(f"unknown method {name!r}; the methods are {', '.join((*METHODS, *RECIPES))}")
    return RECIPES.get(name) or Recipe(name)


def base_method(name: str) -> Method | SplitMethod:
    """The method of that name, or the one that a recipe is built on."""
    return by_name(recipe(name).method)
