"""Work beside the main thread, for what leaves the interpreter's lock: hashing, the disk, large array operations."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

__all__ = ["in_background", "side_by_side"]

_THREADS = 2  # each holds one layer and what is made of it

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")


def in_background(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
    """Start one call on a thread of its own and return its future, which gives its result or raises its error.

    Nobody waits for a thread whose future nobody asks: an interrupted program ends at once.
    """
    future: Future[T] = Future()

    def call() -> None:
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 -- it is raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=call, name="rerampile", daemon=True).start()
    return future


def side_by_side(function: Callable[[S], T], items: Iterable[S]) -> list[T]:
    """Call a function for each item, a few at a time, and return the results in order.

    The first error in that order is raised once no call is left running; calls not yet started never are.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(function, items))
