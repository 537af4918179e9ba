"""What pruned weights may look like: sets of weights, each with its projection.

An engine needs no more of a constraint than this: the nearest point of the set, in a norm that weighs each input by its
importance, and the directions in which weights can move without leaving the set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt

from rerampile.errors import ConfigError

__all__ = [
    "BlockSparsity",
    "Constraint",
    "Floats",
    "InBlocks",
    "NOfM",
    "Shape",
    "Sparsity",
    "Tangent",
    "check_ratio",
    "keep_largest",
]

Floats = npt.NDArray[np.floating[Any]]
Flags = npt.NDArray[np.bool_]
Shape = tuple[int, int, int]
Tangent = Callable[[Floats], Floats]


class Constraint(Protocol):
    """A set of weights. All weights are [groups, outputs, inputs], importance is [groups, inputs] and positive."""

    @property
    def joint(self) -> bool:
        """Whether groups share a budget, so that they can't be solved apart."""
        ...

    @property
    def tied(self) -> bool:
        """Whether weights that are not zero share values or are bound to some, so that they can't move freely."""
        ...

    def check(self, shape: Shape) -> None:
        """Refuse layers that have no such weights.

        Raises:
            ConfigError: The shape [groups, outputs, inputs] doesn't allow it.
        """
        ...

    def project(self, weights: Floats, importance: Floats) -> Floats:
        """Return the point ``z`` of the set with the smallest ``sum(importance * (weights - z)**2)``.

        A set of values (levels, clusters, shared magnitudes) leaves zeros as they are.
        """
        ...

    def tangent(self, weights: Floats, importance: Floats) -> Tangent:
        """Return what projects steps onto those along which the set extends from ``weights``, one of its points."""
        ...


def keep_largest(scores: Floats, remove: int) -> Flags:
    """Return which scores [..., n] to keep: all but the ``remove`` smallest along the last axis.

    Among equal scores the earlier ones go.
    """
    if remove <= 0:
        return np.ones(scores.shape, np.bool_)
    if remove >= scores.shape[-1]:
        return np.zeros(scores.shape, np.bool_)
    threshold = np.partition(scores, remove - 1, axis=-1)[..., remove - 1 : remove]
    kept = scores > threshold
    short = scores.shape[-1] - remove - np.count_nonzero(kept, axis=-1, keepdims=True)
    if short.any():  # of those at the threshold, the last ones stay
        ties = scores == threshold
        left = np.count_nonzero(ties, axis=-1, keepdims=True) - np.cumsum(ties, axis=-1)
        kept |= ties & (left < short)
    return kept


def check_ratio(ratio: float, what: str) -> None:
    """Refuse a ratio outside [0, 1); ``what`` is what stands before it in the message.

    Raises:
        ConfigError: It is.
    """
    if not 0 <= ratio < 1:
        raise ConfigError(f"{what}{ratio:g}: expected a ratio of 0 or more and less than 1")


class _Zeros:
    """What sets that only ask for zeros have in common: weights that are kept are free."""

    tied: ClassVar[bool] = False

    def check(self, shape: Shape) -> None:
        """Accept every shape."""

    def tangent(self, weights: Floats, importance: Floats) -> Tangent:
        """Return what sets steps of zero weights to zero."""
        kept = weights != 0
        return lambda step: step * kept


@dataclass(frozen=True)
class Sparsity(_Zeros):
    """A share of the weights is zero, wherever they are.

    Attributes:
        ratio: Exactly ``round(ratio * size)`` weights go; among equal ones the earlier.
        within: Whether weights compete in the whole layer, or in each output, which then has
            ``round(ratio * inputs)`` zeros.
    """

    ratio: float
    within: Literal["layer", "output"] = "layer"

    def __post_init__(self) -> None:
        check_ratio(self.ratio, "pruning ratio ")

    @property
    def joint(self) -> bool:
        """Whether weights of all groups compete."""
        return self.within == "layer"

    def project(self, weights: Floats, importance: Floats) -> Floats:
        """Keep the weights of the largest ``importance * weight**2``."""
        remove = round(self.ratio * (weights.size if self.joint else weights.shape[-1]))
        return np.where(self.kept(importance[:, None] * weights**2, remove), weights, 0)

    def kept(self, scores: Floats, remove: int) -> Flags:
        """Return which weights to keep of those with ``scores`` if ``remove`` go, in all or in each output."""
        if self.joint:
            return keep_largest(scores.reshape(-1), remove).reshape(scores.shape)
        return keep_largest(scores, remove)


@dataclass(frozen=True)
class NOfM(_Zeros):
    """Of every ``of`` neighbouring inputs at most ``count`` have a weight, in each output by itself (N:M)."""

    count: int
    of: int
    joint: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 1 <= self.count <= self.of:
            raise ConfigError(f"{self.count}:{self.of} sparsity: expected N:M with 1 <= N <= M, as in 2:4")

    def check(self, shape: Shape) -> None:
        """Refuse inputs that can't be cut into groups of M.

        Raises:
            ConfigError: They can't.
        """
        if shape[2] % self.of:
            raise ConfigError(
                f"{self.count}:{self.of} sparsity: a layer of {_words(shape)}, expected a multiple of {self.of} "
                f"inputs; leave the layer out or choose another M"
            )

    def project(self, weights: Floats, importance: Floats) -> Floats:
        """Keep the weights of the largest ``importance * weight**2`` of every M."""
        scores = (importance[:, None] * weights**2).reshape(*weights.shape[:2], -1, self.of)
        return np.where(keep_largest(scores, self.of - self.count).reshape(weights.shape), weights, 0)


@dataclass(frozen=True)
class InBlocks:
    """A matrix cut into blocks of neighbouring inputs and outputs; those at its ends may be smaller.

    Attributes:
        ratio: Share of the blocks that the constraint is about.
        inputs: Inputs of a block, or None for all.
        outputs: Outputs of a block, or None for all.
    """

    ratio: float
    inputs: int | None
    outputs: int | None
    joint: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ratio(self.ratio, "ratio of blocks ")
        if any(size is not None and size < 1 for size in (self.inputs, self.outputs)):
            raise ConfigError(f"blocks of {self.inputs} inputs x {self.outputs} outputs: expected at least 1 x 1")

    def reduce(self, function: np.ufunc, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return ``function`` over ``values`` [groups, outputs, inputs] of each block, [groups, blocks, blocks]."""
        starts = [np.arange(0, n, s or n) for n, s in zip(values.shape[1:], (self.outputs, self.inputs), strict=True)]
        return function.reduceat(function.reduceat(values, starts[1], axis=2), starts[0], axis=1)

    def spread(self, blocks: npt.NDArray[Any], shape: Shape) -> npt.NDArray[Any]:
        """Return what each block has, [groups, blocks, blocks], for each of its weights."""
        index = [np.arange(n) // (s or n) for n, s in zip(shape[1:], (self.outputs, self.inputs), strict=True)]
        return blocks[:, index[0][:, None], index[1][None, :]]


@dataclass(frozen=True)
class BlockSparsity(InBlocks, _Zeros):
    """A share of the blocks is zero: whole rows or columns of crossbars, or whole partitions.

    ``round(ratio * blocks)`` blocks go, those of the smallest ``sum(importance * weight**2)``, but one always stays:
    a layer of a single partition is not pruned away.
    """

    @classmethod
    def rows(cls, ratio: float) -> BlockSparsity:
        """Inputs of a group over all its outputs: rows of crossbars."""
        return cls(ratio, inputs=1, outputs=None)

    @classmethod
    def columns(cls, ratio: float) -> BlockSparsity:
        """Outputs over all their inputs: columns of crossbars."""
        return cls(ratio, inputs=None, outputs=1)

    def project(self, weights: Floats, importance: Floats) -> Floats:
        """Keep the heaviest blocks."""
        scores = self.reduce(np.add, importance[:, None] * weights**2)
        remove = min(round(self.ratio * scores.size), scores.size - 1)
        kept = keep_largest(scores.reshape(-1), remove).reshape(scores.shape)
        return np.where(self.spread(kept, _shape(weights)), weights, 0)


def _shape(weights: Floats) -> Shape:
    groups, outputs, inputs = weights.shape
    return groups, outputs, inputs


def _words(shape: Shape) -> str:
    return f"{shape[0]} x {shape[1]} x {shape[2]} weights (groups x outputs x inputs)"
