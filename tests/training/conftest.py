"""What tests of training share."""

from __future__ import annotations

from contextlib import suppress

import pytest


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Models here are tiny: threads that wait for each other, beside other tests, take many times as long."""
    with suppress(ImportError):
        import torch

        torch.set_num_threads(1)
