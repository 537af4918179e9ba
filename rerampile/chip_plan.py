"""What the plan of a programmed chip says of that chip."""

from __future__ import annotations

from typing import Literal

import msgspec

from rerampile.plan_record import Count, Record, Sha256

__all__ = ["ChipLayer", "ChipPlan", "ChipStep", "Unrepaired"]


class ChipStep(Record, kw_only=True, frozen=True):
    """What one step of programming left of the errors of a chip.

    Attributes:
        step: ``none`` before anything was done, else the step: ``compensate``, ``assign``, ``flip``, ``repair``,
            ``gain`` or ``bias``.
        error: Root of the mean over layers of the squared relative errors, all layers counting alike.
        touched: Healthy cells whose target differs from the compiled one, after this step.
        moved: Inputs and outputs of partitions that another row or other columns have been given, after this step.
        flipped: Column segments with changed roles, after this step.
    """

    step: Literal["none", "compensate", "assign", "flip", "repair", "gain", "bias"]
    error: float
    touched: Count
    moved: Count
    flipped: Count


class ChipLayer(Record, kw_only=True, frozen=True):
    """One layer on one chip.

    Attributes:
        stuck: Cells on a row and a column of the layer that are not read as programmed: stuck, or cut off with one.
        beside: Those of them that hold no weight, but join blocks of the layer. No step makes up for them.
        weights: Weights that the faults could change.
        unrepaired: Weights that still differ from the compiled ones by more than 1e-6 of the output's full scale, of
            those that faults hit.
        measure: What errors are weighed by: ``moments`` of the layer's inputs, or ``plain`` squares of weights.
        energy: That of the compiled weights.
        errors: Energy of the errors before, and after each of the plan's steps, as a share of ``energy``; what leaks
            between groups included, as if inputs that leak had nothing in common.
        bias: Initializer of ``deployed.onnx`` whose values step ``bias`` has shifted; null where none.
        shift: What was added to it, for each output; empty where there is none.
    """

    stuck: Count
    beside: Count
    weights: Count
    unrepaired: Count
    measure: Literal["moments", "plain"]
    energy: float
    errors: list[float]
    bias: str | None
    shift: list[float]


class Unrepaired(Record, kw_only=True, frozen=True):
    """A weight that no step could restore.

    Attributes:
        layer: Position in ``layers``.
        output: Row of the layer's matrix, ``group * outputs + output``.
        input: Its column.
        wanted: The weight that was compiled.
        found: What the chip reads.
        share: Its squared error by the layer's measure (without cross terms), as a share of the layer's energy.
        array: The array of its stuck cell; of the first, where several are stuck.
        row: The cell's row there.
        column: Its column.
    """

    layer: Count
    output: Count
    input: Count
    wanted: float
    found: float
    share: float
    array: Count
    row: Count
    column: Count


class ChipPlan(Record, kw_only=True, frozen=True):
    """What was done to make one chip, whose stuck cells are known, as good as it can be.

    Attributes:
        faults: The file of the folder with the chip's stuck cells, a fault map with one chip.
        source: Name of the fault map that was given.
        source_sha256: Hash of that file.
        number: Number of the chip in it.
        compiled: Name of the folder of the deployment that was programmed.
        compiled_sha256: Its ``plan_sha256``.
        stuck_off: Stuck-off cells of all arrays.
        stuck_on: Stuck-on cells of all arrays.
        categories: Cells of all arrays that failed in other ways, by name; left out where there are none.
        calibration: Name of the calibration data; null where there were none.
        calibration_images: Images of it.
        steps: Before anything, and after each step that was taken.
        layers: Each layer of the plan.
        unrepaired: The worst of the weights that stay wrong, the worst first; at most 100.
        unrepaired_total: How many weights stay wrong.
        output_error_before: Error of the outputs on the inputs of the verification against those of the deployment,
            rms over rms over all outputs, with the stuck cells and the compiled targets; null where an output is no
            numbers.
        output_error: The same as programmed.
    """

    faults: str
    source: str
    source_sha256: Sha256
    number: Count
    compiled: str
    compiled_sha256: Sha256
    stuck_off: Count
    stuck_on: Count
    calibration: str | None
    calibration_images: Count
    steps: list[ChipStep]
    layers: list[ChipLayer]
    unrepaired: list[Unrepaired]
    unrepaired_total: Count
    output_error_before: float | None
    output_error: float | None
    categories: dict[str, Count] | msgspec.UnsetType = msgspec.UNSET
