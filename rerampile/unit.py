"""What passes hand on: one immutable record of a compilation, and the protocol of a pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from rerampile.array_plan import ArrayPlan, Region
from rerampile.graph import ModelGraph
from rerampile.layer import DigitalOperation, Layer
from rerampile.layer_plan import ClipPlan, CopiesPlan, CorrectionPlan, MappingChoice
from rerampile.onnx_file import ModelFile
from rerampile.plan import Plan, ProtectionPlan, Vote
from rerampile.pruning import PrunedModel
from rerampile.schemes import Coding, MappingName, Scale
from rerampile.segments import Segments
from rerampile.target import Target

__all__ = ["Calibration", "CompileOptions", "InputMoments", "MappedLayer", "Mask", "Pass", "Unit"]


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """What the user asked for.

    Attributes:
        mapping: One of :data:`rerampile.schemes.MAPPINGS`.
        stuck_off: Probability that a cell is stuck off, where anything depends on it; else None.
        stuck_on: Probability that a cell is stuck on, the same.
        categories: Probabilities of other ways in which cells fail, by name, where there are any.
        current_weight: What read current counts beside error, for the same mappings.
        scale: What one full scale of the cells is for.
        clip: Whether full scales are those of the least expected error.
        correct: Whether gains and biases make up for mean errors.
        calibration: The ``data`` that both are chosen from, and how many ``images``; empty where there are none.
        prune: Ratios by block or layer name pattern in order, ``"*"`` for all layers; empty for none.
        pruning: How the model was pruned from calibration images before; empty where it was not.
        masks: A masks file, or None.
        pack: Whether small partitions of different layers share arrays.
        spend_spare_arrays: Whether arrays that are left over get further copies of layers, to be averaged.
        protect_msb: How many of the most significant slices are to have copies.
        vote: How three readings of them become one.
        seed: Seed of the generated inputs of the verification.
        inputs: An .npz file of inputs for the verification, or None to generate them.
        tolerance: Largest relative output error of the deployed model, or None for the default.
        keep_stages: Whether to write what each pass produced.
    """

    mapping: MappingName
    stuck_off: float | None = None
    stuck_on: float | None = None
    categories: Mapping[str, float] = field(default_factory=dict)
    current_weight: float = 0.0
    scale: Scale = "channel"
    clip: bool = False
    correct: bool = False
    calibration: Mapping[str, Any] = field(default_factory=dict)
    prune: Mapping[str, float] = field(default_factory=dict)
    pruning: Mapping[str, Any] = field(default_factory=dict)
    masks: Path | None = None
    pack: bool = False
    spend_spare_arrays: bool = False
    protect_msb: int = 0
    vote: Vote = "median"
    seed: int = 0
    inputs: Path | None = None
    tolerance: float | None = None
    keep_stages: bool = False


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Which weights of a layer are kept.

    Attributes:
        kept: bool [groups * outputs, inputs].
        source: Where it comes from, as the plan tells.
    """

    kept: npt.NDArray[np.bool_] = field(repr=False)
    source: str


@dataclass(frozen=True, kw_only=True)
class MappedLayer:
    """How a layer's weights become cells.

    Attributes:
        coding: The coding of a weight into cells.
        gain: float32 [groups * outputs], weight units a unit of difference; [groups * outputs, segments] for the scale
            ``partition``.
        segments: The ranges of inputs that these are for; one of all inputs for the other scales.
        nonzero: bool [groups * outputs, inputs], where a weight is not zero; None where none is.
        zeros: Number of zero weights.
        choice: Why the layer has its scheme, for mappings that weigh schemes.
        limit: float32, shaped as ``gain``: what weights are clipped to, infinite where nothing is clipped; None where
            nothing of the layer is.
        clip: How full scales were chosen, where that was asked for.
        factor: float32 [groups * outputs], what corrects the gain, and so the weights that it gives; None for ones.
        addend: float64 [groups * outputs], what corrects the bias, behind folds; None for nothing.
        correction: How they were corrected, where that was asked for.
        noise: Expected energy of what differs from chip to chip in the layer's products, as a share of theirs, where
            spare arrays are spent by it.
    """

    coding: Coding
    gain: npt.NDArray[np.float32] = field(repr=False)
    segments: Segments
    nonzero: npt.NDArray[np.bool_] | None = field(repr=False)
    zeros: int
    choice: MappingChoice | None = None
    limit: npt.NDArray[np.float32] | None = field(default=None, repr=False)
    clip: ClipPlan | None = None
    factor: npt.NDArray[np.float32] | None = field(default=None, repr=False)
    addend: npt.NDArray[np.float64] | None = field(default=None, repr=False)
    correction: CorrectionPlan | None = None
    noise: float | None = None

    @property
    def as_given(self) -> bool:
        """Whether cells and bias are those of the weights as they are: neither clipped nor corrected."""
        return self.limit is None and self.factor is None and self.addend is None

    def held(
        self, weights: npt.NDArray[np.float32], rows: slice, unfolded: npt.NDArray[np.float32] | float = 1.0
    ) -> npt.NDArray[np.float32]:
        """Return weights clipped and corrected.

        Args:
            weights: float32 [rows, inputs].
            rows: Which rows of the matrix they are.
            unfolded: The magnitude of what is still to be folded into them, [rows, inputs] or broadcastable to it.
        """
        if self.limit is not None:
            limit = np.broadcast_to(self.segments.spread(self.limit[rows]), weights.shape)
            limit = np.divide(limit, unfolded, out=np.full_like(weights, np.inf), where=np.asarray(unfolded) > 0)
            weights = np.clip(weights, -limit, limit)
        return weights if self.factor is None else weights * self.factor[rows, None]


@dataclass(frozen=True, kw_only=True)
class InputMoments:
    """What the crossbars of a layer see on calibration images.

    Attributes:
        square: E[x x^T], float64 [groups, inputs, inputs].
        mean: E[x], float64 [groups, inputs].
    """

    square: npt.NDArray[np.float64] = field(repr=False)
    mean: npt.NDArray[np.float64] = field(repr=False)


Calibration = Callable[[Sequence[Layer]], tuple[Mapping[str, InputMoments], Mapping[str, str]]]


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One compilation; each pass returns it with more filled in.

    Attributes:
        model: The model as read.
        graph: Its linked view.
        target: The hardware.
        options: What the user asked for.
        folder: Where the deployment is being written (a temporary folder until it is whole).
        pruned: What was pruned before, with weights of its own, or None; its model is :attr:`model`.
        calibration: Gives the moments of the inputs of some layers by layer name, and the reason for each layer whose
            inputs cannot be seen; None where nothing is chosen by them.
        layers: Filled by *find layers*.
        digital: Filled by *find layers*.
        masks: By layer name, filled by *prune*.
        mapped: By layer name, filled by *map*.
        arrays: Filled by *allocate*.
        regions: Parts of matrices that take no cells, filled by *allocate*.
        copies: By layer name where spare arrays are spent, filled by *allocate*.
        arrays_without_pruning: Filled by *allocate*.
        arrays_before_packing: Filled by *allocate*.
        protection: What copies protect, where they were asked for; filled by *allocate*.
        hashes: sha256 of each file of the folder, done once it is whole and on the disk; filled by *emit*.
        plan: Filled by *emit*, completed by *verify*.
    """

    model: ModelFile
    graph: ModelGraph
    target: Target
    options: CompileOptions
    folder: Path
    pruned: PrunedModel | None = None
    calibration: Calibration | None = field(default=None, repr=False)
    layers: tuple[Layer, ...] = ()
    digital: tuple[DigitalOperation, ...] = ()
    masks: Mapping[str, Mask] = field(default_factory=dict)
    mapped: Mapping[str, MappedLayer] = field(default_factory=dict)
    arrays: tuple[ArrayPlan, ...] = ()
    regions: tuple[Region, ...] = ()
    copies: Mapping[str, CopiesPlan] = field(default_factory=dict)
    arrays_without_pruning: int = 0
    arrays_before_packing: int = 0
    protection: ProtectionPlan | None = None
    hashes: Mapping[str, Future[str]] = field(default_factory=dict)
    plan: Plan | None = None

    def weights(self, layer: Layer) -> npt.NDArray[np.float32]:
        """Return the weights to hold, folded, pruned and, once mapped, clipped and corrected; read anew each time.

        They are float32 [groups * outputs, inputs].
        """
        return self.weight_rows(layer)(slice(None))

    def weight_rows(self, layer: Layer) -> Callable[[slice], npt.NDArray[np.float32]]:
        """Return a reader of some rows of :meth:`weights`, which makes those rows alone."""
        original, mask = layer.original_rows(self.graph), self.masks.get(layer.name)
        mapped = self.mapped.get(layer.name)
        factor = layer.fold_factor()
        factors = None if factor is None else np.broadcast_to(factor, layer.view.shape)

        def read(rows: slice) -> npt.NDArray[np.float32]:
            part = original(rows)
            part = part if factors is None else np.multiply(part, factors[rows], dtype=np.float32)
            part = part if mask is None else np.where(mask.kept[rows], part, np.float32(0))
            return part if mapped is None else mapped.held(part, rows)

        return read


class Pass(Protocol):
    """One step of the compiler.

    A pass takes a :class:`Unit` and returns a new one; it never changes what it was given. It may write files into
    ``unit.folder``. It raises a :class:`rerampile.errors.RerampileError` for what the user can mend.
    """

    @property
    def name(self) -> str:
        """Name that the progress line shows."""
        ...

    def run(self, unit: Unit) -> Unit:
        """Return the unit with this pass' part filled in."""
        ...

    def summary(self, unit: Unit) -> Mapping[str, Any]:
        """Return what this pass produced in a few readable numbers, for the progress line and ``--keep-stages``."""
        ...
