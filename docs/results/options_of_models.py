r"""Put what the options of 'rerampile compile' bring to several models on one page, from the pages of each.

Nothing is measured here: the numbers are those that 'options.py' wrote.

Example:
    python docs/results/options_of_models.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from options import DROP, OPTIONS, Line, tolerance
from tables import HERE, command, mean, table

from rerampile.runtime.validation import MetricReport


@dataclass(frozen=True)
class Model:
    """A page of one model.

    Attributes:
        page: Its name.
        title: The model and its data.
        metric: What it is scored by.
    """

    page: str
    title: str
    metric: str

    def lines(self) -> list[Line]:
        """Return what was measured, in the order of the options."""
        numbers = msgspec.json.decode(
            (HERE / f"{self.page}.json").read_bytes(), type=dict[str, dict[str, MetricReport]]
        )
        return [
            Line(option, self.metric, {float(rate): found for rate, found in numbers[option.name].items()})
            for option in OPTIONS
            if option.name in numbers
        ]


MODELS = (
    Model("resnet18-options", "ResNet18, CIFAR-10", "top1"),
    Model("resnet20-options", "ResNet20, CIFAR-10", "top1"),
    Model("mobilenetv2-options", "MobileNetV2, ImageNet", "top1"),
    Model("yolov4-tiny-options", "YOLOv4-tiny, COCO", "map50"),
)


def page(found: Sequence[tuple[Model, list[Line]]]) -> str:
    """Return the page in Markdown."""
    text = [
        "# Options of compile on four models",
        "",
        "What universal options bring against stuck cells (off : on = 1 : 5.2) of which nothing is known: the pages of",
        "the models tell how each was measured, draw it, and name the worst chips. Intervals are of 95 %.",
        "",
        f"## Times the failure rate of two columns with a tensor scale, at a drop of {DROP:g} point",
        "",
        "In brackets the interval over chips, open where the rates that were run do not bound it.",
        "",
        *table(["option", *(model.title for model, _ in found)], [times(option.name, found) for option in OPTIONS]),
    ]
    for model, lines in found:
        rates = sorted({rate for line in lines for rate in line.found})
        first = lines[0].found[rates[0]]
        text += [
            "",
            f"## {model.title}",
            "",
            f"Mean {model.metric} of {first.chips} chips, {first.clean:.1f} % without faults; the failure rate that is",
            f"tolerated at a drop of {DROP:g} point ([page]({model.page}.md)).",
            "",
            *table(["option", *(f"{r:g}" for r in rates), "tolerated"], [row(line, lines, rates) for line in lines]),
        ]
    return "\n".join([*text, "", *command("options_of_models.py", [])]) + "\n"


def row(line: Line, lines: Sequence[Line], rates: Sequence[float]) -> list[str]:
    """Return the row of an option in the table of its model."""
    name, tolerated, interval, *_ = tolerance(line, lines[0])
    return [name, *(mean(line.found[r]) if r in line.found else "" for r in rates), f"{tolerated} ({interval})"]


def times(option: str, found: Sequence[tuple[Model, list[Line]]]) -> list[str]:
    """Return the row of an option in the table of all models."""
    cells = []
    for _, lines in found:
        line = next((line for line in lines if line.option.name == option), None)
        *_, estimate, interval = ["", ""] if line is None else tolerance(line, lines[0])
        cells.append(f"{estimate} ({interval})" if interval else estimate)
    return [f"`{option}`", *cells]


def main() -> None:
    """Write the page."""
    found = [(model, model.lines()) for model in MODELS]
    (HERE / "options.md").write_text(page(found))


if __name__ == "__main__":
    main()
