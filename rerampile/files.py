"""Names of the files in a deployment folder."""

from __future__ import annotations

__all__ = ["CONDUCTANCES", "DEPLOYED", "DIGITAL", "MASKS", "PLAN", "REFERENCE", "STAGES"]

PLAN = "plan.json"
CONDUCTANCES = "conductances.safetensors"
DEPLOYED = "deployed.onnx"
DIGITAL = "digital.safetensors"
MASKS = "masks.safetensors"
REFERENCE = "verification.safetensors"
STAGES = "stages"
