"""What a plan says of a layer: where it came from, how its weights became cells, and why so."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from rerampile.matrix_view import MatrixView
from rerampile.plan_record import Count, Fraction, Range, Record, Sha256
from rerampile.schemes import Scale, Scheme
from rerampile.weight_slots import RECURRENT

__all__ = [
    "ClipPlan",
    "CopiesPlan",
    "CorrectionPlan",
    "FoldPlan",
    "LayerPlan",
    "MappingChoice",
    "MaskPlan",
    "SchemeEstimate",
    "Use",
]


class Use(Record, kw_only=True, frozen=True):
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


class FoldPlan(Record, kw_only=True, frozen=True):
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


class MaskPlan(Record, kw_only=True, frozen=True):
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


class SchemeEstimate(Record, kw_only=True, frozen=True):
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


class MappingChoice(Record, kw_only=True, frozen=True):
    """Why a layer has its scheme.

    Attributes:
        reason: The reason in words.
        estimates: The schemes that can hold the layer, that of the layer among them.
    """

    reason: str
    estimates: list[SchemeEstimate]


class ClipPlan(Record, kw_only=True, frozen=True):
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


class CorrectionPlan(Record, kw_only=True, frozen=True):
    """How digital gains and biases make up for what stuck cells do on average, and clipping.

    Errors are of the layer's products on the calibration images, squared, as a share of the squared products of the
    user's weights.

    Attributes:
        gain: What gains are multiplied by, mean over the outputs.
        bias: Whether the bias was changed, too.
        error: Expected with stuck cells.
        error_uncorrected: The same without the correction; less where gains make errors of chips larger than means.
    """

    gain: float
    bias: bool
    error: float
    error_uncorrected: float


class CopiesPlan(Record, kw_only=True, frozen=True):
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


class LayerPlan(Record, kw_only=True, frozen=True):
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
    def groups_take_turns(self) -> bool:
        """Whether groups run one after another, as directions of a recurrent layer do, and don't leak into others."""
        return any(use.op in RECURRENT for use in self.uses)

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
