"""Weights as a chip with random stuck cells reads them, drawn anew for every step of a training.

After Kim et al. 2020: the network meets other defects at each step, so that no weight can rely on one cell. Cells are
stuck independently, as in :mod:`rerampile.runtime.faults`, and read as the hardware does
(:mod:`rerampile.failed_cells`); which array they lie on does not matter to that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from rerampile.errors import ConfigError
from rerampile.layer import Layer
from rerampile.passes.map import plain_coding
from rerampile.runtime.faults import FaultModel
from rerampile.schemes import SCHEMES, WEIGHED, Coding, Scale, Scheme, known_mapping
from rerampile.segments import Segments
from rerampile.target import Target

__all__ = ["Defects", "StuckWeights"]

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Defects:
    """What chips suffer from, and how weights lie on them.

    Attributes:
        faults: Probabilities of stuck cells.
        target: The hardware.
        mapping: A scheme that does not depend on the faults, or None for the target's.
        scale: What one full scale is for.
    """

    faults: FaultModel
    target: Target = field(default_factory=lambda: Target.load("paper"))
    mapping: str | None = None
    scale: Scale = "channel"

    def __post_init__(self) -> None:
        self.coding  # noqa: B018 - refuses what cannot be coded

    @property
    def coding(self) -> Coding:
        """How a weight lies on its cells.

        Raises:
            ConfigError: That depends on the faults.
        """
        name = known_mapping(self.mapping or self.target.mapping)
        if name in WEIGHED:
            plain = ", ".join(scheme for scheme in SCHEMES if scheme not in WEIGHED)
            raise ConfigError(f"--mapping {name}: cannot be trained with, expected {plain}")
        scheme: Scheme = name  # type: ignore[assignment]
        return plain_coding(self.target, scheme)


class StuckWeights:
    """Draws the weights of one layer that stuck cells change.

    Args:
        defects: What happens.
        layer: The layer.
    """

    def __init__(self, defects: Defects, layer: Layer) -> None:
        self._defects, self._coding, self._view = defects, defects.coding, layer.view
        self._factor = layer.fold_factor()
        places = np.arange(int(np.prod(layer.view.shape)), dtype=np.int64).reshape(layer.view.tensor_shape)
        self._places = layer.view.matrix(places).reshape(-1)  # of each weight of the matrix in the tensor

    def draw(self, tensor: Floats, random: np.random.Generator) -> tuple[Integers, Floats]:
        """Return which weights change, as flat positions in the layer's tensor, and what they become.

        Args:
            tensor: The layer's weights as its node reads them, float32.
            random: What the draws come from.
        """
        matrix = self._view.matrix(tensor)
        matrix = matrix if self._factor is None else matrix * self._factor
        parts = self._coding.slices * self._coding.cells
        cell = _hits(self._defects.faults.rate, matrix.size * parts, random)
        changed, at = np.unique(cell // parts, return_inverse=True)
        gain = self._gain(matrix, changed)
        cells = self._coding.encode(matrix.reshape(-1)[changed, None], gain)
        table = self._coding.cell_values
        values = (cells if table is None else table[cells]).astype(np.float32).reshape(parts, -1)
        part = cell % parts
        values[part, at] = worth = self._coding.worth(self._stuck(len(cell), random))
        if self._defects.target.failed_cells.isolates_pairs and self._coding.cells == 2:
            values[part ^ 1, at] = worth
        read = self._coding.combine(values.reshape(*cells.shape[:2], -1)) * gain
        if self._factor is not None:
            factor = np.broadcast_to(self._factor, matrix.shape)[np.divmod(changed, matrix.shape[1])]
            read = np.divide(read, factor, out=np.zeros_like(read), where=factor != 0)
        return self._places[changed], read

    def _gain(self, matrix: Floats, position: Integers) -> Floats:
        """Return the gain of weights at some flat positions of the matrix."""
        if self._defects.scale == "partition":
            segments = Segments.by_rows(np.asarray(matrix.any(axis=0)), self._defects.target.rows)
            scale = segments.full_scale(matrix)
        else:
            segments, scale = Segments.whole(matrix.shape[1]), np.abs(matrix).max(axis=1)
        gain = self._coding.gain(np.full_like(scale, scale.max()) if self._defects.scale == "tensor" else scale)
        found: Floats = segments.at(gain, position)
        return found

    def _stuck(self, count: int, random: np.random.Generator) -> Floats:
        """Return what some stuck cells are read as, siemens: normal around the mean of their state, within limits."""
        faults, target = self._defects.faults, self._defects.target
        probabilities = dict(reversed(faults.probabilities.items()))
        failures = [target.failure(state) for state in probabilities]
        reach = np.cumsum([*probabilities.values()])
        state = np.searchsorted(reach[:-1], random.random(count) * faults.rate, "right")
        mean, spread = np.array([[failure.mean, failure.spread] for failure in failures])[state].T
        drawn: Floats = np.clip(mean + spread * random.standard_normal(count), *target.failed_limits)
        return drawn.astype(np.float32)


def _hits(rate: float, count: int, random: np.random.Generator) -> Integers:
    """Return which of ``range(count)`` are hit, each with a probability of ``rate``, ascending."""
    found: list[npt.NDArray[Any]] = [np.zeros(0, np.int64)]
    last = -1
    while rate > 0 and last < count:
        gaps = random.geometric(rate, size=int(count * rate) + 64)
        found.append(last + np.cumsum(gaps))
        last = int(found[-1][-1])
    hits = np.concatenate(found)
    return hits[hits < count]
