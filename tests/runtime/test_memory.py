"""What a worker takes while it runs chips, measured as benchmarks/memory.py does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rerampile.runtime.processor import int8_saturates

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "memory.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what no file holds")
@pytest.mark.parametrize(("way", "copy"), [("worker", 43), ("int8-worker", 11)])
def test_a_worker_takes_two_copies_of_the_weights_and_the_activations(way: str, copy: int) -> None:
    """ResNet18 for CIFAR, 11.2 million weights, batches of 32; the limit is that of weights in fp32."""
    if way == "int8-worker" and int8_saturates():
        pytest.skip("this processor has no exact int8 products")
    found = subprocess.run([sys.executable, SCRIPT, "--ways", way], check=True, capture_output=True, text=True)
    limit, opening, running = map(int, re.findall(r"(\d+) MiB", found.stdout))
    assert limit == 117
    assert copy < opening <= limit  # one copy of the weights at least
    assert opening < running <= limit
