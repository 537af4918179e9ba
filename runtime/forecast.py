"""A rough forecast of the accuracy of chips without running any, for choices that are far apart.

The predicted squared error of the outputs (:mod:`rerampile.runtime.predict`) is added to the outputs of the fault-free
deployment as white noise, and these are scored. Errors of real chips are neither white nor the same for all chips, so
the forecast is off by a few points; between two deployments of one model that cancels in part.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from rerampile.runtime.monte_carlo import Bench, Experiment
from rerampile.runtime.predict import predict_experiment

__all__ = ["forecast", "with_noise"]

_IMAGES = 64  # of the calibration run of the prediction


def forecast(experiment: Experiment) -> float:
    """Return the first metric that chips of an experiment's one fault model are expected to have, percent.

    Raises:
        RerampileError: The deployment or the data do not fit, or the closed forms do not hold for the faults.
    """
    images = min(_IMAGES, experiment.images or _IMAGES)
    (rate,) = predict_experiment(replace(experiment, images=images)).rates
    bench = Bench(experiment)
    scored, rng = bench.metric.fresh(), np.random.default_rng(experiment.seed)
    for batch in bench.data.batches(experiment.batch, bench.images):
        outputs = bench.executor.run(batch.inputs)
        scored.update([with_noise(output, rate.output_error / 100, rng) for output in outputs], batch)
    return scored.result().values[bench.metric.names[0]]


def with_noise(output: Any, error: float, rng: np.random.Generator) -> Any:
    """Return an output with white noise whose rms is ``error`` times that of the output; whole numbers as they are."""
    if not np.issubdtype(output.dtype, np.floating):
        return output
    rms = float(np.sqrt(np.mean(np.square(output, dtype=np.float64))))
    noise = rng.standard_normal(output.shape, np.float32) * np.float32(error * rms)
    return (output + noise).astype(output.dtype)
