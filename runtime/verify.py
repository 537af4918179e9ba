"""Verify: decode every weight from the files, and run the deployed model beside its reference in ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import TensorProto

from rerampile.checks import check_checksums, check_placement, decode_layer, weights_sha256
from rerampile.deployment import Deployment, layer_coding, load_deployment
from rerampile.errors import FaultRunError, InternalError, PlanFormatError
from rerampile.files import DEPLOYED, PLAN, REFERENCE
from rerampile.layer import Layer
from rerampile.onnx_file import file_sha256
from rerampile.plan import FileRecord, LayerPlan, OutputError, Plan, Verification, encode_plan
from rerampile.runtime.inputs import fitting_inputs, inputs_from_file
from rerampile.runtime.reference import write_reference
from rerampile.runtime.session import open_session, run
from rerampile.tensor_file import TensorFile, TensorWriter
from rerampile.unit import Unit

__all__ = ["Verify", "verify_deployment"]

Outputs = Sequence[Any]

# Largest error of an output relative to its largest magnitude, by the coarsest arithmetic around a mapped layer.
_TOLERANCE = {"float": 1e-4, "float16": 1e-2, "bfloat16": 5e-2, "quantised": 5e-2}
_QUANTISERS = ("QuantizeLinear", "DynamicQuantizeLinear", "QLinear", "ConvInteger", "MatMulInteger")
_NUDGE = 1e-4
_THREADS = 2  # each holds one layer and its decoded copy


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
        _write_plan(unit.folder, unit.plan)
        deployment = load_deployment(unit.folder)
        check_placement(deployment)
        layers, errors = _decode_all(unit, deployment)
        verification = _run_both(unit, deployment, errors)
        files = dict(unit.plan.files)
        record = _record(unit.folder / REFERENCE)
        if record is not None:
            files[REFERENCE] = record
        plan = msgspec.structs.replace(
            unit.plan, layers=layers, verification=verification, files=dict(sorted(files.items()))
        )
        _write_plan(unit.folder, plan)
        return replace(unit, plan=plan)

    def summary(self, unit: Unit) -> Mapping[str, Any]:
        """Return the errors found."""
        if unit.plan is None or unit.plan.verification is None:
            return {}
        found = unit.plan.verification
        worst = max((o.relative_error for o in found.outputs), default=0.0)
        summary = {"weight error": f"{found.max_weight_error:.2g}", "output error": f"{worst:.2g}"}
        if found.outputs_unquantised:
            unquantised = max(o.relative_error for o in found.outputs_unquantised)
            summary["against unquantised"] = f"{unquantised:.2g}"
        return summary


def _write_plan(folder: Path, plan: Plan) -> None:
    (folder / PLAN).write_bytes(encode_plan(plan))


def _record(path: Path) -> FileRecord | None:
    return FileRecord(sha256=file_sha256(path), bytes=path.stat().st_size) if path.exists() else None


def _decode_all(unit: Unit, deployment: Deployment) -> tuple[list[LayerPlan], tuple[float, float]]:
    """Compare every decoded weight with the pruned one; return the plan's layers with hashes, and the worst errors."""

    def check(layer: Layer, plan: LayerPlan) -> tuple[LayerPlan, float, float]:
        decoded, expected = decode_layer(deployment, plan), unit.weights(layer)
        error = np.abs(decoded - expected).max(axis=1).astype(np.float64)
        bound = layer_coding(deployment.target, plan).error_bound(deployment.gain(plan))
        if not (error <= bound).all() or (unit.mapped[layer.name].zeros and np.any(decoded[expected == 0])):
            raise InternalError(
                f"layer '{layer.name}': a decoded weight is {error.max():.3g} off (bound {bound[error.argmax()]:.3g}), "
                f"or a pruned weight is not zero"
            )
        filled = msgspec.structs.replace(plan, decoded_sha256=weights_sha256(decoded))
        deployment.conductances.drop_pages()
        return filled, float(error.max()), float((error / bound).max())

    with ThreadPoolExecutor(_THREADS) as pool:  # numpy and hashlib work outside the interpreter's lock
        found = list(pool.map(check, unit.layers, deployment.plan.layers))
    return [plan for plan, _, _ in found], (max(error for _, error, _ in found), max(part for _, _, part in found))


def _run_both(unit: Unit, deployment: Deployment, errors: tuple[float, float]) -> Verification:
    options = unit.options
    with tempfile.TemporaryDirectory(prefix="rerampile-") as scratch:
        session = _pruned_session(unit, Path(scratch))
        if options.inputs is not None:
            inputs = inputs_from_file(options.inputs, session)
            pruned: Outputs = run(session, inputs)
        else:
            inputs, pruned = fitting_inputs(session, options.seed)
        names = [output.name for output in session.get_outputs()]
        tolerance, sensitivity = _tolerance(unit, session, inputs, pruned)
        del session
    quantised = pruned
    if unit.target.cell.levels is not None:
        with tempfile.TemporaryDirectory(prefix="rerampile-") as scratch:
            quantised = run(_quantised_session(unit, deployment, Path(scratch)), inputs)
    deployed = run(open_session(unit.folder / DEPLOYED), inputs)
    _keep_reference(unit.folder / REFERENCE, inputs, names, quantised)
    verification = Verification(
        max_weight_error=errors[0],
        max_weight_error_of_bound=errors[1],
        onnxruntime=ort.__version__,
        seed=options.seed,
        inputs=options.inputs.name if options.inputs is not None else "generated",
        tolerance=tolerance,
        sensitivity=sensitivity,
        outputs=[output_error(n, d, q) for n, d, q in zip(names, deployed, quantised, strict=True)],
        outputs_unquantised=[]
        if quantised is pruned
        else [output_error(n, d, p) for n, d, p in zip(names, deployed, pruned, strict=True)],
    )
    _require_tolerance(verification.outputs, tolerance, unit.model.name)
    return verification


def _pruned_session(unit: Unit, scratch: Path) -> Any:
    """Open the user's own model, with masks applied where there are any, as converted where it was too old to run."""
    model = unit.model
    if model.path is not None and not unit.masks and model.converted_from_opset is None:
        return open_session(model.path)
    return open_session(write_reference(unit, lambda layer: _pruned(unit, layer), scratch))


def _pruned(unit: Unit, layer: Layer) -> npt.NDArray[np.float32]:
    matrix = layer.original_matrix(unit.graph)
    mask = unit.masks.get(layer.name)
    return matrix if mask is None else np.where(mask.kept, matrix, np.float32(0))


def _quantised_session(unit: Unit, deployment: Deployment, scratch: Path) -> Any:
    """Open the user's graph with the weights that discrete levels hold, folds divided out again."""
    plans = {plan.name: plan for plan in deployment.plan.layers}

    def weights(layer: Layer) -> npt.NDArray[np.float32]:
        decoded = deployment.weights(plans[layer.name])
        factor = layer.fold_factor()
        if factor is None:
            return decoded
        factor = np.broadcast_to(factor, decoded.shape)
        unfolded = np.divide(decoded, factor, out=np.zeros_like(decoded), where=factor != 0)
        return np.where(factor != 0, unfolded, _pruned(unit, layer))

    return open_session(write_reference(unit, weights, scratch))


def _tolerance(
    unit: Unit, session: Any, inputs: Mapping[str, npt.NDArray[Any]], outputs: Outputs
) -> tuple[float, float | None]:
    """Return the tolerance, and for a model that quantises its activations its own sensitivity, which may set it.

    Where activations are rounded to 8 bits, the last bit of a cell now and then tips one to the next step, and a deep
    network amplifies that as it amplifies any small change. How much it does is measured: by its response to inputs
    that are changed by one part in ten thousand.
    """
    if unit.options.tolerance is not None:
        return unit.options.tolerance, None
    types = {TensorProto.DataType.Name(layer.element_type).lower() for layer in unit.layers}
    tolerance = max((_TOLERANCE[kind] for kind in types & _TOLERANCE.keys()), default=_TOLERANCE["float"])
    if not any(node.proto.op_type.startswith(_QUANTISERS) for node in unit.graph.nodes):
        return tolerance, None
    moved = run(session, {name: _nudged(value, number) for number, (name, value) in enumerate(inputs.items())})
    sensitivity = max(
        (abs(output_error("", m, o).relative_error) for m, o in zip(moved, outputs, strict=True)), default=0
    )
    return max(tolerance, _TOLERANCE["quantised"], 2 * sensitivity), sensitivity


def _nudged(value: npt.NDArray[Any], seed: int) -> npt.NDArray[Any]:
    if value.dtype.kind != "f":
        return value
    noise = np.random.default_rng(seed).standard_normal(value.shape)
    return (value + _NUDGE * float(value.std()) * noise).astype(value.dtype)


def output_error(name: str, found: Any, reference: Any) -> OutputError:
    """Return how far an output is from its reference; outputs of another shape or kind are infinitely far."""
    a, b = _flat(found), _flat(reference)
    if a.shape != b.shape:
        return OutputError(output=name, max_abs_error=-1.0, max_abs_reference=0.0, relative_error=-1.0)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    difference = np.where(same, 0.0, np.abs(a - b))
    error = float(difference.max(initial=0.0))
    if not np.isfinite(error):
        return OutputError(output=name, max_abs_error=-1.0, max_abs_reference=0.0, relative_error=-1.0)
    finite = np.abs(b[np.isfinite(b)])
    largest = float(finite.max(initial=0.0))
    relative = error / largest if largest > 0 else error
    return OutputError(output=name, max_abs_error=error, max_abs_reference=largest, relative_error=relative)


def _flat(value: Any) -> npt.NDArray[np.float64]:
    """Return an output, a sequence of them or a map, as one vector of numbers; text counts by its hash code points."""
    if isinstance(value, dict):
        value = [part for key in sorted(value) for part in (key, value[key])]
    if isinstance(value, (list, tuple)):
        return np.concatenate([_flat(part) for part in value]) if value else np.zeros(0)
    array = np.asarray(value)
    if array.dtype.kind in "OUS":
        text = "\0".join(str(item) for item in array.reshape(-1))
        return np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.float64)
    return array.astype(np.float64).reshape(-1)


def _require_tolerance(outputs: Sequence[OutputError], tolerance: float, where: str) -> None:
    for output in outputs:
        if output.relative_error < 0:
            raise FaultRunError(
                f"{where}: output '{output.output}' of the deployed model has another shape, or is not finite where "
                f"the reference is; check the model with --inputs FILE.npz of real inputs"
            )
        if output.relative_error > tolerance:
            raise FaultRunError(
                f"{where}: output '{output.output}' of the deployed model is off by {output.relative_error:.3g} of its "
                f"largest magnitude, expected at most {tolerance:g}; raise --tolerance if the model amplifies rounding"
            )


def _keep_reference(path: Path, inputs: Mapping[str, npt.NDArray[Any]], names: Sequence[str], outputs: Outputs) -> None:
    """Write the inputs and the reference outputs, so that the folder can be verified later without the model."""
    tensors = {f"input/{name}": value for name, value in inputs.items()}
    tensors |= {f"output/{name}": _flat(value) for name, value in zip(names, outputs, strict=True)}
    announced = [(name, value.dtype, value.shape) for name, value in tensors.items()]
    with TensorWriter(path, announced, {"format": "rerampile-verification"}) as writer:
        for name in writer.specs:
            writer.write(name, tensors[name])


def verify_deployment(folder: str | Path) -> Verification:
    """Verify a deployment folder again, from its files alone.

    Checksums, the placement of every weight, the decoded weights against the hashes in the plan, pruned weights against
    the masks, and the deployed model in ONNX Runtime against the outputs recorded when it was compiled.

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
    with ThreadPoolExecutor(_THREADS) as pool:
        hashes = pool.map(partial(_decoded_sha256, deployment), deployment.plan.layers)
        for layer, found_hash in zip(deployment.plan.layers, hashes, strict=True):
            if found_hash != layer.decoded_sha256:
                raise PlanFormatError(
                    f"{deployment.folder}: layer '{layer.name}': decoded weights differ from those that were compiled"
                )
    reference = TensorFile(deployment.folder / REFERENCE)
    inputs = {n.removeprefix("input/"): reference.read(n) for n in reference.specs if n.startswith("input/")}
    session = open_session(deployment.model_path)
    names = [output.name for output in session.get_outputs()]
    found = run(session, inputs)
    outputs = [output_error(n, f, reference.read(f"output/{n}")) for n, f in zip(names, found, strict=True)]
    _require_tolerance(outputs, recorded.tolerance, str(deployment.folder))
    return msgspec.structs.replace(recorded, outputs=outputs, onnxruntime=ort.__version__)


def _decoded_sha256(deployment: Deployment, layer: LayerPlan) -> str:
    digest = weights_sha256(decode_layer(deployment, layer))
    deployment.conductances.drop_pages()
    return digest
