"""The deployment plan: its types, its JSON, its schema.

``docs/plan-format.md`` is the normative description. The types below are the format: what they refuse is not a plan.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from rerampile.errors import PlanFormatError
from rerampile.schemes import Scheme

__all__ = [
    "FORMAT_VERSION",
    "ArrayPlan",
    "Conventions",
    "DigitalPlan",
    "FileRecord",
    "FoldPlan",
    "LayerPlan",
    "MaskPlan",
    "ModelRecord",
    "OutputError",
    "Partition",
    "Plan",
    "Producer",
    "Region",
    "Totals",
    "Use",
    "Verification",
    "decode_plan",
    "encode_plan",
    "plan_schema",
    "read_plan",
]

FORMAT_VERSION = 1
_LARGEST_PLAN = 1 << 30

Count = Annotated[int, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Range = Annotated[tuple[Count, Count], Meta(description="half-open: [first, one past the last)")]


class _Record(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A part of the plan; unknown fields are refused."""


class Producer(_Record, kw_only=True, frozen=True):
    """The program that wrote the plan."""

    name: str
    version: str


class ModelRecord(_Record, kw_only=True, frozen=True):
    """The model that was compiled."""

    name: str
    sha256: Sha256
    bytes: Count
    ir_version: Count
    opset: Count
    graph: str
    external_data: dict[str, Sha256] = {}
    inlined_functions: Count = 0
    converted_from_opset: Count | None = None
    deployed_ir_version: Count = 0


class Conventions(_Record, kw_only=True, frozen=True):
    """What the numbers of the plan mean, stated in every plan so that no reader has to guess."""

    rows: str = "word lines; inputs of a matrix; row r of an array is driven by one input"
    columns: str = "bit lines; outputs of a matrix; a column sums the currents of its cells"
    matrix: str = "[outputs, inputs] of one group; groups of a layer are stacked along the outputs in the cells tensor"
    cells_tensor: str = "[slices, cells, groups * outputs, inputs]; cell 0 is plus, cell 1 is minus"
    slice_order: str = "least significant first"
    column_order: str = "for each output of a partition in order: for each slice: for each role"
    weight: str = (
        "w = gain[output] * (sum_k significance[k] * plus_k - sum_k significance[k] * minus_k, or - reference)"
    )
    index_base: Literal[0] = 0
    ranges: str = "half-open [first, one past the last)"
    conductance_unit: Literal["S"] = "S"
    level_code: str = "0 is g_off, levels - 1 is g_on; uniform in conductance unless the target has a level_table"
    spare_cells: str = (
        "hold g_off (code 0); but where a row and a column of one array belong to the same layer and to no common "
        "group or partition, the cells hold a zero weight, because that row is driven while that column is read"
    )
    shared_arrays: str = "rows that belong to other layers than the running one are not driven"
    faults: str = "stuck_on = fixed at G_on (LRS); stuck_off = fixed at G_off (HRS)"


class FileRecord(_Record, kw_only=True, frozen=True):
    """A file of the deployment folder."""

    sha256: Sha256
    bytes: Count


class Use(_Record, kw_only=True, frozen=True):
    """A graph node that reads a layer's weights."""

    node: str
    op: str
    input: Count


class FoldPlan(_Record, kw_only=True, frozen=True):
    """A digital operation that was folded into a layer."""

    node: str
    op: str
    side: Literal["before", "after"]


class MaskPlan(_Record, kw_only=True, frozen=True):
    """How a layer was pruned."""

    source: str
    tensor: str
    kept: Count
    total: Count


class LayerPlan(_Record, kw_only=True, frozen=True):
    """One weight tensor as matrices of cells."""

    name: str
    uses: list[Use]
    block: str
    groups: Count
    outputs: Count
    inputs: Count
    output_order: str
    input_order: str
    weight_shape: list[Count]
    element_type: str
    stored_shape: list[Count]
    permutation: list[Count] | None
    scheme: Scheme
    cells: Annotated[int, Meta(ge=1, le=2)]
    slices: Annotated[int, Meta(ge=1)]
    significances: list[float]
    reference: float | None
    unit: Literal["S", "level"]
    cells_tensor: str
    gain_tensor: str
    scale: Literal["tensor", "channel"]
    zeros: Count
    sparsity: Fraction
    decoded_sha256: Sha256
    mean_cell_conductance: float
    mask: MaskPlan | None = None
    folds: list[FoldPlan] = []
    constant_chain: list[str] = []


class Partition(_Record, kw_only=True, frozen=True, omit_defaults=True):
    """The piece of a layer's matrices that sits on one array.

    ``inputs`` and ``outputs`` are ranges of one group's matrix, or lists of its indices where rows or columns were
    left out. A partition of several groups is block-diagonal: group ``groups[0] + k`` starts ``k`` times its own rows
    and columns further.
    """

    layer: Count
    row: Count = 0
    column: Count = 0
    groups: Range = (0, 1)
    inputs: Range | None = None
    outputs: Range | None = None
    input_index: list[Count] | None = None
    output_index: list[Count] | None = None
    replica: Count = 0

    @property
    def input_count(self) -> int:
        """Inputs, so rows, of one group."""
        return self.inputs[1] - self.inputs[0] if self.inputs is not None else len(self.input_index or ())

    @property
    def output_count(self) -> int:
        """Outputs of one group."""
        return self.outputs[1] - self.outputs[0] if self.outputs is not None else len(self.output_index or ())

    @property
    def input_indices(self) -> list[int]:
        """The inputs in the order of their rows."""
        return list(range(*self.inputs)) if self.inputs is not None else list(self.input_index or ())

    @property
    def output_indices(self) -> list[int]:
        """The outputs in the order of their columns."""
        return list(range(*self.outputs)) if self.outputs is not None else list(self.output_index or ())


class ArrayPlan(_Record, kw_only=True, frozen=True, omit_defaults=True):
    """One crossbar array. ``roles`` and ``slices`` say which cells of a weight its columns hold."""

    id: Count
    chip: Count
    tile: Count
    core: Count
    array: Count
    roles: list[Literal["plus", "minus"]]
    slices: list[Count]
    partitions: list[Partition]
    twin: Count | None = None


class Region(_Record, kw_only=True, frozen=True, omit_defaults=True):
    """A rectangle of a layer's matrix that takes no cells: all its weights are zero."""

    layer: Count
    reason: Literal["zero"]
    group: Count = 0
    inputs: Range | None = None
    outputs: Range | None = None
    input_index: list[Count] | None = None
    output_index: list[Count] | None = None


class DigitalPlan(_Record, kw_only=True, frozen=True):
    """A node that runs digitally, with the reason."""

    node: str
    op: str
    code: str
    reason: str


class Totals(_Record, kw_only=True, frozen=True):
    """Sums over the plan."""

    layers: Count
    weights: Count
    zeros: Count
    sparsity: Fraction
    arrays: Count
    partitions: Count
    cells: Count
    cells_used: Count
    utilisation: Fraction
    arrays_without_pruning: Count
    arrays_before_packing: Count
    arrays_saved_by_pruning: int
    arrays_saved_by_packing: int
    weights_without_cells: Count
    mean_pair_conductance: float
    digital_operations: Count


class OutputError(_Record, kw_only=True, frozen=True):
    """How far one output of the deployed model is from the reference's."""

    output: str
    max_abs_error: float
    max_abs_reference: float
    relative_error: float


class Verification(_Record, kw_only=True, frozen=True):
    """What compile checked, and found."""

    max_weight_error: float
    max_weight_error_of_bound: float
    onnxruntime: str
    seed: Count
    inputs: str
    tolerance: float
    sensitivity: float | None = None
    outputs: list[OutputError]
    outputs_unquantised: list[OutputError] = []


class Plan(_Record, kw_only=True, frozen=True):
    """A deployment plan: where every weight of a model sits on the crossbars of a target."""

    format: Literal["rerampile-plan"] = "rerampile-plan"
    format_version: Literal[1] = 1
    producer: Producer
    model: ModelRecord
    target: dict[str, Any]
    options: dict[str, Any]
    conventions: Conventions
    files: dict[str, FileRecord]
    totals: Totals
    layers: list[LayerPlan]
    digital: list[DigitalPlan]
    verification: Verification | None
    skipped: list[Region]
    arrays: list[ArrayPlan]


def encode_plan(plan: Plan) -> bytes:
    """Return the plan as JSON: indented, one array or region a line, the same bytes for the same plan."""
    body: dict[str, Any] = msgspec.to_builtins(plan)
    long = {name: body.pop(name) for name in ("skipped", "arrays")}
    text = msgspec.json.format(msgspec.json.encode(body), indent=1).decode().rstrip()
    parts = [text.removesuffix("\n}")]
    for name, rows in long.items():
        lines = ",\n  ".join(msgspec.json.encode(row).decode() for row in rows)
        parts.append(f' "{name}": [\n  {lines}\n ]' if rows else f' "{name}": []')
    return (",\n".join(parts) + "\n}\n").encode()


def decode_plan(data: bytes, where: str) -> Plan:
    """Parse and check a plan.

    Raises:
        PlanFormatError: It is no plan, of another version, or a field is missing, unknown or of the wrong kind.
    """
    version = re.search(rb'"format_version"\s*:\s*(\d+)', data[:4096])
    if version and int(version[1]) > FORMAT_VERSION:
        raise PlanFormatError(
            f"{where}: $.format_version: {int(version[1])}, expected at most {FORMAT_VERSION}; "
            "it was written by a newer rerampile, upgrade to read it"
        )
    try:
        return msgspec.json.decode(data, type=Plan)
    except msgspec.DecodeError as error:
        raise PlanFormatError(f"{where}: not a deployment plan: {error}") from error


def read_plan(path: Path) -> Plan:
    """Read and check a plan file.

    Raises:
        PlanFormatError: It is missing, absurdly large or no plan.
    """
    try:
        if path.stat().st_size > _LARGEST_PLAN:
            raise PlanFormatError(f"{path}: {path.stat().st_size} bytes, expected a plan of at most {_LARGEST_PLAN}")
        return decode_plan(path.read_bytes(), str(path))
    except OSError as error:
        raise PlanFormatError(
            f"{path}: cannot be read: {error.strerror or error}; expected the plan.json of a deployment folder"
        ) from error


def plan_schema() -> dict[str, Any]:
    """Return the JSON Schema of a plan (it also ships as ``plan.schema.json`` in the package)."""
    schema = msgspec.json.schema(Plan)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "rerampile deployment plan", **schema}
