"""The deployment plan: its types, its JSON, its schema.

``docs/plan-format.md`` is the normative description. The types below are the format: what they refuse is not a plan.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from rerampile.array_plan import ArrayPlan, Region
from rerampile.chip_plan import ChipPlan
from rerampile.errors import PlanFormatError
from rerampile.files import require_regular
from rerampile.layer_plan import LayerPlan
from rerampile.plan_record import Count, Fraction, Record, Sha256

__all__ = [
    "FORMAT_VERSION",
    "NO_SHA256",
    "Conventions",
    "DigitalPlan",
    "FileRecord",
    "ModelRecord",
    "OutputError",
    "Plan",
    "Producer",
    "ProtectionPlan",
    "Totals",
    "Verification",
    "Vote",
    "decode_plan",
    "encode_plan",
    "plan_checksum",
    "read_plan",
]

FORMAT_VERSION = 1
NO_SHA256 = "0" * 64
_LARGEST_PLAN = 1 << 30

Vote = Literal["median", "mean"]


class Producer(Record, kw_only=True, frozen=True):
    """The program that wrote the plan.

    Attributes:
        name: Its name.
        version: Its version.
    """

    name: str
    version: str


class ModelRecord(Record, kw_only=True, frozen=True):
    """The model that was compiled.

    Attributes:
        name: File name; the name of the graph where the model came without a file.
        sha256: Hash of the model file.
        bytes: Size of the model file and its external data.
        ir_version: ONNX IR version of the model.
        opset: Version of the standard operator set that the compiler worked with.
        graph: Name of the graph.
        external_data: Hash of each external data file, by its location relative to the model.
        inlined_functions: Model-local functions that were inlined before compiling.
        converted_from_opset: Operator set of the file, where it was too old and converted up to ``opset``.
        deployed_ir_version: IR version of ``deployed.onnx``.
        fixed_inputs: Graph inputs with a default value that cells or folded biases hold: another value has no effect
            on those, and ``deployed.onnx`` has the input only where a digital node reads it too.
    """

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
    fixed_inputs: list[str] = []


class Conventions(Record, kw_only=True, frozen=True):
    """What the numbers of the plan mean, stated in every plan so that no reader has to guess.

    Attributes:
        rows: What a row of an array is.
        columns: What a column of an array is.
        matrix: Axes of a weight matrix.
        cells_tensor: Axes of a layer's tensor of cells.
        slice_order: Order of slices.
        column_order: Order of columns inside a partition.
        weight: How a weight is decoded.
        index_base: What counting starts from.
        ranges: What a range of two numbers includes.
        conductance_unit: Unit of every conductance in the plan and of analog cells.
        level_code: What a level code means.
        spare_cells: What cells hold that hold no weight.
        shared_arrays: What happens on an array of several layers.
        faults: What the fault words mean.
    """

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
    shared_arrays: str = (
        "rows that belong to other layers than the running one are not driven; nor are those of the other direction "
        "of a recurrent layer, whose directions run one after the other"
    )
    faults: str = "stuck_on = fixed at G_on (LRS); stuck_off = fixed at G_off (HRS)"

    @classmethod
    def of(cls, layers: Sequence[LayerPlan]) -> Conventions:
        """Return the conventions of a plan with these layers."""
        if all(layer.segments is msgspec.UNSET for layer in layers):
            return cls()
        return cls(weight=cls().weight.replace("gain[output]", "gain[output, segment of the input]"))


class FileRecord(Record, kw_only=True, frozen=True):
    """A file of the deployment folder.

    Attributes:
        sha256: Hash of the file.
        bytes: Its size.
    """

    sha256: Sha256
    bytes: Count


class DigitalPlan(Record, kw_only=True, frozen=True):
    """A node that runs digitally, with the reason.

    Attributes:
        node: The node of the user's model, named as in ``uses``.
        op: Its operator, with its domain where it is not the standard one.
        code: The reason in one word, for programs.
        reason: The reason in words.
    """

    node: str
    op: str
    code: str
    reason: str


class Totals(Record, kw_only=True, frozen=True):
    """Sums over the plan.

    Attributes:
        layers: Layers.
        weights: Weights of all layers.
        zeros: Weights that are exactly zero.
        sparsity: Their share.
        arrays: Arrays that are used.
        partitions: Partitions on them; twins count each.
        cells: Cells of the used arrays.
        cells_used: Cells inside partitions.
        utilisation: ``cells_used / cells``.
        arrays_without_pruning: Arrays that the same model would take with no row and no column left out, unpacked.
        arrays_before_packing: Arrays with rows and columns left out, unpacked.
        arrays_saved_by_pruning: ``arrays_without_pruning`` less ``arrays_before_packing``.
        arrays_saved_by_packing: ``arrays_before_packing`` less the arrays that hold weights.
        weights_without_cells: Weights in skipped regions.
        mean_pair_conductance: Mean conductance of the cells of a weight in one slice, summed over its pair, siemens,
            over the cells that sit on arrays.
        digital_operations: Entries of ``digital``.
        arrays_spent: Arrays that hold nothing but further copies of layers, counted in ``arrays``; left out where spare
            arrays were not to be spent.
    """

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
    arrays_spent: Count | msgspec.UnsetType = msgspec.UNSET


class ProtectionPlan(Record, kw_only=True, frozen=True):
    """What copies of most significant slices, and votes on what they are read as, protect.

    Attributes:
        slices: How many slices of a weight are copied twice, the most significant ones.
        vote: How three sums become one: their ``median``, or their ``mean``.
        weights: Weights that have copies.
        weights_with_cells: Weights that have cells at all.
        cells: Cells that hold copies.
        arrays_without_protection: Arrays that hold weights; the other ones of ``totals.arrays`` hold copies alone, in
            the place of arrays that pruning freed.
    """

    slices: Annotated[int, Meta(ge=1)]
    vote: Vote
    weights: Count
    weights_with_cells: Count
    cells: Count
    arrays_without_protection: Count


class OutputError(Record, kw_only=True, frozen=True):
    """How far one output of the deployed model is from the reference's.

    Attributes:
        output: Name of the graph output.
        max_abs_error: Largest difference.
        max_abs_reference: Largest magnitude of the reference.
        relative_error: ``max_abs_error / max_abs_reference``; the error itself where the reference is all zero.
        numbers: How many numbers were compared; 0 where the output is empty, so that its error says nothing.
    """

    output: str
    max_abs_error: float
    max_abs_reference: float
    relative_error: float
    numbers: Count


class Verification(Record, kw_only=True, frozen=True):
    """What compile checked, and found.

    Attributes:
        max_weight_error: Largest difference between a decoded weight and the pruned one.
        max_weight_error_of_bound: The largest, as a share of what the cells allow (rounding, or half a level).
        onnxruntime: Version of ONNX Runtime that ran the models.
        seed: Seed of generated inputs.
        inputs: ``generated``, or the name of the inputs file.
        tolerance: Largest relative output error that passes.
        sensitivity: For models that quantise activations: relative change of the outputs when inputs change by 1e-4.
        outputs: The deployed model against the user's graph with the weights that the cells hold.
        outputs_unquantised: The same against the pruned weights before they were rounded to levels; empty for analog
            cells.
        layers: For models that quantise activations: the result of each mapped layer of the main graph, on the same
            inputs as the node that it replaces; results of whole numbers that differ by one step count as equal.
    """

    max_weight_error: float
    max_weight_error_of_bound: float
    onnxruntime: str
    seed: Count
    inputs: str
    tolerance: float
    sensitivity: float | None = None
    outputs: list[OutputError]
    outputs_unquantised: list[OutputError] = []
    layers: list[OutputError] = []


class Plan(Record, kw_only=True, frozen=True, omit_defaults=True):
    """A deployment plan: where every weight of a model sits on the crossbars of a target.

    Attributes:
        format: What kind of file this is.
        format_version: Version of the format.
        plan_sha256: Hash of this very file, with these 64 digits replaced by zeros.
        producer: The program that wrote it.
        model: The model that was compiled.
        target: The resolved hardware target, every key written out.
        options: The resolved options of the compilation; files by name only.
        conventions: What the numbers mean.
        files: Every other file of the folder, by name.
        totals: Sums.
        layers: The mapped weights, in graph order.
        digital: Every node that runs digitally, in graph order.
        verification: What compile checked; null only while the folder is being written.
        skipped: Parts of matrices that take no cells.
        arrays: The arrays, in address order.
        chip: What was done for one chip with known stuck cells, by ``rerampile program``; absent from what compile
            writes.
        protection: What copies of most significant slices protect; absent where none were asked for.
    """

    format: Literal["rerampile-plan"]
    format_version: Literal[1]
    plan_sha256: Sha256
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
    chip: ChipPlan | None = None
    protection: ProtectionPlan | None = None


def encode_plan(plan: Plan) -> bytes:
    """Return the plan as JSON: indented, one array or region a line, the same bytes for the same plan.

    The hash of the plan is computed here, whatever the plan has for it.
    """
    long: dict[str, list[Any]] = {"skipped": plan.skipped, "arrays": plan.arrays}
    plan = msgspec.structs.replace(plan, plan_sha256=NO_SHA256)
    body: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(plan, skipped=[], arrays=[]))
    text = msgspec.json.format(msgspec.json.encode({k: v for k, v in body.items() if k not in long}), indent=1)
    parts = [text.decode().rstrip().removesuffix("\n}")]
    for name, rows in long.items():
        lines = ",\n  ".join(msgspec.json.encode(row).decode() for row in rows)
        parts.append(f' "{name}": [\n  {lines}\n ]' if rows else f' "{name}": []')
    data = (",\n".join(parts) + "\n}\n").encode()
    return data.replace(NO_SHA256.encode(), plan_checksum(data, plan).encode(), 1)


def plan_checksum(data: bytes, plan: Plan) -> str:
    """Return what ``plan_sha256`` has to be in a plan of these bytes."""
    return hashlib.sha256(data.replace(plan.plan_sha256.encode(), NO_SHA256.encode(), 1)).hexdigest()


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
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PlanFormatError(f"{where}: not a deployment plan: {error}") from error


def read_plan(path: Path) -> Plan:
    """Read and check a plan file.

    Raises:
        PlanFormatError: It is missing, absurdly large or no plan.
    """
    try:
        require_regular(path)
        if path.stat().st_size > _LARGEST_PLAN:
            raise PlanFormatError(f"{path}: {path.stat().st_size} bytes, expected a plan of at most {_LARGEST_PLAN}")
        return decode_plan(path.read_bytes(), str(path))
    except OSError as error:
        raise PlanFormatError(
            f"{path}: cannot be read: {error.strerror or error}; expected the plan.json of a deployment folder"
        ) from error
