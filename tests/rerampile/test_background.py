"""Calls beside the main thread: results in order, errors where results are asked for, nothing started after one."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import CancelledError

import pytest

from rerampile.background import in_background, side_by_side


def test_a_call_runs_beside_its_caller() -> None:
    go = threading.Event()
    future = in_background(lambda value: go.wait(60) and value, 3)
    assert not future.done()
    go.set()
    assert future.result() == 3


@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt(), SystemExit(3)])
def test_an_error_is_raised_where_the_result_is_asked_for(error: BaseException) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        in_background(fail).result()
    assert caught.value is error


def test_an_ending_program_waits_for_no_call() -> None:
    code = (
        "import threading; from rerampile.background import in_background\n"
        "in_background(threading.Event().wait); raise SystemExit(7)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 7


def test_results_are_in_order() -> None:
    both = threading.Barrier(2)

    def call(number: int) -> int:
        both.wait(60)  # so two run at once
        return -number

    assert side_by_side(call, range(6)) == [0, -1, -2, -3, -4, -5]


def test_nothing_starts_after_an_error_and_nothing_is_left_running() -> None:
    started = list[int]()

    def call(number: int) -> None:
        started.append(number)
        if number == 1:
            raise CancelledError("stop")

    before = threading.active_count()
    with pytest.raises(CancelledError, match="stop"):
        side_by_side(call, range(100_000))
    assert 1 in started
    assert len(started) < 100_000
    assert threading.active_count() == before
