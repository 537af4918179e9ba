"""How far the outputs of two models are apart, and how far they may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from rerampile.errors import FaultRunError
from rerampile.plan import OutputError
from rerampile.runtime.session import run

__all__ = ["input_sensitivity", "output_error", "require_tolerance"]

_NUDGE = 1e-4


def output_error(name: str, found: Any, reference: Any) -> OutputError:
    """Return how far an output is from its reference; -1 where shapes differ or only one of them is finite."""
    a, b = flat(found), flat(reference)
    arrays = isinstance(found, np.ndarray) and isinstance(reference, np.ndarray)
    apart = OutputError(output=name, max_abs_error=-1.0, max_abs_reference=0.0, relative_error=-1.0, numbers=b.size)
    if a.shape != b.shape or (arrays and found.shape != reference.shape):
        return apart
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    error = float(np.abs(np.subtract(a, b, out=np.zeros_like(a), where=~same)).max(initial=0.0))
    if not np.isfinite(error):
        return apart
    largest = float(np.abs(b[np.isfinite(b)]).max(initial=0.0))
    relative = error / largest if largest > 0 else error
    return replace(apart, max_abs_error=error, max_abs_reference=largest, relative_error=relative)


def flat(value: Any) -> npt.NDArray[np.float64]:
    """Return an output, a sequence of them or a map, as one vector of numbers; text as its code points."""
    if isinstance(value, dict):
        value = [part for key in sorted(value) for part in (key, value[key])]
    if isinstance(value, (list, tuple)):
        return np.concatenate([flat(part) for part in value]) if value else np.zeros(0)
    array = np.asarray(value)
    if array.dtype.kind in "OUS":
        text = "\0".join(str(item) for item in array.reshape(-1))
        return np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.float64)
    return array.astype(np.float64).reshape(-1)


def require_tolerance(errors: Sequence[OutputError], tolerance: float, where: str) -> None:
    """Refuse errors above the tolerance.

    Raises:
        FaultRunError: An output is above it, has another shape, or is not finite where the reference is.
    """
    for error in errors:
        if error.relative_error < 0:
            raise FaultRunError(
                f"{where}: output '{error.output}' of the deployed model has another shape, or is not finite where "
                f"the reference is; check the model with --inputs FILE.npz of real inputs"
            )
        if error.relative_error > tolerance:
            raise FaultRunError(
                f"{where}: output '{error.output}' of the deployed model is off by {error.relative_error:.3g} of its "
                f"largest magnitude, expected at most {tolerance:g}; raise --tolerance if the model amplifies rounding"
            )


def input_sensitivity(session: Any, inputs: Mapping[str, npt.NDArray[Any]], outputs: Sequence[Any]) -> float:
    """Return by how much a model's outputs move, relative to their largest magnitude, when its inputs move by 1e-4.

    Where activations are rounded to 8 bits, the last bit of a weight now and then tips one to the next step, and a deep
    network amplifies that as it amplifies any small change of its inputs. This measures how much.
    """
    moved = run(session, {name: _nudged(value, number) for number, (name, value) in enumerate(inputs.items())})
    return max((abs(output_error("", m, o).relative_error) for m, o in zip(moved, outputs, strict=True)), default=0.0)


def _nudged(value: npt.NDArray[Any], seed: int) -> npt.NDArray[Any]:
    if value.dtype.kind != "f":
        return value
    noise = np.random.default_rng(seed).standard_normal(value.shape)
    return np.asarray(value + _NUDGE * float(value.std()) * noise, value.dtype)
