"""The passes that turn a model into a deployment."""

from __future__ import annotations
