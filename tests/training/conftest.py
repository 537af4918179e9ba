"""What tests of training share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Models here are tiny: threads that wait for each other, beside other tests, take many times as long."""
    torch = pytest.importorskip("torch", reason="the extra rerampile[train] is not installed")
    torch.set_num_threads(1)
