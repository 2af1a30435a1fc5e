"""Workers that are lost, and clusters."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from blockprune.errors import MissingExtraError
from blockprune.lottery import Spec, run
from blockprune.lottery.executors import InProcess, Processes, opened
from blockprune.lottery.stages import RunError
from tests.lottery_models import SPEC, die, die_once, echo


@pytest.fixture
def pool() -> Iterator[Processes]:
    processes = Processes(2)
    try:
        yield processes
    finally:
        processes.close()


class TestInProcess:
    def test_errors_are_the_future_s(self) -> None:
        assert isinstance(InProcess().submit(int, "x").exception(), ValueError)

    def test_ctrl_c_passes_through(self) -> None:
        def interrupted() -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            InProcess().submit(interrupted)


class TestProcesses:
    def test_a_lost_worker_s_task_is_done_by_another(self, pool: Processes, tmp_path: Path) -> None:
        futures = [pool.submit(echo, str(n)) for n in range(4)]
        lost = pool.submit(die_once, str(tmp_path / "flag"))
        futures += [pool.submit(echo, str(n)) for n in range(4, 8)]
        assert lost.result() == "survived"
        assert [future.result() for future in futures] == [str(n) for n in range(8)]

    def test_a_task_that_always_kills_is_given_up_and_no_other(
        self, pool: Processes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("blockprune.lottery.executors.TRIES", 1)
        futures = [pool.submit(echo, "before"), pool.submit(die), pool.submit(echo, "beside")]
        futures.append(pool.submit(echo, "after"))
        found = [future.exception() or future.result() for future in futures]
        assert [found[0], *found[2:]] == ["before", "beside", "after"]
        assert isinstance(found[1], RunError)
        assert "killed, or out of memory" in str(found[1])

    def test_a_worker_that_dies_idle_costs_nobody_a_try(
        self, pool: Processes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("blockprune.lottery.executors.TRIES", 0)
        workers = pool._pool
        os.kill(pool.submit(os.getpid).result(), signal.SIGKILL)
        # Until the pool has seen it; with no tries left, a task lost with the worker would fail.
        end = time.monotonic() + 60
        while not workers._broken and time.monotonic() < end:
            time.sleep(0.01)
        assert [pool.submit(echo, word).result() for word in ("one", "two")] == ["one", "two"]
        assert pool._pool is not workers

    def test_errors_come_back(self, pool: Processes) -> None:
        assert isinstance(pool.submit(int, "x").exception(), ValueError)

    def test_what_waits_is_cancelled_at_the_end(self) -> None:
        pool = Processes(1)
        futures: list[Future[Any]] = [pool.submit(time.sleep, 600) for _ in range(3)]
        pool.close()
        assert not any(future.done() and not future.cancelled() for future in futures)

    def test_jobs_are_at_least_one(self) -> None:
        with pytest.raises(RunError, match="at least 1"), opened("local", 0):
            pytest.fail("no workers")


class TestDask:
    def test_an_absent_extra_names_the_command(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def absent(name: str) -> Any:
            raise ImportError(name)

        monkeypatch.setattr("blockprune.lottery.executors.importlib.import_module", absent)
        with (
            pytest.raises(MissingExtraError, match=r"blockprune\[cluster\]"),
            opened("dask://localhost:1"),
        ):
            pytest.fail("no dask")

    def test_nobody_answers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        _distributed()
        monkeypatch.setattr("blockprune.lottery.executors.CONNECT_SECONDS", 1)
        with pytest.raises(RunError, match="No dask scheduler answers"), opened("dask://[::1]:9"):
            pytest.fail("somebody answered")

    def test_the_stages_of_a_worker_that_dies_are_done_by_another(self, tmp_path: Path) -> None:
        distributed = _distributed()
        asked = Spec.parse(SPEC)
        whole = run(asked, tmp_path / "whole" / "run")
        with (
            distributed.LocalCluster(
                n_workers=2,
                threads_per_worker=2,
                processes=True,
                dashboard_address=None,
                silence_logs=50,
            ) as cluster,
            distributed.Client(cluster) as client,
        ):
            killed: list[int] = []

            def kill_one(event: Any) -> None:
                if not killed:
                    pids = client.run(os.getpid)
                    killed.append(next(iter(pids.values())))
                    os.kill(killed[0], signal.SIGKILL)

            address = cluster.scheduler_address.replace("tcp://", "dask://")
            record = run(asked, tmp_path / "dask" / "run", executor=address, on_event=kill_one)
        assert killed
        assert record.failures == {}
        assert record.without_times() == whole.without_times()


def _distributed() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("distributed", reason="the extra cluster is not installed")
