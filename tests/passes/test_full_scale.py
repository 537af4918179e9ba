"""Full scales of the least expected error, beside errors from the cells themselves at every threshold of a grid."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rerampile.passes.full_scale import FaultNoise, Losses, least_by_segment, losses_of
from rerampile.schemes import SCHEMES, Coding
from rerampile.segments import Segments
from rerampile.stuck_cell import StuckCell
from rerampile.target import Cell, Stuck, Target

Doubles = npt.NDArray[np.float64]
OFF, ON = 1e-6, 100e-6
CELLS: dict[str, tuple[Cell, int]] = {
    "analog": (Cell(g_off=OFF, g_on=ON), 1),
    "outside": (
        Cell(g_off=OFF, g_on=ON, stuck_off=Stuck(mean=0.0, spread=0.0), stuck_on=Stuck(mean=170e-6, spread=30e-6)),
        1,
    ),
    "levels": (Cell(g_off=OFF, g_on=ON, levels=64), 1),
    "slices": (Cell(g_off=OFF, g_on=ON, levels=8), 3),
    "table": (Cell(g_off=OFF, g_on=ON, levels=4, level_table=(OFF, 20e-6, 37e-6, ON)), 3),
}


def coding_of(kind: str, scheme: str, off: float, on: float) -> tuple[Coding, StuckCell]:
    cell, slices = CELLS[kind]
    target = Target(name="cells", rows=8, columns=8, slices=slices, cell=cell)
    faults = {"stuck_off": off, "stuck_on": on}
    keys: dict[str, Any] = {key: getattr(cell, key) for key in ("g_off", "g_on", "levels", "level_table")}
    pair = Coding(scheme="balanced", slices=slices, **keys)
    aims = StuckCell.of(target, pair, faults).common_modes(pair) if scheme == "optimal" else None
    coding = Coding(scheme=scheme, slices=slices, common_modes=aims, **keys)
    return coding, StuckCell.of(target, coding, faults)


def problem(seed: int, outputs: int = 2, inputs: int = 24) -> tuple[Doubles, npt.NDArray[np.bool_], Doubles]:
    """Weights with some outliers, zeros among them, and correlated inputs that are not centred."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_t(3, (outputs, inputs)) * (rng.random((outputs, inputs)) < 0.8)
    samples = np.maximum(rng.standard_normal((60, inputs)) @ rng.standard_normal((inputs, inputs)) * 0.3 + 0.2, 0)
    placed = np.broadcast_to(rng.random(inputs) < 0.9, weights.shape) | (weights != 0)
    return weights, placed, samples.T @ samples / len(samples)


def expected_error(
    weights: Doubles, placed: npt.NDArray[np.bool_], moment: Doubles, coding: Coding, stuck: StuckCell, scale: float
) -> float:
    """The error of one output, from the cells that it would have, [inputs]."""
    gain = coding.gain(np.full(1, scale))
    held = np.clip(weights, -scale, scale)
    cells = coding.encode(held[None].astype(np.float32), gain)
    variance = stuck.variance_of(coding, cells, gain[:, None])[0].astype(np.float64)
    mean = (1 - stuck.probability) * held + stuck.shift(coding) * gain[0] * placed - weights
    rounding = np.square(coding.decode(cells, gain)[0] - held)
    return float(mean @ moment @ mean + np.diag(moment) @ (variance * placed + rounding))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["analog", "outside"])
@given(seed=st.integers(0, 1000), off=st.floats(0, 0.05), on=st.floats(0.001, 0.1))
@settings(max_examples=5, deadline=None)
def test_no_threshold_is_better(kind: str, scheme: str, seed: int, off: float, on: float) -> None:
    coding, stuck = coding_of(kind, scheme, off, on)
    weights, placed, moment = problem(seed)
    losses = losses_of(weights, placed, moment, FaultNoise.of(coding, stuck))
    for output, (scale, error, before) in enumerate(zip(*losses.least(), strict=True)):
        case = (weights[output], placed[output], moment, coding, stuck)
        top, floor = np.abs(weights[output]).max(), losses.floor[output]
        tried = [expected_error(*case, s) for s in np.linspace(floor, top, 100)]
        assert floor <= scale <= top == losses.top[output]
        assert error == pytest.approx(expected_error(*case, scale), rel=2e-4)
        assert before == pytest.approx(tried[-1], rel=2e-4)
        assert error <= min(tried) * (1 + 2e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["levels", "slices", "table"])
def test_levels_and_slices_are_near(kind: str, scheme: str) -> None:
    """Digits jump from level to level; the functions fitted to them are off by little, and so is the choice."""
    coding, stuck = coding_of(kind, scheme, 0.005, 0.03)
    weights, placed, moment = problem(1)
    losses = losses_of(weights, placed, moment, FaultNoise.of(coding, stuck))
    for output, (scale, error, _) in enumerate(zip(*losses.least(), strict=True)):
        case = (weights[output], placed[output], moment, coding, stuck)
        tried = [expected_error(*case, s) for s in np.linspace(losses.floor[output], losses.top[output], 150)]
        assert error == pytest.approx(expected_error(*case, scale), rel=0.15)
        assert expected_error(*case, scale) <= min(tried) * 1.1


@pytest.mark.parametrize("scheme", ["two_column", "optimal", "offset"])
def test_one_scale_for_all_outputs(scheme: str) -> None:
    """Of outputs of several groups, whose inputs differ."""
    coding, stuck = coding_of("analog", scheme, 0.01, 0.04)
    cases = [problem(seed) for seed in (1, 2)]
    noise, floor = FaultNoise.of(coding, stuck), 0.3
    losses = Losses.together(losses_of(*case, noise, floor=floor) for case in cases)
    (scale,), (error,), _ = losses.least()
    top = max(np.abs(weights).max() for weights, _, _ in cases)

    def total(s: float) -> float:
        rows = ((w, p, case[2]) for case in cases for w, p in zip(case[0], case[1], strict=True))
        return sum(expected_error(*row, coding, stuck, s) for row in rows)

    assert 0.3 < scale < top == losses.top
    assert error == pytest.approx(total(scale), rel=2e-4)
    assert error <= min(total(s) for s in np.linspace(0.3, top, 100)) * (1 + 2e-4)


@pytest.mark.parametrize(("scheme", "share"), [("two_column", 5.2 / 6.2), ("differential", 1 / 6.2)])
def test_more_faults_clip_more(scheme: str, share: float) -> None:
    """Normal weights, inputs that have nothing in common: beside integrals over the normal distribution."""
    weights = np.random.default_rng(0).standard_normal((20, 1000))
    held = np.ones((1, 1000), np.bool_)
    found, expected = [], []
    for rate in (0.001, 0.005, 0.02, 0.05):
        noise = FaultNoise.of(*coding_of("analog", scheme, rate / 6.2, rate * 5.2 / 6.2))
        parts = [losses_of(w[None], held, np.eye(1000), noise, floor=1.0) for w in weights]
        found.append(float(Losses.together(parts).least()[0][0]))
        grid = np.linspace(1, 4, 1000)
        expected.append(grid[np.argmin([normal_loss(s, rate, share * rate) for s in grid])])
    np.testing.assert_allclose(found, expected, atol=0.08)
    assert found == sorted(found, reverse=True)


def normal_loss(s: float, p: float, hurting: float) -> float:
    """Mean squared error of normal weights clipped at ``s``, of pairs whose zeros one of the stuck states hurts."""
    density, beyond = math.exp(-s * s / 2) / math.sqrt(2 * math.pi), math.erfc(s / math.sqrt(2))
    mean = 2 * (1 / math.sqrt(2 * math.pi) - density) + s * beyond
    square = 1 - beyond - 2 * s * density + s * s * beyond
    clipping = (1 + s * s) * beyond - 2 * s * density
    return p * square + 2 * hurting * (1 - hurting) * s * s - 2 * hurting * (1 - p) * s * mean + clipping


def test_nothing_to_choose() -> None:
    """Outputs of zeros, weights that are all alike, and inputs that are always zero keep the largest magnitude."""
    coding, stuck = coding_of("analog", "differential", 0.01, 0.05)
    weights = np.array([[0.0, 0, 0], [2, 2, -2], [1, 0, 0]])
    moment = np.diag([0.0, 1, 1])
    losses = losses_of(weights, np.ones((3, 3), np.bool_), moment, FaultNoise.of(coding, stuck))
    scale, error, before = losses.least()
    assert scale[0] == 0
    assert scale[2] == 1
    assert np.isfinite(error).all()
    assert (error <= before).all()


def test_inputs_that_go_together_allow_less_clipping() -> None:
    """Two clipped weights of one sign add up where their inputs are one; of different signs they cancel."""
    coding, stuck = coding_of("analog", "two_column", 0.005, 0.03)
    weights = np.concatenate([np.full(2, 4.0), np.linspace(-1, 1, 40)])[None]
    opposed = weights.copy()
    opposed[0, 1] = -4
    alone, moment = np.eye(42), np.eye(42)
    moment[:2, :2] = 1
    noise, held = FaultNoise.of(coding, stuck), np.ones((1, 42), np.bool_)
    found = {
        name: float(losses_of(w, held, h, noise).least()[0][0])
        for name, w, h in (("one", weights, moment), ("apart", weights, alone), ("opposed", opposed, moment))
    }
    assert found["opposed"] < found["apart"] < found["one"] < 4


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("unbiased", [False, True])
def test_segments_beside_each_other(scheme: str, unbiased: bool) -> None:
    """The error of all together is that of the cells; no other full scale of one segment is better."""
    coding, stuck = coding_of("analog", scheme, 0.005, 0.03)
    weights, placed, moment = problem(3, outputs=4, inputs=40)
    weights[1, 25:33] = 0  # one output has a segment without weights
    segments = Segments((0, 15, 25, 33), 40)
    noise = FaultNoise.of(coding, stuck)
    noise = noise.unbiased() if unbiased else noise
    power = np.diagonal(moment) * 1.3  # as where the moment is one around the means

    def errors(scale: Doubles) -> Doubles:
        """By the closed form of each segment's noise, and the mean errors of all inputs together."""
        total, means = np.zeros(4), np.zeros_like(weights)
        for k, part in enumerate(segments.slices):
            s = scale[:, k, None]
            held = np.clip(weights[:, part], -s, s)
            share = np.abs(held) / np.where(s > 0, s, 1)
            signs = np.where(weights[:, part] < 0, 1, 0)
            which = np.where(share <= noise.bend, 0, -1)
            a, b, c = np.moveaxis(noise.variances[signs, which], -1, 0)
            variance = s**2 * (a + b * share + c * share**2)
            total += ((placed[:, part] * variance + noise.rounding * s**2 * (weights[:, part] != 0)) * power[part]).sum(
                1
            )
            means[:, part] = noise.mean_gain * held - weights[:, part] + noise.shift * s * placed[:, part]
        return total + np.einsum("oi,oi->o", means @ moment, means)

    scale, found, before = least_by_segment(weights, placed, moment, noise, segments, power=power)

    top = segments.largest(np.abs(weights))
    assert (scale <= top).all()
    assert scale[1, 2] == 0
    np.testing.assert_allclose(found, errors(scale), rtol=1e-6)
    np.testing.assert_allclose(before, errors(top), rtol=1e-6)
    assert (found <= before * (1 + 1e-12)).all()
    assert found.sum() < 0.9 * before.sum()
    for k in range(4):
        deepest = np.sort(np.abs(weights[:, segments.slices[k]]), axis=1)[:, ::-1]
        floor = deepest[np.arange(4), np.count_nonzero(deepest, axis=1) // 4]
        for share in np.linspace(0, 1, 40):
            tried = scale.copy()
            tried[:, k] = floor + share * (top[:, k] - floor)
            assert (found <= errors(tried) * 1.01).all()


def test_one_segment_is_the_whole() -> None:
    """The same full scales and errors as without segments."""
    weights, placed, moment = problem(2, outputs=3)
    noise = FaultNoise.of(*coding_of("analog", "offset", 0.01, 0.04))
    found = least_by_segment(weights, placed, moment, noise, Segments.whole(24), power=np.diagonal(moment))
    expected = losses_of(weights, placed, moment, noise).least()
    for ours, theirs in zip((found[0][:, 0], *found[1:]), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def test_mean_errors_of_segments_meet() -> None:
    """Weights that would be clipped alone are not where another segment's mean error has the same sign."""
    noise = FaultNoise.of(*coding_of("analog", "two_column", 0.005, 0.03))
    weights = np.concatenate([[4.0], np.linspace(-1, 1, 40), [4.0], np.linspace(-1, 1, 40)])[None]
    apart = np.eye(82)
    joined, held = apart.copy(), np.ones((1, 82), np.bool_)
    joined[0, 41] = joined[41, 0] = 1
    scales = [
        least_by_segment(weights, held, h, noise, Segments((0, 41), 82), power=np.ones(82))[0] for h in (apart, joined)
    ]
    assert (scales[0] < 4).all()
    assert scales[1].sum() > scales[0].sum() + 0.1
