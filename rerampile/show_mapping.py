"""What ``show`` tells of the choice of schemes and of full scales."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from rerampile.plan import ClipPlan, Plan
from rerampile.schemes import SCHEMES
from rerampile.terminal import new_table, print_parts, printable

__all__ = ["clip_words", "show_choices", "show_clips"]


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


def clip_words(plan: Plan) -> str | None:
    """Return in one line what clipping did, None where nothing was to be clipped."""
    clips = [(layer, layer.clip) for layer in plan.layers if isinstance(layer.clip, ClipPlan)]
    if not clips:
        return None
    count = sum(clip.clipped for _, clip in clips)
    layer, most = max(clips, key=lambda pair: pair[1].output_change)
    words = (
        f"{count:,} weights; that changes the outputs of '{printable(layer.name)}' most, by {most.output_change:.2%}"
    )
    left = sum(clip.reason is not None for _, clip in clips)
    return f"{words}; {left:,} layers left as they are" if left else words


def show_clips(out: Console, plan: Plan) -> None:
    """Print what full scales each layer has and what is expected of them; nothing where they were not chosen."""
    clips = [(layer, layer.clip) for layer in plan.layers if isinstance(layer.clip, ClipPlan)]
    if not clips:
        return
    numbers = ("clipped", "full scale", "change", "error", "before")
    table = new_table(("layer", "left"), *((name, "right") for name in numbers))
    for layer, clip in clips:
        shares = (clip.full_scale, clip.output_change, clip.error, clip.error_unclipped)
        table.add_row(
            printable(layer.name),
            f"{clip.clipped:,}",
            *("" if share is None or clip.reason else f"{share:.3%}" for share in shares),
        )
    words = (
        "Full scales as shares of the largest weights. Of the outputs, squared: what clipping changes without faults, "
        "and the error that is expected with them, clipped and before."
    )
    out.print()
    print_parts(out, table, *(Text(f"{printable(layer.name)}: {clip.reason}") for layer, clip in clips if clip.reason))
    print_parts(out, Text(words))
