"""Choose full scales: the least expected squared error of a layer's products, by clipped weights and stuck cells.

With the full scale ``s`` cells hold the weights ``c = clip(w, -s, s)``, and chips read ``c`` with an error of mean
``-p c`` (and a shift for ``offset``) and of a variance that grows with ``s``. On inputs ``x`` of the second moment
``H = E[x x^T]``, faults independent of inputs and from cell to cell, the products of one output have the error

    L(s) = m^T H m + sum over i of H[i, i] (s^2 V(c[i] / s) + s^2 R),    m = (1 - p) c - w + s d

with the variance ``V`` and the mean shift ``d`` of a weight in full scales, and the variance ``R`` of its rounding to
levels. The first term is what all chips share: errors of clipping add up there, input by input, with their signs.

``V`` is a quadratic function of ``|c| / s`` for each scheme (``optimal``: two of them, one after the other), and ``c``
is ``w`` or ``s``. So between neighbouring weights ``L`` is a quadratic function of ``s``, whose coefficients change by
what *one* weight brings when it starts to be clipped. Sorted weights and cumulative sums give all of these functions,
and the least of their minima is exact.

Where segments of an output's inputs have full scales of their own, ``L`` is a sum over segments but for the first term,
in which their mean errors meet. Each segment in turn gets the exact minimum beside what the others are, which adds
``2 m^T H m'`` with their mean errors ``m'``: linear in ``m``, so that the same sums do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from rerampile.schemes import Coding
from rerampile.segments import Segments
from rerampile.stuck_cell import StuckCell

__all__ = ["FaultNoise", "Losses", "least_by_segment", "losses_of"]

Doubles = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]

_SAMPLES = 2001  # values of a weight at which the closed form of its scheme is read
_PAIRS = 1 << 18  # of weights handled at a time: where they are and what is read there stays in the cache
_BLOCK = 64  # weights of an output handled at a time
_TURNS = 2  # of each segment: a third changes next to nothing


@dataclass(frozen=True, kw_only=True)
class FaultNoise:
    """What stuck cells and rounding do to a weight of one coding, in full scales.

    Attributes:
        bend: Share of the full scale up to which the first of two quadratic functions holds; 1 where there is one.
        variances: Coefficients of ``a + b |u| + c u^2``, float64 [2 signs, 1 or 2 functions, 3]: those of positive
            weights first.
        rounding: Mean squared error of rounding a weight that is not zero.
        mean_gain: What the mean over chips multiplies a weight by.
        shift: What it adds.
    """

    bend: float
    variances: Doubles
    rounding: float
    mean_gain: float
    shift: float

    @classmethod
    def of(cls, coding: Coding, stuck: StuckCell) -> FaultNoise:
        """Read the functions off the coding's own cells; with slices, whose digits jump, fit them."""
        u = np.linspace(0, 1, _SAMPLES)
        gain = coding.gain(np.ones(2))
        weights = np.stack([u, -u]).astype(np.float32)
        cells = coding.encode(weights, gain)
        variance = stuck.variance_of(coding, cells, gain[:, None]).astype(np.float64)
        bend = _bend(coding)
        first = u <= bend
        parts = (first, ~first) if bend < 1 else (first,)
        return cls(
            bend=bend,
            variances=np.array([[_quadratic(u[part], values[part]) for part in parts] for values in variance]),
            rounding=float(np.square(coding.decode(cells, gain) - weights, dtype=np.float64).mean()),
            mean_gain=1 - stuck.loss,
            shift=stuck.shift(coding) * float(gain[0]),
        )

    def unbiased(self) -> FaultNoise:
        """Return the same behind a digital gain that makes up for the mean."""
        gain = self.mean_gain
        return replace(self, variances=self.variances / gain**2, mean_gain=1.0, shift=self.shift / gain)


def _bend(coding: Coding) -> float:
    """Return the size of weights, in full scales, from which a pair of ``optimal`` can no longer lie around its aim.

    It is 1 where that is so for all weights, or for none.
    """
    if coding.common_modes is None:
        return 1.0
    low, high = (0.0, float(coding.levels or 2) - 1) if coding.integer else (coding.g_off, coding.g_on)
    aim = (coding.common_modes[-1] - low) / (high - low)
    bend = 2 * min(aim, 1 - aim)
    return bend if 5 / _SAMPLES < bend < 1 - 5 / _SAMPLES else 1.0


def _quadratic(u: Doubles, values: Doubles) -> Doubles:
    """Return the coefficients of the nearest quadratic function, constant first."""
    found: Doubles = np.asarray(np.linalg.lstsq(np.vander(u, 3, increasing=True), values, rcond=None)[0], np.float64)
    return found


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The expected errors of some outputs, as functions of their full scales.

    ``L(s)`` has the coefficients ``base`` (of 1, s, s^2) and, for every event whose ``at`` is above ``s``, those of its
    ``change`` besides.

    Attributes:
        top: Largest magnitude, float64 [outputs]: the scale above which nothing is clipped.
        floor: The least scale that is tried, float64 [outputs].
        base: float64 [outputs, 3].
        at: float64 [outputs, events].
        change: float64 [outputs, events, 3].
    """

    top: Doubles
    floor: Doubles
    base: Doubles
    at: Doubles
    change: Doubles

    @classmethod
    def together(cls, parts: Iterable[Losses]) -> Losses:
        """Return the sum over all outputs of some parts with one floor: the error by one full scale for all."""
        kept = []
        for part in parts:
            counts = part.at > part.floor[:, None]
            kept.append((part.top.max(), part.floor.max(), part.base.sum(axis=0), part.at[counts], part.change[counts]))
        tops, floors, bases, at, change = zip(*kept, strict=True)
        return cls(
            top=np.array([max(tops)]),
            floor=np.array([max(floors)]),
            base=np.sum(bases, axis=0)[None],
            at=np.concatenate(at)[None],
            change=np.concatenate(change)[None],
        )

    def least(self) -> tuple[Doubles, Doubles, Doubles]:
        """Return the best full scale of each output, its error, and the error at ``top``, float64 [outputs] each.

        Of equal ones the largest scale is taken, so that nothing is clipped for nothing.
        """
        order = np.argsort(-self.at, axis=1, kind="stable")
        at = np.take_along_axis(self.at, order, axis=1)
        changes = np.take_along_axis(self.change, order[:, :, None], axis=1).cumsum(axis=1)
        pieces = self.base[:, None] + np.concatenate([np.zeros_like(changes[:, :1]), changes], axis=1)
        constant, slope, square = np.moveaxis(pieces, 2, 0)
        top, floor = self.top[:, None], self.floor[:, None]
        high = np.minimum(np.concatenate([top, at], axis=1), top)
        low = np.maximum(np.concatenate([at, floor], axis=1), floor)
        convex = square > 0
        vertex = np.divide(-slope, 2 * square, out=np.broadcast_to(top, slope.shape).copy(), where=convex)
        inside = np.minimum(np.maximum(vertex, low), high)
        scales = np.stack([inside, low], axis=2)
        errors = constant[:, :, None] + scales * (slope[:, :, None] + scales * square[:, :, None])
        possible = high >= low
        errors[~possible] = np.inf
        rows = np.arange(len(at))
        best = errors.reshape(len(at), -1).argmin(axis=1)
        first = possible.argmax(axis=1)
        unclipped = constant[rows, first] + self.top * (slope[rows, first] + self.top * square[rows, first])
        return scales.reshape(len(at), -1)[rows, best], errors.reshape(len(at), -1)[rows, best], unclipped


def losses_of(
    weights: Doubles,
    placed: Flags,
    moment: Doubles,
    noise: FaultNoise,
    *,
    power: Doubles | None = None,
    floor: float | None = None,
    pull: Doubles | None = None,
) -> Losses:
    """Return the expected errors of outputs that see the same inputs.

    Args:
        weights: float64 [outputs, inputs].
        placed: bool [outputs, inputs], which of them take cells.
        moment: E[x x^T], float64 [inputs, inputs]; around the means where a bias makes up for mean errors.
        noise: What stuck cells do to them.
        power: E[x^2], [inputs]; the diagonal of ``moment`` where None.
        floor: The least scale that is tried; where None that which clips a quarter of the weights of each output that
            are not zero. Pairs of weights below it need not be looked at.
        pull: E[x e] with the mean error ``e`` of what else is added to each output, float64 [outputs, inputs]; 0 where
            None. ``L`` is then the error of all together, less that of ``e`` alone.
    """
    size = np.abs(weights)
    order = np.argsort(-size, axis=1, kind="stable")
    power = np.diagonal(moment) if power is None else power
    ordered = _Sorted.of(weights, placed, moment, power, np.zeros_like(weights) if pull is None else pull, order)
    deepest = np.minimum(np.count_nonzero(size, axis=1) // 4, size.shape[1] - 1)
    least = ordered.size[np.arange(len(size)), deepest] if floor is None else np.full(len(size), floor)
    b, shift = noise.mean_gain, noise.shift
    held = (ordered.power * ordered.placed)[:, :, None]
    variances = noise.variances[np.where(ordered.sign < 0, 1, 0)]  # [outputs, inputs, functions, 3]
    powers = np.stack([ordered.size**2, ordered.size, np.ones_like(ordered.size)], axis=2)
    # s^2 (a + b |w| / s + c (w / s)^2) has the coefficients c w^2, b |w|, a of 1, s, s^2
    first, last = (held * variances[:, :, n, ::-1] * powers for n in (0, -1))
    rounding = noise.rounding * ordered.power * (ordered.size > 0)
    mean = (b - 1) * ordered.products  # E[x (mean error of the output)] without clipping, but for the shift
    value = ordered.sign * ordered.size
    base = first.sum(axis=1)
    base[:, 0] += (b - 1) * (value * (mean + 2 * ordered.pull)).sum(axis=1)
    base[:, 1] += 2 * shift * (b - 1) * (value * ordered.driven).sum(axis=1)
    base[:, 1] += 2 * shift * (ordered.placed * ordered.pull).sum(axis=1)
    mean = mean + ordered.pull
    base[:, 2] += shift**2 * (ordered.placed * ordered.driven).sum(axis=1) + rounding.sum(axis=1)
    change = b**2 * _clipping(ordered, moment, order, least) - last
    change[:, :, 0] -= 2 * b * value * mean
    change[:, :, 1] += 2 * b * (ordered.sign * mean - shift * value * ordered.driven)
    change[:, :, 2] += 2 * b * shift * ordered.sign * ordered.driven - rounding
    change[:, :, 2] += held[:, :, 0] * variances[:, :, -1].sum(axis=2)
    at = ordered.size
    if noise.bend < 1:
        at = np.concatenate([at, ordered.size / noise.bend], axis=1)
        change = np.concatenate([change, last - first], axis=1)
    return Losses(top=ordered.size[:, 0], floor=least, base=base, at=at, change=change)


def least_by_segment(
    weights: Doubles, placed: Flags, moment: Doubles, noise: FaultNoise, segments: Segments, *, power: Doubles
) -> tuple[Doubles, Doubles, Doubles]:
    """Return full scales of segments whose errors together no change of a single one makes much less.

    Args:
        weights: As of :func:`losses_of`.
        placed: The same.
        moment: The same.
        noise: The same.
        segments: The ranges of inputs.
        power: As of :func:`losses_of`.

    Returns:
        The full scales, float64 [outputs, segments]; the error of each output, and that with the largest magnitudes as
        full scales, float64 [outputs] each.
    """

    def means(scale: Doubles) -> Doubles:
        """Return the mean error of each weight."""
        s = segments.spread(scale)
        return noise.mean_gain * np.clip(weights, -s, s) - weights + noise.shift * s * placed

    scale = segments.largest(np.abs(weights))
    mean = means(scale)
    before = _alike(mean, moment)
    random = np.zeros_like(scale)  # what differs from chip to chip
    for turn in range(_TURNS):
        for k, part in enumerate(segments.slices):
            own = moment[part, part]
            pull = mean @ moment[:, part] - mean[:, part] @ own
            losses = losses_of(weights[:, part], placed[:, part], own, noise, power=power[part], pull=pull)
            scale[:, k], error, unclipped = losses.least()
            if not turn:
                before += unclipped - _alike(mean[:, part], own, pull)
            mean = means(scale)
            random[:, k] = error - _alike(mean[:, part], own, pull)
    return scale, random.sum(axis=1) + _alike(mean, moment), before


def _alike(mean: Doubles, moment: Doubles, pull: Doubles | float = 0.0) -> Doubles:
    """Return what mean errors [outputs, inputs] add to the error of each output, beside what pulls at them."""
    added: Doubles = np.einsum("oi,oi->o", mean @ moment + 2 * pull, mean)
    return added


@dataclass(frozen=True)
class _Sorted:
    """The weights of each output, largest first, with what belongs to them; all [outputs, inputs].

    Attributes:
        size: Magnitudes.
        sign: Signs, 1 or -1; 0 of a zero.
        placed: Which take cells, 1 or 0.
        power: E[x^2] of their inputs.
        own: The diagonal of the moment, at their inputs.
        products: E[x y] of their inputs with the output.
        driven: E[x z] of their inputs with the sum z of those inputs of the output that take cells.
        pull: E[x e] of their inputs with the mean error e of what else is added to the output.
    """

    size: Doubles
    sign: Doubles
    placed: Doubles
    power: Doubles
    own: Doubles
    products: Doubles
    driven: Doubles
    pull: Doubles

    @classmethod
    def of(
        cls, weights: Doubles, placed: Flags, moment: Doubles, power: Doubles, pull: Doubles, order: Integers
    ) -> _Sorted:
        diagonal = (np.broadcast_to(values, weights.shape) for values in (power, np.diagonal(moment)))
        columns = (weights, placed.astype(np.float64), *diagonal, weights @ moment, placed @ moment, pull)
        w, *others = (np.take_along_axis(column, order, axis=1) for column in columns)
        return cls(np.abs(w), np.sign(w), *others)


def _clipping(ordered: _Sorted, moment: Doubles, order: Integers, floor: Doubles) -> Doubles:
    """Return what each weight adds to ``e^T H e`` for the errors of clipping ``e``, with all larger ones clipped too.

    With ``e[i] = sign[i] (s - |w[i]|)`` two clipped weights add ``2 H[i, j] e[i] e[j]``; each pair counts for the
    smaller of the two.

    Returns:
        Coefficients of 1, s, s^2, float64 [outputs, inputs, 3]; without the pairs of weights below the floor.
    """
    size, flat = ordered.size, moment.reshape(-1)
    sums = np.zeros((*size.shape, 2))
    depth = max(1, int((size >= floor[:, None]).sum(axis=1).max()))
    step = max(1, _PAIRS // (min(depth, _BLOCK) * depth))
    for start in range(0, len(size), step):
        rows = slice(start, start + step)
        index, sign = order[rows, :depth], ordered.sign[rows, :depth]
        errors = np.stack([sign, sign * size[rows, :depth]], axis=2)
        for first in range(0, depth, _BLOCK):
            last = min(first + _BLOCK, depth)
            where = index[:, first:last, None] * len(moment) + index[:, None, :last]
            pairs = flat.take(where, mode="clip")  # all are inside; asking so takes half as long as "raise"
            pairs[:, :, first:] = np.tril(pairs[:, :, first:], -1)
            sums[rows, first:last] = sign[:, first:last, None] * (pairs @ errors[:, :last])
    total, weighted = np.moveaxis(sums, 2, 0)
    own = ordered.own
    return np.stack(
        [
            2 * weighted * size + own * size**2,
            -2 * (weighted + total * size + own * size),
            2 * total + own,
        ],
        axis=2,
    )
