"""One array as allocation sees it: the room that it has, and the pieces of layers that fill it along its diagonal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rerampile.array_plan import ArrayPlan, Partition
from rerampile.errors import CapacityError
from rerampile.layer import Layer
from rerampile.schemes import Coding
from rerampile.target import Target

__all__ = ["Bin", "Grid", "Piece", "array_set"]

Role = Literal["plus", "minus"]


@dataclass(frozen=True)
class Grid:
    """The geometry of one array as partitions see it.

    Attributes:
        rows: Inputs an array has room for.
        outputs: Outputs an array has room for.
        width: Columns that one output takes.
        slices: Slices of a weight, all on one array.
        roles: The roles of each array of a set: one array with both cells, or twins with one each.
    """

    rows: int
    outputs: int
    width: int
    slices: int
    roles: tuple[tuple[Role, ...], ...]

    @classmethod
    def of(cls, target: Target, coding: Coding) -> Grid:
        """Return the geometry for weights of a coding.

        Raises:
            CapacityError: An array has no room for a single one.
        """
        cells: tuple[Role, ...] = ("plus", "minus") if coding.cells == 2 else ("plus",)
        twin = target.pair_layout == "twin" and len(cells) == 2
        roles: tuple[tuple[Role, ...], ...] = (("plus",), ("minus",)) if twin else (cells,)
        width = len(roles[0]) * coding.slices
        if width > target.columns:
            raise CapacityError(
                f"target '{target.name}': one output takes {width} columns ({coding.slices} slices of "
                f'{len(roles[0])} cells), an array has {target.columns}; use fewer slices or pair_layout = "twin"'
            )
        return cls(target.rows, target.columns // width, width, coding.slices, roles)

    def groups_at_once(self, layer: Layer) -> int:
        """How many whole groups of a layer lie block-diagonally on one array, 0 where not even one fits."""
        return min(self.rows // layer.view.inputs, self.outputs // layer.view.outputs)

    def dense_count(self, layer: Layer) -> int:
        """Arrays (sets of twins counted once) that the layer would take with nothing left out."""
        view = layer.view
        if self.groups_at_once(layer) > 1:
            return -(-view.groups // self.groups_at_once(layer))
        return view.groups * -(-view.inputs // self.rows) * -(-view.outputs // self.outputs)


@dataclass(frozen=True)
class Piece:
    """A partition before it has a position: ``partition`` without row and column, and its size."""

    partition: Partition
    rows: int
    outputs: int
    group: int


@dataclass(eq=False)
class Bin:
    """An array (or a set of twins) that is being filled along its diagonal."""

    grid: Grid
    rows: int = 0
    outputs: int = 0
    pieces: list[tuple[Piece, int, int]] = field(default_factory=list)

    @property
    def layers(self) -> set[int]:
        """The layers, by position in the plan, of which something is on it."""
        return {piece.partition.layer for piece, _, _ in self.pieces}

    @property
    def share(self) -> float:
        """How much of its diagonal is taken, from 0 to 1."""
        return max(self.rows / self.grid.rows, self.outputs / self.grid.outputs)

    def has_room(self, rows: int, outputs: int) -> bool:
        """Whether so many rows and outputs more fit."""
        return self.rows + rows <= self.grid.rows and self.outputs + outputs <= self.grid.outputs

    def add(self, piece: Piece) -> None:
        """Put one more piece on it, for which there is room."""
        self.pieces.append((piece, self.rows, self.outputs))
        self.rows += piece.rows
        self.outputs += piece.outputs

    def absorb(self, other: Bin) -> None:
        """Put all pieces of another one on it, for which there is room."""
        self.pieces += [(piece, self.rows + row, self.outputs + output) for piece, row, output in other.pieces]
        self.rows += other.rows
        self.outputs += other.outputs


def array_set(
    target: Target, first: int, roles: Sequence[Sequence[Role]], slices: list[int], partitions: list[Partition]
) -> Iterator[ArrayPlan]:
    """Yield an array, or two twins, in address order.

    Args:
        target: The hardware.
        first: Id of the first one.
        roles: The roles of each of them.
        slices: The slices that they hold.
        partitions: What sits on them.
    """
    for k, own in enumerate(roles):
        chip, tile, core, array = target.address(first + k)
        yield ArrayPlan(
            id=first + k,
            chip=chip,
            tile=tile,
            core=core,
            array=array,
            roles=list(own),
            slices=slices,
            partitions=partitions,
            twin=first + 1 - k if len(roles) == 2 else None,
        )
