"""Sets of weights that share values or are bound to some: levels, clusters, unified magnitudes, and combinations.

A weight that is zero stays zero in all of them, so that each can follow pruning: the survivors take the values (Ye et
al. 2018), and a dead input stays without weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from rerampile.errors import ConfigError
from rerampile.passes.pruning.constraint import Constraint, Floats, InBlocks, Shape, Tangent, keep_largest

__all__ = ["Clusters", "Combination", "Levels", "UnifiedMagnitudes", "fix_centres"]

_LLOYD_STEPS = 100


@dataclass(frozen=True, eq=False)
class Levels:
    """Each weight is one of a list of values times the scale of its output.

    Attributes:
        values: The values in any order, such as those that cells of discrete levels can hold.
        scale: What a value of one is worth, positive, [groups, outputs].
    """

    values: tuple[float, ...]
    scale: Floats = field(repr=False)
    joint: ClassVar[bool] = False
    tied: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.values or not np.isfinite(self.values).all():
            raise ConfigError(f"levels {list(self.values)}: expected a list of finite numbers")
        if not (self.scale > 0).all():
            raise ConfigError(f"levels: a scale of {self.scale.min():g}, expected only positive ones")

    def check(self, shape: Shape) -> None:
        """Refuse layers that the scales are not of.

        Raises:
            ConfigError: They are not.
        """
        if self.scale.shape != shape[:2]:
            raise ConfigError(
                f"levels: scales of shape {list(self.scale.shape)} for a layer of shape {list(shape)}, expected "
                f"{list(shape[:2])}, one for each output"
            )

    def project(self, weights: Floats, importance: Floats) -> Floats:
        """Take the nearest value; of two equally near the smaller."""
        values = np.unique(np.asarray(self.values, weights.dtype))
        scale = self.scale[:, :, None].astype(weights.dtype)
        nearest = values[np.searchsorted((values[1:] + values[:-1]) / 2, weights / scale)] * scale
        return np.where(weights != 0, nearest, 0)

    def tangent(self, weights: Floats, importance: Floats) -> Tangent:
        """Return zero steps: from one level none leads on."""
        return np.zeros_like


@dataclass(frozen=True)
class Clusters:
    """The weights of the layer that are not zero share ``count`` values (weighted k-means).

    The projection is Lloyd's, from centres at equal distances between the smallest and the largest weight: the same
    weights give the same clusters, and no other assignment or centre by itself is nearer.
    """

    count: int
    joint: ClassVar[bool] = True
    tied: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"{self.count} clusters: expected at least 1")

    def check(self, shape: Shape) -> None:
        """Refuse layers with fewer weights than clusters.

        Raises:
            ConfigError: It has fewer.
        """
        if self.count > np.prod(shape):
            raise ConfigError(
                f"{self.count} clusters: a layer of {shape[0]} x {shape[1]} x {shape[2]} weights (groups x outputs x "
                f"inputs), expected at most as many clusters as weights"
            )

    def project(self, weights: Floats, importance: Floats) -> Floats:
        """Move each weight to the centre of its cluster."""
        kept = weights != 0
        if not kept.any():
            return weights.copy()
        values = weights[kept]
        centres = self._centres(values, np.broadcast_to(importance[:, None], weights.shape)[kept])
        result = np.zeros_like(weights)
        result[kept] = centres[np.searchsorted((centres[1:] + centres[:-1]) / 2, values)]
        return result

    def _centres(self, values: Floats, importance: Floats) -> Floats:
        """Return the centres of weighted ``values``, ascending: sorted, a cluster is a range, its sums differences."""
        order = np.argsort(values, kind="stable")
        ordered = values[order]
        distinct: Floats = ordered[np.append(True, np.diff(ordered) > 0)]
        if len(distinct) <= self.count:
            return distinct
        mass = np.concatenate([[0.0], np.cumsum(importance[order], dtype=np.float64)])
        moment = np.concatenate([[0.0], np.cumsum(importance[order] * ordered, dtype=np.float64)])
        centres = np.linspace(float(ordered[0]), float(ordered[-1]), self.count)
        cuts = np.zeros(0, np.int64)
        for _ in range(_LLOYD_STEPS):
            middle = np.searchsorted(ordered, ((centres[1:] + centres[:-1]) / 2).astype(values.dtype), side="right")
            if np.array_equal(cuts, ends := np.concatenate([[0], middle, [len(values)]])):
                break
            cuts = ends
            weight = np.diff(mass[cuts])
            centres = np.where(weight > 0, np.diff(moment[cuts]) / np.where(weight > 0, weight, 1), centres)
        return centres.astype(values.dtype)

    def tangent(self, weights: Floats, importance: Floats) -> Tangent:
        """Return what moves all weights of a cluster by the importance-weighted mean of their steps."""
        found, label = np.unique(weights, return_inverse=True)
        label = label.reshape(-1)
        heavy = np.broadcast_to(importance[:, None], weights.shape).reshape(-1)
        mass = np.bincount(label, heavy)

        def move(step: Floats) -> Floats:
            mean = np.where(found != 0, np.bincount(label, heavy * step.reshape(-1)) / mass, 0)
            return mean.astype(step.dtype)[label].reshape(step.shape)

        return move


@dataclass(frozen=True)
class UnifiedMagnitudes(InBlocks):
    """In a share of the blocks the weights that are not zero have one magnitude; signs stay (Lin et al. 2021).

    ``round(ratio * blocks)`` blocks are unified, those that it changes least. The magnitude is the importance-weighted
    mean of theirs, the nearest.
    """

    tied: ClassVar[bool] = True

    def check(self, shape: Shape) -> None:
        """Accept every shape."""

    def project(self, weights: Floats, importance: Floats) -> Floats:
        """Unify the blocks in which magnitudes differ least."""
        shape, magnitude = weights.shape, np.abs(weights)
        heavy = importance[:, None] * (weights != 0)
        mean = self.spread(self._mean(magnitude, heavy), shape)
        loss = self.reduce(np.add, heavy * (magnitude - mean) ** 2)
        unified = ~keep_largest(loss.reshape(-1), round(self.ratio * loss.size)).reshape(loss.shape)
        return np.where(self.spread(unified, shape), np.sign(weights) * mean, weights)

    def tangent(self, weights: Floats, importance: Floats) -> Tangent:
        """Return what moves the magnitudes of a unified block by one step, and leaves those of others free."""
        shape, magnitude, sign = weights.shape, np.abs(weights), np.sign(weights)
        heavy = importance[:, None] * (weights != 0)
        largest: Floats = self.spread(self.reduce(np.maximum, magnitude), shape)
        unified = self.spread(self.reduce(np.logical_and, (magnitude == largest) | (weights == 0)), shape)

        def move(step: Floats) -> Floats:
            return np.where(unified, sign * self.spread(self._mean(sign * step, heavy), shape), step * np.abs(sign))

        return move

    def _mean(self, values: Floats, heavy: Floats) -> Floats:
        """Return the weighted mean of each block, [groups, blocks, blocks]; zero where nothing has weight."""
        mass = self.reduce(np.add, heavy)
        mean: Floats = self.reduce(np.add, heavy * values) / np.where(mass > 0, mass, 1)
        return mean


@dataclass(frozen=True)
class Combination:
    """Sparsity first, then values for the survivors: joint pruning and quantisation, clustering or unification.

    Its projection is that of the values after that of the sparsity; nearest among weights with those zeros.
    """

    sparsity: Constraint
    values: Constraint

    @property
    def joint(self) -> bool:
        """Whether groups share a budget in either."""
        return self.sparsity.joint or self.values.joint

    @property
    def tied(self) -> bool:
        """Whether the survivors are bound."""
        return self.values.tied

    def check(self, shape: Shape) -> None:
        """Refuse what either refuses.

        Raises:
            ConfigError: One does.
        """
        self.sparsity.check(shape)
        self.values.check(shape)

    def project(self, weights: Floats, importance: Floats) -> Floats:
        """Project onto the sparsity, then onto the values."""
        return self.values.project(self.sparsity.project(weights, importance), importance)

    def tangent(self, weights: Floats, importance: Floats) -> Tangent:
        """Return the tangent of the values, which leaves zeros alone."""
        return self.values.tangent(weights, importance)


def fix_centres(constraint: Constraint, weights: Floats, importance: Floats) -> Constraint:
    """Return the constraint with levels in the place of clusters: the centres of the clusters of ``weights``.

    Engines look for the best assignment to these, and move the centres afterwards: centres that move along are pulled
    to what the weights happened to be.
    """
    if isinstance(constraint, Combination):
        survivors = constraint.sparsity.project(weights, importance)
        return Combination(constraint.sparsity, fix_centres(constraint.values, survivors, importance))
    if not isinstance(constraint, Clusters):
        return constraint
    centres = np.unique(constraint.project(weights, importance))
    return Levels(tuple(centres[centres != 0].tolist()) or (0.0,), np.ones(weights.shape[:2]))
