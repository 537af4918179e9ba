"""What ``prune`` shows in a terminal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console

from rerampile.pruning import PrunedModel
from rerampile.terminal import facts_table, new_table, print_parts, printable

__all__ = ["show_pruning"]


def show_pruning(out: Console, pruned: PrunedModel, path: Path) -> None:
    """Print a pruning: its layers, those that were left whole, where the model is."""
    rows = new_table(("layer", "left"), ("weights", "right"), ("zeros", "right"), ("outputs changed", "right"))
    for layer in pruned.layers:
        zeros = 1 - np.count_nonzero(layer.kept) / max(layer.kept.size, 1)
        rows.add_row(printable(layer.name), f"{layer.kept.size:,}", f"{zeros:.1%}", f"{layer.loss:.2%}")
    print_parts(out, rows)
    few = [layer.name for layer in pruned.layers if layer.deficient]
    known = [
        ("zeros", f"{pruned.sparsity:.1%} of the weights of {len(pruned.layers)} layers"),
        *(("whole", f"{name}: {reason}") for name, reason in pruned.left.items()),
        *(
            [
                (
                    "few images",
                    f"fewer independent inputs than weights of an output in {len(few)} layers, such as {few[0]}; "
                    "give more with --images",
                )
            ]
            if few
            else []
        ),
        ("model", str(path)),
    ]
    print_parts(out, facts_table([(name, printable(text)) for name, text in known]))
