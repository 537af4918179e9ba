"""How hardware treats failed cells: what targets say of it, and what it makes of weights, beside Monte Carlo."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import integrate, stats

from rerampile import ConfigError, Target
from rerampile.failed_cells import CATEGORIES, RESPONSES, Category, FailedCells
from rerampile.schemes import SCHEMES, Coding
from rerampile.stuck_cell import StuckCell
from rerampile.target import Cell, to_toml

G_OFF, G_ON = 10e-6, 100e-6
# Unformed cells below the range, over-formed ones far above it, and some in between of every size.
FORMED: dict[str, Any] = {
    "unformed": {"share": 3, "mean": 0.5e-6, "spread": 0.5e-6},
    "partially_formed": {"share": 2, "mean": 40e-6, "spread": 30e-6},
    "over_formed": {"share": 5, "mean": 400e-6, "spread": 150e-6},
}
PROBABILITIES = {"stuck_off": 0.0, "stuck_on": 0.01, "unformed": 0.03, "partially_formed": 0.02, "over_formed": 0.05}
CELLS: dict[str, tuple[dict[str, Any], int]] = {
    "analog": ({}, 1),
    "levels": ({"levels": 16}, 1),
    "slices": ({"levels": 4}, 3),
    "table": ({"levels": 4, "level_table": (G_OFF, 20e-6, 37e-6, G_ON)}, 2),
}
WEIGHTS = np.linspace(-1, 1, 41, dtype=np.float32)[None]


def target_of(response: str = "unbounded", kind: str = "analog", **failed: Any) -> Target:
    keys, slices = CELLS[kind]
    failed = {"response": response, **FORMED, **failed}
    cell = {"g_off": G_OFF, "g_on": G_ON, **keys}
    return Target(name="formed", rows=8, columns=8, slices=slices, cell=cell, failed_cells=failed)  # type: ignore[arg-type]


# Targets.


def test_a_target_that_says_nothing() -> None:
    """Is what it was before there was anything to say: cells are stuck off or on, and read as what they conduct."""
    target = Target(name="plain", rows=8, columns=8, cell=Cell(g_off=G_OFF, g_on=G_ON))
    assert target.failed_cells == FailedCells()
    assert list(target.failures) == ["stuck_off", "stuck_on"]
    assert target.failed_limits == (0.0, math.inf)
    assert "failed_cells" not in target.to_dict()
    assert "failed" not in to_toml(target)


@pytest.mark.parametrize("response", RESPONSES)
def test_a_target_as_toml_and_back(response: str, tmp_path: Path) -> None:
    target = target_of(response, low=1e-6, over_formed="never")
    path = tmp_path / "target.toml"
    path.write_text(to_toml(target))
    assert Target.load(path) == Target.from_dict(target.to_dict()) == target
    assert target.to_dict()["failed_cells"] == {
        "response": response,
        "low": 1e-6,
        "high": "g_on",
        "unformed": {"share": 3.0, "mean": 0.5e-6, "spread": 0.5e-6},
        "partially_formed": {"share": 2.0, "mean": 40e-6, "spread": 30e-6},
        "over_formed": "never",
    }
    assert list(target.failures) == ["stuck_off", "stuck_on", "unformed", "partially_formed"]


@pytest.mark.parametrize(
    ("response", "bounds", "expected"),
    [
        ("unbounded", {}, (0.0, math.inf)),
        ("unbounded", {"low": 1e-6, "high": 2e-6}, (0.0, math.inf)),
        ("bounded", {}, (G_OFF, G_ON)),
        ("bounded", {"high": 150e-6}, (G_OFF, 150e-6)),
        ("bounded", {"low": 0, "high": "g_on"}, (0.0, G_ON)),
        ("bounded", {"low": 50e-6, "high": 50e-6}, (50e-6, 50e-6)),
        ("isolated_cell", {}, (0.0, 0.0)),
        ("isolated_pair", {"high": 150e-6}, (0.0, 0.0)),
    ],
)
def test_limits(response: str, bounds: dict[str, Any], expected: tuple[float, float]) -> None:
    target = target_of(response, **bounds)
    assert target.failed_limits == expected
    assert target.failed_cells.isolates_pairs == (response == "isolated_pair")


def test_a_response_is_chosen_by_one_setting() -> None:
    """Of a target that says nothing else of failed cells, too."""
    target = Target.load("paper", {"failed_cells.response": "isolated_pair"})
    assert target.failed_cells == FailedCells(response="isolated_pair")


@pytest.mark.parametrize(
    ("failed", "message"),
    [
        (
            {"response": "open"},
            "response: expected one of unbounded, bounded, isolated_cell, isolated_pair, got 'open'",
        ),
        ({"respones": "bounded"}, "respones: unknown key (did you mean response?)"),
        ({"high": 100}, 'high: expected a conductance in siemens from 0 to 10 (100 µS is 100e-6) or "g_on", got 100'),
        ({"low": "off"}, "low: expected a conductance in siemens"),
        ({"response": "bounded", "high": 5e-6}, "high: expected at least low = 1e-05, got 5e-06"),
        ({"unformed": {"mean": 0}}, "unformed.share: missing key (required: share, mean)"),
        ({"unformed": {"share": 0, "mean": 0}}, "unformed.share: expected a number above 0, got 0"),
        ({"over_formed": {"share": math.inf, "mean": 0}}, "over_formed.share: expected a number above 0, got inf"),
        ({"over_formed": {"share": 1, "mean": 400}}, "over_formed.mean: expected a conductance in siemens"),
        ({"partially_formed": 0.3}, 'partially_formed: expected a table of keys or "never", got 0.3'),
        ({"half_formed": {"share": 1, "mean": 0}}, "half_formed: unknown key"),
    ],
)
def test_what_no_target_says(failed: dict[str, Any], message: str) -> None:
    table = {"name": "x", "rows": 8, "columns": 8, "cell": {"g_off": G_OFF, "g_on": G_ON}, "failed_cells": failed}
    with pytest.raises(ConfigError) as caught:
        Target.from_dict(table, "chip.toml")
    assert str(caught.value).startswith(f"chip.toml: failed_cells.{message}")
    assert "\n" not in str(caught.value)


def test_a_state_that_cells_of_a_target_do_not_fail_in() -> None:
    with pytest.raises(ConfigError, match="formed: no cells that are over-formed, expected stuck_off, stuck_on, "):
        target_of(over_formed="never").failure("over_formed")


# Weights.


def coding_of(target: Target, scheme: str, **more: Any) -> tuple[Coding, StuckCell]:
    """A coding, for ``optimal`` around what suits the probabilities, and how its cells fail."""
    keys: dict[str, Any] = {key: getattr(target.cell, key) for key in ("g_off", "g_on", "levels", "level_table")}
    keys["slices"] = target.slices
    if scheme == "optimal":
        pair = Coding(scheme="balanced", **keys)
        keys["common_modes"] = StuckCell.of(target, pair, PROBABILITIES, **more).common_modes(pair)
    coding = Coding(scheme=scheme, **keys)  # type: ignore[arg-type]
    return coding, StuckCell.of(target, coding, PROBABILITIES, **more)


def chips_read(target: Target, coding: Coding, by_weight: bool, chips: int) -> npt.NDArray[np.float64]:
    """Weights that chips read, [chips, weights], from conductances alone."""
    rng = np.random.default_rng(3)
    gain = coding.gain(np.ones(1))
    cells = coding.encode(WEIGHTS, gain)
    siemens = np.repeat(coding.conductance(cells).astype(np.float64)[None, ..., 0, :], chips, axis=0)
    reach = np.cumsum([*PROBABILITIES.values()])
    u = rng.random(siemens.shape)
    if by_weight:  # one number a weight, and the cell that it hits
        count = coding.slices * coding.cells
        hit = np.arange(count)[:, None] == rng.integers(0, count, (chips, 1, siemens.shape[-1]))
        u = np.where(hit.reshape(siemens.shape), u[:, :1, :1], 1.0)
    failed = u < reach[-1]
    state = np.minimum(np.searchsorted(reach, u, "right"), len(reach) - 1)
    means, spreads = np.array([[f.mean, f.spread] for f in (target.failure(name) for name in PROBABILITIES)]).T
    value = np.maximum(rng.normal(means[state], spreads[state]), 0)
    response = target.failed_cells.response
    if response == "bounded":
        value = np.minimum(np.maximum(value, G_OFF), G_ON)
    elif response != "unbounded":
        value[:] = 0
    read = np.where(failed, value, siemens)
    if response == "isolated_pair":
        read[np.broadcast_to(failed.any(axis=2, keepdims=True), read.shape)] = 0
    if coding.integer:
        read = (read - G_OFF) * ((coding.levels - 1) / (G_ON - G_OFF))
    total = np.einsum("k,nkcw->ncw", coding.significances, read)
    return gain[0] * (total[:, 0] - (total[:, 1] if coding.cells == 2 else coding.reference))


@pytest.mark.parametrize(
    ("kind", "by_weight"),
    [(kind, False) for kind in CELLS] + [("analog", True), ("slices", True)],
)
@pytest.mark.parametrize("response", RESPONSES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_closed_forms_are_those_of_many_chips(scheme: str, kind: str, by_weight: bool, response: str) -> None:
    chips = 4_000
    target = target_of(response, kind)
    coding, stuck = coding_of(target, scheme, by_weight=by_weight)
    read = chips_read(target, coding, by_weight, chips)
    gain = coding.gain(np.ones(1))
    cells = coding.encode(WEIGHTS, gain)

    mean = (1 - stuck.loss) * coding.decode(cells, gain)[0] + gain[0] * stuck.shift(coding)
    variance = stuck.variance_of(coding, cells, gain[:, None])[0].astype(np.float64)

    np.testing.assert_allclose(read.mean(axis=0), mean, rtol=0, atol=5 * np.sqrt(variance.max() / chips))
    np.testing.assert_allclose(read.var(axis=0).sum(), variance.sum(), rtol=0.05)


@given(
    st.floats(0, 500e-6), st.floats(0.1e-6, 200e-6), st.floats(0, 300e-6), st.floats(0, 300e-6), st.floats(0.01, 0.99)
)
def test_moments_of_bounded_cells(mean: float, spread: float, one: float, other: float, p: float) -> None:
    """Beside those of a normal number, integrated between the bounds, which hold what is beyond them."""
    low, high = sorted((one, other))
    assume(high - low > 0.1e-6)
    over_formed = {"share": 1, "mean": mean, "spread": spread}
    target = target_of("bounded", low=low, high=high, over_formed=over_formed)
    coding, _ = coding_of(target, "balanced")
    stuck = StuckCell.of(target, coding, {"over_formed": p})

    normal = stats.norm(mean, spread)
    ends = [(low, normal.cdf(low)), (high, normal.sf(high))]
    nodes = np.linspace(low, high, 20_001)
    moments = [
        integrate.simpson(nodes**power * normal.pdf(nodes), x=nodes) + sum(g**power * q for g, q in ends)
        for power in (1, 2)
    ]
    assert stuck.probability == p
    assert low * (1 - 1e-9) <= stuck.mean <= high * (1 + 1e-9)
    assert stuck.mean == pytest.approx(moments[0], rel=1e-6, abs=1e-12)
    assert stuck.variance == pytest.approx(moments[1] - moments[0] ** 2, rel=1e-4, abs=1e-5 * high**2)


@pytest.mark.parametrize(
    ("kind", "response"),
    [(kind, response) for kind in CELLS for response in RESPONSES if (kind, response) != ("table", "isolated_pair")],
)
def test_no_pair_is_better_than_the_optimal_one(kind: str, response: str) -> None:
    """For every weight; of isolated pairs all are alike, but for the digits that a number is split into."""
    target = target_of(response, kind)

    def errors(scheme: str) -> npt.NDArray[np.float64]:
        coding, stuck = coding_of(target, scheme)
        gain = coding.gain(np.ones(1))
        cells = coding.encode(WEIGHTS, gain)
        return stuck.variance_of(coding, cells, gain[:, None])[0].astype(np.float64)

    best = errors("optimal")
    for scheme in ("two_column", "differential", "balanced"):
        other = errors(scheme)
        assert (best <= other * (1 + 1e-4) + 1e-9).all()
        if response == "isolated_pair" and kind in ("analog", "levels"):
            np.testing.assert_allclose(best, other, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("response", ["isolated_cell", "isolated_pair"])
def test_cells_that_are_cut_off_suit_two_columns(response: str) -> None:
    """Nothing is stuck on then: the best pair is the one of the least current."""
    target = target_of(response)
    gain = np.full(1, 1 / (G_ON - G_OFF), np.float32)
    optimal, plain = (coding_of(target, scheme)[0].encode(WEIGHTS, gain) for scheme in ("optimal", "two_column"))
    np.testing.assert_allclose(optimal, plain, rtol=1e-5)


def test_what_each_response_buys() -> None:
    """Shorts are worst; a bound keeps what is stuck within what cells are; a zero weight without a pair stays zero."""
    zero = np.zeros((1, 1), np.float32)
    error = {}
    for response in RESPONSES:
        coding, stuck = coding_of(target_of(response), "differential")
        gain = coding.gain(np.ones(1))
        error[response] = float(stuck.variance_of(coding, coding.encode(zero, gain), gain[:, None])[0, 0])
    assert error["unbounded"] > 4 * error["isolated_cell"] > 4 * error["bounded"] > error["isolated_pair"] == 0


def test_categories_are_named_in_order() -> None:
    assert tuple(target_of().failed_cells.categories) == CATEGORIES
    assert target_of().failed_cells.unformed == Category(share=3, mean=0.5e-6, spread=0.5e-6)
