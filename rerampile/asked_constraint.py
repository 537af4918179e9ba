"""From the words of a request to the constraint of a layer's weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from rerampile.errors import ConfigError
from rerampile.passes.allocate import partition_size
from rerampile.passes.map import plain_coding
from rerampile.passes.pruning.constraint import BlockSparsity, Constraint, Floats, NOfM, Sparsity
from rerampile.passes.pruning.values import Clusters, Combination, Levels, UnifiedMagnitudes
from rerampile.pruning import PruneRequest
from rerampile.schemes import Coding, known_mapping
from rerampile.target import Target

__all__ = ["WHOLE", "constraint_of", "held_values", "inputs_of_pattern", "on_target"]

WHOLE = frozenset({"rows", "columns", "channels", "partitions"})
"""Structures that free whole lines of cells: only there do filters that nothing reads any more go, too."""

_N_OF_M = re.compile(r"(\d+):(\d+)")
_POINTS_PER_STEP = 4  # of the weights that are coded to see which values there are
_MOST_POINTS = 2**16


def inputs_of_pattern(structure: str) -> int | None:
    """Return the M of an N:M structure, None for others."""
    found = _N_OF_M.fullmatch(structure)
    return None if found is None else int(found[2])


def constraint_of(request: PruneRequest, ratio: float, weights: Floats, kernel: int = 1) -> Constraint:
    """Return what a layer's weights have to be.

    Args:
        request: What is asked.
        ratio: The layer's ratio.
        weights: Its dense weights, [groups, outputs, inputs], which set the full scale of levels.
        kernel: Neighbouring inputs that belong to one channel.

    Raises:
        ConfigError: The structure or the values are unknown, or the ratio is outside [0, 1).
    """
    sparsity = _sparsity(request, ratio, kernel)
    if request.values == "any":
        return sparsity
    return Combination(sparsity, _values(request, weights))


def _sparsity(request: PruneRequest, ratio: float, kernel: int) -> Constraint:
    structure = request.structure
    if found := _N_OF_M.fullmatch(structure):
        return NOfM(int(found[1]), int(found[2]))
    makers: dict[str, Callable[[float], Constraint]] = {
        "weights": Sparsity,
        "rows": BlockSparsity.rows,
        "columns": BlockSparsity.columns,
        "channels": lambda share: BlockSparsity(share, inputs=kernel, outputs=None),
        "partitions": lambda share: BlockSparsity(share, *request.partition),
    }
    if structure not in makers:
        raise ConfigError(f"--structure {structure}: expected {', '.join(makers)}, or N:M as in 2:4")
    return makers[structure](ratio)


def _values(request: PruneRequest, weights: Floats) -> Constraint:
    if request.values == "levels":
        scale = np.abs(weights).max(axis=2)
        return Levels(request.levels, np.where(scale > 0, scale, 1.0))
    if found := re.fullmatch(r"clusters:(\d+)", request.values):
        return Clusters(int(found[1]))
    if found := re.fullmatch(r"unified:(\d*\.?\d+)", request.values):
        return UnifiedMagnitudes(float(found[1]), *request.partition)
    raise ConfigError(
        f"--values {request.values}: expected any, levels, clusters:N as in clusters:16, or unified:SHARE as in "
        f"unified:0.5"
    )


def on_target(request: PruneRequest, target: Target, mapping: str | None) -> PruneRequest:
    """Return a request with what its words mean on a target: the size of a partition, and the values of its cells.

    Raises:
        ConfigError: The target has no such values, or no such mapping is there.
    """
    known = known_mapping(mapping or target.mapping)
    coding = plain_coding(target, "balanced" if known == "auto" else known)  # the values are those of any pair
    if request.structure == "partitions" or request.values.startswith("unified"):
        request = replace(request, partition=partition_size(target, coding))
    return replace(request, levels=held_values(target, coding)) if request.values == "levels" else request


def held_values(target: Target, coding: Coding) -> tuple[float, ...]:
    """Return the weights that a target's cells can hold, as shares of the full scale, ascending.

    Raises:
        ConfigError: Its cells are analog.
    """
    if target.analog:
        raise ConfigError(
            f"--values levels: the cells of target '{target.name}' are analog, expected discrete levels; name another "
            f"target, or give --set cell.levels=16"
        )
    points = min(_POINTS_PER_STEP * coding.steps, _MOST_POINTS)
    grid = np.linspace(-1, 1, 2 * points + 1, dtype=np.float32)[None]
    gain: npt.NDArray[Any] = coding.gain(np.ones(1))
    return tuple(np.unique(coding.decode(coding.encode(grid, gain), gain)).tolist())
