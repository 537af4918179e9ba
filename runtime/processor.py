"""What this processor's int8 products are like."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

__all__ = ["int8_saturates"]

_DOT_PRODUCTS = {"avx512_vnni", "avx_vnni", "amx_int8"}


def int8_saturates() -> bool:
    """Tell whether int8 products overflow their sums: those of x86 without VNNI or AMX are added in 16 bits."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return not _features() & _DOT_PRODUCTS


@cache
def _features() -> frozenset[str]:
    info = Path("/proc/cpuinfo")
    return frozenset(info.read_text().split()) if info.exists() else frozenset()
