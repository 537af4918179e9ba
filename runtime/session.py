"""ONNX Runtime sessions, opened one way."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from rerampile.errors import FaultRunError
from rerampile.runtime.processor import int8_saturates

__all__ = ["open_declared", "open_session", "release_memory", "run"]


def open_session(model: Path | bytes, options: Any = None, providers: Sequence[str] = ("CPUExecutionProvider",)) -> Any:
    """Open a model, with ONNX Runtime's default optimisations on the CPU where nothing else is asked for.

    Args:
        model: A file, or a serialised model.
        options: ONNX Runtime's session options, or None for the default.
        providers: Execution providers, in order of preference.

    Raises:
        FaultRunError: ONNX Runtime refuses the model; its own words are kept.
    """
    options = options if options is not None else ort.SessionOptions()
    options.log_severity_level = 4
    # Idle threads that go on spinning take the cores from whoever draws faults or opens the next session.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "100")
    # Products with weights of four bits are rounded to eight bits otherwise, which no exact deployment agrees with.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    # Constant float weights between DequantizeLinear and QuantizeLinear would be rounded to eight bits, too.
    disabled = ["WeightBiasQuantization"]
    if int8_saturates():
        # Exact products give the numbers of other processors. Elsewhere they are exact, and asking makes them slow.
        options.add_session_config_entry("session.x64quantprecision", "1")
        # Gives weights with a scale for each channel and no zero point a single one then, which fits nothing.
        disabled.append("QDQS8ToU8Transformer")
    try:
        source = model if isinstance(model, bytes) else str(model)
        return ort.InferenceSession(source, options, list(providers), disabled_optimizers=disabled)
    except Exception as error:
        name = "the model" if isinstance(model, bytes) else str(model)
        raise FaultRunError(f"ONNX Runtime cannot open {name}: {' '.join(str(error).split())[:400]}") from error


def open_declared(model: Path) -> Any:
    """Open a model for what it declares: it is not optimised, which saves time and memory, and runs slowly.

    Raises:
        FaultRunError: ONNX Runtime refuses the model; its own words are kept.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False
    return open_session(model, options)


def release_memory() -> None:
    """Give the system what the allocator holds of freed memory: after a session was opened, copies of its weights."""
    with suppress(OSError, AttributeError):  # other C libraries than glibc need no such call
        ctypes.CDLL(None).malloc_trim(0)


def run(session: Any, inputs: Mapping[str, npt.NDArray[Any]]) -> Sequence[Any]:
    """Run a session and return its outputs in order.

    Raises:
        FaultRunError: ONNX Runtime cannot run the inputs; its own words are kept.
    """
    options = ort.RunOptions()
    options.log_severity_level = 4
    try:
        found: Sequence[Any] = session.run(None, {k: np.ascontiguousarray(v) for k, v in inputs.items()}, options)
    except Exception as error:
        raise FaultRunError(f"ONNX Runtime cannot run the model: {' '.join(str(error).split())[:400]}") from error
    return found
