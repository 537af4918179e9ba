"""Work spread over processes: of this machine, or workers of a Dask cluster.

A :class:`Work` is opened once by each worker, which then does one item after the other. An item may be done twice,
after the worker that had done it died; its result is given once.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any, Protocol, Self

from rerampile.errors import ConfigError, FaultRunError, RerampileError

__all__ = ["Work", "Workers", "open_workers"]

_AHEAD = 2  # items a worker that are under way: it need not wait for the next one, and few are lost with it
_TICK_SECONDS = 1.0  # between looks at whether a cluster is still there
_FETCH_SECONDS = 5.0  # that a result has to arrive
_ANSWER_SECONDS = 10.0  # that a scheduler has to answer
_WORKERS_SECONDS = 30.0  # that a cluster may be without workers: killed ones come back

Do = Callable[[Any], Any]


class Work(Protocol):
    """What a worker opens once and then does item by item; plain data, equal where it means the same."""

    def open(self) -> Do:
        """Return what does an item; called by the worker."""
        ...

    def elsewhere(self) -> Work:
        """Return the same work for other machines: absolute paths, and small, for it goes along with every item."""
        ...


class Workers(Protocol):
    """Processes that do work."""

    def each(self, work: Work, items: Sequence[Any]) -> Iterator[Any]:
        """Yield the result of each item, in the order in which they are finished.

        Raises:
            FaultRunError: Workers were lost; what they had finished was yielded.
        """
        ...


@contextmanager
def open_workers(jobs: int = 1, dask: str | None = None) -> Iterator[Workers | None]:
    """Open worker processes.

    Args:
        jobs: Processes of this machine; with one, work is done by this very process: None is given.
        dask: Address of a Dask scheduler whose workers do the work instead.

    Raises:
        ConfigError: Dask is not installed.
        FaultRunError: No scheduler answers at the address, or it has no workers.
    """
    if dask is not None:
        with _connected(dask) as cluster:
            yield cluster
    elif jobs > 1:
        with _Processes(jobs) as processes:
            yield processes
    else:
        yield None


def _finished(
    items: Sequence[Any],
    submit: Callable[[Any], Any],
    done: Callable[[Collection[Any]], Iterator[tuple[Any, Any]]],
    limit: Callable[[], int],
) -> Iterator[Any]:
    """Yield results as items are finished.

    Args:
        items: The items.
        submit: Sends an item on its way, and returns what stands for it.
        done: Waits for some of those that are under way; yields each with its result, and raises where one failed.
        limit: How many may be under way.
    """
    waiting, pending = deque(items), set[Any]()
    while waiting or pending:
        try:
            for _ in range(min(limit() - len(pending), len(waiting))):
                pending.add(submit(waiting[0]))
                waiting.popleft()
        except BrokenExecutor:
            if not pending:  # else some of them may still have results
                raise
        for future, result in done(pending):
            pending.discard(future)
            yield result


# In a worker.

_opened: list[tuple[Work, Do]] = []  # at most one: what is held takes memory
_one_at_a_time = threading.Lock()  # workers of a cluster may have several threads


def _do(work: Work, item: Any) -> Any:
    """Do an item of work, which is opened if it is not."""
    with _one_at_a_time:
        if not _opened or _opened[0][0] != work:
            _opened.clear()
            try:
                _opened.append((work, work.open()))
            except RerampileError as error:
                raise type(error)(f"a worker on {socket.gethostname()}: {error}") from error
        return _opened[0][1](item)


# Processes of this machine.


class _Processes:
    """A pool of processes that is started when there is work, and does not outlive this process."""

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._pool: tuple[Work, ProcessPoolExecutor] | None = None
        self._context = multiprocessing.get_context("spawn")
        self._held, self._alive = self._context.Pipe(duplex=False)

    def each(self, work: Work, items: Sequence[Any]) -> Iterator[Any]:
        try:
            pool = self._open(work)
            yield from _finished(items, lambda item: _submit(pool, item), self._done, lambda: _AHEAD * self._jobs)
        except BrokenExecutor as error:
            raise FaultRunError(
                "a worker process died (out of memory?); finished chips are kept, start again with the same options to "
                "go on, or with fewer --jobs"
            ) from error

    @staticmethod
    def _done(pending: Collection[Future[Any]]) -> Iterator[tuple[Future[Any], Any]]:
        done, _ = wait(pending, return_when=FIRST_COMPLETED)
        for future in sorted(done, key=lambda future: future.exception() is not None):  # an error loses no result
            yield future, future.result()

    def _open(self, work: Work) -> ProcessPoolExecutor:
        if self._pool is None or self._pool[0] != work:
            self._shut()
            pool = ProcessPoolExecutor(self._jobs, self._context, initializer=_begin, initargs=(work, self._held))
            self._pool = work, pool
        return self._pool[1]

    def _shut(self) -> None:
        if self._pool is not None:
            self._pool[1].shutdown(cancel_futures=True)
            self._pool = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._alive.close()  # nobody waits for what is under way
        self._shut()
        self._alive.close()
        self._held.close()


def _submit(pool: ProcessPoolExecutor, item: Any) -> Future[Any]:
    """Send an item on its way; a process that is started for it inherits that SIGINT is blocked until it is ignored."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_do_given, item)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_given: list[Work] = []


def _begin(work: Work, parent: Connection) -> None:
    """Start a worker process: its parent alone is interrupted, and it ends when its parent does, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _given.append(work)


def _end_with(parent: Connection) -> None:
    parent.poll(None)  # nothing is ever sent: it ends when the other side is closed
    os._exit(1)


def _do_given(item: Any) -> Any:
    return _do(_given[0], item)


# Workers of a Dask cluster.


@contextmanager
def _connected(address: str) -> Iterator[_Cluster]:
    """Connect to a scheduler, and wait for its first worker."""
    try:
        import distributed
    except ImportError as error:
        raise ConfigError("--dask: needs Dask, which is not installed; pip install 'rerampile[cluster]'") from error
    try:
        with ThreadPoolExecutor(1) as thread:  # a notebook has a loop of its own here
            thread.submit(asyncio.run, _greet(address)).result()
        client: Any = distributed.Client(address, timeout=_ANSWER_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise FaultRunError(
            f"--dask {address}: no scheduler answers there within {_ANSWER_SECONDS:g} s; expected HOST:PORT as "
            f"'dask scheduler' says when it starts"
        ) from error
    with _unlogged("distributed.client"), client:
        try:
            client.wait_for_workers(1, timeout=_WORKERS_SECONDS)
        except TimeoutError as error:
            raise FaultRunError(
                f"--dask {address}: the cluster has no workers; start some with 'dask worker {address}'"
            ) from error
        yield _Cluster(client, address)
        client.run(_portable()[1], on_error="ignore")


@contextmanager
def _unlogged(name: str) -> Iterator[None]:
    """Keep a logger from telling of workers and schedulers that are lost: they come back, or an error says so."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _portable() -> tuple[Callable[[bytes, Any], Any], Callable[[], None]]:
    """Return what a worker of a cluster runs to do an item, and to give its memory back in the end.

    Dask sends these whole, for they are local to a function. Others it sends by name, and a worker or a scheduler that
    has no rerampile would end over that name, without a word to us.
    """

    def do(work: bytes, item: Any) -> Any:
        from distributed.protocol.pickle import loads

        from rerampile.runtime import workers

        return workers._do(loads(work), item)

    def close() -> None:
        import sys

        if "rerampile.runtime.workers" in sys.modules:
            sys.modules["rerampile.runtime.workers"]._opened.clear()

    return do, close


async def _greet(address: str) -> None:
    """Connect once for nothing: a client that finds nobody leaves threads behind."""
    from distributed.comm import connect

    greeted = await connect(address, timeout=_ANSWER_SECONDS)
    await greeted.close()


class _Cluster:
    """A connection to a scheduler."""

    def __init__(self, client: Any, address: str) -> None:
        self._client, self._address = client, address
        self._alone_since: float | None = None  # when the cluster was first seen without workers

    def each(self, work: Work, items: Sequence[Any]) -> Iterator[Any]:
        from distributed import KilledWorker
        from distributed.protocol.pickle import dumps

        do, there = _portable()[0], dumps(work.elsewhere())
        try:
            yield from _finished(
                items, lambda item: self._client.submit(do, there, item, pure=False), self._done, self._limit
            )
        except ImportError as error:
            raise self._lost(f"a worker has other software ({error}), expected the same rerampile as here") from error
        except KilledWorker as error:
            raise self._lost("a chip ended every worker that tried it (out of memory?)") from error
        except CancelledError as error:
            raise self._lost("the scheduler is lost") from error

    def _done(self, pending: Collection[Any]) -> Iterator[tuple[Any, Any]]:
        from distributed import wait as wait_there

        with suppress(TimeoutError), self._client.as_current():
            wait_there(pending, timeout=_TICK_SECONDS, return_when="FIRST_COMPLETED")
        for future in [future for future in pending if future.done()]:
            try:
                result = future.result(_FETCH_SECONDS)
            except TimeoutError:  # its worker died with the result: the item is done again
                continue
            yield future, result

    def _limit(self) -> int:
        """Return how many items may be under way."""
        try:
            workers = len(self._client.nthreads())
        except OSError as error:
            raise self._lost("the scheduler is lost") from error
        now = time.monotonic()
        self._alone_since = None if workers else self._alone_since or now
        if self._alone_since is not None and now - self._alone_since > _WORKERS_SECONDS:
            raise self._lost("all workers are lost")
        return _AHEAD * max(workers, 1)

    def _lost(self, what: str) -> FaultRunError:
        return FaultRunError(
            f"--dask {self._address}: {what}; finished chips are kept, start again with the same options to go on"
        )
