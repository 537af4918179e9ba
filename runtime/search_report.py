"""What a search found: its numbers and its picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from rerampile.files import write_files
from rerampile.runtime.pictures import render
from rerampile.runtime.progressive import Measured, Rules, SearchStep
from rerampile.runtime.statistics import interval_of

__all__ = ["SEARCH_FILES", "Outcome", "SearchReport", "beside", "steps_picture", "write_search"]

SEARCH_FILES = ("search.json", "search.svg", "search.png")

_COLOURS = {"accepted": "#1b6ca8", "rejected": "#d1495b"}


class Outcome(msgspec.Struct, kw_only=True, frozen=True):
    """The pruned model beside the unpruned one, on the same chips; percent and points.

    Attributes:
        chips: Chips of each.
        unpruned_clean: The unpruned model without faults.
        unpruned: Its mean over chips.
        unpruned_interval: 95 % interval of that mean; null for one chip.
        clean: The pruned model without faults.
        mean: Its mean over chips.
        interval: 95 % interval of that mean; null for one chip.
        gain: Mean gain of a chip by pruning.
        gain_interval: Its 95 % interval, paired; null for one chip.
    """

    chips: int
    unpruned_clean: float
    unpruned: float
    unpruned_interval: tuple[float, float] | None
    clean: float
    mean: float
    interval: tuple[float, float] | None
    gain: float
    gain_interval: tuple[float, float] | None


class SearchReport(msgspec.Struct, kw_only=True, frozen=True, tag_field="format", tag="rerampile-search"):
    """What ``search.json`` holds.

    Attributes:
        format: What kind of file this is.
        format_version: Version of the format.
        metric: The metric that was searched for.
        model: Name of the model.
        failure_rate: Failure rate a cell (or weight) of the chips.
        faults: Their fault model in words.
        seed: Seed of the chips of the selection; those that confirm and those of the final figures have the next two.
        mapping: Mapping scheme.
        scale: One scale a tensor, a channel or a partition.
        clip: Whether the full scales of every step were chosen on the calibration images; left out where not.
        correct: Whether gains and biases of every step were corrected there; left out where not.
        engine: Engine that pruned.
        structure: What was pruned.
        protect: Layers that were not.
        schedule: Ratios to try.
        order: Which blocks were taken off the search first.
        rules: What was accepted.
        selection: Data by which steps were judged.
        reported: Data of the final figures.
        steps: Every step, the unpruned start first.
        best: Number of the best accepted step.
        ratios: Ratio of every block of the deployment that was written: of the best step, or 0 where fresh chips showed
            it to be worse than the unpruned model.
        confirmed: The best step on fresh chips and the data of the selection; null where it is the start.
        final: The deployment that was written, on other chips and the reported data.
    """

    format_version: int = 1
    metric: str
    model: str
    failure_rate: float
    faults: str
    seed: int
    mapping: str
    scale: str
    engine: str
    structure: str
    protect: tuple[str, ...]
    schedule: tuple[float, ...]
    order: str
    rules: Rules
    selection: str
    reported: str
    steps: list[SearchStep]
    best: int
    ratios: dict[str, float]
    confirmed: Outcome | None
    final: Outcome
    clip: bool | msgspec.UnsetType = msgspec.UNSET
    correct: bool | msgspec.UnsetType = msgspec.UNSET


def beside(unpruned: Measured, pruned: Measured) -> Outcome:
    """Compare two models on the same chips."""
    gains = pruned.values - unpruned.values
    return Outcome(
        chips=len(gains),
        unpruned_clean=unpruned.clean,
        unpruned=unpruned.mean,
        unpruned_interval=interval_of(unpruned.values),
        clean=pruned.clean,
        mean=pruned.mean,
        interval=interval_of(pruned.values),
        gain=float(gains.mean()),
        gain_interval=interval_of(gains),
    )


def write_search(folder: Path, report: SearchReport) -> None:
    """Write ``search.json`` and the picture, ``search.svg`` and ``search.png``.

    Raises:
        ConfigError: A file cannot be written.
    """
    data = msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n"
    svg, png = render(steps_picture(report))
    write_files(folder, dict(zip(SEARCH_FILES, (data, svg.encode(), png), strict=True)))


def steps_picture(report: SearchReport) -> Callable[[Any], None]:
    """Return what draws the mean over chips of each step with its interval, its ratio beside it."""

    def draw(axes: Any) -> None:
        measured = [(n, step, step.mean) for n, step in enumerate(report.steps) if step.mean is not None]
        for word, wanted in (("accepted", True), ("rejected", False)):
            points = [(n, mean, step.interval or (mean, mean)) for n, step, mean in measured if step.accepted is wanted]
            if points:
                places, means, ends = zip(*points, strict=True)
                below = [mean - low for mean, (low, _) in zip(means, ends, strict=True)]
                above = [high - mean for mean, (_, high) in zip(means, ends, strict=True)]
                axes.errorbar(
                    places,
                    means,
                    [below, above],
                    fmt="o" if wanted else "x",
                    capsize=3,
                    color=_COLOURS[word],
                    label=word,
                )
        accepted = [(n, mean) for n, step, mean in measured if step.accepted]
        axes.plot(*zip(*accepted, strict=True), color=_COLOURS["accepted"], lw=1)
        for number, step, mean in measured:
            axes.annotate(f"{step.ratio:g}", (number, mean), (4, 4), textcoords="offset points", fontsize=7)
        axes.plot(
            [report.best], [report.steps[report.best].mean], "o", ms=11, mfc="none", mec="#3a7d44", label="best", ls=""
        )
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("step; its pruning ratio beside each point")
        axes.set_ylabel(f"{report.metric} of chips (%)")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)

    return draw
