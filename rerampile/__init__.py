"""Compile exported ONNX models for ReRAM crossbar accelerators, and check the deployment before silicon.

:func:`compile_model` writes a deployment folder, :func:`load_deployment` reads one. A :class:`Plan` says where every
weight sits, a :class:`Target` describes the hardware; ``PASSES`` is the ordered tuple of passes, each a :class:`Pass`.
Names are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rerampile.compiler import PASSES, compile_model
    from rerampile.deployment import Deployment, load_deployment
    from rerampile.errors import (
        CapacityError,
        ConfigError,
        DataError,
        FaultRunError,
        InternalError,
        ModelError,
        PlanFormatError,
        RerampileError,
        UnsupportedModelError,
    )
    from rerampile.plan import Plan
    from rerampile.runtime.verify import verify_deployment
    from rerampile.target import Target
    from rerampile.unit import Pass
    from rerampile.version import __version__

__all__ = [
    "PASSES",
    "CapacityError",
    "ConfigError",
    "DataError",
    "Deployment",
    "FaultRunError",
    "InternalError",
    "ModelError",
    "Pass",
    "Plan",
    "PlanFormatError",
    "RerampileError",
    "Target",
    "UnsupportedModelError",
    "__version__",
    "compile_model",
    "load_deployment",
    "verify_deployment",
]

_HOMES = {
    "PASSES": "compiler",
    "Deployment": "deployment",
    "Pass": "unit",
    "Plan": "plan",
    "Target": "target",
    "__version__": "version",
    "compile_model": "compiler",
    "load_deployment": "deployment",
    "verify_deployment": "runtime.verify",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'rerampile' has no attribute '{name}'")
    home = _import_module(f"rerampile.{_HOMES.get(name, 'errors')}")
    attribute: object = getattr(home, name)
    return attribute


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
