"""The progress of chips on a terminal."""

from __future__ import annotations

import io
import re
import sys
import time

import pytest

from rerampile.commands.chips_progress import chips_progress
from rerampile.runtime.monte_carlo import ChipResult

RESULT = ChipResult(
    run=0,
    rate=0,
    values={"top1": 91.5},
    clean={"top1": 92.0},
    within={},
    stuck_off=0,
    stuck_on=0,
    non_finite=0,
    by_class={},
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_rate_is_that_of_this_start(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stderr", terminal)
    with chips_progress(quiet=False) as progress:
        assert progress is not None
        progress(4000, 6000, None)
        for finished in range(4001, 4006):
            time.sleep(0.02)
            progress(finished, 6000, RESULT)
    last = next(line for line in reversed(terminal.getvalue().splitlines()) if "4005/6000" in line)
    assert "top1 91.50" in last
    rate = re.search(r"([\d,.]+) chips/min", last)
    assert rate is not None, last
    assert 1 < float(rate[1].replace(",", "")) <= 60 / 0.02
    assert re.search(r"\d+:\d\d:\d\d", last), "no time left"


def test_nothing_is_shown_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with chips_progress(quiet=False) as progress:
        assert progress is None
    monkeypatch.setattr(sys, "stderr", Terminal())
    with chips_progress(quiet=True) as progress:
        assert progress is None
