"""What ``show`` tells of the choice of schemes, of full scales and of copies."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from rerampile.layer_plan import ClipPlan, CopiesPlan, LayerPlan
from rerampile.plan import Plan
from rerampile.schemes import SCHEMES
from rerampile.terminal import new_table, print_parts, printable
from rerampile.totals import arrays_spent

__all__ = ["clip_words", "copies_words", "show_calibrated", "show_choices", "show_copies"]


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
    alike = "" if plan.options.get("calibration") else ", all inputs counted alike"
    words = f"that changes the outputs of '{printable(layer.name)}' most, by {most.output_change:.2%}"
    words = f"{count:,} weights{alike}; {words}"
    left = sum(clip.reason is not None for _, clip in clips)
    return f"{words}; {left:,} layers left as they are" if left else words


def copies_words(plan: Plan) -> str | None:
    """Return in one line what spare arrays were spent on, None where they were not to be spent."""
    copies = [layer.copies for layer in plan.layers if isinstance(layer.copies, CopiesPlan)]
    if not copies:
        return None
    counts = [each.count for each in copies if each.count > 1]
    if not counts:
        return "no array was left that a further copy of a layer fits on"
    after, before = (sum(c.error for c in copies) / len(copies), sum(c.error_single for c in copies) / len(copies))
    return (
        f"{arrays_spent(plan.arrays):,} arrays for {len(counts):,} of {len(copies):,} layers, held up to {max(counts)} "
        f"times; expected squared error of a layer {after:.2%}, without {before:.2%}"
    )


def show_copies(out: Console, plan: Plan) -> None:
    """Print how often each layer is held and what that saves; nothing where spare arrays were not to be spent."""
    copies = [(layer, layer.copies) for layer in plan.layers if isinstance(layer.copies, CopiesPlan)]
    if not copies:
        return
    table = new_table(("layer", "left"), ("copies", "right"), ("error", "right"), ("of one copy", "right"))
    for layer, each in copies:
        table.add_row(printable(layer.name), str(each.count), f"{each.error:.3%}", f"{each.error_single:.3%}")
    words = "Copies whose mean is read, and what is expected to differ from chip to chip in the outputs, squared."
    out.print()
    print_parts(out, table, Text(words))


def show_calibrated(out: Console, plan: Plan) -> None:
    """Print the full scales and gains of layers, and what is expected of them; nothing where all are the plain ones."""
    layers = [layer for layer in plan.layers if layer.clip or layer.correction]
    if not layers:
        return
    numbers = ("clipped", "full scale", "change", "gain", "error", "before")
    table = new_table(("layer", "left"), *((name, "right") for name in numbers))
    for layer in layers:
        table.add_row(printable(layer.name), *_calibrated(layer))
    words = (
        "Full scales as shares of the largest weights, and what gains are multiplied by. Of the outputs, squared: what "
        "clipping changes without faults, and the error that is expected with them, now and before."
    )
    reasons = [(layer.name, layer.clip.reason) for layer in layers if layer.clip and layer.clip.reason]
    out.print()
    print_parts(out, table, *(Text(f"{printable(name)}: {reason}") for name, reason in reasons))
    print_parts(out, Text(words))


def _calibrated(layer: LayerPlan) -> Iterator[str]:
    """Yield the numbers of a layer, empty where it has none."""
    clip = layer.clip if layer.clip and layer.clip.reason is None else None
    correction = layer.correction or None
    yield f"{clip.clipped:,}" if clip else ""
    yield f"{clip.full_scale:.1%}" if clip else ""
    yield f"{clip.output_change:.3%}" if clip else ""
    yield f"{correction.gain:.4f}" if correction else ""
    errors = (
        correction.error if correction else clip and clip.error,
        clip.error_unclipped if clip else correction and correction.error_uncorrected,
    )
    yield from ("" if error is None else f"{error:.3%}" for error in errors)
