"""The arguments of ``compress_``: recipes by name, what was left open filled in, what cannot be refused at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from torch import Tensor, nn

from nsvd.compression.ranks import ALLOCATIONS, SEARCHING, SOLA_ALLOCATIONS, check_allocation
from nsvd.linalg import METHODS, Method, SplitMethod, by_name
from nsvd.linalg.factors import check_factors
from nsvd.stored.experts import layer_names
from nsvd.walk.moments import check_mixture, check_windows
from nsvd.walk.targets import fits, patterns, targets

STEEP = 1.5  # the share of neurons that a recipe chooses is no more than so many times the ratio: the first ranks cost least


@dataclass(frozen=True)
class Recipe:
    """A method, and the arguments of ``compress_`` and ``compress_kv_`` that go with it; each can be overridden."""

    method: str
    options: dict = field(default_factory=dict)  # of the method, where weights are compressed
    weights: dict = field(default_factory=dict)
    cache: dict = field(default_factory=dict)


RECIPES: dict[str, Recipe] = {
    "best": Recipe(
        "kfac",
        options={"mu": 0.3},
        weights={"allocation": "fisher", "factors": "pivoted", "shifted": True, "neurons": 0.5},
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


@dataclass(frozen=True)
class Request:
    """The arguments of ``compress_``, what was left open filled in from the recipe."""

    name: str
    method: Method | SplitMethod
    options: dict  # as given, and those of the recipe
    ratio: float | None
    ranks: Mapping[str, int] | None
    allocation: str
    factors: str
    shifted: bool
    refine: int
    distill: int
    domains: list[Tensor]
    weights: Sequence[float] | str
    search_count: int | None
    seed: int
    progress: bool
    neurons: float = 0.0  # the share of what is removed that neurons of feed-forwards remove
    optional: bool = (
        False  # whether they stay where there are none to leave out: no one has asked for it but the recipe
    )
    layers: tuple[str, ...] | None = None  # patterns, see ``targets``
    exclude: tuple[str, ...] | None = None
    sampled_text: bool = False  # whether ``domains`` is what the model has written

    @property
    def idle(self) -> bool:
        """Whether there is nothing to compress."""
        return not (self.ranks if self.ratio is None else self.ratio)

    @property
    def splits(self) -> bool:
        return isinstance(self.method, SplitMethod)

    @property
    def whole(self) -> Method:
        """The method, where it factors whole layers."""
        return cast(Method, self.method)

    @property
    def removed(self) -> float:
        """The ratio, where no ranks are given."""
        return cast(float, self.ratio)

    @property
    def searches(self) -> bool:
        """Whether the ranks come from decompositions."""
        return self.allocation != "uniform" and self.removed > 0 and not self.splits

    @property
    def one_by_one(self) -> bool:
        """Whether a layer's moments are needed once, when it is factored, and not again."""
        follows = self.shifted or self.distill or self.splits or self.method.needs_gradients
        return self.method.needs_moments and self.allocation == "uniform" and bool(self.domains) and not follows

    @property
    def reaches_experts(self) -> bool:
        """Whether experts are compressed, each for its own tokens: not where inputs are followed or gradients asked for."""
        gradients = self.judge.needs_gradients or self.allocation in ("fisher", "zero-sum")
        return not (self.shifted or self.distill or self.splits or gradients)

    @property
    def priced(self) -> bool:
        """Whether what is removed is chosen by what the loss rises by, and the layers behind make up for it."""
        return bool(self.shifted and self.method.needs_gradients and self.allocation == "fisher")

    @property
    def sampled(self) -> bool:
        """Whether the text is to be the model's own."""
        return self.name in RECIPES and not self.domains

    @property
    def judge(self) -> Method | SplitMethod:
        """The method that says which statistics are needed."""
        inner = self.method.inner(self.options)[0] if isinstance(self.method, SplitMethod) else self.method
        return inner if inner.needs_gradients else self.method


def chosen_layers(model: nn.Module, ask: Request) -> dict[str, nn.Linear]:
    """The target layers that the request names; raises ``ValueError`` as ``targets``, and says why where they are experts."""
    try:
        return targets(model, ask.layers, ask.exclude)
    except ValueError as error:
        named = (pattern for pattern in ask.layers or () if any(fits(name, pattern) for name in layer_names(model)))
        if ask.reaches_experts or (pattern := next(named, None)) is None:
            raise
        raise ValueError(
            f"{pattern!r} names layers of experts, and these stay dense here: shifted inputs, gradients, distillation and SoLA "
            "need layers that every token goes through"
        ) from error


def resolve(
    name: str,
    options: dict,
    *,
    ratio: float | None,
    ranks: Mapping[str, int] | None,
    allocation: str | None,
    factors: str | None,
    shifted: bool | None,
    refine: int,
    distill: int,
    windows: Tensor | Sequence[Tensor] | None,
    weights: Sequence[float] | str,
    search_count: int | None,
    seed: int,
    progress: bool,
    neurons: float | None = None,
    layers: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> Request:
    """All arguments resolved; raises ``ValueError`` for those that are wrong, or do not go together, for any model."""
    chosen, method = recipe(name), base_method(name)
    options = chosen.options | options
    method.resolve(options)
    splits = isinstance(method, SplitMethod)
    usual = "uniform" if ranks is not None else chosen.weights.get("allocation", "sola" if splits else "uniform")
    ask = Request(
        name, method, options, ratio, ranks,
        allocation=allocation or usual,
        factors=factors or chosen.weights.get("factors", "plain"),
        shifted=chosen.weights.get("shifted", False) if shifted is None else shifted,
        refine=refine, distill=distill,
        domains=[windows] if isinstance(windows, Tensor) else list(windows or ()),
        weights=weights, search_count=search_count, seed=seed, progress=progress,
        neurons=neurons or 0.0, optional=neurons is None,
        layers=patterns(layers), exclude=patterns(exclude),
    )  # fmt: skip
    for ids in ask.domains:
        check_windows(ids)
    check_factors(ask.factors)
    check_mixture(weights, max(1, len(ask.domains)))
    textless = not (ask.domains or ask.sampled or ask.idle)
    if weights != "uniform" and textless:
        raise ValueError("weights are those of domains of text: pass windows=")
    if weights == "worst-case" and ratio is None:
        raise ValueError("worst-case weights are found for a ratio; give it in place of ranks")
    check_allocation(ask.allocation, ratio, ranks, ask.domains, among=SOLA_ALLOCATIONS if splits else ALLOCATIONS)
    absent = {"pivoted factors": ask.factors != "plain", "shifted inputs": ask.shifted}
    absent |= {"refinement": refine, "distillation": distill}
    absent |= {"choice of layers": ask.layers is not None or ask.exclude is not None}
    for what, wanted in absent.items():
        if splits and wanted:
            raise ValueError(f"{method.label} has no {what}")
    for what, steps in (("refine", refine), ("distill", distill)):
        if not isinstance(steps, int) or steps < 0:
            raise ValueError(f"{what} is {steps}, but a number of steps is whole and not negative")
    if ask.optional and ask.priced:
        ask = replace(ask, neurons=round(min(chosen.weights.get("neurons", 0.0), STEEP * ask.removed), 6))
    if not isinstance(ask.neurons, int | float) or not 0 <= ask.neurons <= 1:
        raise ValueError(f"neurons is {ask.neurons!r}, but it is a share of what is removed, in [0, 1]")
    if ask.neurons and not ask.priced:
        raise ValueError(
            "neurons are left out by what the loss rises by, and the layers behind them make up for it: that goes with method "
            "'kfac' or 'best', allocation 'fisher' and shifted=True, and a ratio in place of ranks"
        )
    if refine and not ask.shifted:
        raise ValueError("refine goes with shifted=True: the blocks are fitted in order")
    if ask.shifted and textless:
        raise ValueError("shifted inputs are followed on a text: pass windows=")
    if distill and textless:
        raise ValueError("distill goes over a text: pass windows=, such as own_text(model)")
    if search_count is not None and ask.allocation not in SEARCHING:
        raise ValueError(f"search_count needs allocation {', '.join(SEARCHING)}, not {ask.allocation!r}")
    if search_count is not None and search_count < 1:
        raise ValueError(f"search_count is {search_count}; 1 window is the least")
    return ask
