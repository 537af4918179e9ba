"""Drawn faults: as many as asked for by every distribution, where they belong, and the same at every rate."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from rerampile import Target
from rerampile.errors import ConfigError
from rerampile.runtime.fault_map import STUCK_OFF, STUCK_ON, ChipGeometry, FaultMap
from rerampile.runtime.faults import DISTRIBUTIONS, FaultModel, draw_faults
from rerampile.target import Cell, Stuck

TARGET = Target(name="small", rows=32, columns=24, cell=Cell(g_off=1e-6, g_on=100e-6))
MODELS = [(distribution, "cell") for distribution in DISTRIBUTIONS] + [("independent", "weight"), ("array", "weight")]
SURE = 1e-6  # smallest probability of a right result to look as it does; the seeds are fixed


def chip(arrays: int = 40, rows: int = 32, columns: int = 24, width: int = 2, twins: bool = False) -> ChipGeometry:
    ids = np.arange(arrays)
    roles = 2 if width % 2 == 0 and not twins else 1
    return ChipGeometry(
        arrays=arrays,
        rows=rows,
        columns=columns,
        width=np.full(arrays, width),
        twin=ids ^ 1 if twins else ids,
        roles=np.full(arrays, roles),
    )


def draw(geometry: ChipGeometry, model: FaultModel, run: int = 0, target: Target = TARGET) -> FaultMap:
    return draw_faults(geometry, model, target, seed=5, run=run)


def sure_mean(values: npt.NDArray[Any], expected: float) -> bool:
    """Whether independent values may well have that mean, by their own spread."""
    error = values.std(ddof=1) / np.sqrt(len(values))
    return bool(abs(values.mean() - expected) < 4.9 * error + 1e-12)


@pytest.mark.parametrize(("off", "on"), [(0.002, 0.0104), (0.03, 0), (0, 0.06), (0.1, 0.2), (0.6, 0.15)])
@pytest.mark.parametrize(("distribution", "unit"), MODELS)
def test_observed_fractions_are_the_asked_ones(distribution: str, unit: str, off: float, on: float) -> None:
    """Of each state, over chips; exactly binomial where cells are independent."""
    geometry = chip()
    model = FaultModel(stuck_off=off, stuck_on=on, distribution=distribution, rate_unit=unit)
    chips = [draw(geometry, model, run) for run in range(60)]
    sites = geometry.cells // (2 if unit == "weight" else 1)

    for state, p in ((STUCK_OFF, off), (STUCK_ON, on)):
        found = np.array([np.count_nonzero(c.state == state) for c in chips])
        assert sure_mean(found / sites, p)
        if distribution == "independent":
            assert stats.binomtest(int(found.sum()), sites * len(chips), p).pvalue > SURE
    assert [c.stuck_off + c.stuck_on for c in chips] == [len(c) for c in chips]


@pytest.mark.parametrize(("distribution", "unit"), MODELS)
def test_every_cell_is_as_likely(distribution: str, unit: str) -> None:
    """Borders as the middle, the first array as the last, the first cell of a weight as the others."""
    geometry = chip(arrays=8, rows=7, columns=12, width=3)
    model = FaultModel.of_rate(0.1, distribution=distribution, rate_unit=unit)
    hit = np.zeros((300, geometry.cells), np.float32)
    for run in range(len(hit)):
        hit[run, draw(geometry, model, run).cell] = 1
    hit = hit.reshape(-1, 8, 7, 12)

    rate = 0.1 / 3 if unit == "weight" else 0.1
    for part in (hit[:, 0], hit[:, -1], hit[:, :, 0], hit[:, :, -1], hit[..., 0], hit[..., 1], hit[..., 11]):
        assert sure_mean(part.reshape(len(hit), -1).mean(axis=1), rate)


@pytest.mark.parametrize(("distribution", "unit"), MODELS)
def test_a_cell_is_stuck_once(distribution: str, unit: str) -> None:
    model = FaultModel(stuck_off=0.2, stuck_on=0.3, distribution=distribution, rate_unit=unit)

    faults = draw(chip(twins=True), model)

    assert (np.diff(faults.cell) > 0).all()
    assert faults.cell[0] >= 0
    assert faults.cell[-1] < chip().cells
    assert set(np.unique(faults.state)) == {STUCK_OFF, STUCK_ON}
    assert len(faults) == len(faults.state) == len(faults.conductance)
    assert (faults.cell.dtype, faults.state.dtype, faults.conductance.dtype) == (np.int64, np.uint8, np.float32)


@pytest.mark.parametrize(("distribution", "unit"), MODELS)
def test_higher_rates_keep_the_faults_of_lower_ones(distribution: str, unit: str) -> None:
    """With their states and their values."""
    cell = Cell(g_off=1e-6, g_on=1e-4, stuck_off={"spread": 1e-7}, stuck_on={"spread": 1e-5})  # type: ignore[arg-type]
    target = Target(name="spread", rows=32, columns=24, cell=cell)
    rates = (0.0, 0.001, 0.004, 0.005, 0.02, 0.1, 0.3, 0.7)
    models = [FaultModel.of_rate(rate, distribution=distribution, rate_unit=unit) for rate in rates]
    chips = [draw(chip(), model, 3, target) for model in models]

    assert 0 == len(chips[0]) < len(chips[4]) < len(chips[5]) < len(chips[6]) < len(chips[7])
    for lower, higher in itertools.pairwise(chips):
        assert len(higher) >= len(lower)
        at = np.searchsorted(higher.cell, lower.cell)
        np.testing.assert_array_equal(higher.cell[at], lower.cell)
        np.testing.assert_array_equal(higher.state[at], lower.state)
        np.testing.assert_array_equal(higher.conductance[at], lower.conductance)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_same_chips_serve_every_mapping(distribution: str) -> None:
    """What takes more arrays, or more columns a weight, meets the same faults where both have cells."""
    model = FaultModel.of_rate(0.05, distribution=distribution)
    pairs, single, twins = (draw(g, model) for g in (chip(40), chip(22, width=1), chip(40, width=1, twins=True)))

    np.testing.assert_array_equal(pairs.cell, twins.cell)
    np.testing.assert_array_equal(pairs.state, twins.state)
    common = pairs.cell < chip(22).cells
    np.testing.assert_array_equal(pairs.cell[common], single.cell)
    np.testing.assert_array_equal(pairs.state[common], single.state)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_chips_differ_by_run_and_seed_alone(distribution: str) -> None:
    model = FaultModel.of_rate(0.05, distribution=distribution)
    one, again, other = (draw(chip(), model, run) for run in (4, 4, 5))
    seed = draw_faults(chip(), model, TARGET, seed=6, run=4)

    np.testing.assert_array_equal(one.cell, again.cell)
    assert not np.array_equal(one.cell, other.cell)
    assert not np.array_equal(one.cell, seed.cell)


@pytest.mark.parametrize(("width", "twins"), [(1, False), (2, False), (1, True), (3, True), (5, False)])
def test_a_weight_has_one_stuck_cell_and_each_is_as_likely(width: int, twins: bool) -> None:
    """Of all slices and both roles, which for twins lie on two arrays; columns that no weight fits in stay whole."""
    geometry = chip(width=width, twins=twins)
    faults = draw(geometry, FaultModel(stuck_off=0.2, stuck_on=0.2, rate_unit="weight"))
    array, row, column = geometry.locate(faults.cell)

    slots = 24 // width
    assert column.max() < slots * width
    first = np.minimum(array, geometry.twin[array])
    weight = (first * 32 + row) * slots + column // width
    assert len(np.unique(weight)) == len(weight)
    weights = 40 // (2 if twins else 1) * 32 * slots
    assert stats.binomtest(len(weight), weights, 0.4).pvalue > SURE
    part = column % width + np.where(array == first, 0, width)
    counts = np.bincount(part, minlength=width * (2 if twins else 1))
    assert len(counts) == width * (2 if twins else 1)
    if len(counts) > 1:
        assert stats.chisquare(counts).pvalue > SURE


def test_lines_are_whole_and_many_come_in_twos() -> None:
    geometry = chip(arrays=400)
    faults = draw(geometry, FaultModel.of_rate(0.02, distribution="line"))
    state = np.zeros(geometry.cells, np.uint8)
    state[faults.cell] = faults.state
    lines = state.reshape(400, 32, 24)

    assert (lines == lines[:, :1]).all()
    hit = lines[:, 0] > 0
    alone = hit & ~np.roll(hit, 1, axis=1) & ~np.roll(hit, -1, axis=1)
    # Two thirds of the struck lines belong to an event that takes two.
    assert 0.2 < alone.sum() / hit.sum() < 0.45


def test_clusters_are_close_together_and_of_one_state() -> None:
    geometry = chip(arrays=400)
    faults = draw(geometry, FaultModel(stuck_off=0.001, stuck_on=0.001, distribution="cluster"))
    state = np.zeros(geometry.cells, np.int8)
    state[faults.cell] = faults.state
    cells = state.reshape(400, 32, 24)

    below = np.roll(cells, 1, axis=1)
    neighbours = (cells > 0) & (below > 0)
    assert neighbours.sum() > 0.2 * (cells > 0).sum()  # 0.002 of them if cells were independent
    assert (cells == below)[neighbours].mean() > 0.95
    far = np.roll(cells, 16, axis=1)
    assert ((cells > 0) & (far > 0)).sum() < 0.02 * (cells > 0).sum()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 30), (3, 2), (64, 64)])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_small_arrays_have_their_rate_too(distribution: str, rows: int, columns: int) -> None:
    """Where clusters and neighbours reach around the edges."""
    geometry = chip(arrays=max(1, 60_000 // (rows * columns)), rows=rows, columns=columns)
    model = FaultModel(stuck_off=0.05, stuck_on=0.1, distribution=distribution)
    rates = np.array([len(draw(geometry, model, run)) / geometry.cells for run in range(30)])
    assert sure_mean(rates, 0.15)


def test_arrays_differ_in_their_rate() -> None:
    """Beta of shape 2 and the asked mean: its quantiles, after the binomial spread of the cells."""
    geometry = chip(arrays=2000, rows=64, columns=64)
    faults = draw(geometry, FaultModel.of_rate(0.05, distribution="array"))

    rates = np.bincount(geometry.locate(faults.cell)[0], minlength=2000) / 64**2

    assert stats.kstest(rates, stats.beta(2, 2 * 0.95 / 0.05).cdf).pvalue > 1e-3


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_all_cells_and_no_cells(distribution: str) -> None:
    geometry = chip(4)
    assert len(draw(geometry, FaultModel.of_rate(0, distribution=distribution))) == 0
    assert len(draw(chip(0), FaultModel.of_rate(0.1, distribution=distribution))) == 0
    if distribution != "cluster":
        assert len(draw(geometry, FaultModel.of_rate(1, distribution=distribution))) == geometry.cells


def test_stuck_cells_take_the_ends_of_the_range() -> None:
    faults = draw(chip(), FaultModel(stuck_off=0.1, stuck_on=0.1))
    np.testing.assert_array_equal(faults.conductance[faults.state == STUCK_OFF], np.float32(1e-6))
    np.testing.assert_array_equal(faults.conductance[faults.state == STUCK_ON], np.float32(100e-6))


def test_stuck_cells_spread_as_the_target_says() -> None:
    """Normal around the mean, and never below nothing at all."""
    cell = Cell(g_off=5e-6, g_on=1e-4, stuck_off=Stuck(mean=1e-6, spread=2e-6), stuck_on=Stuck(mean=3e-4, spread=5e-5))
    faults = draw(
        chip(), FaultModel(stuck_off=0.2, stuck_on=0.2), target=Target(name="x", rows=32, columns=24, cell=cell)
    )

    on, off = (faults.conductance[faults.state == state].astype(np.float64) for state in (STUCK_ON, STUCK_OFF))
    assert stats.kstest(on, stats.norm(3e-4, 5e-5).cdf).pvalue > 1e-3
    assert off.min() == 0
    above = off[off > 0]
    assert stats.binomtest(len(above), len(off), stats.norm.sf(-0.5)).pvalue > 1e-3
    assert stats.kstest(above, stats.truncnorm(-0.5, np.inf, 1e-6, 2e-6).cdf).pvalue > 1e-3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FaultModel(stuck_off=-0.1, stuck_on=0), "--stuck-off -0.1: expected a probability from 0 to 1"),
        (lambda: FaultModel(stuck_off=0, stuck_on=float("nan")), "--stuck-on nan: expected a probability from 0 to 1"),
        (lambda: FaultModel(stuck_off=0.6, stuck_on=0.5), "expected a sum of at most 1, got 1.1"),
        (lambda: FaultModel.of_rate(1.5), "--failure-rate 1.5: expected a fraction from 0 to 1"),
        (lambda: FaultModel.of_rate(0.1, (0, 0)), "--off-on 0:0: expected two numbers of 0 or more, not both 0"),
        (lambda: FaultModel.of_rate(0.1, (-1, 2)), "--off-on -1:2: expected two numbers"),
        (lambda: FaultModel.of_rate(0.1, (1, float("inf"))), "--off-on 1:inf: expected two numbers"),
        (
            lambda: FaultModel.of_rate(0.1, distribution="lines"),
            "--distribution lines: expected one of independent, line, cluster, array",
        ),
        (lambda: FaultModel.of_rate(0.1, rate_unit="pair"), "--rate-unit pair: expected one of cell, weight"),
        (
            lambda: FaultModel.of_rate(0.1, rate_unit="weight", distribution="line"),
            "--rate-unit weight: a line is made of cells; use --rate-unit cell",
        ),
        (lambda: FaultModel.of_rate(1, distribution="cluster"), "clusters cover at most 0.9997"),
    ],
)
def test_what_is_no_fault_model(make: Callable[[], FaultModel], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_default_ratio() -> None:
    model = FaultModel.of_rate(0.0062)
    assert (model.stuck_off, model.stuck_on) == pytest.approx((0.001, 0.0052))
    assert FaultModel.of_rate(1.0).rate == pytest.approx(1)
