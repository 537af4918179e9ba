"""The search of Algorithm 1 on scripted oracles: accept, reject, take off, roll back, run out of blocks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rerampile import ConfigError
from rerampile.runtime.progressive import Hopeless, Measured, Rules, SearchPath, SearchStep, search

START = Measured(92.0, np.full(4, 90.0))


def scripted(worth: Callable[[Mapping[str, float]], float], asked: list[dict[str, float]]) -> Callable[..., Measured]:
    """Return an oracle whose four chips are all worth the same."""

    def measure(ratios: Mapping[str, float], _: Measured) -> Measured:
        asked.append(dict(ratios))
        return Measured(92.0, np.full(4, worth(ratios)))

    return measure


def run(worth: Callable[[Mapping[str, float]], float], **rules: object) -> tuple[SearchPath, list[dict[str, float]]]:
    asked: list[dict[str, float]] = []
    path = search(["64", "128", "256"], (0.2, 0.4, 0.6), scripted(worth, asked), START, Rules(**rules))  # type: ignore[arg-type]
    return path, asked


def told(path: SearchPath) -> list[tuple[float, str, bool, bool]]:
    return [(step.ratio, ",".join(step.searched), step.accepted, step.best) for step in path.steps]


def test_everything_is_accepted() -> None:
    path, asked = run(lambda ratios: 90 + ratios["64"])
    assert told(path) == [(0, "64,128,256", True, True), *((r, "64,128,256", True, True) for r in (0.2, 0.4, 0.6))]
    assert asked == [dict.fromkeys(("64", "128", "256"), ratio) for ratio in (0.2, 0.4, 0.6)]
    assert path.best == 3


def test_a_rejected_block_keeps_its_ratio_and_the_others_are_tried_again() -> None:
    path, asked = run(lambda ratios: 85 if ratios["64"] > 0.2 else 90)
    assert told(path)[2:] == [
        (0.4, "64,128,256", False, False),
        (0.4, "128,256", True, False),
        (0.6, "128,256", True, False),
    ]
    assert asked[2] == {"64": 0.2, "128": 0.4, "256": 0.4}  # what was rejected left no trace
    assert path.steps[-1].ratios == {"64": 0.2, "128": 0.6, "256": 0.6}
    assert path.best == 0  # nothing was better than the start


def test_advance_goes_to_the_next_ratio() -> None:
    path, _ = run(lambda ratios: 85 if ratios["64"] > 0.2 else 90, on_reject="advance")
    assert [step[:3] for step in told(path)[2:]] == [(0.4, "64,128,256", False), (0.6, "128,256", True)]


def test_the_search_ends_when_no_block_is_left() -> None:
    path, asked = run(lambda _: 80)
    assert told(path)[1:] == [(0.2, blocks, False, False) for blocks in ("64,128,256", "128,256", "256")]
    assert len(asked) == 3
    assert path.best == 0
    assert path.steps[0].ratios == dict.fromkeys(("64", "128", "256"), 0.0)


@pytest.mark.parametrize(("reference", "accepted"), [("current", [True, True, True]), ("best", [True, True, False])])
def test_small_losses_add_up_only_against_the_last(reference: str, accepted: list[bool]) -> None:
    """Every ratio loses 0.2 more: against the model before that is below 0.5, against the best not for ever."""
    path, _ = run(lambda ratios: 90 - max(ratios.values()), reference=reference)
    assert [step.accepted for step in path.steps[1:4]] == accepted
    assert path.best == 0


def test_the_best_is_kept_though_later_steps_are_accepted() -> None:
    path, _ = run(lambda ratios: {0.2: 90.3, 0.4: 90.6, 0.6: 90.4}[ratios["256"]])
    assert [step.accepted for step in path.steps] == [True] * 4
    assert path.best == 2


def test_noise_alone_rejects_nothing() -> None:
    """A mean loss above the threshold that chips do not show for sure is accepted; the same in all chips is not."""
    noisy = np.array([93.0, 85.0, 93.0, 85.0])
    paths = [
        search(["64"], [0.2], lambda *_, values=values: Measured(92.0, values), START, Rules(threshold=0.5))
        for values in (noisy, np.full(4, noisy.mean()))
    ]
    assert [path.steps[1].accepted for path in paths] == [True, False]
    assert [path.steps[1].drop for path in paths] == [1.0, 1.0]


def test_a_skipped_step_is_a_rejected_one() -> None:
    path = search(["64"], [0.2], lambda *_: Hopeless("predicted to lose 5 points"), START, Rules())
    step = path.steps[1]
    assert (step.accepted, step.mean, step.reason) == (False, None, "predicted to lose 5 points")


def test_steps_are_reported_as_they_come() -> None:
    seen: list[SearchStep] = []
    path = search(["64"], [0.2], lambda *_: START, START, Rules(), seen.append)
    assert seen == path.steps


@settings(max_examples=100, deadline=None)
@given(
    losses=st.dictionaries(st.sampled_from(["a", "b", "c"]), st.floats(0, 3), min_size=3),
    on_reject=st.sampled_from(["retry", "advance"]),
    reference=st.sampled_from(["current", "best"]),
)
def test_whatever_is_lost_the_result_is_never_below_the_start(
    losses: dict[str, float], on_reject: str, reference: str
) -> None:
    def measure(ratios: Mapping[str, float], _: Measured) -> Measured:
        return Measured(92.0, 90 - np.full(4, sum(losses[block] * ratio for block, ratio in ratios.items())))

    rules = Rules(on_reject=on_reject, reference=reference)  # type: ignore[arg-type]
    path = search(sorted(losses), (0.1, 0.5, 0.9), measure, START, rules)
    best = path.steps[path.best]
    assert best.accepted
    assert best.mean is not None
    assert best.mean >= START.mean
    ratios = [step.ratios for step in path.steps if step.accepted]
    for before, after in itertools.pairwise(ratios):  # blocks only ever lose more
        assert all(after[block] >= before[block] for block in before)
    taken_off = [
        set(before.searched) - set(after.searched) for before, after in zip(path.steps, path.steps[1:], strict=False)
    ]
    assert all(len(blocks) <= 1 for blocks in taken_off)


@pytest.mark.parametrize(
    ("blocks", "schedule", "threshold", "message"),
    [
        ([], [0.5], 0.5, "no block to search"),
        (["64"], [], 0.5, "--ratios : expected ratios above 0 and below 1, ascending"),
        (["64"], [0.5, 0.2], 0.5, "--ratios 0.5,0.2: expected"),
        (["64"], [0.5, 1.0], 0.5, "--ratios 0.5,1: expected"),
        (["64"], [0.5], 0.0, "--threshold 0: expected more than 0 points"),
    ],
)
def test_searches_that_make_no_sense(blocks: list[str], schedule: list[float], threshold: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        search(blocks, schedule, lambda *_: START, START, Rules(threshold=threshold))
