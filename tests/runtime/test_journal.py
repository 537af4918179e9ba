"""The journal of long work: what survives, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rerampile.errors import DataError
from rerampile.runtime.journal import Journal

EXPERIMENT = {"seed": 1, "rates": [0.001, 0.01], "plan": "abc"}


def filled(path: Path) -> Path:
    with Journal(path, EXPERIMENT) as journal:
        journal.add("run 0", {"top1": 91.5})
        journal.add("run 1", {"top1": 88.0})
    return path


def test_results_come_back(tmp_path: Path) -> None:
    with Journal(filled(tmp_path / "j"), EXPERIMENT) as journal:
        assert journal.done == {"run 0": {"top1": 91.5}, "run 1": {"top1": 88.0}}
        journal.add("run 2", {"top1": 80.0})
    with Journal(tmp_path / "j", EXPERIMENT) as journal:
        assert len(journal.done) == 3


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_that_a_crash_cut_short_is_done_again(tmp_path: Path, cut: int) -> None:
    path = filled(tmp_path / "j")
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with Journal(path, EXPERIMENT) as journal:
        assert list(journal.done) == ["run 0"]
        journal.add("run 1", {"top1": 88.0})
    assert path.read_bytes() == whole


def test_an_empty_file_is_a_new_journal(tmp_path: Path) -> None:
    (tmp_path / "j").touch()
    with Journal(tmp_path / "j", EXPERIMENT) as journal:
        assert journal.done == {}
    assert json.loads((tmp_path / "j").read_text())["format"] == "rerampile-journal"


def test_of_another_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"journal of another run: seed was 1, now 2; remove it to start anew"):
        Journal(filled(tmp_path / "j"), {**EXPERIMENT, "seed": 2})


def test_somebody_elses_file_without_an_end_of_line(tmp_path: Path) -> None:
    (tmp_path / "j").write_text("my notes")
    with pytest.raises(DataError, match="not a journal of rerampile; name another file"):
        Journal(tmp_path / "j", EXPERIMENT)
    assert (tmp_path / "j").read_text() == "my notes"


def test_a_first_line_that_a_crash_cut_short(tmp_path: Path) -> None:
    path = filled(tmp_path / "j")
    path.write_bytes(path.read_bytes()[:30])
    with Journal(path, EXPERIMENT) as journal:
        assert journal.done == {}


def test_not_a_journal(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_text('{"a": 1}\n')
    with pytest.raises(DataError, match="not a journal of rerampile"):
        Journal(path, EXPERIMENT)
    assert path.read_text() == '{"a": 1}\n'
    path.write_text("hello\n")
    with pytest.raises(DataError, match="not a journal of rerampile"):
        Journal(path, EXPERIMENT)


def test_damaged_in_the_middle(tmp_path: Path) -> None:
    path = filled(tmp_path / "j")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "garbage", lines[2]]) + "\n")
    with pytest.raises(DataError, match="line 2 is no journal entry"):
        Journal(path, EXPERIMENT)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the journal cannot be written: No such file"):
        Journal(tmp_path / "no" / "j", EXPERIMENT)


def test_another_process_is_writing_it(tmp_path: Path) -> None:
    """The lock belongs to the open file: a second one is refused as if another process had it."""
    message = "another process is writing this journal; wait for it, or name another one"
    with Journal(tmp_path / "j", EXPERIMENT), pytest.raises(DataError, match=message):
        Journal(tmp_path / "j", EXPERIMENT)
    with Journal(tmp_path / "j", EXPERIMENT) as journal:
        assert journal.done == {}
