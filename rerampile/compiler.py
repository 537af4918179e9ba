"""The compiler: load, run the passes in order, and move the finished folder into place."""

from __future__ import annotations

import dataclasses
import gc
import json
import numbers
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from rerampile.deployment import Deployment, load_deployment
from rerampile.errors import ConfigError, RerampileError
from rerampile.files import (
    CONDUCTANCES,
    DEPLOYED,
    DIGITAL,
    MASKS,
    PLAN,
    REFERENCE,
    STAGES,
    begins_with,
    holds_plan,
    refuse_inside_deployment,
    resolved,
)
from rerampile.graph import ModelGraph
from rerampile.layer import Layer
from rerampile.onnx_file import ModelFile, load_model_file
from rerampile.passes import PASSES as _COMPILE_PASSES
from rerampile.passes.protect import check_protection
from rerampile.plan import Vote, read_plan
from rerampile.pruning import PrunedModel
from rerampile.runtime.verify import Verify
from rerampile.schemes import WEIGHED, MappingName, Scale, known_mapping, known_scale
from rerampile.target import Target
from rerampile.unit import Calibration, CompileOptions, InputMoments, Pass, Unit

if TYPE_CHECKING:
    from rerampile.runtime.dataset import Dataset
    from rerampile.runtime.faults import FaultModel

__all__ = ["CALIBRATION_IMAGES", "PASSES", "Progress", "check_replaceable", "compile_model"]

PASSES: tuple[Pass, ...] = (*_COMPILE_PASSES, Verify())
"""Every pass of a compilation, in order."""

CALIBRATION_IMAGES = 256
"""Images that full scales and corrections are chosen from, if nothing else is asked for."""

_LEAST_RATE = 1e-9  # less is none, and overflows

Progress = Callable[[int, int, str, float | None, Mapping[str, Any]], None]


def compile_model(
    model: str | os.PathLike[str] | onnx.ModelProto | PrunedModel,
    *,
    out: str | os.PathLike[str],
    target: Target | str | os.PathLike[str] = "paper",
    mapping: str | None = None,
    faults: FaultModel | None = None,
    current_weight: float = 0.0,
    scale: Scale = "channel",
    clip: bool = False,
    correct: bool = False,
    calibration: Dataset | None = None,
    calibration_images: int = CALIBRATION_IMAGES,
    prune: float | Mapping[str, float] | None = None,
    masks: str | os.PathLike[str] | None = None,
    pack: bool = False,
    spend_spare_arrays: bool = False,
    protect_msb: int = 0,
    vote: Vote = "median",
    inputs: str | os.PathLike[str] | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    keep_stages: bool = False,
    passes: Sequence[Pass] = PASSES,
    progress: Progress | None = None,
) -> Deployment:
    """Compile a model into a deployment folder and verify it.

    Args:
        model: Path of an ONNX file, a model in memory, or what :func:`rerampile.pruner.prune_model` made of one.
        out: The folder to write. An earlier deployment there is replaced; anything else is refused.
        target: The hardware, a preset's name, or a TOML file.
        mapping: One of :data:`rerampile.schemes.MAPPINGS`; the target's own where None.
        faults: For ``optimal``, ``auto``, ``clip``, ``correct`` and ``spend_spare_arrays``, how likely a cell is
            stuck; a failure rate of 0.001 where None, split as the target says.
        current_weight: For ``optimal`` and ``auto``, how much squared error, in full scales, a unit of read current is
            worth.
        scale: One full scale for each tensor, for each output channel, or for each output channel on each array.
        clip: Whether each full scale is the one of the least expected error on the calibration images, not the largest
            weight; without images all inputs count alike.
        correct: Whether gains and biases make up for what stuck cells do to the outputs on average there.
        calibration: Images for both and for ``spend_spare_arrays``, and needed for ``correct``; targets are not.
        calibration_images: How many of the images to use at most, spread over the data.
        prune: A magnitude ratio for all layers, or ratios by block or layer name pattern; later ones win.
        masks: A masks file (.npz or .safetensors) instead.
        pack: Whether small partitions share arrays.
        spend_spare_arrays: Whether arrays of the target that are left over get further copies of the layers that stuck
            cells hurt most. Copies are averaged.
        protect_msb: How many of the most significant slices are to have two copies in cells that pruning freed.
        vote: What counts of the three sums of such a slice: their ``median``, or their ``mean``.
        inputs: Inputs of the verification (.npz); generated where None.
        tolerance: Largest relative output error, or None for the default of the model's arithmetic.
        seed: Seed of generated inputs.
        keep_stages: Whether to write what each pass produced into ``stages/``.
        passes: The passes to run; a pass of your own can be put between them.
        progress: Called as ``(number, count, name, None, {})`` before and ``(…, seconds, summary)`` after each pass.

    Returns:
        The deployment, as read back from the folder.

    Raises:
        RerampileError: What the user can mend; nothing is left behind.
    """
    pruned = model if isinstance(model, PrunedModel) else None
    resolved = target if isinstance(target, Target) else Target.load(target)
    known = known_mapping(mapping or resolved.mapping)
    weighs_faults = clip or correct or spend_spare_arrays
    options = CompileOptions(
        mapping=known,
        **_weighing(known, resolved, faults, current_weight, calibrated=weighs_faults),
        scale=known_scale(scale),
        clip=clip,
        correct=correct,
        calibration={}
        if calibration is None
        else {"data": calibration.name, "images": min(len(calibration), calibration_images)},
        prune=_ratios(prune),
        pruning={} if pruned is None else dataclasses.asdict(pruned.request),
        masks=None if masks is None else Path(masks),
        pack=pack,
        spend_spare_arrays=spend_spare_arrays,
        protect_msb=protect_msb,
        vote=_known_vote(vote),
        seed=seed,
        inputs=None if inputs is None else Path(inputs),
        tolerance=tolerance,
        keep_stages=keep_stages,
    )
    if calibration is None and correct:
        raise ConfigError("correct: no calibration images, expected some, which show the mean of each input")
    if calibration is not None and not weighs_faults:
        raise ConfigError("calibration images without effect, expected clip, correct or spend_spare_arrays with them")
    if spend_spare_arrays and resolved.unlimited is not None:
        raise ConfigError(
            f"--spend-spare-arrays: target '{resolved.name}' has unlimited {resolved.unlimited}, so that none of its "
            f"arrays is spare, expected a number; give one with --set {resolved.unlimited}=N"
        )
    if pruned is not None and (options.prune or options.masks is not None):
        raise ConfigError("the model is pruned already, expected neither masks nor pruning ratios")
    if options.masks is not None and options.prune:
        raise ConfigError("both masks and pruning ratios were given, expected one of the two")
    if protect_msb:
        check_protection(resolved, protect_msb)
        if spend_spare_arrays:
            raise ConfigError(
                "--protect-msb and --spend-spare-arrays: of an averaged layer no single sums are left to vote on, "
                "expected one of the two"
            )
    if seed < 0:
        raise ConfigError(f"seed {seed}: expected 0 or more")
    if tolerance is not None and not tolerance >= 0:  # NaN is refused too: everything would pass
        raise ConfigError(f"tolerance {tolerance:g}: expected 0 or more")
    with _uncollected():
        loaded = _loaded(model)
        _check_outside(Path(out), loaded, options)
        with written_whole(Path(out)) as folder:
            unit = Unit(
                model=loaded,
                graph=ModelGraph(loaded),
                target=resolved,
                options=options,
                folder=folder,
                pruned=pruned,
            )
            if calibration is not None:
                seen = _calibration(unit.graph, calibration, calibration_images)
                unit = dataclasses.replace(unit, calibration=seen)
            elif clip:
                unit = dataclasses.replace(unit, calibration=_alike)
            _run_passes(unit, passes, progress or (lambda *_: None))
    return load_deployment(out)


def _calibration(graph: ModelGraph, data: Dataset, images: int) -> Calibration:
    """Return what gives the moments of layers' inputs on calibration images."""
    from rerampile.runtime.dataset import spread
    from rerampile.runtime.second_moments import second_moments

    chosen = spread(len(data), min(len(data), images))

    def moments(layers: Sequence[Layer]) -> tuple[Mapping[str, InputMoments], Mapping[str, str]]:
        found, reasons = second_moments(graph, layers, data, chosen)
        averages = {
            name: InputMoments(square=each.moment / each.count, mean=each.total / each.count)
            for name, each in found.items()
        }
        return averages, reasons

    return moments


def _alike(layers: Sequence[Layer]) -> tuple[Mapping[str, InputMoments], Mapping[str, str]]:
    """Return moments of inputs of which nothing is known: of one size, of mean zero, with nothing in common."""
    found = {}
    for layer in layers:
        groups, inputs = layer.view.groups, layer.view.inputs
        square = np.broadcast_to(np.eye(inputs), (groups, inputs, inputs))
        found[layer.name] = InputMoments(square=square, mean=np.zeros((groups, inputs)))
    return found, {}


def _loaded(model: str | os.PathLike[str] | onnx.ModelProto | PrunedModel) -> ModelFile:
    if isinstance(model, PrunedModel):
        return model.model
    return load_model_file(model if isinstance(model, onnx.ModelProto) else Path(model))


def _run_passes(unit: Unit, passes: Sequence[Pass], progress: Progress) -> None:
    """The pipeline: each pass takes the unit and hands on a new one."""
    for number, step in enumerate(passes, start=1):
        progress(number, len(passes), step.name, None, {})
        started = time.perf_counter()
        unit = step.run(unit)
        summary = step.summary(unit)
        progress(number, len(passes), step.name, time.perf_counter() - started, summary)
        if unit.options.keep_stages:
            _keep_stage(unit, number, step.name, summary)
    if unit.plan is None or unit.plan.verification is None:
        names = ", ".join(step.name for step in passes) or "none"
        raise ConfigError(f"passes {names}: wrote no verified plan, expected 'emit' and 'verify' last, as in PASSES")


def _keep_stage(unit: Unit, number: int, name: str, summary: Mapping[str, Any]) -> None:
    """Write what a pass produced, as readable JSON, into ``stages/``."""
    from rerampile.stages import stage_record

    folder = unit.folder / STAGES
    folder.mkdir(exist_ok=True)
    record = {"pass": name, "summary": dict(summary), **stage_record(unit)}
    (folder / f"{number}-{name.replace(' ', '-')}.json").write_text(json.dumps(record, indent=1, default=str) + "\n")


@contextmanager
def _uncollected() -> Iterator[None]:
    """Have Python not look for unused cycles meanwhile: that takes as long as all objects of the caller are many."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """Give a temporary folder beside ``out`` and move it there once it is whole; leave nothing behind otherwise.

    Raises:
        ConfigError: ``out`` holds something else than a deployment, or cannot be written.
    """
    out = resolved(out) if out.is_symlink() else out
    check_replaceable(out)
    folder = out.parent / f".{out.name}.{os.getpid()}.tmp"
    missing = [parent for parent in out.parents if not parent.exists()]
    try:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        except OSError as error:
            raise ConfigError(f"{out}: cannot be written: {error.strerror or error}") from error
        try:
            yield folder
            _sync(folder)
            _move_into_place(folder, out)
        except OSError as error:
            raise ConfigError(
                f"{error.filename or out}: {error.strerror or error}; '{out}' was not written, and nothing was left "
                f"behind"
            ) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        for parent in missing:
            with suppress(OSError):  # only an empty folder goes, so none with a deployment in it
                parent.rmdir()


def _sync(folder: Path) -> None:
    """Have every file on the disk before the folder gets its name: a crash leaves the earlier one or a whole one."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def check_replaceable(out: Path) -> None:
    """Refuse to write over anything but nothing, an empty folder, or a deployment with no files of the user's in it.

    Raises:
        ConfigError: Something else is there.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: a file, expected a folder to write the deployment into; name another one with -o")
    if Path.cwd().is_relative_to(resolved(out)):
        raise ConfigError(f"{out}: the current folder or one around it, expected one inside it; name it with -o")
    refuse_inside_deployment(out)
    if not out.is_dir() or not any(out.iterdir()):
        return
    try:
        files = set(read_plan(out / PLAN).files)
    except RerampileError as error:
        if not holds_plan(out):
            raise ConfigError(
                f"{out}: holds something else than a deployment, expected a new or empty folder; "
                f"name another one with -o, or empty it"
            ) from error
        files = {CONDUCTANCES, DEPLOYED, DIGITAL, MASKS, REFERENCE}
    if others := _others(out, {PLAN, *files}):
        raise ConfigError(
            f"{out}: holds '{others[0]}' beside an earlier deployment, which would be lost; "
            f"move it away, or name another folder with -o"
        )


def _others(out: Path, files: Collection[str]) -> list[str]:
    """Return what lies in an earlier deployment and is not of its making."""
    stages = out / STAGES
    found = [entry for entry in out.iterdir() if entry != stages and not (entry.name in files and _is_regular(entry))]
    if stages.is_dir() and not stages.is_symlink():
        found += [entry for entry in stages.iterdir() if not _is_stage(entry)]
    elif stages.exists() or stages.is_symlink():
        found.append(stages)
    return sorted(str(entry.relative_to(out)) for entry in found)


def _is_regular(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _is_stage(path: Path) -> bool:
    """Whether a file is what ``--keep-stages`` writes; passes of the user's own have any name."""
    return _is_regular(path) and bool(re.fullmatch(r"\d+-.+\.json", path.name)) and begins_with(path, b'"pass": ')


def _check_outside(out: Path, model: ModelFile, options: CompileOptions) -> None:
    """Refuse to replace a folder that holds what is compiled.

    Raises:
        ConfigError: The model, its external data, the masks or the inputs lie in ``out``.
    """
    given = [path for path in (model.path, options.masks, options.inputs) if path is not None]
    given += [model.folder / location for location in model.external if model.folder is not None]
    for path in given:
        if resolved(path).is_relative_to(resolved(out)):
            raise ConfigError(
                f"{path}: lies in '{out}', which would be replaced; name another folder with -o, or move it away"
            )


def _move_into_place(folder: Path, out: Path) -> None:
    """Rename the finished folder to ``out``; an earlier deployment makes way and goes only afterwards."""
    if not out.exists():
        folder.rename(out)
        return
    check_replaceable(out)  # again: the user may have put something there while the model was compiled
    earlier = out.parent / f".{out.name}.{os.getpid()}.old"
    out.rename(earlier)
    try:
        folder.rename(out)
    except BaseException:
        earlier.rename(out)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def _weighing(
    mapping: MappingName, target: Target, faults: FaultModel | None, current_weight: float, *, calibrated: bool
) -> dict[str, Any]:
    """Return the options that weigh schemes and full scales, where the mapping or clipping depends on them.

    Raises:
        ConfigError: They are out of range, or nothing depends on them.
    """
    if mapping not in WEIGHED and (not calibrated or current_weight):
        if faults is None and not current_weight:
            return {}
        given = "current weights" if calibrated else "fault probabilities and current weights"
        raise ConfigError(
            f"mapping '{mapping}' is the same for all {given}, expected none; leave them out, or use "
            f"{' or '.join(WEIGHED)}"
        )
    what = f"mapping '{mapping}'" if mapping in WEIGHED else "--clip, --correct and --spend-spare-arrays"
    from rerampile.runtime.faults import FaultModel  # brings half of scipy

    faults = faults or FaultModel.of_target(0.001, target)
    if not _LEAST_RATE <= faults.rate <= 1 - _LEAST_RATE:
        raise ConfigError(
            f"{what}: {faults.rate:g} of all cells stuck, expected more than 0 and less than 1, where there is "
            f"something to weigh; give --failure-rate, or --stuck-off and --stuck-on"
        )
    if faults.rate_unit != "cell":
        raise ConfigError(
            f"{what}: a failure rate of a {faults.rate_unit}, expected one of a cell; leave out "
            f"--rate-unit {faults.rate_unit}"
        )
    if not 0 <= current_weight <= 1:
        raise ConfigError(f"--current-weight {current_weight:g}: expected a number from 0 to 1")
    return {
        "stuck_off": faults.stuck_off,
        "stuck_on": faults.stuck_on,
        "categories": faults.categories,
        "current_weight": float(current_weight),
    }


def _known_vote(vote: str) -> Vote:
    if vote == "median":
        return "median"
    if vote == "mean":
        return "mean"
    raise ConfigError(f"vote '{vote}': expected median or mean")


def _ratios(prune: float | Mapping[str, float] | None) -> dict[str, float]:
    if prune is None:
        return {}
    ratios: dict[str, Any] = dict(prune) if isinstance(prune, Mapping) else {"*": prune}
    for name, ratio in ratios.items():
        if not isinstance(ratio, numbers.Real):
            raise ConfigError(f"prune {'' if name == '*' else f'{name}='}{ratio!r}: expected a number from 0 up to 1")
    return {name: float(ratio) for name, ratio in ratios.items()}
