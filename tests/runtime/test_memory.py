"""What a worker takes while it runs chips, measured as benchmarks/memory.py does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "memory.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what no file holds")
def test_a_worker_takes_two_copies_of_the_weights_and_the_activations() -> None:
    """ResNet18 for CIFAR, 11.2 million weights in fp32, batches of 32."""
    found = subprocess.run([sys.executable, SCRIPT, "--ways", "worker"], check=True, capture_output=True, text=True)
    limit, opening, running = map(int, re.findall(r"(\d+) MiB", found.stdout))
    assert limit == 117
    assert 43 < opening <= limit  # one copy of the weights at least
    assert opening < running <= limit
