"""Weights to cells and back: every scheme, analog, levels, slices and measured tables."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rerampile.schemes import SCHEMES, Coding

G_OFF, G_ON = 1e-6, 100e-6
SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9)

# Ordinary, denormal, tiny and huge weights, and many zeros. Above 2**113 a gain in siemens leaves float32.
WEIGHTS = st.one_of(
    st.just(0.0),
    st.floats(-1, 1, width=32),
    st.floats(-(2.0**100), 2.0**100, width=32),
    st.floats(-(2.0**-126), 2.0**-126, width=32),
)


def aims(ends: tuple[float, float], steps: int | None, slices: int) -> st.SearchStrategy[tuple[float, ...]]:
    """Common modes inside and outside the range of a cell: siemens, or codes up to ``steps``."""
    low, high = ends if steps is None else (0, steps)
    inside = st.floats(-0.5, 1.5) | st.sampled_from([-1e12, 0.5, 1e12])
    return st.lists(inside.map(lambda x: low + x * (high - low)), min_size=slices, max_size=slices).map(tuple)


@st.composite
def codings(draw: st.DrawFn) -> Coding:
    scheme = draw(st.sampled_from(SCHEMES))
    kind = draw(st.sampled_from(["analog", "uniform", "table"]))
    if kind == "analog":
        g_off, g_on = draw(st.sampled_from([(G_OFF, G_ON), (0.0, 1e-3), (9e-5, 1e-4), (1e-9, 5.0)]))
        common_modes = draw(aims((g_off, g_on), None, 1)) if scheme == "optimal" else None
        return Coding(scheme=scheme, g_off=g_off, g_on=g_on, common_modes=common_modes)
    levels = draw(st.integers(2, 9) | st.sampled_from([16, 255, 256, 257]))
    slices = draw(st.integers(1, 3 if levels < 16 else 1))
    table = None
    if kind == "table":
        levels = min(levels, 9)
        steps = draw(st.lists(st.floats(0.05, 1.0), min_size=levels - 1, max_size=levels - 1))
        edges = np.concatenate([[0.0], np.cumsum(steps) / np.sum(steps)])
        table = tuple(float(g) for g in G_OFF + (G_ON - G_OFF) * edges)
    ends = (G_OFF, G_ON) if table is None else (table[0], table[-1])
    coding = Coding(
        scheme=scheme,
        g_off=ends[0],
        g_on=ends[1],
        levels=levels,
        level_table=table,
        slices=slices,
        common_modes=draw(aims(ends, levels - 1 if table is None else None, slices)) if scheme == "optimal" else None,
    )
    assume(coding.span > 0)  # one cell of two levels holds no offset; the compiler refuses it
    return coding


def coding_of(scheme: str, slices: int = 1, aim: float = 0.8, **keys: Any) -> Coding:
    """A coding between G_OFF and G_ON; for ``optimal`` the pairs of every slice lie around ``aim`` of the range."""
    low, high = (0, keys["levels"] - 1) if "levels" in keys else (G_OFF, G_ON)
    common_modes = (low + aim * (high - low),) * slices if scheme == "optimal" else None
    return Coding(scheme=scheme, g_off=G_OFF, g_on=G_ON, slices=slices, common_modes=common_modes, **keys)


def gain_of(coding: Coding, weights: npt.NDArray[np.float32], by_channel: bool) -> npt.NDArray[np.float32]:
    magnitude = np.abs(weights).max(axis=1)
    return coding.gain(magnitude if by_channel else np.full_like(magnitude, magnitude.max()))


@given(codings(), hnp.arrays(np.float32, SHAPES, elements=WEIGHTS), st.booleans())
def test_round_trip(coding: Coding, weights: npt.NDArray[np.float32], by_channel: bool) -> None:
    gain = gain_of(coding, weights, by_channel)

    cells = coding.encode(weights, gain)
    decoded = coding.decode(cells, gain)

    assert cells.shape == (coding.slices, coding.cells, *weights.shape)
    assert cells.dtype == coding.dtype
    low, high = (np.float32(coding.g_off), np.float32(coding.g_on)) if coding.levels is None else (0, coding.levels - 1)
    assert cells.min() >= low
    assert cells.max() <= high
    assert (np.abs(decoded.astype(np.float64) - weights) <= coding.error_bound(gain)[:, None]).all()
    assert not decoded[weights == 0].any()
    assert (np.sign(decoded) * np.sign(weights) >= 0).all()


@given(codings(), hnp.arrays(np.float32, SHAPES, elements=WEIGHTS))
def test_what_cells_hold_is_held_exactly(coding: Coding, weights: npt.NDArray[np.float32]) -> None:
    """Weights that already are values of the cells decode to themselves, up to float32 rounding of the gain."""
    gain = gain_of(coding, weights, True)
    held = coding.decode(coding.encode(weights, gain), gain)

    again = coding.decode(coding.encode(held, gain), gain)

    if coding.integer and (gain > 1e-30).all():
        np.testing.assert_array_equal(again, held)
    else:
        np.testing.assert_allclose(again, held, rtol=0, atol=float(coding.error_bound(gain).max()))


@given(
    st.sampled_from(SCHEMES),
    hnp.arrays(np.float32, SHAPES, elements=st.floats(-1, 1, width=32)),
)
def test_analog_cells_follow_the_published_equations(scheme: str, u: npt.NDArray[np.float32]) -> None:
    """Yuan et al. 2021, and the pairs between theirs: the conductance of each cell, from the weight, normalised."""
    coding = coding_of(scheme)
    common = np.clip(0.8, np.abs(u) / 2, 1 - np.abs(u) / 2)
    equations = {
        "two_column": (np.maximum(u, 0), np.maximum(-u, 0)),
        "differential": (1 - np.maximum(-u, 0), 1 - np.maximum(u, 0)),
        "balanced": ((1 + u) / 2, (1 - u) / 2),
        "offset": ((1 + u) / 2,),
        "optimal": (common + u / 2, common - u / 2),
    }

    cells = coding.encode(u, coding.gain(np.ones(len(u))))

    normalised = (cells[0].astype(np.float64) - G_OFF) / (G_ON - G_OFF)
    for cell, expected in zip(normalised, equations[scheme], strict=True):
        np.testing.assert_allclose(cell, expected, rtol=0, atol=3e-7)


@pytest.mark.parametrize("levels", [2, 3, 4, 16, 256])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_uniform_levels_take_the_nearest_step(scheme: str, levels: int) -> None:
    """One weight for each half step: the codes are those of the equations, halves going to the even difference."""
    coding = coding_of(scheme, levels=levels)
    n = levels - 1
    reach = n // 2 if scheme == "offset" else n  # offset's zero sits at step (n + 1) // 2
    steps = np.round(np.linspace(-reach, reach, 4 * reach + 1))[None, :].astype(int)
    zero = (n + 1) // 2

    cells = coding.encode(np.linspace(-reach, reach, 4 * reach + 1, dtype=np.float32)[None, :], np.ones(1, np.float32))

    lower = np.clip(np.rint(0.8 * n - np.abs(steps) / 2), 0, n - np.abs(steps)).astype(int)
    expected = {
        "two_column": [np.maximum(steps, 0), np.maximum(-steps, 0)],
        "differential": [n - np.maximum(-steps, 0), n - np.maximum(steps, 0)],
        "balanced": [(n + steps) // 2, (n + steps) // 2 - steps],
        "offset": [steps + zero],
        "optimal": [lower + np.maximum(steps, 0), lower + np.maximum(-steps, 0)],
    }
    np.testing.assert_array_equal(cells[0], expected[scheme])


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "optimal"])
def test_slices_are_digits_least_significant_first(scheme: str) -> None:
    sliced = Coding(scheme=scheme, g_off=G_OFF, g_on=G_ON, levels=4, slices=3)
    whole = Coding(scheme=scheme, g_off=G_OFF, g_on=G_ON, levels=64)
    weights, one = np.linspace(-31, 31, 63, dtype=np.float32)[None, :], np.ones(1, np.float32)

    digits = sliced.encode(weights, one)

    assert sliced.significances == (1.0, 4.0, 16.0)
    np.testing.assert_array_equal(digits[0] + 4 * digits[1] + 16 * digits[2], whole.encode(weights, one)[0])


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("scheme", ["two_column", "differential"])
def test_a_measured_table_takes_the_nearest_value(scheme: str, slices: int) -> None:
    """Against trying every combination of levels."""
    table = (1e-6, 20e-6, 37e-6, 100e-6)
    coding = Coding(scheme=scheme, g_off=table[0], g_on=table[-1], levels=4, level_table=table, slices=slices)
    weights = np.random.default_rng(5).uniform(-1, 1, (1, 200)).astype(np.float32)
    gain = coding.gain(np.ones(1))

    cells = coding.encode(weights, gain)

    significance = np.array(coding.significances)
    assert significance.sum() == pytest.approx(1)
    values = np.array([significance @ combination for combination in itertools.product(table, repeat=slices)])
    aim = np.abs(weights[0]) * (table[-1] - table[0])
    target = table[0] + aim if scheme == "two_column" else table[-1] - aim
    cell = np.where(weights[0] > 0, 0, 1) if scheme == "two_column" else np.where(weights[0] > 0, 1, 0)
    found = significance @ np.array(table)[cells][:, cell, 0, np.arange(200)]
    np.testing.assert_allclose(np.abs(found - target), np.abs(values[:, None] - target).min(axis=0), atol=1e-11)


@given(codings())
def test_zero_cells_are_a_zero_weight(coding: Coding) -> None:
    cells = coding.zero_cells[:, :, None, None]
    assert cells.shape == (coding.slices, coding.cells, 1, 1)
    assert coding.decode(cells, np.full(1, 7, np.float32)) == 0
    normalised = {"two_column": 0.0, "differential": 1.0}.get(coding.scheme)
    if normalised is not None:
        expected = np.float32(coding.g_on if normalised else coding.g_off)
        np.testing.assert_allclose(coding.conductance(cells).ravel(), expected, rtol=1e-6)


@given(codings())
def test_conductance_spans_the_cell(coding: Coding) -> None:
    ends = np.array([coding.g_off, coding.g_on]) if coding.levels is None else np.array([0, coding.levels - 1])
    np.testing.assert_allclose(
        coding.conductance(ends.astype(coding.dtype)), [coding.g_off, coding.g_on], rtol=1e-6, atol=0
    )


@given(st.sampled_from(SCHEMES), st.integers(2, 16), st.integers(1, 3), st.integers(-300, 300), st.integers(-300, 300))
def test_holds_integers(scheme: str, levels: int, slices: int, a: int, b: int) -> None:
    """It says yes exactly where a gain of one gives every whole number back."""
    coding = coding_of(scheme, slices, levels=levels)
    weights, one = np.array([[a, b]], np.float32), np.ones(1, np.float32)
    exact = np.array_equal(coding.decode(coding.encode(weights, one), one), weights)
    assert coding.holds_integers(min(a, b), max(a, b)) == exact


def test_only_uniform_levels_hold_integers() -> None:
    table = (0.0, 1e-6, 3e-6)
    assert not Coding(scheme="offset", g_off=0, g_on=1e-6).holds_integers(0, 0)
    assert not Coding(scheme="offset", g_off=0, g_on=3e-6, levels=3, level_table=table).holds_integers(0, 0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_sided_weights_use_the_whole_range(scheme: str) -> None:
    coding = coding_of(scheme)
    cells = coding.encode(np.array([[0.25, 1.0]], np.float32), coding.gain(np.ones(1)))[0]
    np.testing.assert_allclose(cells[:, 0, 1], [G_ON, G_OFF][: coding.cells], rtol=1e-6)


def test_more_weights_than_one_chunk() -> None:
    """Rows are coded in chunks; where one ends nothing may change."""
    coding = Coding(scheme="balanced", g_off=G_OFF, g_on=G_ON, levels=16)
    weights = np.random.default_rng(0).uniform(-1, 1, (300, 700)).astype(np.float32)
    gain = gain_of(coding, weights, True)
    cells = coding.encode(weights, gain)
    rows = np.concatenate([coding.encode(weights[i : i + 1], gain[i : i + 1]) for i in range(300)], axis=2)
    np.testing.assert_array_equal(cells, rows)


def test_analog_cells_have_no_steps() -> None:
    with pytest.raises(ValueError, match="analog cells have no steps"):
        Coding(scheme="offset", g_off=0, g_on=1).steps  # noqa: B018 (reading it is the test)


def test_common_modes_are_for_optimal_alone() -> None:
    with pytest.raises(ValueError, match=r"optimal: common modes \(0.5,\), expected 2"):
        Coding(scheme="optimal", g_off=0, g_on=1, levels=2, slices=2, common_modes=(0.5,))
    with pytest.raises(ValueError, match=r"balanced: common modes \(0.5,\), expected 0"):
        Coding(scheme="balanced", g_off=0, g_on=1, common_modes=(0.5,))


def test_too_many_measured_combinations() -> None:
    table = tuple(float(g) for g in np.linspace(0, 1e-4, 16))
    coding = Coding(scheme="offset", g_off=0, g_on=1e-4, levels=16, level_table=table, slices=5)
    with pytest.raises(ValueError, match="1048576 combinations of measured levels, more than 65536"):
        coding.encode(np.zeros((1, 1), np.float32), np.ones(1, np.float32))
