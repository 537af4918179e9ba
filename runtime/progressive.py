"""Hierarchical progressive pruning: which blocks to prune how far so that chips with stuck cells lose no accuracy.

Algorithm 1 of Yuan et al. 2021, read as follows where the paper leaves it open. For each ratio in turn all blocks that
are still searched are pruned to that ratio, an absolute share of their weights. The pruned model is accepted if it is
less than a threshold worse than the one accepted last; else the first block is taken off the search, keeps the ratio
that it was accepted with, and the others are tried at the same ratio again. The best model seen is remembered apart:
accepted ones may each lose a little.

Nothing here knows models: what a choice of ratios is worth is asked of a function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec
import scipy.stats

from rerampile.errors import ConfigError
from rerampile.runtime.statistics import Vector, interval_of

__all__ = [
    "Hopeless",
    "Measure",
    "Measured",
    "Rules",
    "SearchPath",
    "SearchStep",
    "check_search",
    "search",
]

_CONFIDENCE = 0.95  # one-sided


@dataclass(frozen=True)
class Measured:
    """What a choice of ratios is worth.

    Attributes:
        clean: Metric without faults, percent.
        values: Metric of each chip, percent, float64 [chips]; the same chips in the same order for all choices.
    """

    clean: float
    values: Vector = field(repr=False)

    @property
    def mean(self) -> float:
        """Mean over chips."""
        return float(self.values.mean())


@dataclass(frozen=True)
class Hopeless:
    """A choice of ratios that was not measured.

    Attributes:
        reason: Why it cannot be accepted.
    """

    reason: str


Measure = Callable[[Mapping[str, float], Measured], Measured | Hopeless]
"""Measures the ratios of all blocks; given too what they are compared with."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What is left open by the paper.

    Attributes:
        threshold: Loss, points, from which on a step is rejected.
        on_reject: Whether the other blocks are tried at the same ratio again (the paper's text), or at the next one
            (its listing).
        reference: Whether a step is compared with what was accepted last (as in the paper) or with the best: then all
            steps together lose less than the threshold.
    """

    threshold: float = 0.5
    on_reject: Literal["retry", "advance"] = "retry"
    reference: Literal["current", "best"] = "current"


class SearchStep(msgspec.Struct, kw_only=True, frozen=True):
    """One choice of ratios.

    Attributes:
        ratio: The ratio that was tried; 0 for the unpruned start.
        searched: Blocks that were pruned to it.
        ratios: Ratio of every block.
        clean: Metric without faults, percent; null where it was not measured.
        mean: Mean of the metric over chips, percent; null where it was not measured.
        interval: Its 95 % interval.
        drop: Mean loss against the reference, points, paired chip by chip; null where it was not measured.
        drop_interval: Its 95 % interval.
        accepted: Whether the search went on from it.
        best: Whether it was the best so far.
        reason: Why it was accepted or not.
    """

    ratio: float
    searched: list[str]
    ratios: dict[str, float]
    clean: float | None = None
    mean: float | None = None
    interval: tuple[float, float] | None = None
    drop: float | None = None
    drop_interval: tuple[float, float] | None = None
    accepted: bool = False
    best: bool = False
    reason: str = ""


class SearchPath(msgspec.Struct, kw_only=True, frozen=True):
    """How a search went.

    Attributes:
        steps: Every choice that was tried, in order; the first is the unpruned start.
        best: Number of the best accepted step.
    """

    steps: list[SearchStep]
    best: int


def search(
    blocks: Sequence[str],
    schedule: Sequence[float],
    measure: Measure,
    start: Measured,
    rules: Rules,
    report: Callable[[SearchStep], None] = lambda _: None,
) -> SearchPath:
    """Run the search.

    Args:
        blocks: The blocks, in the order in which they are taken off the search.
        schedule: Ratios, ascending.
        measure: Says what ratios are worth.
        start: What the unpruned model is worth.
        rules: What is accepted.
        report: Called with each step.

    Raises:
        ConfigError: There is no block, or the ratios do not ascend.
    """
    check_search(blocks, schedule, rules)
    state = _State(list(blocks), dict.fromkeys(blocks, 0.0), start, start, rules)
    state.note(_step(0.0, state.searched, state.ratios, start, None, rules), best=True)
    report(state.steps[0])
    for ratio in schedule:
        while state.searched:
            step = state.attempt(ratio, measure)
            report(step)
            if step.accepted or rules.on_reject == "advance":
                break
    return SearchPath(steps=state.steps, best=max(n for n, step in enumerate(state.steps) if step.best))


def check_search(blocks: Sequence[str], schedule: Sequence[float], rules: Rules) -> None:
    """Refuse a search that makes no sense.

    Raises:
        ConfigError: There is no block, the ratios do not ascend, or the threshold is not above 0.
    """
    if not blocks:
        raise ConfigError("no block to search: every layer is protected or has no weights that can be pruned")
    if not schedule or any(not 0 < ratio < 1 for ratio in schedule) or sorted(set(schedule)) != list(schedule):
        raise ConfigError(
            f"--ratios {','.join(f'{ratio:g}' for ratio in schedule)}: expected ratios above 0 and below 1, ascending"
        )
    if not rules.threshold > 0:
        raise ConfigError(f"--threshold {rules.threshold:g}: expected more than 0 points")


@dataclass
class _State:
    """Where a search is: blocks still searched, accepted ratios, the accepted model and the best one."""

    searched: list[str]
    ratios: dict[str, float]
    current: Measured
    best: Measured
    rules: Rules
    steps: list[SearchStep] = field(default_factory=list)

    def attempt(self, ratio: float, measure: Measure) -> SearchStep:
        """Try the searched blocks at a ratio; go on from there, or take the first block off."""
        ratios = self.ratios | dict.fromkeys(self.searched, ratio)
        reference = self.best if self.rules.reference == "best" else self.current
        found = measure(ratios, reference)
        step = _step(ratio, self.searched, ratios, found, reference, self.rules)
        if step.accepted and isinstance(found, Measured):
            better = found.mean > self.best.mean
            self.ratios, self.current = ratios, found
            self.best = found if better else self.best
            return self.note(step, best=better)
        del self.searched[0]
        return self.note(step, best=False)

    def note(self, step: SearchStep, *, best: bool) -> SearchStep:
        """Add a step to the path."""
        self.steps.append(msgspec.structs.replace(step, best=best))
        return self.steps[-1]


def _step(
    ratio: float,
    searched: Sequence[str],
    ratios: Mapping[str, float],
    found: Measured | Hopeless,
    reference: Measured | None,
    rules: Rules,
) -> SearchStep:
    """Judge what was found.

    A step is accepted unless chips show that it loses the threshold or more: so chance alone takes no block off.
    """
    tried = SearchStep(ratio=ratio, searched=list(searched), ratios=dict(ratios))
    if isinstance(found, Hopeless):
        return msgspec.structs.replace(tried, reason=found.reason)
    measured = msgspec.structs.replace(
        tried, clean=found.clean, mean=found.mean, interval=interval_of(found.values), accepted=True, reason="unpruned"
    )
    if reference is None:
        return measured
    drops = reference.values - found.values
    least = float(drops.mean())
    if len(drops) > 1:
        error = float(drops.std(ddof=1)) / len(drops) ** 0.5
        least -= float(scipy.stats.t.ppf(_CONFIDENCE, len(drops) - 1)) * error
    accepted = least < rules.threshold
    return msgspec.structs.replace(
        measured,
        drop=float(drops.mean()),
        drop_interval=interval_of(drops),
        accepted=accepted,
        reason=f"loses at least {least:.2f} points, {'' if accepted else 'not '}less than {rules.threshold:g}",
    )
