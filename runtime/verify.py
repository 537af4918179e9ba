"""Verify: decode every weight from the files, and run the deployed model beside its reference in ONNX Runtime."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import TensorProto

from rerampile.background import side_by_side
from rerampile.checks import check_checksums, check_placement, decode_rows, weight_bytes
from rerampile.deployment import Deployment, layer_coding, layer_segments, load_deployment
from rerampile.errors import FaultRunError, InternalError, PlanFormatError, UnsupportedModelError
from rerampile.files import CONDUCTANCES, DEPLOYED, MASKS, PLAN, REFERENCE
from rerampile.layer import Layer
from rerampile.layer_plan import LayerPlan
from rerampile.onnx_file import hash_on_disk
from rerampile.plan import FileRecord, Verification, encode_plan, read_plan
from rerampile.recount import check_counts, check_nodes, check_sums
from rerampile.runtime.compare import flat, input_sensitivity, output_error, require_tolerance
from rerampile.runtime.inputs import fitting_inputs, inputs_from_file
from rerampile.runtime.programmed_chip import chip_outputs
from rerampile.runtime.reference import write_reference
from rerampile.runtime.session import open_session, run
from rerampile.runtime.side_by_side import layer_errors
from rerampile.tensor_file import TensorFile, TensorWriter, stores
from rerampile.unit import Unit

__all__ = ["Verify", "keep_reference", "reference_inputs", "verify_deployment"]

Outputs = Sequence[Any]

# Largest error of an output relative to its largest magnitude, by the coarsest arithmetic around a mapped layer.
_TOLERANCE = {"float": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
_QUANTISERS = ("QuantizeLinear", "DynamicQuantizeLinear", "QLinear", "ConvInteger", "MatMulInteger")
_ROUNDING = 5e-2  # from end to end, where activations are rounded; layer by layer the above holds


@dataclass(frozen=True)
class Verify:
    """The decoder against the pruned weights, the deployed model against the pruned model; then the finished plan."""

    name: str = "verify"

    def run(self, unit: Unit) -> Unit:
        """Complete the plan and write it.

        Raises:
            FaultRunError: ONNX Runtime cannot run the model, or the deployed model's error is above tolerance.
            InternalError: A decoded weight is not the weight that was to be held: a bug.
        """
        if unit.plan is None:
            raise InternalError("verify runs before emit")
        deployment = Deployment(
            folder=unit.folder,
            plan=unit.plan,
            target=unit.target,
            conductances=TensorFile(unit.folder / CONDUCTANCES),
        )
        check_placement(deployment)
        layers, errors = _decode_all(unit, deployment)
        verification = _run_both(unit, deployment, errors)
        plan = msgspec.structs.replace(
            unit.plan, layers=layers, verification=verification, files=_files(unit.folder, unit.hashes)
        )
        text = encode_plan(plan)
        (unit.folder / PLAN).write_bytes(text)
        if encode_plan(read_plan(unit.folder / PLAN)) != text:
            raise InternalError("the plan does not read back as it was written")
        return replace(unit, plan=plan)

    def summary(self, unit: Unit) -> Mapping[str, Any]:
        """Return the errors found."""
        if unit.plan is None or unit.plan.verification is None:
            return {}
        found = unit.plan.verification
        compared = [o.relative_error for o in found.outputs if o.numbers]
        worst = f"{max(compared):.2g}" if compared else "nothing to compare"
        summary = {"weight error": f"{found.max_weight_error:.2g}", "output error": worst}
        if found.outputs_unquantised:
            unquantised = max(o.relative_error for o in found.outputs_unquantised)
            summary["against unquantised"] = f"{unquantised:.2g}"
        return summary


def _files(folder: Path, hashes: Mapping[str, Future[str]]) -> dict[str, FileRecord]:
    """Return the plan's records of the files, once each is whole and on the disk."""
    found = {name: future.result() for name, future in hashes.items()}
    if (folder / REFERENCE).exists():
        found[REFERENCE] = hash_on_disk(folder / REFERENCE)
    return {name: FileRecord(sha256=found[name], bytes=(folder / name).stat().st_size) for name in sorted(found)}


def _decode_all(unit: Unit, deployment: Deployment) -> tuple[list[LayerPlan], tuple[float, float]]:
    """Compare every decoded weight with the pruned one; return the plan's layers with hashes, and the worst errors."""

    def check(pair: tuple[Layer, LayerPlan]) -> tuple[LayerPlan, float, float]:
        layer, plan = pair
        expected, segments = unit.weight_rows(layer), layer_segments(plan)
        bound = layer_coding(deployment.target, plan).error_bound(deployment.gain(plan))
        bound = bound.reshape(len(bound), -1)
        digest, worst, worst_part = hashlib.sha256(), 0.0, 0.0
        for rows, decoded in decode_rows(deployment, plan):
            wanted = expected(rows)
            off = decoded - wanted
            error = segments.largest(np.abs(off)).astype(np.float64)
            if not (error <= bound[rows]).all() or (unit.mapped[layer.name].zeros and np.any(decoded[wanted == 0])):
                raise InternalError(
                    f"layer '{layer.name}': a decoded weight is {error.max():.3g} off "
                    f"(bound {bound[rows].flat[error.argmax()]:.3g}), or a pruned weight is not zero"
                )
            worst, worst_part = max(worst, float(error.max())), max(worst_part, float((error / bound[rows]).max()))
            digest.update(weight_bytes(decoded))
        return msgspec.structs.replace(plan, decoded_sha256=digest.hexdigest()), worst, worst_part

    found = side_by_side(check, zip(unit.layers, deployment.plan.layers, strict=True))
    return [plan for plan, _, _ in found], (max(error for _, error, _ in found), max(part for _, _, part in found))


def _run_both(unit: Unit, deployment: Deployment, errors: tuple[float, float]) -> Verification:
    """Run the user's model with the pruned weights, with the weights that the cells hold, and the deployed model."""
    options = unit.options
    with _scratch(unit.folder) as scratch:
        session = _pruned_session(unit, scratch)
        if options.inputs is not None:
            inputs = inputs_from_file(options.inputs, session)
            pruned: Outputs = run(session, inputs)
        else:
            inputs, pruned = fitting_inputs(session, options.seed)
        names = [output.name for output in session.get_outputs()]
        rounds = any(node.proto.op_type.startswith(_QUANTISERS) for node in unit.graph.nodes)
        sensitivity = input_sensitivity(session, inputs, pruned) if rounds else None
    discrete = unit.target.cell.levels is not None
    held, layers = pruned, None
    if discrete or rounds:
        with _scratch(unit.folder) as scratch:
            path = write_reference(unit, partial(_held, unit, deployment), scratch)
            held = run(open_session(path), inputs) if discrete else pruned
            layers = layer_errors(unit.folder, path, inputs) if rounds else None
    deployed = run(open_session(unit.folder / DEPLOYED), inputs)
    keep_reference(unit.folder / REFERENCE, inputs, names, held)
    verification = Verification(
        max_weight_error=errors[0],
        max_weight_error_of_bound=errors[1],
        onnxruntime=ort.__version__,
        seed=options.seed,
        inputs=options.inputs.name if options.inputs is not None else "generated",
        tolerance=_tolerance(unit, sensitivity),
        sensitivity=sensitivity,
        outputs=[output_error(n, d, h) for n, d, h in zip(names, deployed, held, strict=True)],
        outputs_unquantised=[output_error(n, d, p) for n, d, p in zip(names, deployed, pruned, strict=True)]
        if discrete
        else [],
        layers=layers or [],
    )
    _require(unit, verification, held)
    return verification


def _require(unit: Unit, found: Verification, held: Outputs) -> None:
    """Refuse a deployed model that is not within tolerance, or a comparison that says nothing.

    Raises:
        FaultRunError: An error is above tolerance, or the reference gives nothing but NaN, or nothing at all for the
            user's inputs.
        UnsupportedModelError: The model draws random numbers, so that no two runs of it agree.
    """
    numbers = [flat(output) for output in held]
    if unit.options.inputs is not None and not any(n.size for n in numbers):
        raise FaultRunError(
            f"{unit.options.inputs}: every output is empty for these inputs, so that nothing can be compared; give "
            f"inputs with a batch of at least one"
        )
    if any(n.size for n in numbers) and all(np.isnan(n).all() for n in numbers):
        raise FaultRunError(
            f"{unit.model.name}: every output is NaN, so that nothing can be compared; "
            f"give inputs that the model is made for with --inputs FILE.npz"
        )
    try:
        require_tolerance(found.layers, _tolerance(unit, None), f"{unit.model.name}, layer by layer")
        require_tolerance(found.outputs, found.tolerance, unit.model.name)
    except FaultRunError as error:
        random = next((node for node in unit.graph.nodes if node.random), None)
        if random is None:
            raise
        raise UnsupportedModelError(
            f"{unit.model.name}: node '{random.full_name}' ({random.op}) draws random numbers: no two runs agree "
            f"and none can be verified; export the model for inference"
        ) from error


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Give a folder inside the deployment folder, on its disk, that is gone afterwards."""
    path = folder / "scratch"
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path)


def _tolerance(unit: Unit, sensitivity: float | None) -> float:
    """Return the largest relative error that passes, by the coarsest arithmetic around a mapped layer."""
    if unit.options.tolerance is not None:
        return unit.options.tolerance
    types = {TensorProto.DataType.Name(layer.element_type).lower() for layer in unit.layers}
    arithmetic = max((_TOLERANCE[kind] for kind in types & _TOLERANCE.keys()), default=_TOLERANCE["float"])
    return arithmetic if sensitivity is None else max(arithmetic, _ROUNDING, 2 * sensitivity)


def _pruned_session(unit: Unit, scratch: Path) -> Any:
    """Open the user's own model, with its weights changed where they are, as converted where it was too old to run."""
    model = unit.model
    as_given = not unit.masks and all(mapped.as_given for mapped in unit.mapped.values())
    if as_given and model.converted_from_opset is None:  # the model itself, not what we make of it
        return open_session(model.path if model.path is not None else model.proto.SerializeToString())
    return open_session(write_reference(unit, partial(_pruned, unit), scratch))


def _pruned(unit: Unit, layer: Layer) -> npt.NDArray[np.float32]:
    """Return the weights to hold as the user's graph reads them: pruned, clipped and corrected, folds divided out."""
    matrix = layer.original_matrix(unit.graph)
    mask, factor = unit.masks.get(layer.name), layer.fold_factor()
    matrix = matrix if mask is None else np.where(mask.kept, matrix, np.float32(0))
    return unit.mapped[layer.name].held(matrix, slice(None), 1.0 if factor is None else np.abs(factor))


def _held(unit: Unit, deployment: Deployment, layer: Layer) -> npt.NDArray[np.float32]:
    """Return the weights that the cells hold, folds divided out again, as the user's graph reads them."""
    if unit.target.cell.levels is None:
        return _pruned(unit, layer)
    decoded = deployment.weights(deployment.layer(layer.name))
    factor = layer.fold_factor()
    if factor is None:
        return decoded
    factor = np.broadcast_to(factor, decoded.shape)
    unfolded = np.divide(decoded, factor, out=np.zeros_like(decoded), where=factor != 0)
    return np.where(factor != 0, unfolded, _pruned(unit, layer))


def reference_inputs(reference: TensorFile) -> dict[str, npt.NDArray[Any]]:
    """Return the inputs that :func:`keep_reference` wrote, by name."""
    return {n.removeprefix("input/"): reference.read(n) for n in reference.specs if n.startswith("input/")}


def keep_reference(path: Path, inputs: Mapping[str, npt.NDArray[Any]], names: Sequence[str], outputs: Outputs) -> None:
    """Write the inputs and the reference outputs, so that the folder can be verified later without the model."""
    tensors = {f"input/{name}": value for name, value in inputs.items()}
    tensors |= {f"output/{name}": _recorded(value) for name, value in zip(names, outputs, strict=True)}
    announced = [(name, value.dtype, value.shape) for name, value in tensors.items()]
    with TensorWriter(path, announced, {"format": "rerampile-verification"}) as writer:
        for name in writer.specs:
            writer.write(name, tensors[name])


def _recorded(value: Any) -> npt.NDArray[Any]:
    """Return an output as a tensor file holds it: itself, or flat where it is text, a sequence or a map."""
    return value if isinstance(value, np.ndarray) and stores(value.dtype) else flat(value)


def verify_deployment(folder: str | Path) -> Verification:
    """Verify a deployment folder again, from its files alone.

    Checksums, the placement of every weight, the decoded weights against the hashes in the plan, pruned weights against
    the masks, the plan's sums and nodes against what they stand for, and the deployed model in ONNX Runtime against the
    outputs recorded when it was compiled.

    Returns:
        What was found now.

    Raises:
        PlanFormatError: A file is missing, changed or inconsistent.
        FaultRunError: The deployed model's error is above the tolerance of the plan.
    """
    deployment = load_deployment(folder)
    recorded = deployment.plan.verification
    if recorded is None:
        raise PlanFormatError(f"{deployment.folder / PLAN}: $.verification: missing, the folder was never completed")
    check_checksums(deployment)
    check_placement(deployment)
    masks = TensorFile(deployment.folder / MASKS) if MASKS in deployment.plan.files else None
    side_by_side(partial(_check_weights, deployment, masks), range(len(deployment.plan.layers)))
    check_sums(deployment)
    check_nodes(deployment)
    reference = TensorFile(deployment.folder / REFERENCE)
    inputs = reference_inputs(reference)
    session = open_session(deployment.model_path)
    names = [output.name for output in session.get_outputs()]
    found = run(session, inputs) if deployment.plan.chip is None else chip_outputs(deployment, inputs)
    outputs = [output_error(n, _recorded(f), reference.read(f"output/{n}")) for n, f in zip(names, found, strict=True)]
    require_tolerance(outputs, recorded.tolerance, str(deployment.folder))
    return msgspec.structs.replace(recorded, outputs=outputs, onnxruntime=ort.__version__)


def _check_weights(deployment: Deployment, masks: TensorFile | None, number: int) -> None:
    """Decode one layer: its weights are those that were compiled, zero where its mask says so, and counted rightly.

    On a chip with stuck cells pruned weights need not be zero.
    """
    layer = deployment.plan.layers[number]
    digest, kept, zeros = hashlib.sha256(), None, 0
    if layer.mask is not None and masks is not None:
        mask = masks.read(layer.mask.tensor)
        if mask.dtype != np.bool_ or mask.shape != tuple(layer.weight_shape):
            raise PlanFormatError(
                f"{masks.path}: tensor '{layer.mask.tensor}': {mask.dtype} {list(mask.shape)}, expected bool "
                f"{layer.weight_shape}"
            )
        kept = layer.view.matrix(mask)
    for rows, weights in decode_rows(deployment, layer):
        digest.update(weight_bytes(weights))
        zeros += weights.size - int(np.count_nonzero(weights))
        if kept is not None and deployment.plan.chip is None and weights[~kept[rows]].any():
            raise PlanFormatError(
                f"{deployment.folder}: layer '{layer.name}': a weight that '{MASKS}' prunes is not zero"
            )
    if digest.hexdigest() != layer.decoded_sha256:
        raise PlanFormatError(
            f"{deployment.folder}: layer '{layer.name}': decoded weights differ from those that were compiled"
        )
    check_counts(deployment, number, zeros, kept)
