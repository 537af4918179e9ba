"""Predict what faults do without drawing any: closed forms for each layer, and one noisy run a layer for the network.

A layer's error, as a share of the energy of its products (noise-to-signal ratio, NSR), follows from the plan and from
sums over one calibration run. How much of it reaches the outputs is measured once a layer, with little noise of the
same shape; such errors of different layers add up by their energies. The mean errors of weights are no noise: all chips
share them, and those of all layers act together. One run of the mean chip measures that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from rerampile.deployment import Deployment, load_deployment
from rerampile.errors import ConfigError, DataError, RerampileError
from rerampile.runtime.copy_places import refuse_weight_rates
from rerampile.runtime.data import open_dataset
from rerampile.runtime.dataset import Dataset, spread
from rerampile.runtime.executor import Executor, Inputs, Outputs, open_executor
from rerampile.runtime.faults import FaultModel
from rerampile.runtime.inject import LayerFaults
from rerampile.runtime.layer_energies import Energies, layer_energies
from rerampile.runtime.monte_carlo import Experiment
from rerampile.runtime.session import open_session
from rerampile.runtime.weight_errors import LayerErrors

__all__ = [
    "LayerPrediction",
    "Prediction",
    "RatePrediction",
    "check_predictable",
    "predict",
    "predict_beside",
    "predict_experiment",
]

_IMAGES = 64  # of the calibration run
_PROBE_NSR = 0.01  # noise that measures how much of a layer's error reaches the outputs
_NOISY_RUNS = 5  # images run with noise, for all layers together, for each image of the calibration run
_MOST_PROBE_IMAGES = 16


class LayerPrediction(msgspec.Struct, kw_only=True, frozen=True):
    """One layer at one failure rate.

    Attributes:
        layer: Its name.
        nsr: Expected squared error of its products, over the sum of their squares.
        coherent: The part of ``nsr`` that the mean errors of weights make: chips share it.
        sensitivity: Squared relative error of the outputs for each unit of ``nsr`` that is not coherent.
        share: The layer's part of the squared output error, each layer's mean error taken alone, from 0 to 1.
    """

    layer: str
    nsr: float
    coherent: float
    sensitivity: float
    share: float


class RatePrediction(msgspec.Struct, kw_only=True, frozen=True):
    """One failure rate.

    Attributes:
        rate: Failure rate a cell (or weight).
        stuck_off: Its part of stuck-off cells.
        stuck_on: Its part of stuck-on cells.
        categories: Its parts of cells that fail in other ways, by name; left out where none do.
        rate_unit: What the rate is of.
        output_error: Predicted error of the outputs, rms over rms, percent. Too high where it comes near 100: outputs
            do not grow with errors for ever.
        coherent_error: The part of it that the mean errors of weights make in all chips, percent.
        layers: The layers, those that hurt most first.
    """

    rate: float
    stuck_off: float
    stuck_on: float
    rate_unit: str
    output_error: float
    coherent_error: float
    layers: list[LayerPrediction]
    categories: dict[str, float] | msgspec.UnsetType = msgspec.UNSET


class Prediction(msgspec.Struct, kw_only=True, frozen=True, tag_field="format", tag="rerampile-prediction"):
    """What ``prediction.json`` holds: what faults are expected to do to a deployment.

    Attributes:
        format: What kind of file this is.
        format_version: Version of the format.
        folder: Name of the deployment folder.
        model: Name of the compiled model.
        mapping: Mapping scheme.
        scale: One scale a tensor, a channel or a partition.
        data: Name of the data.
        images: Images of the calibration run.
        probe_images: Images of the noisy run of each layer.
        rates: By failure rate.
        not_predicted: Layers that are left out, with the reason.
    """

    format_version: int = 1
    folder: str
    model: str
    mapping: str
    scale: str
    data: str
    images: int
    probe_images: int
    rates: list[RatePrediction]
    not_predicted: dict[str, str]


def predict(
    deployment: Deployment,
    faults: Sequence[FaultModel],
    data: Dataset,
    *,
    images: int = _IMAGES,
    probe_images: int | None = None,
    batch: int = 32,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Prediction:
    """Predict the errors of every layer, and of the outputs.

    Args:
        deployment: The deployment.
        faults: Independent faults, by failure rate.
        data: Inputs to calibrate with; targets are not needed.
        images: How many of them to use at most.
        probe_images: How many of them each layer's noisy runs see; by default 16, or so few that those of all
            layers are at most five times ``images``, and no more than there are data.
        batch: Images run at once.
        seed: Seed of the noise.
        progress: Called with (done, all): the calibration run and the noisy run of each layer count one each.

    Raises:
        ConfigError: Faults are not independent, a number is out of range, or no layer can be predicted.
        DataError: There are no images, or outputs are not finite.
    """
    check_predictable(faults)
    _check_chips(deployment, faults)
    images = min(images, len(data))
    if images < 1:
        raise DataError("no images to calibrate with, expected one or more")
    if probe_images is not None and probe_images < 1:
        raise ConfigError(f"--probe-images {probe_images}: expected 1 or more")
    layers = deployment.plan.layers
    steps = len(layers) + 1
    report = progress or (lambda done, total: None)
    report(0, steps)
    errors = [LayerErrors(deployment, number) for number in range(len(layers))]
    calibration = (b.inputs for b in data.batches(batch, spread(len(data), images)))
    energies, reasons = layer_energies(deployment, errors, faults, calibration)
    if not energies:
        raise ConfigError(f"{deployment.folder}: no layer to predict: {'; '.join(sorted(set(reasons.values())))}")
    report(1, steps)
    if probe_images is None:
        probe_images = max(1, min(_MOST_PROBE_IMAGES, min(_NOISY_RUNS * images, len(data)) // len(layers)))
    probe_images = min(probe_images, images)
    probes = [b.inputs for b in data.batches(1, spread(len(data), probe_images))]
    worst = max(range(len(faults)), key=lambda number: faults[number].rate)
    bench = _Bench(deployment, errors, probes, seed)
    effects: dict[int, _Effect] = {}
    for number, found in energies.items():
        effects[number] = bench.effect(number, faults[worst], float(found.errors[worst]) / found.products)
        report(2 + number, steps)
    means = [bench.mean_chip(model, energies) for model in faults]
    report(steps, steps)
    return Prediction(
        folder=deployment.folder.name,
        model=deployment.plan.model.name,
        mapping=str(deployment.plan.options["mapping"]),
        scale=str(deployment.plan.options["scale"]),
        data=data.name,
        images=images,
        probe_images=probe_images,
        rates=[_rate(errors, model, n, means[n], energies, effects) for n, model in enumerate(faults)],
        not_predicted={layers[number].name: reason for number, reason in sorted(reasons.items())},
    )


def predict_experiment(
    experiment: Experiment, *, split: str = "train", progress: Callable[[int, int], None] | None = None
) -> Prediction:
    """Predict what chips of an experiment will do; of how they are run and scored, nothing counts.

    Args:
        experiment: Deployment, faults, data, and the seed of the noise.
        split: Which split of the data to calibrate with where the experiment names none.
        progress: As of :func:`predict`.

    Raises:
        RerampileError: As of :func:`predict`, or the deployment or the data cannot be opened.
    """
    check_predictable(experiment.faults)
    deployment = load_deployment(experiment.folder)
    images = experiment.images or _IMAGES
    data = open_dataset(
        experiment.data,
        open_session(deployment.model_path),
        experiment.preprocessing,
        default_split=split,
        generate=images,
        seed=experiment.seed,
        skip_bad=experiment.skip_bad,
    )
    return predict(
        deployment,
        experiment.faults,
        data,
        images=images,
        batch=experiment.batch,
        seed=experiment.seed,
        progress=progress,
    )


def predict_beside(experiment: Experiment) -> Prediction | str:
    """Predict what chips that are run do at their highest failure rate, from the data that they are run on.

    Args:
        experiment: What is run. Nothing is expected of it: this is an extra.

    Returns:
        The prediction, or why there is none.
    """
    if experiment.fault_map is not None or load_deployment(experiment.folder).plan.chip is not None:
        return "chips are measured, not drawn"
    worst = max(experiment.faults, key=lambda model: model.rate)
    if worst.distribution != "independent":
        return f"the closed forms hold for independent faults, not for --distribution {worst.distribution}"
    if not worst.rate:
        return "no cell is stuck"
    images = min(_IMAGES, experiment.images or _IMAGES)
    try:
        return predict_experiment(replace(experiment, faults=(worst,), images=images), split="test")
    except RerampileError as error:
        return str(error)


def check_predictable(faults: Sequence[FaultModel]) -> None:
    """Refuse faults that the closed forms do not hold for.

    Raises:
        ConfigError: There are none, or they are not independent.
    """
    if not faults:
        raise ConfigError("--failure-rate: no rate to predict, expected one or more")
    if odd := next((model for model in faults if model.distribution != "independent"), None):
        raise ConfigError(
            f"--distribution {odd.distribution}: the closed forms hold for independent faults; run 'rerampile validate'"
        )


def _check_chips(deployment: Deployment, faults: Sequence[FaultModel]) -> None:
    """Refuse chips that there is no closed form for.

    Raises:
        ConfigError: There is but one, whose cells are known; or votes are medians, or faults are of weights, which have
            more than one place.
    """
    if deployment.plan.chip is not None:
        raise ConfigError(
            f"{deployment.folder}: programmed for one chip, whose cells are known: there is nothing to predict; run "
            f"'rerampile validate', or predict the deployment that it was programmed from"
        )
    refuse_weight_rates(deployment, faults)
    protection = deployment.plan.protection
    if protection is not None and protection.vote == "median" and protection.weights:
        raise ConfigError(
            f"{deployment.folder}: medians of three sums depend on the inputs, and there is no closed form for them; "
            f"run 'rerampile validate', or compile with --vote mean"
        )


class _Effect(NamedTuple):
    """What a layer does to the outputs: of noise, for each unit of NSR; of a shift of one in units of the gain."""

    noise: float
    shift: float


def _rate(
    errors: Sequence[LayerErrors],
    model: FaultModel,
    number: int,
    mean: float,
    energies: dict[int, Energies],
    effects: dict[int, _Effect],
) -> RatePrediction:
    """Put the parts of one failure rate together; ``mean`` is the squared relative error of the mean chip."""
    parts, noise = [], 0.0
    for layer, found in energies.items():
        coherent = _coherent(errors[layer], model, found) / found.products
        random = float(found.errors[number]) / found.products
        noise += effects[layer].noise * random
        part = effects[layer].noise * random + effects[layer].shift * errors[layer].shift(model) ** 2
        parts.append((part, layer, random + coherent, coherent))
    total = math.fsum(part for part, *_ in parts)
    return RatePrediction(
        rate=model.asked,
        stuck_off=model.stuck_off,
        stuck_on=model.stuck_on,
        categories=model.categories or msgspec.UNSET,
        rate_unit=model.rate_unit,
        output_error=100 * math.sqrt(noise + mean),
        coherent_error=100 * math.sqrt(mean),
        layers=[
            LayerPrediction(
                layer=errors[layer].layer.name,
                nsr=nsr,
                coherent=coherent,
                sensitivity=effects[layer].noise,
                share=part / total if total else 0.0,
            )
            for part, layer, nsr, coherent in sorted(parts, key=lambda p: (-p[0], p[1]))
        ],
    )


def _coherent(errors: LayerErrors, model: FaultModel, found: Energies) -> float:
    """Return the energy of the mean error ``shift * sums - p * products``, ``p`` being what weights lose."""
    p, shift = errors.stuck(model).loss, errors.shift(model)
    return shift**2 * found.shifts - 2 * shift * p * found.crossed + p**2 * found.products


class _Bench:
    """Measures how much errors in layers change the outputs."""

    def __init__(
        self, deployment: Deployment, errors: Sequence[LayerErrors], probes: Sequence[Inputs], seed: int
    ) -> None:
        self._deployment, self._errors, self._probes, self._seed = deployment, errors, probes, seed
        self._executor = _executor(deployment)
        self._clean = [_numbers(self._executor.run(inputs)) for inputs in probes]
        self._energy = sum(_energy(outputs) for outputs in self._clean)
        if not math.isfinite(self._energy):
            raise DataError(
                f"{deployment.folder}: outputs are not finite on these inputs without faults, so that no error can be "
                f"predicted; give inputs that the model is made for with --data"
            )

    def effect(self, number: int, model: FaultModel, nsr: float) -> _Effect:
        """Return what noise and shift of a layer do.

        Noise of few weights is a small sample of all noise, so small layers get new noise for each of several images.

        Args:
            number: The layer.
            model: The fault model whose variances shape the noise.
            nsr: What these variances come to.
        """
        errors = self._errors[number]
        noise = shift = 0.0
        if nsr > 0:
            deviation = np.sqrt(errors.variance(model) * np.float32(_PROBE_NSR / nsr))
            weights, rng = self._deployment.weights(errors.layer), np.random.default_rng([self._seed, number])
            mean_size = self._deployment.plan.totals.weights // len(self._errors)
            draws = max(1, min(len(self._probes), mean_size // deviation.size))
            for first in range(draws):
                signs = rng.integers(0, 2, deviation.shape, np.int8) * 2 - 1
                noise += self._error({number: weights + deviation * signs}, slice(first, None, draws)) / _PROBE_NSR
        if errors.shift(model):
            shift = self._error({number: errors.mean_weights(model)}) / errors.shift(model) ** 2
        return _Effect(noise, shift)

    def mean_chip(self, model: FaultModel, layers: Iterable[int]) -> float:
        """Return the squared relative error of the outputs when each weight is what it is on average."""
        if not model.rate:
            return 0.0
        return self._error({number: self._errors[number].mean_weights(model) for number in layers})

    def _error(self, weights: Mapping[int, npt.NDArray[np.float32]], which: slice = slice(None)) -> float:
        """Return the squared error of the outputs on some probes, over the energy of the outputs on all of them."""
        faults = [
            LayerFaults(layer=number, index=np.arange(value.size), value=value.reshape(-1), leaks=None)
            for number, value in weights.items()
        ]
        self._executor.apply(faults)
        try:
            found = [_numbers(self._executor.run(inputs)) for inputs in self._probes[which]]
        finally:
            self._executor.restore()
        pairs = zip(found, self._clean[which], strict=True)
        error = sum(_energy(f - c for f, c in zip(*pair, strict=True) if f.shape == c.shape) for pair in pairs)
        if not math.isfinite(error):
            raise DataError(
                f"{self._deployment.folder}: errors in its layers make outputs that are not finite, whose error cannot "
                f"be predicted; run 'rerampile validate', which counts them"
            )
        return error / self._energy if self._energy else 0.0


def _executor(deployment: Deployment) -> Executor:
    """Open the fast way where it can run the model at all: noise never leaks."""
    try:
        return open_executor(deployment, method="fast")
    except ConfigError:
        return open_executor(deployment, method="slow")


def _numbers(outputs: Outputs) -> list[npt.NDArray[np.float64]]:
    return [output.astype(np.float64) for output in outputs if output.dtype.kind in "fiu"]


def _energy(arrays: Iterable[npt.NDArray[np.float64]]) -> float:
    return sum(float(np.square(array).sum()) for array in arrays)
