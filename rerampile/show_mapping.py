"""What ``show`` tells of the choice of schemes."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from rerampile.plan import Plan
from rerampile.schemes import SCHEMES
from rerampile.terminal import new_table, print_parts, printable

__all__ = ["show_choices"]


def show_choices(out: Console, plan: Plan) -> None:
    """Print what each scheme would cost each layer, beside the one it has; nothing where no layer weighed any."""
    chosen = [(layer, layer.choice) for layer in plan.layers if layer.choice is not None]
    if not chosen:
        return
    table = new_table(("layer", "left"), ("scheme", "left"), *((scheme, "right") for scheme in SCHEMES))
    for layer, choice in chosen:
        costs = {estimate.scheme: estimate.cost for estimate in choice.estimates}
        own = costs.get(layer.scheme) or 1.0
        table.add_row(
            printable(layer.name),
            layer.scheme,
            *(f"{costs[scheme] / own:.3g}" if scheme in costs else "" for scheme in SCHEMES),
        )
    words = "Expected error of the weights, and current where it has a weight, times that of the layer's own scheme."
    out.print()
    print_parts(out, table, Text(words))
