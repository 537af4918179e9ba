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
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from rerampile.errors import PlanFormatError
from rerampile.files import require_regular
from rerampile.matrix_view import MatrixView
from rerampile.schemes import Scale, Scheme

__all__ = [
    "FORMAT_VERSION",
    "NO_SHA256",
    "ArrayPlan",
    "ChipLayer",
    "ChipPlan",
    "ChipStep",
    "ClipPlan",
    "Conventions",
    "CopiesPlan",
    "CorrectionPlan",
    "DigitalPlan",
    "FileRecord",
    "FoldPlan",
    "LayerPlan",
    "MappingChoice",
    "MaskPlan",
    "ModelRecord",
    "OutputError",
    "Partition",
    "Plan",
    "Producer",
    "ProtectionPlan",
    "Region",
    "SchemeEstimate",
    "SliceCopy",
    "Totals",
    "Unrepaired",
    "Use",
    "Verification",
    "Vote",
    "decode_plan",
    "encode_plan",
    "plan_checksum",
    "read_plan",
    "span_fields",
]

FORMAT_VERSION = 1
NO_SHA256 = "0" * 64
_LARGEST_PLAN = 1 << 30

Count = Annotated[int, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Vote = Literal["median", "mean"]
Range = Annotated[tuple[Count, Count], Meta(description="half-open: [first, one past the last)")]


class _Record(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """A part of the plan; unknown fields are refused."""


class Producer(_Record, kw_only=True, frozen=True):
    """The program that wrote the plan.

    Attributes:
        name: Its name.
        version: Its version.
    """

    name: str
    version: str


class ModelRecord(_Record, kw_only=True, frozen=True):
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


class Conventions(_Record, kw_only=True, frozen=True):
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
    shared_arrays: str = "rows that belong to other layers than the running one are not driven"
    faults: str = "stuck_on = fixed at G_on (LRS); stuck_off = fixed at G_off (HRS)"

    @classmethod
    def of(cls, layers: Sequence[LayerPlan]) -> Conventions:
        """Return the conventions of a plan with these layers."""
        if all(layer.segments is msgspec.UNSET for layer in layers):
            return cls()
        return cls(weight=cls().weight.replace("gain[output]", "gain[output, segment of the input]"))


class FileRecord(_Record, kw_only=True, frozen=True):
    """A file of the deployment folder.

    Attributes:
        sha256: Hash of the file.
        bytes: Its size.
    """

    sha256: Sha256
    bytes: Count


class Use(_Record, kw_only=True, frozen=True):
    """A graph node that reads a layer's weights.

    Attributes:
        node: Name of the node in the user's model, behind the names of the nodes and attributes whose subgraphs it lies
            in, joined by ``/``; a node without a name is called by its operator and first output.
        op: Its operator.
        input: The input slot that reads the weights, from 0.
    """

    node: str
    op: str
    input: Count


class FoldPlan(_Record, kw_only=True, frozen=True):
    """A digital operation that was folded into a layer.

    Attributes:
        node: The folded node of the user's model, named as in ``uses``.
        op: Its operator.
        side: ``after``: it scaled the layer's outputs. ``before``: its inputs.
        constant_chain: Nodes that computed its constants from initializers, in order.
    """

    node: str
    op: str
    side: Literal["before", "after"]
    constant_chain: list[str] = []


class MaskPlan(_Record, kw_only=True, frozen=True):
    """How a layer was pruned.

    Attributes:
        source: The masks file, or the method and ratio.
        tensor: Name of the mask in the masks file of the deployment folder.
        kept: Weights that the mask keeps.
        total: Weights of the layer.
    """

    source: str
    tensor: str
    kept: Count
    total: Count


class SchemeEstimate(_Record, kw_only=True, frozen=True):
    """What a layer would be like under one scheme, for the stuck probabilities of the options.

    Attributes:
        scheme: The scheme.
        error: Expected squared error of the weights, summed up, over the sum of their squares. Counts the weights whose
            output and whose input have a weight that is not zero.
        pair_conductance: Mean conductance of the cells of a weight in one slice, summed over its pair, siemens.
        cost: ``error``, and ``current_weight`` times the conductance of pairs in the same measure.
    """

    scheme: Scheme
    error: float
    pair_conductance: float
    cost: float


class MappingChoice(_Record, kw_only=True, frozen=True):
    """Why a layer has its scheme.

    Attributes:
        reason: The reason in words.
        estimates: The schemes that can hold the layer, that of the layer among them.
    """

    reason: str
    estimates: list[SchemeEstimate]


class ClipPlan(_Record, kw_only=True, frozen=True):
    """How a layer's full scales were chosen.

    Errors are of the layer's products on the calibration images, squared, as a share of the squared products of the
    weights before clipping; where there were no images, for inputs of one size that have nothing in common.

    Attributes:
        clipped: Weights that were larger than the full scale, and are held as large as it.
        full_scale: Full scale as a share of the largest magnitude that it is for, mean over all full scales.
        output_change: What clipping changes where no cell is stuck.
        error: Expected with stuck cells, clipping included, behind gains and biases that make up for the mean where
            these are corrected; null where no scale was chosen.
        error_unclipped: The same where every full scale is the largest magnitude.
        reason: Why no scale was chosen; null where one was.
    """

    clipped: Count
    full_scale: float
    output_change: float
    error: float | None
    error_unclipped: float | None
    reason: str | None


class CorrectionPlan(_Record, kw_only=True, frozen=True):
    """How digital gains and biases make up for what stuck cells do on average, and clipping.

    Errors are of the layer's products on the calibration images, squared, as a share of the squared products of the
    user's weights.

    Attributes:
        gain: What gains are multiplied by, mean over the outputs.
        bias: Whether the bias was changed, too.
        error: Expected with stuck cells.
        error_uncorrected: The same without the correction.
    """

    gain: float
    bias: bool
    error: float
    error_uncorrected: float


class CopiesPlan(_Record, kw_only=True, frozen=True):
    """How often a layer is held, its copies averaged.

    Errors are what is expected to differ from chip to chip in the layer's products, squared, as a share of the squared
    products of the user's weights on the calibration images; where there were no images, or none show the layer's
    inputs, for inputs of one size that have nothing in common. Mean errors, which copies share, are not counted.

    Attributes:
        count: Copies. Each holds every weight in cells of its own; the weights that are read are the mean of them all.
        error: Expected of the mean of the copies, ``error_single / count``.
        error_single: Expected of one copy.
    """

    count: Annotated[int, Meta(ge=1)]
    error: float
    error_single: float


class LayerPlan(_Record, kw_only=True, frozen=True):
    """One weight tensor as matrices of cells.

    Attributes:
        name: Unique name: of the weight's initializer, or of the first node that uses it.
        uses: The nodes that read the weights.
        block: The group of layers of similar size that it belongs to, for pruning: its number of output channels.
        groups: Separate matrices: convolution groups, batch of a MatMul, directions of a recurrent layer.
        outputs: Rows of one group's matrix.
        inputs: Columns of one group's matrix.
        output_order: What the outputs of a group run over, outermost first.
        input_order: What the inputs of a group run over, outermost first.
        weight_shape: Shape of the weight tensor as its nodes read it.
        element_type: Its ONNX element type, in small letters.
        stored_shape: The matrices of all groups split into axes.
        permutation: Axes of ``stored_shape`` in the order of the weight tensor; null where they are in that order.
        scheme: How a weight becomes cells.
        cells: Cells of a weight in one slice: 2 for a pair, 1 for ``offset``.
        slices: Slices of a weight.
        significances: Weight of each slice in a value, least significant first.
        reference: The constant that ``offset`` subtracts, in units of ``unit``; null for pairs.
        common_modes: For ``optimal``, what the pair of cells of each slice lies around, where its difference leaves
            room, in units of one cell (siemens, or codes of uniform levels); null for other schemes.
        zero_cells: What the cells of a zero weight hold, [slices][cells], as in the cells tensor.
        unit: What cell values are counted in: siemens, or steps between levels that are uniform in conductance.
        cells_tensor: Name of the cells in the conductance file, [slices, cells, groups * outputs, inputs].
        gain_tensor: Name of the gains there, float32 [groups * outputs], or [groups * outputs, segments] where there
            are segments, in weight units a ``unit``.
        scale: What one full scale of the cells is for: the tensor, each output, or each output of each partition.
        segments: The ranges of inputs whose sums have gains of their own, one after another from the first input to
            the last; left out but for scale ``partition``.
        zeros: Weights that are exactly zero.
        sparsity: Their share.
        decoded_sha256: Hash of the decoded weights, little-endian float32 [groups * outputs, inputs].
        mean_cell_conductance: Mean over the layer's cells that sit on arrays, siemens; 0 where none does.
        choice: Why the layer has its scheme; null where the options name it, without regard to how likely cells are
            stuck.
        clip: How its full scales were chosen; left out where they are the largest magnitudes.
        correction: What makes up for mean errors; left out where nothing does.
        copies: How often it is held on arrays, to be averaged; left out where spare arrays were not to be spent, so
            that it is held once.
        mask: How the layer was pruned; null where it was not.
        folds: What was folded into the layer, in the order in which it acts.
        constant_chain: Nodes that computed the weights from initializers, in order; empty for an initializer.
    """

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
    common_modes: list[float] | None = None
    zero_cells: list[list[int | float]]
    unit: Literal["S", "level"]
    cells_tensor: str
    gain_tensor: str
    scale: Scale
    segments: list[Range] | msgspec.UnsetType = msgspec.UNSET
    zeros: Count
    sparsity: Fraction
    decoded_sha256: Sha256
    mean_cell_conductance: float
    choice: MappingChoice | None = None
    clip: ClipPlan | msgspec.UnsetType = msgspec.UNSET
    correction: CorrectionPlan | msgspec.UnsetType = msgspec.UNSET
    copies: CopiesPlan | msgspec.UnsetType = msgspec.UNSET
    mask: MaskPlan | None = None
    folds: list[FoldPlan] = []
    constant_chain: list[str] = []

    @property
    def copy_count(self) -> int:
        """How many copies are averaged; 1 where there is but one."""
        return self.copies.count if isinstance(self.copies, CopiesPlan) else 1

    @property
    def view(self) -> MatrixView:
        """How the weight tensor is read as matrices."""
        return MatrixView(
            groups=self.groups,
            outputs=self.outputs,
            inputs=self.inputs,
            tensor_shape=tuple(self.weight_shape),
            stored_shape=tuple(self.stored_shape),
            permutation=None if self.permutation is None else tuple(self.permutation),
        )


class _Rectangle:
    """Part of a group's matrix: a range or a list of its inputs, by a range or a list of its outputs."""

    __slots__ = ()

    inputs: Range | None
    outputs: Range | None
    input_index: list[int] | None
    output_index: list[int] | None

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


def span_fields(axis: str, indices: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Return ascending indices as a range where they are one, else as a list, under the fields of a rectangle.

    Args:
        axis: ``input`` or ``output``.
        indices: int64, at least one.
    """
    first, last = int(indices[0]), int(indices[-1]) + 1
    if last - first == len(indices):
        return {f"{axis}s": (first, last)}
    return {f"{axis}_index": indices.tolist()}


class Partition(_Record, _Rectangle, kw_only=True, frozen=True, omit_defaults=True):
    """The piece of a layer's matrices that sits on one array.

    ``inputs`` and ``outputs`` are ranges of one group's matrix, or lists of its indices where rows or columns were
    left out. A partition of several groups is block-diagonal: group ``groups[0] + k`` starts ``k`` times its own rows
    and columns further.

    Attributes:
        layer: Position in ``layers``.
        row: First row on the array.
        column: First column on the array.
        groups: The layer's groups.
        inputs: Range of inputs, in row order.
        outputs: Range of outputs, in column order.
        input_index: The inputs in row order, where they are no range; ascending but where a chip was programmed.
        output_index: The outputs in column order, where they are no range; ascending but where a chip was programmed.
        input_rows: Where a chip was programmed and rows between were left free: the row of each input, counted from
            ``row``, ascending. Of partitions of one group.
        output_slots: Where columns between were left free: the place of each output, counted from ``column`` in outputs
            (of ``width`` columns each), ascending. Of partitions of one group.
        replica: Number of the replica, for layers held several times for throughput: each serves other inputs.
        copy: Number of the copy of those that are averaged, all of which serve the same inputs.
        flipped: Numbers, ascending, of the outputs whose columns have changed roles: plus stands where minus would,
            and minus where plus would. Output ``b`` of group ``groups[0] + k`` has number ``k * outputs + b`` for as
            many outputs as a group of the partition has.
    """

    layer: Count
    row: Count
    column: Count
    groups: Range
    inputs: Range | None = None
    outputs: Range | None = None
    input_index: list[Count] | None = None
    output_index: list[Count] | None = None
    input_rows: list[Count] | None = None
    output_slots: list[Count] | None = None
    replica: Count = 0
    copy: Count = 0
    flipped: list[Count] | None = None

    @property
    def row_places(self) -> list[int]:
        """The rows of a group's inputs, counted from its first."""
        return list(range(self.input_count)) if self.input_rows is None else self.input_rows

    @property
    def slot_places(self) -> list[int]:
        """The places of a group's outputs, counted from its first, in outputs."""
        return list(range(self.output_count)) if self.output_slots is None else self.output_slots


class SliceCopy(_Record, _Rectangle, kw_only=True, frozen=True, omit_defaults=True):
    """Copies of the most significant slices of some weights of a partition, on cells that hold nothing else.

    They are read with no other rows than theirs driven, so that what lies beside them does not count.

    Attributes:
        array: The array of the partition; of twins the one with the lower id.
        partition: Position of the partition in the array's ``partitions``.
        number: 1 or 2: which copy it is.
        row: First row on the array where the copy is.
        column: First column there.
        inputs: Range of inputs, in row order.
        outputs: Range of outputs, in column order.
        input_index: The inputs, ascending, where they are no range.
        output_index: The outputs, ascending, where they are no range.
    """

    array: Count
    partition: Count
    number: Literal[1, 2]
    row: Count
    column: Count
    inputs: Range | None = None
    outputs: Range | None = None
    input_index: list[Count] | None = None
    output_index: list[Count] | None = None


class ArrayPlan(_Record, kw_only=True, frozen=True, omit_defaults=True):
    """One crossbar array. ``roles`` and ``slices`` say which cells of a weight its columns hold.

    Attributes:
        id: Position in ``arrays``.
        chip: Chip of the target.
        tile: Tile of the chip.
        core: Core of the tile.
        array: Array of the core.
        roles: Which cells of a pair the array holds.
        slices: Which slices it holds, least significant first.
        partitions: What sits on it.
        twin: The array with the other cells of the same weights; null where it holds both.
        slice_copies: Copies of most significant slices in cells that no partition needs; left out where there are none.
    """

    id: Count
    chip: Count
    tile: Count
    core: Count
    array: Count
    roles: list[Literal["plus", "minus"]]
    slices: list[Count]
    partitions: list[Partition]
    twin: Count | None = None
    slice_copies: list[SliceCopy] = []


class Region(_Record, _Rectangle, kw_only=True, frozen=True, omit_defaults=True):
    """A rectangle of a layer's matrix that takes no cells: all its weights are zero.

    Attributes:
        layer: Position in ``layers``.
        reason: Why it takes none.
        group: The layer's group.
        inputs: Range of inputs.
        outputs: Range of outputs.
        input_index: The inputs, ascending, where they are no range.
        output_index: The outputs, ascending, where they are no range.
    """

    layer: Count
    reason: Literal["zero"]
    group: Count
    inputs: Range | None = None
    outputs: Range | None = None
    input_index: list[Count] | None = None
    output_index: list[Count] | None = None


class DigitalPlan(_Record, kw_only=True, frozen=True):
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


class Totals(_Record, kw_only=True, frozen=True):
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


class ProtectionPlan(_Record, kw_only=True, frozen=True):
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


class OutputError(_Record, kw_only=True, frozen=True):
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


class Verification(_Record, kw_only=True, frozen=True):
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


class ChipStep(_Record, kw_only=True, frozen=True):
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


class ChipLayer(_Record, kw_only=True, frozen=True):
    """One layer on one chip.

    Attributes:
        stuck: Stuck cells on a row and a column of the layer.
        beside: Those of them that hold no weight, but join blocks of the layer; no step changes what they do.
        weights: Weights that the faults could change.
        unrepaired: Weights that still differ from the compiled ones by more than 1e-6 of the output's full scale, of
            those that faults hit.
        measure: What errors are weighed by: ``moments`` of the layer's inputs, or ``plain`` squares of weights.
        energy: That of the compiled weights.
        errors: Energy of the errors before, and after each of the plan's steps, as a share of ``energy``.
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


class Unrepaired(_Record, kw_only=True, frozen=True):
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


class ChipPlan(_Record, kw_only=True, frozen=True):
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


class Plan(_Record, kw_only=True, frozen=True, omit_defaults=True):
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
