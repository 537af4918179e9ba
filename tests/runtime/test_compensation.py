"""Healthy cells make up for stuck ones: against brute force, and exactly where theory says so."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerampile.runtime.compensation import HitWeights, compensated
from rerampile.schemes import SCHEMES, Coding

G_OFF, G_ON = 1e-6, 100e-6
TABLE = (1e-6, 20e-6, 37e-6, 100e-6)


def coding_of(scheme: Any, **more: Any) -> Coding:
    middle = 1.5 if more.get("levels") and not more.get("level_table") else 50e-6
    aims = (middle,) * more.get("slices", 1) if scheme == "optimal" else None
    return Coding(scheme=scheme, g_off=G_OFF, g_on=G_ON, common_modes=aims, **more)


def hit(coding: Coding, stuck: np.ndarray, siemens: np.ndarray) -> HitWeights:
    count = stuck.shape[-1]
    worth = np.where(stuck, coding.worth(siemens.astype(np.float32)), 0).astype(np.float32)
    return HitWeights(index=np.arange(count), segment=np.zeros(count, np.int64), stuck=stuck, worth=worth)


def encoded(coding: Coding, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cells [slices, cells, weights] of weights from -1 to 1, and their differences."""
    gain = coding.gain(np.ones(1))
    cells = coding.encode(weights[None].astype(np.float32), gain)[:, :, 0]
    return cells, coding.difference(cells)


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s != "offset"])
@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("on", [False, True])
def test_one_stuck_cell_of_an_analog_pair(scheme: str, plus: bool, on: bool) -> None:
    """Exact for one sign of the weights, zero for the other: plus on and minus off serve those above zero."""
    coding = coding_of(scheme)
    weights = np.linspace(-1, 1, 201)
    cells, wanted = encoded(coding, weights)
    stuck = np.zeros(cells.shape, np.bool_)
    stuck[0, 0 if plus else 1] = True
    faults = hit(coding, stuck, np.full(cells.shape, G_ON if on else G_OFF))
    found = faults.difference(coding, compensated(coding, faults, cells, wanted)) / coding.span
    serves = weights >= -1e-9 if plus == on else weights <= 1e-9
    np.testing.assert_allclose(found[serves], weights[serves], atol=3e-7)
    np.testing.assert_allclose(found[~serves], 0, atol=3e-7)


@pytest.mark.parametrize(
    "more",
    [{}, {"levels": 4}, {"levels": 16, "slices": 2}, {"levels": 4, "level_table": TABLE}],
    ids=["analog", "levels", "slices", "table"],
)
@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s != "offset"])
def test_a_zero_weight_is_exactly_zero_under_any_single_fault(scheme: str, more: dict[str, Any]) -> None:
    coding = coding_of(scheme, **more)
    cells, wanted = encoded(coding, np.zeros(1))
    for k, c, g in itertools.product(range(coding.slices), range(2), (G_OFF, G_ON)):
        stuck = np.zeros(cells.shape, np.bool_)
        stuck[k, c] = True
        faults = hit(coding, stuck, np.full(cells.shape, g))
        assert faults.difference(coding, compensated(coding, faults, cells, wanted)).tolist() == [0]


@given(
    number=st.integers(-3, 3),
    states=st.lists(st.sampled_from(["healthy", "off", "on", "between", "outside"]), min_size=2, max_size=2),
    scheme=st.sampled_from(SCHEMES),
    table=st.booleans(),
)
def test_no_other_targets_come_nearer(number: int, states: list[str], scheme: str, table: bool) -> None:
    """With one slice, brute force over all levels of the healthy cells finds nothing better."""
    coding = coding_of(scheme, levels=4, level_table=TABLE if table else None)
    cells, wanted = encoded(coding, np.array([number / 3]))
    stuck = np.array([s != "healthy" for s in states[: coding.cells]])[None, :, None]
    at = {"healthy": G_OFF, "off": G_OFF, "on": G_ON, "between": 41e-6, "outside": 140e-6}
    faults = hit(coding, stuck, np.array([at[s] for s in states[: coding.cells]])[None, :, None])
    if not stuck.any():
        return
    best = min(
        abs(float(faults.difference(coding, np.array(codes, coding.dtype)[None, :, None])[0] - wanted[0]))
        for codes in itertools.product(range(4), repeat=coding.cells)
    )
    found = faults.difference(coding, compensated(coding, faults, cells, wanted))
    assert abs(float(found[0] - wanted[0])) <= best * (1 + 1e-6) + 1e-12


def test_slices_make_up_for_each_other() -> None:
    """A stuck digit is made good by the others of both cells, never worse than as compiled; brute force is close."""
    coding, rng = coding_of("differential", levels=4, slices=2), np.random.default_rng(0)
    cells, wanted = encoded(coding, rng.uniform(-1, 1, 40))
    stuck = rng.random(cells.shape) < 0.3
    faults = hit(coding, stuck, np.where(rng.random(cells.shape) < 0.5, G_ON, G_OFF))
    error = np.abs(faults.difference(coding, compensated(coding, faults, cells, wanted)) - wanted)
    before = np.abs(faults.difference(coding, cells) - wanted)
    assert (error <= before).all()
    every = np.array(list(itertools.product(range(4), repeat=4)), np.uint8).T.reshape(2, 2, -1, 1)
    values = np.where(stuck[:, :, None], faults.worth[:, :, None], every.astype(np.float32))
    best = np.abs(coding.combine(values) - wanted).min(axis=0)
    assert (error <= best + 1e-6).mean() > 0.9


def test_mean_squared_error_of_compensated_pairs() -> None:
    """p m**2 + 2 p0 p1 with full scale 1: a weight m whose cells are stuck off with p0, on with p1, p in all."""
    coding, rng, off, on = coding_of("two_column"), np.random.default_rng(1), 0.03, 0.06
    weights = rng.normal(0, 0.2, 400_000).clip(-1, 1)
    cells, wanted = encoded(coding, weights)
    u = rng.random(cells.shape)
    faults = hit(coding, (u < off) | (u >= 1 - on), np.where(u < off, G_OFF, G_ON))
    found = faults.difference(coding, compensated(coding, faults, cells, wanted)) / coding.span
    square = np.square(found - weights)
    p = off + on
    expected = p * np.square(weights).mean() + 2 * off * on
    # second order: both stuck at the same end is zero, at different ends plus or minus one
    assert abs(square.mean() - expected) < 5 * square.std() / len(weights) ** 0.5 + p * p * np.square(weights).mean()
