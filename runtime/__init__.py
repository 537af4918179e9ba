"""Running deployments: ONNX Runtime execution and what is measured with it."""

from __future__ import annotations
