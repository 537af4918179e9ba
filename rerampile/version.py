"""The version of rerampile, as its metadata state it."""

from __future__ import annotations

from importlib.metadata import version

__all__ = ["__version__"]

__version__ = version("rerampile")
