"""Program a deployment for one chip whose stuck cells are known: a deployment folder of that very chip."""

from __future__ import annotations

import hashlib
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from rerampile.background import side_by_side
from rerampile.checks import weight_bytes
from rerampile.chip_calibration import Calibration
from rerampile.chip_plan import ChipLayer, ChipPlan, ChipStep, Unrepaired
from rerampile.compiler import written_whole
from rerampile.deployment import Deployment, layer_coding, layer_segments, load_deployment
from rerampile.digital_bias import shifted_model
from rerampile.errors import ConfigError, InternalError
from rerampile.files import CONDUCTANCES, DEPLOYED, FAULTS, PLAN, REFERENCE
from rerampile.layer_plan import LayerPlan
from rerampile.onnx_file import file_sha256, hash_on_disk
from rerampile.plan import FileRecord, Plan, encode_plan
from rerampile.runtime.assignment import assigned, with_partitions
from rerampile.runtime.compare import flat, output_error
from rerampile.runtime.fault_map import FaultMap, read_fault_maps, write_fault_maps
from rerampile.runtime.inject import Injector, LayerFaults
from rerampile.runtime.layer_program import CALIBRATED, LISTED, STEPS, LayerProgram, require_programmable
from rerampile.runtime.programmed_chip import outputs_with
from rerampile.runtime.session import open_session, run
from rerampile.runtime.verify import keep_reference, reference_inputs
from rerampile.schemes import row_chunks
from rerampile.tensor_file import TensorFile, TensorWriter
from rerampile.totals import totals_of, weights_without_cells

__all__ = ["ChipRequirement", "ChipSource", "check_steps", "chip_sources", "program_chip"]

Outputs = Sequence[Any]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ChipRequirement:
    """A bound on what a programmed chip may lose, such as ``error <= 0.05``.

    Attributes:
        text: As it was given.
        name: ``error``, ``worst``, ``unrepaired`` or ``output_error``.
        relation: ``<`` or ``<=``.
        bound: The number.
    """

    text: str
    name: str
    relation: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> ChipRequirement:
        """Read a requirement.

        Raises:
            ConfigError: It is not of the form.
        """
        found = re.fullmatch(r"\s*(error|worst|unrepaired|output_error)\s*(<=|<)\s*([-+.\deE]+)\s*", text)
        try:
            if found is not None:
                return cls(text.strip(), found[1], found[2], float(found[3]))
        except ValueError:
            pass
        raise ConfigError(
            f"--require '{text}': expected error, worst, unrepaired or output_error <= NUMBER, as in 'error <= 0.05'"
        )

    def check(self, chip: ChipPlan) -> tuple[float, bool]:
        """Return what a chip has, and whether that is within the bound; what is not known is not."""
        found: dict[str, float | None] = {
            "error": chip.steps[-1].error,
            "worst": max((math.sqrt(layer.errors[-1]) for layer in chip.layers), default=0.0),
            "unrepaired": float(chip.unrepaired_total),
            "output_error": chip.output_error,
        }
        value = found[self.name]
        value = math.nan if value is None else value
        return value, value < self.bound if self.relation == "<" else value <= self.bound


def check_steps(steps: Sequence[str], calibrated: bool) -> tuple[str, ...]:
    """Return steps in the order in which they are taken.

    Raises:
        ConfigError: One is unknown, or needs a calibration and there is none.
    """
    for step in steps:
        if step not in STEPS:
            raise ConfigError(f"--steps: no step '{step}', expected some of {', '.join(STEPS)}")
        if step in CALIBRATED and not calibrated:
            raise ConfigError(f"--steps: '{step}' has to know what layers see; name images with --calibration")
    return tuple(step for step in STEPS if step in steps)


@dataclass(frozen=True, kw_only=True)
class ChipSource:
    """Where the stuck cells of a chip come from.

    Attributes:
        path: The fault map.
        number: Number of the chip in it.
        faults: The stuck cells.
    """

    path: Path
    number: int
    faults: FaultMap


def chip_sources(path: Path, deployment: Deployment, out: Path) -> list[tuple[ChipSource, Path]]:
    """Return the chips of a fault map, or of a folder of them, with the folder that each goes to.

    One chip of one file goes to ``out``; several go to folders below, named after the file and the number of the chip.

    Raises:
        ConfigError: A folder holds no fault map, or two that would go to the same place.
        DataError: A file is no fault map of this deployment.
    """
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in (".safetensors", ".csv"))
        if not files:
            raise ConfigError(f"--fault-map {path}: no .safetensors and no .csv file in it, expected fault maps")
    found: list[tuple[ChipSource, Path]] = []
    for file in files:
        chips = read_fault_maps(file, deployment)
        for number, faults in enumerate(chips):
            name = file.stem if len(chips) == 1 else f"{file.stem}-{number}"
            place = out if len(files) == len(chips) == 1 and not path.is_dir() else out / name
            found.append((ChipSource(path=file, number=number, faults=faults), place))
    places = [place for _, place in found]
    if len(set(places)) < len(places):
        twice = next(place for place in places if places.count(place) > 1)
        raise ConfigError(f"--fault-map {path}: two chips would go to '{twice}'; rename a fault map")
    return found


@dataclass(frozen=True, kw_only=True)
class _Programmed:
    """What programming makes of one layer.

    Attributes:
        plan: Its part of the plan.
        faults: What the chip's faults do to it in the end.
        record: What was found, step by step.
        unrepaired: The worst weights that stay wrong.
        touched: Healthy cells with another target, before and after each step.
        flips: Changed segments, before and after each step.
        flipped: The changed segments in the end.
    """

    plan: LayerPlan
    faults: LayerFaults
    record: ChipLayer
    unrepaired: list[Unrepaired]
    touched: list[int]
    flips: list[int]
    flipped: npt.NDArray[np.int64]


def program_chip(
    deployment: Deployment,
    source: ChipSource,
    out: Path,
    *,
    steps: Sequence[str],
    calibration: Calibration | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Deployment:
    """Write the deployment folder of one chip.

    Args:
        deployment: What was compiled, for any chip.
        source: The chip's stuck cells.
        out: The folder to write. An earlier deployment there is replaced; anything else is refused.
        steps: Some of :data:`~rerampile.runtime.layer_program.STEPS`.
        calibration: What layers see, where it is known; errors are then weighed by it.
        progress: Called with (layers done, all layers).

    Returns:
        The chip's deployment, as read back.

    Raises:
        ConfigError: The deployment is a chip's already, a step cannot be taken, or ``out`` cannot be written.
    """
    require_programmable(deployment)
    ordered = check_steps(steps, calibration is not None)
    stuck = placed = Injector(deployment).stuck(source.faults)
    plan, moved = deployment.plan, 0
    moments, biases = ({}, {}) if calibration is None else (calibration.moments, calibration.biases)
    if "assign" in ordered:
        better = assigned(
            deployment, source.faults, moments, compensating="compensate" in ordered, flipping="flip" in ordered
        )
        plan, moved = better.deployment.plan, better.moved
        placed = Injector(better.deployment).stuck(source.faults)
    specs = deployment.conductances.specs
    tensors = [(name, spec.dtype, spec.shape) for name, spec in sorted(specs.items(), key=lambda item: item[1].offset)]
    done = 0

    with written_whole(out) as folder:
        with TensorWriter(folder / CONDUCTANCES, tensors, deployment.conductances.metadata) as writer:
            if any(writer.specs[name].offset != spec.offset for name, spec in specs.items()):
                raise InternalError(f"{writer.path}: tensors lie elsewhere than in {deployment.conductances.path}")

            def one(number: int) -> _Programmed:
                nonlocal done
                bias = biases.get(number)
                mean = None if bias is None else bias.mean
                failed = source.faults.cell if deployment.target.failed_cells.isolates_pairs else None
                program = LayerProgram(
                    deployment, number, stuck[number], moments.get(number), placed[number], mean, failed
                )
                for step in ordered:
                    program.step(step)
                writer.write(program.plan.cells_tensor, program.cells)
                writer.write(program.plan.gain_tensor, program.gain)
                done += 1
                if progress is not None:
                    progress(done, len(stuck))
                return _Programmed(
                    plan=_layer_plan(deployment, number, program),
                    faults=program.faults,
                    record=program.record() if bias is None else program.record(bias.name, bias.scale),
                    unrepaired=program.unrepaired(),
                    touched=program.touched,
                    flips=program.flips,
                    flipped=program.flipped,
                )

            numbers = range(len(stuck))
            layers = [one(number) for number in numbers] if calibration is not None else side_by_side(one, numbers)
        for name in deployment.plan.files:
            if name not in (CONDUCTANCES, REFERENCE):
                shutil.copyfile(deployment.folder / name, folder / name)
        shifts = {r.bias: np.array(r.shift) for r in (layer.record for layer in layers) if r.bias is not None}
        if shifts:
            (folder / DEPLOYED).write_bytes(shifted_model(deployment.model_path, shifts))
        plan = _plan(deployment, _flipped(plan, layers), source, layers, ("none", *ordered), moved, calibration)
        conductances = writer.sha256.result()
        _finish(deployment, source, folder, plan, {CONDUCTANCES: conductances}, [layer.faults for layer in layers])
    return load_deployment(out)


def _layer_plan(deployment: Deployment, number: int, program: LayerProgram) -> LayerPlan:
    """Return a layer's part of the plan with what its cells now hold."""
    layer, cells, gain = program.plan, program.cells, program.gain
    segments = layer_segments(layer)
    coding = layer_coding(deployment.target, layer)
    digest, zeros, sums = hashlib.sha256(), 0, []
    for rows in row_chunks(cells.shape[2:]):
        weights = coding.decode(cells[:, :, rows], segments.spread(gain[rows]))
        digest.update(weight_bytes(weights))
        zeros += weights.size - int(np.count_nonzero(weights))
        sums.append(float(coding.conductance(cells[:, :, rows]).sum(dtype=np.float64)))
    total = layer.groups * layer.outputs * layer.inputs
    without = weights_without_cells(len(deployment.plan.layers), deployment.plan.skipped)[number]
    held = math.fsum(sums) / (coding.cells * coding.slices) - coding.mean_zero_conductance * without
    return msgspec.structs.replace(
        layer,
        zeros=zeros,
        sparsity=zeros / total if total else 0.0,
        decoded_sha256=digest.hexdigest(),
        mean_cell_conductance=held / (total - without) if total > without else 0.0,
    )


def _plan(
    deployment: Deployment,
    placed: Plan,
    source: ChipSource,
    layers: Sequence[_Programmed],
    steps: Sequence[Any],
    moved: int,
    calibration: Calibration | None,
) -> Plan:
    """Return the chip's plan, but for its files and its outputs."""
    plan, arrays = deployment.plan, placed.arrays
    records = [layer.record for layer in layers]
    worst = sorted((weight for layer in layers for weight in layer.unrepaired), key=lambda weight: -weight.share)
    chip = ChipPlan(
        faults=FAULTS,
        source=source.path.name,
        source_sha256=file_sha256(source.path),
        number=source.number,
        compiled=deployment.folder.resolve().name,
        compiled_sha256=plan.plan_sha256,
        stuck_off=source.faults.stuck_off,
        stuck_on=source.faults.stuck_on,
        categories=source.faults.categories or msgspec.UNSET,
        calibration=None if calibration is None else calibration.name,
        calibration_images=0 if calibration is None else calibration.images,
        steps=[
            ChipStep(
                step=step,
                error=math.sqrt(math.fsum(r.errors[n] for r in records) / len(records)),
                touched=sum(layer.touched[n] for layer in layers),
                moved=moved if "assign" in steps[: n + 1] else 0,
                flipped=sum(layer.flips[n] for layer in layers),
            )
            for n, step in enumerate(steps)
        ],
        layers=records,
        unrepaired=worst[:LISTED],
        unrepaired_total=sum(record.unrepaired for record in records),
        output_error_before=None,
        output_error=None,
    )
    plans = [layer.plan for layer in layers]
    totals = totals_of(
        deployment.target,
        plans,
        plan.skipped,
        arrays,
        digital=len(plan.digital),
        arrays_without_pruning=plan.totals.arrays_without_pruning,
        arrays_before_packing=plan.totals.arrays_before_packing,
    )
    return msgspec.structs.replace(plan, layers=plans, arrays=arrays, totals=totals, chip=chip)


def _flipped(plan: Plan, layers: Sequence[_Programmed]) -> Plan:
    """Return a plan with the column segments that have changed roles, counted as the injector counts them."""
    flipped = np.sort(np.concatenate([np.zeros(0, np.int64), *(layer.flipped for layer in layers)]))
    partitions = [list(array.partitions) for array in plan.arrays]
    segment = 0
    for array in plan.arrays:
        if array.is_second_twin:
            continue
        for place, partition in enumerate(array.partitions):
            count = (partition.groups[1] - partition.groups[0]) * partition.output_count
            first, last = np.searchsorted(flipped, [segment, segment + count])
            if last > first:
                changed = msgspec.structs.replace(partition, flipped=(flipped[first:last] - segment).tolist())
                partitions[array.id][place] = changed
            segment += count
    return with_partitions(plan, partitions)


def _finish(
    deployment: Deployment,
    source: ChipSource,
    folder: Path,
    plan: Plan,
    hashes: dict[str, str],
    expected: Sequence[LayerFaults],
) -> None:
    """Write the chip's stuck cells, its reference outputs and its plan; the files have to decode to what was meant.

    Raises:
        InternalError: They do not: a bug.
    """
    written = Deployment(
        folder=folder, plan=plan, target=deployment.target, conductances=TensorFile(folder / CONDUCTANCES)
    )
    write_fault_maps(folder / FAULTS, [source.faults], written)
    meant = [faults for faults in expected if len(faults.index) or faults.leaks is not None]
    read = Injector(written).faults(source.faults)
    if len(meant) != len(read) or not all(
        a.layer == b.layer and np.array_equal(a.index, b.index) and a.value.tobytes() == b.value.tobytes()
        for a, b in zip(meant, read, strict=True)
    ):
        raise InternalError(f"{folder}: the cells that were written do not decode to the weights that were meant")
    final = _with_outputs(deployment, source, written)
    files = {
        path.name: FileRecord(sha256=hashes.get(path.name) or hash_on_disk(path), bytes=path.stat().st_size)
        for path in sorted(folder.iterdir())
    }
    (folder / PLAN).write_bytes(encode_plan(msgspec.structs.replace(final, files=files)))


def _with_outputs(deployment: Deployment, source: ChipSource, written: Deployment) -> Plan:
    """Run the chip on the inputs of the verification, keep its outputs, and return the plan with what they are off."""
    reference = TensorFile(deployment.folder / REFERENCE)
    inputs = reference_inputs(reference)
    session = open_session(written.model_path)
    names = [output.name for output in session.get_outputs()]
    compiled, before = (outputs_with(deployment, faults, inputs) for faults in (None, source.faults))
    found = outputs_with(written, source.faults, inputs)
    keep_reference(written.folder / REFERENCE, inputs, names, found)
    plan = written.plan
    if plan.verification is None or plan.chip is None:
        raise InternalError(f"{deployment.folder}: programmed before it was verified")
    errors = [output_error(n, d, f) for n, d, f in zip(names, run(session, inputs), found, strict=True)]
    return msgspec.structs.replace(
        plan,
        verification=msgspec.structs.replace(plan.verification, outputs=errors, outputs_unquantised=[], layers=[]),
        chip=msgspec.structs.replace(
            plan.chip, output_error_before=_distance(before, compiled), output_error=_distance(found, compiled)
        ),
    )


def _distance(found: Outputs, expected: Outputs) -> float | None:
    """Return the root mean square of the differences of outputs over that of the expected ones; None where not finite.

    Args:
        found: Outputs of a model.
        expected: The same of another one.
    """
    a, b = (np.concatenate([np.zeros(0), *(flat(output) for output in side)]) for side in (found, expected))
    size = float(np.square(b).sum())
    if a.shape != b.shape or not np.isfinite(a).all() or not np.isfinite(size) or not size:
        return None
    return math.sqrt(float(np.square(a - b).sum()) / size)
