"""An append-only record of finished work, from which interrupted work goes on.

One JSON object a line. The first says which experiment it is; each later one is a finished piece of work under its key.
A line that a crash cut short is dropped when the journal is opened again; everything before it counts.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rerampile.errors import DataError

__all__ = ["Journal"]

_FORMAT = "rerampile-journal"
_START = b'{"experiment":'  # of every journal


class Journal:
    """Results by key, written as they come.

    Args:
        path: The journal; made where it does not exist.
        experiment: What makes results comparable: everything that a result depends on, in plain data.

    Raises:
        DataError: The file is no journal, damaged before its last line, of another experiment, or being written.
    """

    def __init__(self, path: Path, experiment: Mapping[str, Any]) -> None:
        self.path = path
        self.done: dict[str, Any] = {}
        header = {"format": _FORMAT, "experiment": _plain(experiment)}
        with ExitStack() as stack:
            try:
                self._file = stack.enter_context(path.open("r+b" if path.exists() else "xb"))
                self._lock()
                kept = self._read(header)
                self._file.truncate(kept)
                self._file.seek(kept)
                if kept == 0:
                    self._append(header)
            except OSError as error:
                raise DataError(f"{path}: the journal cannot be written: {error.strerror or error}") from error
            stack.pop_all()

    def _lock(self) -> None:
        """Keep other processes out, where the file system can; the lock ends with this process, however that ends."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{self.path}: another process is writing this journal; wait for it, or name another one"
            ) from error
        except OSError:
            pass

    def _read(self, header: Mapping[str, Any]) -> int:
        """Take over the results of an earlier start; return up to which byte the file is whole."""
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if not (data.startswith(_START) or _START.startswith(data)):
            raise DataError(f"{self.path}: not a journal of rerampile; name another file")
        for number, line in enumerate(whole.splitlines()):
            try:
                entry = json.loads(line)
                if number == 0:
                    self._check(entry, header)
                else:
                    self.done[entry["key"]] = entry["result"]
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(
                    f"{self.path}: line {number + 1} is no journal entry; remove the file to start anew"
                ) from error
        return len(whole)

    def _check(self, found: Any, expected: Mapping[str, Any]) -> None:
        if not isinstance(found, dict) or found.get("format") != _FORMAT:
            raise DataError(f"{self.path}: not a journal of rerampile; name another file")
        there, here = found.get("experiment", {}), expected["experiment"]
        for key in sorted(here.keys() | there.keys(), key=lambda key: (key == "data", key)):  # what was asked, first
            if there.get(key) != here.get(key):
                raise DataError(
                    f"{self.path}: journal of another run: {key} was {json.dumps(there.get(key))}, now "
                    f"{json.dumps(here.get(key))}; remove it to start anew, or name another one"
                )

    def add(self, key: str, result: Any) -> None:
        """Record a finished piece of work; it survives a crash right after."""
        self._append({"key": key, "result": _plain(result)})
        self.done[key] = _plain(result)

    def _append(self, entry: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(entry, sort_keys=True).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _plain(value: Any) -> Any:
    """Return a value as reading it back from JSON gives it."""
    return json.loads(json.dumps(value))
