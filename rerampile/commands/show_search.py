"""What ``search`` shows in a terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from rerampile.runtime.progressive import SearchStep
from rerampile.runtime.search_report import SearchReport
from rerampile.terminal import facts_table, new_table, print_parts, printable

__all__ = ["show_search", "step_line"]


def step_line(step: SearchStep) -> str:
    """Return a step in one line."""
    verdict = f"{'accepted' if step.accepted else 'rejected'}{', best so far' if step.best else ''}: {step.reason}"
    if not step.ratio:
        return f"unpruned  {_plus_minus(step.mean, step.interval)}"
    blocks = ",".join(printable(block) for block in step.searched)
    if step.mean is None:
        return f"{step.ratio:g} of {blocks}  {verdict}"
    drop = _plus_minus(step.drop, step.drop_interval)
    return f"{step.ratio:g} of {blocks}  {_plus_minus(step.mean, step.interval)}  drop {drop}  {verdict}"


def show_search(out: Console, report: SearchReport, folder: Path) -> None:
    """Print a search: its path, its result beside the unpruned model, where the deployment is."""
    heads = ("step", "ratio", "blocks", "clean", f"{report.metric} of chips", "drop", "")
    rows = new_table(*((head, "left" if head in ("blocks", "") else "right") for head in heads))
    for number, step in enumerate(report.steps):
        verdict = "unpruned" if not step.ratio else "accepted" if step.accepted else "rejected"
        rows.add_row(
            str(number),
            f"{step.ratio:g}",
            ",".join(printable(block) for block in step.searched),
            "" if step.clean is None else f"{step.clean:.2f}",
            _plus_minus(step.mean, step.interval),
            _plus_minus(step.drop, step.drop_interval),
            verdict if number != report.best else f"{verdict}, best",
        )
    print_parts(out, rows)
    final = report.final
    same = report.selection == report.reported
    known = [
        *(
            [("judged on", f"{report.selection}, the data of the final figures; name others with --selection")]
            if same
            else []
        ),
        ("ratios", ", ".join(f"{block}={ratio:g}" for block, ratio in report.ratios.items())),
        ("unpruned", f"{final.unpruned_clean:.2f} clean, {_plus_minus(final.unpruned, final.unpruned_interval)}"),
        ("pruned", f"{final.clean:.2f} clean, {_plus_minus(final.mean, final.interval)}"),
        ("gain", f"{_plus_minus(final.gain, final.gain_interval)} points on {final.chips} chips, {report.reported}"),
        ("deployment", str(folder / "deployment")),
    ]
    print_parts(out, facts_table([(name, printable(text)) for name, text in known]))


def _plus_minus(mean: float | None, interval: tuple[float, float] | None) -> str:
    if mean is None:
        return ""
    return f"{mean:.2f}" if interval is None else f"{mean:.2f} ± {(interval[1] - interval[0]) / 2:.2f}"
