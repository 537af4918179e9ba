"""The passes, in the order in which they run."""

from __future__ import annotations

from rerampile.passes.allocate import Allocate
from rerampile.passes.emit import Emit
from rerampile.passes.find_layers import FindLayers
from rerampile.passes.map import Map
from rerampile.passes.prune import Prune
from rerampile.unit import Pass

__all__ = ["PASSES"]

PASSES: tuple[Pass, ...] = (FindLayers(), Prune(), Map(), Allocate(), Emit())
