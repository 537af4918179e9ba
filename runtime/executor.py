"""Running a deployed model in ONNX Runtime with the weights that faulty chips read.

The fast way optimises the graph once, keeps one session whose weights are inputs in the kernels' own order, and patches
faulty weights in place. The slow way opens a session a chip with all optimisations; it runs everything that ONNX
Runtime runs. Which way serves is decided from the deployment alone, so that a chip's result never depends on other
chips.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from rerampile.deployment import Deployment
from rerampile.errors import ConfigError, FaultRunError
from rerampile.runtime.blocked_weights import (
    BlockedModel,
    NotApplicableError,
    blocked_model,
    optimised_once,
    plain_buffers,
)
from rerampile.runtime.leaks import widen
from rerampile.runtime.plain_model import PlainModel, plain_model, weight_options
from rerampile.runtime.quantised import QuantisedModel, quantised_model
from rerampile.runtime.session import open_session, release_memory, run
from rerampile.runtime.votes import add_votes
from rerampile.runtime.weight_buffers import WeightBuffers
from rerampile.slice_copies import protected_outputs

if TYPE_CHECKING:
    from rerampile.runtime.inject import LayerFaults, Leaks, Votes

__all__ = ["Executor", "Fidelity", "Inputs", "Layout", "Method", "Outputs", "Precision", "open_executor"]

Inputs = Mapping[str, npt.NDArray[Any]]
Outputs = list[npt.NDArray[Any]]
Method = Literal["auto", "fast", "slow"]
Precision = Literal["fp32", "int8"]

Layout = BlockedModel | QuantisedModel
"""What opening a deployed model finds out: where its weights lie in the optimised graph, or the model in int8."""

_CPU = "CPUExecutionProvider"
_INT8_REASON = "int8 kernels want weights that stay packed"


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """How far int8 is from fp32, without faults.

    Attributes:
        layers: Layers that run in int8; the others stay in fp32.
        rms: Root mean square of the differences of the outputs on the calibration inputs, over that of the outputs.
    """

    layers: int
    rms: float


class Executor(Protocol):
    """A deployed model that can be run as any chip.

    Attributes:
        method: ``fast`` or ``slow``.
        reason: Why this one, in words.
        layout: What other processes of this machine need not find out again; None where there is no such thing.
        fidelity: Of int8; None in fp32.
    """

    method: str
    reason: str
    layout: Layout | None
    fidelity: Fidelity | None

    def run(self, inputs: Inputs) -> Outputs:
        """Return the outputs of the present chip, in the model's order.

        Raises:
            FaultRunError: ONNX Runtime cannot run the model on these inputs.
        """
        ...

    def apply(self, faults: Sequence[LayerFaults]) -> None:
        """Become the chip that has these faults, and no others."""
        ...

    def restore(self) -> None:
        """Become the chip without faults again."""
        ...


def open_executor(
    deployment: Deployment,
    *,
    precision: Precision = "fp32",
    provider: str = _CPU,
    method: Method = "auto",
    threads: int | None = None,
    calibration: Sequence[Inputs] = (),
    layout: Layout | None = None,
) -> Executor:
    """Open a deployed model.

    Args:
        deployment: The deployment.
        precision: The arithmetic: ``fp32``, or ``int8`` for cells of at most 8 bits; layers that int8 has no kernel
            for, that leak, or that are voted on, stay in fp32. int8 runs the slow way.
        provider: Execution provider of ONNX Runtime.
        method: ``fast`` and ``slow`` insist; ``auto`` takes the fast way where it applies.
        threads: Threads inside an operator, or None for ONNX Runtime's choice.
        calibration: Inputs from which int8 learns the ranges of activations; not needed with a layout.
        layout: Of an executor of the same deployment and precision on this machine, where there is one: finding it
            takes time, and for a moment four times the memory of the weights.

    Raises:
        ConfigError: The precision, the provider or the fast way does not exist here.
        FaultRunError: ONNX Runtime refuses the model, or this CPU has no exact int8.
    """
    if provider not in ort.get_available_providers():
        raise ConfigError(
            f"--provider {provider}: not in this ONNX Runtime, which has {', '.join(ort.get_available_providers())}; "
            f"CUDA comes with the package onnxruntime-gpu"
        )
    plain = plain_model(deployment)
    if precision == "int8":
        ready = layout if isinstance(layout, QuantisedModel) else None
        return _open_int8(deployment, plain, provider, method, threads, calibration, ready)
    if precision != "fp32":
        raise ConfigError(f"--precision {precision}: expected fp32 or int8")
    if method == "slow":
        return _SlowExecutor(deployment, plain, provider, threads, "asked for")
    try:
        protection = deployment.plan.protection
        if protection is not None and protection.vote == "median" and protection.weights:
            raise NotApplicableError("medians of sums are no weights; those of a mean are")
        if provider != _CPU:
            raise NotApplicableError(f"weights are laid out for the CPU, not for {provider}")
        if method == "auto":
            _prefer_fast(deployment)
        blocked = layout if isinstance(layout, BlockedModel) else blocked_model(deployment, plain)
        return _FastExecutor(deployment, blocked, threads)
    except NotApplicableError as error:
        if method == "fast":
            raise ConfigError(f"{deployment.folder}: the fast way does not apply: {error}; use the slow one") from error
        return _SlowExecutor(deployment, plain, provider, threads, str(error))


def _open_int8(
    deployment: Deployment,
    plain: PlainModel,
    provider: str,
    method: Method,
    threads: int | None,
    calibration: Sequence[Inputs],
    ready: QuantisedModel | None,
) -> Executor:
    """Open a deployed model in int8; one that is not ready yet is quantised, and compared with fp32 on the inputs."""
    if method == "fast" or provider != _CPU:
        raise ConfigError(f"--precision int8: runs the slow way on {_CPU} alone, not {method} on {provider}; use fp32")
    if ready is not None:
        return _SlowExecutor(deployment, ready.plain, provider, threads, _INT8_REASON, ready)
    if not calibration:
        raise ConfigError("--precision int8: no calibration inputs, expected at least one batch of real data")
    voted = {number for number, flags in enumerate(protected_outputs(deployment.plan)) if flags.any()}
    quantised = quantised_model(deployment, plain, calibration, _leaking_layers(deployment).keys() | voted)
    exact = _SlowExecutor(deployment, plain, provider, threads, "asked for")
    expected = [exact.run(inputs) for inputs in calibration]
    del exact
    executor = _SlowExecutor(deployment, quantised.plain, provider, threads, _INT8_REASON, quantised)
    found = [executor.run(inputs) for inputs in calibration]
    executor.fidelity = Fidelity(layers=len(quantised.scales), rms=_relative_error(found, expected))
    return executor


def _relative_error(found: Sequence[Outputs], expected: Sequence[Outputs]) -> float:
    """Return the root mean square of the differences over that of the expected outputs."""
    squares = [0.0, 0.0]
    for f, e in ((f, e) for pair in zip(found, expected, strict=True) for f, e in zip(*pair, strict=True)):
        squares[0] += float(np.square(f.astype(np.float64) - e).sum())
        squares[1] += float(np.square(e.astype(np.float64)).sum())
    return math.sqrt(squares[0] / squares[1]) if squares[1] else math.sqrt(squares[0])


def _prefer_fast(deployment: Deployment) -> None:
    """Say why the slow way is the better one where it is.

    Raises:
        NotApplicableError: Chips may have leaks, or most kernels would be slower with weights that may change.
    """
    layers = deployment.plan.layers
    for number, array in sorted(_leaking_layers(deployment).items()):
        name = layers[number].name
        raise NotApplicableError(f"array {array} holds several groups of layer '{name}', whose stuck spare cells leak")
    products = sum(not any("Conv" in use.op for use in layer.uses) for layer in layers)
    if 2 * products > len(layers):
        raise NotApplicableError(
            f"{products} of {len(layers)} layers are products, fastest with weights that stay packed"
        )


def _leaking_layers(deployment: Deployment) -> dict[int, int]:
    """Return the layers of which an array holds several groups, so that stuck spare cells leak, and the array."""
    found: dict[int, int] = {}
    for array in deployment.plan.arrays:
        groups: dict[int, set[int]] = {}
        for partition in array.partitions:
            groups.setdefault(partition.layer, set()).update(range(*partition.groups))
        for layer, held in groups.items():
            if len(held) > 1 and not deployment.plan.layers[layer].groups_take_turns:
                found.setdefault(layer, array.id)
    return found


class _PatchedExecutor:
    """What both ways share: weights in buffers of their own, patched and restored."""

    method: str
    layout: Layout | None = None
    fidelity: Fidelity | None = None

    def __init__(self, deployment: Deployment, buffers: WeightBuffers, reason: str) -> None:
        self.reason = reason
        self._deployment = deployment
        self._buffers = buffers
        for number, layer in enumerate(deployment.plan.layers):
            buffers.fill(number, deployment.weights(layer))
            deployment.conductances.drop_pages()

    def apply(self, faults: Sequence[LayerFaults]) -> None:
        self.restore()
        for fault in faults:
            self._buffers.patch(fault.layer, fault.index, fault.value)
            if fault.leaks is not None:
                self._leak(fault.layer, fault.leaks)
            if fault.votes is not None:
                self._vote(fault.layer, fault.votes)

    def restore(self) -> None:
        self._buffers.restore()

    def _leak(self, layer: int, leaks: Leaks) -> None:
        name = self._deployment.plan.layers[layer].name
        raise FaultRunError(f"layer '{name}': stuck spare cells join its groups, which needs the slow way")

    def _vote(self, layer: int, votes: Votes) -> None:
        name = self._deployment.plan.layers[layer].name
        raise FaultRunError(f"layer '{name}': medians of its sums need the slow way, not votes on {len(votes.out_row)}")


class _FastExecutor(_PatchedExecutor):
    """One session over the optimised graph, whose weights are inputs."""

    method = "fast"

    def __init__(self, deployment: Deployment, blocked: BlockedModel, threads: int | None) -> None:
        self.layout = blocked
        super().__init__(
            deployment, WeightBuffers(blocked.shapes, blocked.places), "every weight was found in the optimised graph"
        )
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = threads or 0
        self._session = open_session(blocked.proto.SerializeToString(), options)
        values = [*self._session.get_inputs(), *self._session.get_outputs()]
        if odd := next((v for v in values if not v.type.startswith("tensor(")), None):
            raise NotApplicableError(f"'{odd.name}' is a {odd.type}, not a tensor")

    def run(self, inputs: Inputs) -> Outputs:
        return list(run(self._session, {**self._buffers.arrays, **inputs}))


class _SlowExecutor(_PatchedExecutor):
    """A session a chip, opened when it first runs."""

    method = "slow"

    def __init__(
        self,
        deployment: Deployment,
        plain: PlainModel,
        provider: str,
        threads: int | None,
        reason: str,
        quantised: QuantisedModel | None = None,
    ) -> None:
        scales = None if quantised is None else quantised.scales
        super().__init__(deployment, plain_buffers(deployment, plain, scales), reason)
        self._plain = plain
        if quantised is not None:
            if len(quantised.scales) == len(plain.weights) and not plain.optimised:  # all are int8, so no layer leaks
                self._plain = optimised_once(deployment, plain, self._buffers.arrays) or plain
            self.layout = replace(quantised, plain=self._plain)
        self._providers = [provider] if provider == _CPU else [provider, _CPU]
        self._threads = threads
        self._leaks: list[tuple[int, Leaks]] = []
        self._votes: list[tuple[int, Votes]] = []
        self._opened: tuple[Any, Any] | None = None  # the session, and the memory that it reads

    def run(self, inputs: Inputs) -> Outputs:
        if self._opened is None:
            self._opened = self._open()
        return list(run(self._opened[0], inputs))

    def restore(self) -> None:
        self._opened = None
        self._leaks.clear()
        self._votes.clear()
        super().restore()

    def _leak(self, layer: int, leaks: Leaks) -> None:
        self._leaks.append((layer, leaks))

    def _vote(self, layer: int, votes: Votes) -> None:
        self._votes.append((layer, votes))

    def _open(self) -> tuple[Any, Any]:
        model, arrays = self._plain.proto, dict(self._buffers.arrays)
        if self._leaks or self._votes:
            model = onnx.ModelProto()
            model.CopyFrom(self._plain.proto)
        for number, leaks in self._leaks:
            layer = self._deployment.plan.layers[number]
            arrays |= widen(model, layer, self._plain.weights[number], self._buffers.read(number), leaks)
        for number, votes in self._votes:
            arrays |= add_votes(model, self._deployment.plan.layers[number], self._plain.weights[number], votes)
        options = weight_options(self._deployment, arrays)
        options.intra_op_num_threads = self._threads or 0
        if self._plain.optimised:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = open_session(model.SerializeToString(), options, self._providers)
        if not self._plain.optimised:
            release_memory()
        return session, arrays
