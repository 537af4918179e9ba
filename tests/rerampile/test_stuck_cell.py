"""What stuck cells do to weights: closed forms beside Monte Carlo, and the pairs for which they are least."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerampile.schemes import SCHEMES, Coding
from rerampile.stuck_cell import StuckCell
from rerampile.target import Cell, Stuck, Target

G_OFF, G_ON = 1e-6, 100e-6
OUTSIDE = {"stuck_off": Stuck(mean=0.5e-6, spread=0.4e-6), "stuck_on": Stuck(mean=170e-6, spread=30e-6)}
TABLE = (1e-6, 20e-6, 37e-6, 100e-6)
CELLS = {
    "analog": (Cell(g_off=G_OFF, g_on=G_ON), 1),
    "outside": (Cell(g_off=G_OFF, g_on=G_ON, **OUTSIDE), 1),
    "levels": (Cell(g_off=G_OFF, g_on=G_ON, levels=16, **OUTSIDE), 1),
    "slices": (Cell(g_off=G_OFF, g_on=G_ON, levels=4), 3),
    "wide slices": (Cell(g_off=G_OFF, g_on=G_ON, levels=8), 2),
    "table": (Cell(g_off=G_OFF, g_on=G_ON, levels=4, level_table=TABLE), 2),
}
WEIGHTS = np.linspace(-1, 1, 41, dtype=np.float32)[None]


def coding_of(kind: str, scheme: str, off: float, on: float, current_weight: float = 0.0) -> tuple[Coding, StuckCell]:
    """A coding, for ``optimal`` around what suits the probabilities, and how its cells fail."""
    cell, slices = CELLS[kind]
    target = Target(name="cells", rows=8, columns=8, slices=slices, cell=cell)
    keys: dict[str, Any] = {key: getattr(cell, key) for key in ("g_off", "g_on", "levels", "level_table")}
    keys["slices"] = slices
    pair = Coding(scheme="balanced", **keys)
    stuck = StuckCell.of(target, pair, {"stuck_off": off, "stuck_on": on})
    if scheme == "optimal":
        return Coding(scheme="optimal", common_modes=stuck.common_modes(pair, current_weight), **keys), stuck
    coding = Coding(scheme=scheme, **keys)
    return coding, StuckCell.of(target, coding, {"stuck_off": off, "stuck_on": on})


def encoded(coding: Coding) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
    gain = coding.gain(np.ones(1))
    return coding.encode(WEIGHTS, gain), gain


def variance(coding: Coding, stuck: StuckCell) -> npt.NDArray[np.float64]:
    """Of the weights, in squared full scales."""
    cells, gain = encoded(coding)
    return stuck.variance_of(coding, cells, gain[:, None])[0].astype(np.float64)


def monte_carlo(kind: str, coding: Coding, off: float, on: float, chips: int) -> npt.NDArray[np.float64]:
    """Weights that chips read, [chips, weights], from conductances alone."""
    cell, _ = CELLS[kind]
    rng = np.random.default_rng(3)
    cells, gain = encoded(coding)
    siemens = np.broadcast_to(coding.conductance(cells).astype(np.float64)[..., 0, :], (chips, *cells.shape[:2], 41))
    u = rng.random(siemens.shape)
    values = {
        key: np.maximum(rng.normal(getattr(cell, key).mean, getattr(cell, key).spread, siemens.shape), 0)
        for key in ("stuck_off", "stuck_on")
    }
    read = np.where(u < off, values["stuck_off"], np.where(u >= 1 - on, values["stuck_on"], siemens))
    if coding.integer:
        read = (read - G_OFF) * ((coding.levels - 1) / (G_ON - G_OFF))
    total = np.einsum("k,nkcw->ncw", coding.significances, read)
    return gain[0] * (total[:, 0] - (total[:, 1] if coding.cells == 2 else coding.reference))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", CELLS)
def test_closed_forms_are_those_of_many_chips(kind: str, scheme: str) -> None:
    off, on, chips = 0.03, 0.09, 8_000
    coding, stuck = coding_of(kind, scheme, off, on)
    read = monte_carlo(kind, coding, off, on, chips)
    cells, gain = encoded(coding)
    decoded = coding.decode(cells, gain)[0]
    expected = (1 - stuck.probability) * decoded + gain[0] * stuck.shift(coding)
    predicted = variance(coding, stuck)
    np.testing.assert_allclose(read.mean(axis=0), expected, rtol=0, atol=5 * np.sqrt(predicted.max() / chips))
    np.testing.assert_allclose(read.var(axis=0).sum(), predicted.sum(), rtol=0.02)


@given(st.floats(1e-4, 0.4), st.floats(1e-4, 0.4), st.sampled_from(["two_column", "differential", "balanced"]))
def test_the_published_special_cases(off: float, on: float, scheme: str) -> None:
    """Binary stuck values: the expected squared error of a weight of magnitude m, by hand."""
    p, m = off + on, np.abs(WEIGHTS[0].astype(np.float64))
    coding, stuck = coding_of("analog", scheme, off, on)
    found = variance(coding, stuck) + (p * m) ** 2
    common = {"two_column": m / 2, "differential": 1 - m / 2, "balanced": np.full_like(m, 0.5)}[scheme]
    expected = 2 * p * (1 - p) * (common - on / p) ** 2 + 2 * off * on / p + p * (1 + p) * m**2 / 2
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    if scheme == "two_column":
        np.testing.assert_allclose(expected, p * m**2 + 2 * on * (1 - on) - 2 * on * (1 - p) * m, atol=1e-12)


@given(st.floats(1e-9, 0.5), st.floats(0, 0.49), st.sampled_from(list(CELLS)))
def test_optimal_is_never_worse_than_another_pair(off: float, on: float, kind: str) -> None:
    """Weight by weight, of those that decode alike; with a measured table, whichever way each scheme rounds."""
    best = variance(*coding_of(kind, "optimal", off, on))
    for scheme in ("two_column", "differential", "balanced"):
        other = variance(*coding_of(kind, scheme, off, on))
        assert (best <= other * (1 + 1e-4) + 1e-9 * (off + on)).all()


@given(st.floats(1e-3, 0.4), st.floats(1e-3, 0.4), st.floats(0, 0.3), st.sampled_from(list(CELLS)))
def test_current_is_weighed_against_error(off: float, on: float, weight: float, kind: str) -> None:
    """No other pair has less of both together, and a higher weight never takes more current."""

    def currents(coding: Coding) -> npt.NDArray[np.float64]:
        siemens = coding.conductance(encoded(coding)[0]).astype(np.float64)[..., 0, :]
        return ((siemens - G_OFF) / (G_ON - G_OFF)).sum(axis=1).mean(axis=0)

    def cost(scheme: str) -> npt.NDArray[np.float64]:
        coding, stuck = coding_of(kind, scheme, off, on, weight)
        return variance(coding, stuck) + weight * currents(coding)

    best = cost("optimal")
    for scheme in ("two_column", "differential", "balanced"):
        assert (best <= cost(scheme) * (1 + 1e-4) + 1e-6).all()
    thrifty, careless = (coding_of(kind, "optimal", off, on, w)[0] for w in (weight + 0.1, weight))
    assert currents(thrifty).sum() <= currents(careless).sum() + 1e-6


@pytest.mark.parametrize("weight", [0.0, 1e-4, 0.01])
def test_the_common_mode_of_analog_cells(weight: float) -> None:
    """clip(v - weight / (2 p (1 - p)), m/2, 1 - m/2)."""
    off, on = 0.002, 0.01
    coding, stuck = coding_of("analog", "optimal", off, on, weight)
    assert stuck.mean == pytest.approx(G_OFF + on / (off + on) * (G_ON - G_OFF))
    aim = on / (off + on) - weight / (2 * (off + on) * (1 - off - on))
    half = np.abs(WEIGHTS[0]) / 2
    pairs = (encoded(coding)[0][0, :, 0].astype(np.float64) - G_OFF) / (G_ON - G_OFF)
    np.testing.assert_allclose(pairs.mean(axis=0), np.clip(aim, half, 1 - half), atol=1e-6)
