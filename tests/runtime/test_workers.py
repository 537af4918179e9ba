"""Work spread over processes and over a real Dask cluster: what is lost on the way changes nothing."""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest
from click.testing import CliRunner

from rerampile import ConfigError, DataError, Deployment, FaultRunError, compile_model
from rerampile.cli import main
from rerampile.runtime import workers
from rerampile.runtime.faults import FaultModel
from rerampile.runtime.monte_carlo import Bench, ChipResult, Experiment
from rerampile.runtime.validation import validate

RUNS, RATES = 20, (0.0, 0.02, 0.2)
WANTED = RUNS * len(RATES)


@pytest.fixture(scope="module")
def deployment(small_model: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    return compile_model(small_model, out=tmp_path_factory.mktemp("workers") / "small.deployment")


@pytest.fixture(scope="module")
def experiment(deployment: Deployment) -> Experiment:
    rates = tuple(FaultModel.of_rate(rate) for rate in RATES)
    return Experiment(folder=deployment.folder, faults=rates, images=24, batch=8, seed=3)


@pytest.fixture(scope="module")
def expected(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The report of one process that nothing happens to."""
    return report(experiment, tmp_path_factory.mktemp("expected") / "j")


def report(experiment: Experiment, journal: Path, **options: Any) -> bytes:
    return msgspec.json.encode(validate(experiment, journal, runs=RUNS, **options))


def finished(journal: Path) -> list[str]:
    """The keys of a journal, in order."""
    return [json.loads(line)["key"] for line in journal.read_text().splitlines()[1:]]


def when(count: int, act: Callable[[], object]) -> Callable[[int, int, ChipResult | None], None]:
    """A progress that acts once, after so many results."""
    waiting = [act]

    def progress(done: int, _: int, __: ChipResult | None) -> None:
        if done >= count and waiting:
            waiting.pop()()

    return progress


# Processes of this machine.


def test_a_process_that_dies_loses_no_result(
    experiment: Experiment, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[workers._Processes] = []
    start = workers._Processes.__enter__
    monkeypatch.setattr(workers._Processes, "__enter__", lambda self: opened.append(self) or start(self))

    def kill() -> None:
        pool = opened[0]._pool
        assert pool is not None
        os.kill(next(iter(pool[1]._processes)), signal.SIGKILL)

    with pytest.raises(FaultRunError, match=r"a worker process died .*; finished chips are kept, start again"):
        report(experiment, tmp_path / "j", jobs=2, progress=when(5, kill))
    before = finished(tmp_path / "j")
    assert 5 <= len(before) < WANTED
    assert report(experiment, tmp_path / "j") == expected
    assert finished(tmp_path / "j")[: len(before)] == before
    assert len(set(finished(tmp_path / "j"))) == len(finished(tmp_path / "j")) == WANTED


def test_workers_take_over_what_the_first_bench_found_out(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distributed.protocol.pickle import dumps, loads

    bench = Bench(experiment)
    learned = loads(dumps(bench.learned))
    monkeypatch.delattr("rerampile.runtime.executor.blocked_model")
    monkeypatch.delattr(Bench, "_learn")
    other = Bench(experiment, learned)
    assert other.clean is learned.clean
    assert other.executor.method == "fast"
    assert other.chip(1, 2) == bench.chip(1, 2)


def test_killed_and_started_again_it_gives_the_same_bytes(deployment: Deployment, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ["validate", deployment.folder, "--runs", "200", "--images", "8", "-q", "-o"]
    command = [sys.executable, "-m", "rerampile", *options]
    with subprocess.Popen([*command, cut, "--jobs", "2"], stderr=subprocess.DEVNULL) as parent:
        wait_until(lambda: (cut / "journal.jsonl").is_file() and len(finished_lines(cut / "journal.jsonl")) > 20)
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        parent.kill()
    assert len(children) >= 3, "two workers, and Python's resource tracker"
    wait_until(lambda: not any(is_running(int(child)) for child in children))
    before = finished_lines(cut / "journal.jsonl")
    assert 20 < len(before) < 600
    for folder in (cut, whole):
        done = CliRunner().invoke(main, [str(word) for word in [*options, folder]])
        assert done.exit_code == 0, done.output
    assert (cut / "report.json").read_bytes() == (whole / "report.json").read_bytes()
    after = finished_lines(cut / "journal.jsonl")
    assert after[: len(before)] == before
    assert sorted(after) == sorted(finished_lines(whole / "journal.jsonl"))


def test_ctrl_c_stops_all_processes_in_one_line(deployment: Deployment, tmp_path: Path) -> None:
    """A terminal sends the signal to the workers, too."""
    command = [sys.executable, "-m", "rerampile", "validate", deployment.folder, "--jobs", "2", "--runs", "5000"]
    with subprocess.Popen(
        [*command, "--images", "8", "-q", "-o", tmp_path / "out"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as parent:
        journal = tmp_path / "out" / "journal.jsonl"
        wait_until(lambda: journal.is_file() and len(finished_lines(journal)) > 5)
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        os.killpg(parent.pid, signal.SIGINT)
        assert parent.stderr is not None
        assert parent.stderr.read() == "Aborted\n"
    assert parent.returncode == 130
    wait_until(lambda: not any(is_running(int(child)) for child in children))
    assert not (tmp_path / "out" / "report.json").exists()
    assert len(finished_lines(journal)) > 5


def finished_lines(journal: Path) -> list[bytes]:
    """The whole lines of a journal but the first."""
    return journal.read_bytes().rpartition(b"\n")[0].splitlines()[1:]


def is_running(process: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until(holds: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.01)


# Workers of a Dask cluster.


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two worker processes, each watched by a nanny that starts it anew when it dies."""
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2, threads_per_worker=2, processes=True, dashboard_address=None, silence_logs=logging.CRITICAL
    ) as found:
        yield found


def test_a_worker_that_dies_changes_nothing(
    experiment: Experiment, expected: bytes, cluster: Any, tmp_path: Path
) -> None:
    killed = next(iter(cluster.workers.values())).pid
    found = report(
        experiment,
        tmp_path / "j",
        dask=cluster.scheduler_address,
        progress=when(10, lambda: os.kill(killed, signal.SIGKILL)),
    )
    assert found == expected
    assert len(set(finished(tmp_path / "j"))) == len(finished(tmp_path / "j")) == WANTED
    assert not is_running(killed)


def test_paths_are_those_of_the_client(
    deployment: Deployment, experiment: Experiment, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(deployment.folder.parent)
    near = replace(experiment, folder=Path(deployment.folder.name))
    bench = Bench(near)
    with workers.open_workers(dask=cluster.scheduler_address) as found:
        assert found is not None
        from rerampile.runtime.monte_carlo import _Chips

        assert list(found.each(_Chips.of(bench), [(0, 1)])) == [bench.chip(0, 1)]


def test_a_worker_with_other_files_is_refused(
    experiment: Experiment, deployment: Deployment, cluster: Any, tmp_path: Path
) -> None:
    from rerampile.runtime.monte_carlo import _Chips

    chips = _Chips.of(Bench(experiment))
    other = replace(chips, expected={**chips.expected, "conductances": "0" * 64})
    older = replace(chips, expected={**chips.expected, "rerampile": "0.0.1"})
    with workers.open_workers(dask=cluster.scheduler_address) as found:
        assert found is not None
        with pytest.raises(DataError, match=r'a worker on .*: conductances is "\w+", expected "0+" as where the run'):
            list(found.each(other, [(0, 0)]))
        with pytest.raises(DataError, match=r'rerampile is "[\d.]+", expected "0.0.1" as .*; give workers the same'):
            list(found.each(older, [(0, 0)]))


def test_what_no_worker_can_do(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.scheduler, "allowed_failures", 0)

    class Deadly:
        def __init__(self, way: str) -> None:
            self.way = way

        def open(self) -> Callable[[int], object]:
            return os._exit if self.way == "exit" else importlib.import_module

        def elsewhere(self) -> Deadly:
            return self

    with workers.open_workers(dask=cluster.scheduler_address) as found:
        assert found is not None
        with pytest.raises(FaultRunError, match=r"software \(No module named 'nothing_here'\), expected the same"):
            list(found.each(Deadly("import"), ["nothing_here"]))
        with pytest.raises(FaultRunError, match=r"a chip ended every worker that tried it \(out of memory\?\)"):
            list(found.each(Deadly("exit"), [1]))


def test_without_workers_what_is_finished_is_kept(
    experiment: Experiment, expected: bytes, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_WORKERS_SECONDS", 1.0)
    address = cluster.scheduler_address
    with pytest.raises(FaultRunError, match=r"--dask tcp://.*: all workers are lost; finished chips are kept, start"):
        report(experiment, tmp_path / "j", dask=address, progress=when(10, lambda: cluster.scale(0)))
    assert 10 <= len(finished(tmp_path / "j")) < WANTED
    wait_until(lambda: not cluster.workers and not cluster.scheduler.workers)  # one on its way out may come up again
    with pytest.raises(FaultRunError, match=r"the cluster has no workers; start some with 'dask worker tcp://"):
        report(experiment, tmp_path / "j", dask=address)
    assert report(experiment, tmp_path / "j") == expected
    assert len(set(finished(tmp_path / "j"))) == len(finished(tmp_path / "j")) == WANTED


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "other://127.0.0.1:1"])
def test_a_scheduler_that_is_not_there(
    deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setattr(workers, "_ANSWER_SECONDS", 0.5)
    done = CliRunner().invoke(main, ["validate", str(deployment.folder), "--dask", address, "-o", str(tmp_path)])
    assert done.exit_code == 1
    assert done.stderr == (
        f"Error: --dask {address}: no scheduler answers there within 0.5 s; expected HOST:PORT as 'dask scheduler' "
        f"says when it starts\n"
    )


def test_without_the_extra(experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ConfigError, match=r"--dask: needs Dask, which is not installed; pip install 'rerampile\[clus"):
        report(experiment, tmp_path / "j", dask="127.0.0.1:8786")


def test_processes_and_a_cluster_at_once(deployment: Deployment) -> None:
    arguments = ["validate", str(deployment.folder), "--jobs", "2", "--dask", "127.0.0.1:8786"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2
    assert "--jobs and --dask: expected one of the two ways" in done.stderr
