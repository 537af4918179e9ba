"""A picture of the cells of an array on a terminal."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from rich.color import Color
from rich.console import Console, Group
from rich.style import Style
from rich.text import Text

from rerampile.terminal import siemens_text

__all__ = ["cell_picture"]

_SHADES, _ASCII_SHADES = "░▒▓█", ".:*#"
# From low to high, readable in the dark, in print, and to the colour-blind; spare cells are darker than any.
_RAMP = np.array([(40, 40, 120), (50, 90, 140), (30, 145, 140), (95, 200, 95), (250, 230, 40)], np.float64)
_SPARE = (24, 24, 24)


def cell_picture(out: Console, siemens: npt.NDArray[np.float32], used: npt.NDArray[np.bool_]) -> Group:
    """Return the mean conductance of square patches of cells, in colour or in shades; spare cells are dark or blank.

    Args:
        out: Where it will be printed.
        siemens: Conductance of each cell, [rows, columns].
        used: Which cells belong to a partition, [rows, columns].
    """
    side = -(-siemens.shape[1] // (min(out.width, 132) - 2))
    coloured = out.color_system in ("256", "truecolor") and not out.no_color
    mean = _patches(siemens, used, side if coloured else 2 * side, side)
    low, high = float(np.nanmin(mean)), float(np.nanmax(mean))
    level = (mean - low) / ((high - low) or 1.0)
    shades = _ASCII_SHADES if out.options.ascii_only else _SHADES
    if coloured:
        lines, (dark, bright) = _half_blocks(level), _rgb(np.array([0.0, 1.0]))
        ends = Text("■", Style(color=Color.from_rgb(*dark))), Text("■", Style(color=Color.from_rgb(*bright)))
    else:
        number = np.minimum(np.nan_to_num(level) * len(shades), len(shades) - 1).astype(int)
        blank = np.isnan(level)
        lines = [
            Text("".join(" " if b else shades[n] for n, b in zip(*row, strict=True)))
            for row in zip(number, blank, strict=True)
        ]
        ends = Text(shades[0]), Text(shades[-1])
    dash, bar = "-|" if out.options.ascii_only else "─│"
    edge = Text(f" {dash * lines[0].cell_len}")
    legend = Text.assemble(
        f" each character {2 * side} × {side} cells, on average: ",
        *(ends[0], f" {siemens_text(low)} to ", ends[1], f" {siemens_text(high)}"),
    )
    return Group(edge, *(Text.assemble(bar, line, bar) for line in lines), edge, legend)


def _patches(
    siemens: npt.NDArray[np.float32], used: npt.NDArray[np.bool_], height: int, width: int
) -> npt.NDArray[np.float64]:
    """Return the mean of the used cells of each patch of ``height`` × ``width``, NaN where none is."""

    def sums(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        by_row = np.add.reduceat(values.astype(np.float64), np.arange(0, values.shape[0], height), axis=0)
        return np.add.reduceat(by_row, np.arange(0, values.shape[1], width), axis=1)

    count = sums(used)
    means: npt.NDArray[np.float64] = np.full(count.shape, np.nan)
    return np.divide(sums(siemens * used), count, out=means, where=count > 0)


def _half_blocks(level: npt.NDArray[np.float64]) -> list[Text]:
    """Return lines of characters that each show one patch above another, by foreground and background."""
    if len(level) % 2:
        level = np.pad(level, ((0, 1), (0, 0)), constant_values=np.nan)
    colours = _rgb(level)
    return [
        Text.assemble(
            *(
                ("▀", Style(color=Color.from_rgb(*above), bgcolor=Color.from_rgb(*below)))
                for above, below in zip(top, bottom, strict=True)
            )
        )
        for top, bottom in zip(colours[::2], colours[1::2], strict=True)
    ]


def _rgb(level: npt.NDArray[np.float64]) -> Any:
    """Return the colour of levels from 0 to 1, as nested lists of (red, green, blue); NaN is spare."""
    position = np.nan_to_num(level) * (len(_RAMP) - 1)
    colours = np.stack([np.interp(position, np.arange(len(_RAMP)), channel) for channel in _RAMP.T], axis=-1)
    return np.where(np.isnan(level)[..., None], _SPARE, colours).astype(int).tolist()


# Targets.
