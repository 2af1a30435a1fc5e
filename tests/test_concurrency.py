"""Runs beside one another, on disks that refuse, under strange names, without a terminal, ended."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import blockprune
import blockprune.lottery.stages as stages_module
from blockprune.errors import BlockpruneError, CheckpointError, TicketError
from blockprune.lottery import RunRecord, Spec, run
from blockprune.lottery.stages import RunError, Stage, StageStore
from blockprune.lottery.state import TrainingState, save_state
from blockprune.models import resnet20
from tests.lottery_models import SPEC

ROOT = Path(__file__).parent.parent
IMAGES = (1, 3, 8, 8)
STAGE = Stage("score", {"seed": 0})
PATIENCE_S = 120
NON_ASCII = "Läufe 実験 🎟"


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "blockprune.cli", *map(str, arguments)]


def started(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Start a command without a terminal, with one thread."""
    return subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        # Where the tests run in the background, a shell has told them to ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, err


def wait_for(process: subprocess.Popen[str], happened: Callable[[], object]) -> None:
    """Wait until something happens, which the process must live to see."""
    until = time.monotonic() + PATIENCE_S
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)


def spec_file(folder: Path, **changes: Any) -> Path:
    path = folder / "spec.json"
    path.write_text(json.dumps({**SPEC, "seeds": 1, **changes}), encoding="utf-8")
    return path


def long_spec(folder: Path) -> Path:
    """Return a spec whose dense training ends long after any test."""
    recipe = {**SPEC["recipe"], "epochs": 10_000}
    return spec_file(folder, recipe=recipe, checkpoint_epochs=1)


def checkpoints(folder: Path) -> list[Path]:
    return list(folder.glob("stages/unfinished/dense-*/epoch-*"))


@pytest.fixture
def process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Return a long run in `tmp_path / "run"` that has left its first checkpoint."""
    running = started("lottery", "run", long_spec(tmp_path), "--out", tmp_path / "run")
    try:
        wait_for(running, lambda: checkpoints(tmp_path / "run"))
        yield running
    finally:
        if running.poll() is None:
            running.kill()
        running.communicate()


class TestTwoRuns:
    def test_the_second_is_refused_with_a_sentence(
        self, process: subprocess.Popen[str], tmp_path: Path
    ) -> None:
        code, out, err = ended(
            started("lottery", "run", tmp_path / "spec.json", "--out", tmp_path / "run")
        )
        assert (code, out) == (1, "")
        assert err.splitlines()[-1].startswith("error: Another run is at work in ")
        assert "Traceback" not in err
        # The first has lost nothing by it, and goes on.
        before = {path.name for path in checkpoints(tmp_path / "run")}
        wait_for(process, lambda: {p.name for p in checkpoints(tmp_path / "run")} - before)

    def test_two_tickets_to_one_file_leave_one_of_them(self, tmp_path: Path) -> None:
        script = (
            "import sys, torch, blockprune\n"
            "from blockprune.models import resnet20\n"
            "ticket = blockprune.remove_blocks(resnet20(), [sys.argv[2]], torch.rand(1, 3, 8, 8))\n"
            "for _ in range(20):\n"
            "    blockprune.save_ticket(ticket, sys.argv[1], overwrite=True)\n"
        )
        path = tmp_path / "ticket.safetensors"
        writers = [
            subprocess.Popen([sys.executable, "-c", script, path, name], cwd=ROOT)
            for name in ("layer1.0", "layer3.2")
        ]
        assert [writer.wait(timeout=PATIENCE_S) for writer in writers] == [0, 0]
        ticket = blockprune.load_ticket(resnet20(), path)
        assert blockprune.plan_of(ticket).remove in (("layer1.0",), ("layer3.2",))
        assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


class TestSignals:
    @pytest.mark.parametrize(
        ("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"]
    )
    def test_a_lottery_says_how_to_go_on(
        self, process: subprocess.Popen[str], tmp_path: Path, number: int, expected: int
    ) -> None:
        process.send_signal(number)
        code, out, err = ended(process)
        assert (code, out) == (expected, "")
        assert "Interrupted. What was done is kept" in err
        assert "the same command goes on" in err
        assert "Traceback" not in err
        run_folder = tmp_path / "run"
        assert not (run_folder / "results.json").exists()
        assert not list(run_folder.glob("stages/.new-*"))
        # The lock is free, and the training goes on from its checkpoint.
        [before] = checkpoints(run_folder)
        again = started("lottery", "run", tmp_path / "spec.json", "--out", run_folder)
        wait_for(again, lambda: any(p.name > before.name for p in checkpoints(run_folder)))
        again.kill()
        again.communicate()

    def test_a_lottery_with_workers_takes_them_along(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        process = started(*("lottery", "run", long_spec(tmp_path), "--out", folder, "--jobs", 2))
        wait_for(process, lambda: checkpoints(folder))
        process.send_signal(signal.SIGTERM)
        # The pipes close when the last worker has ended.
        code, _, err = ended(process)
        assert code == 143
        assert "the same command goes on" in err
        assert "Traceback" not in err

    @pytest.mark.parametrize(
        ("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"]
    )
    def test_a_bench_keeps_what_it_has_measured(
        self, tmp_path: Path, number: int, expected: int
    ) -> None:
        out = tmp_path / "bench.json"
        process = started(
            *("bench", "blockprune:resnet20", "-p", "1,2,3", "-c", "l1", "--out", out),
            *("--repeats", 3000),
        )
        wait_for(process, out.exists)
        process.send_signal(number)
        code, printed, err = ended(process)
        assert code == expected
        assert "Unfinished: measured dense" in err
        assert "Missing: " in err
        assert "dense" in printed
        found = json.loads(out.read_text())
        assert not found["complete"]
        assert found["networks"][0]["name"] == "dense"
        assert [path.name for path in tmp_path.iterdir()] == [out.name]

    def test_a_command_that_says_nothing_of_it_ends_with_its_code(self) -> None:
        script = (
            "import os, signal\n"
            "from blockprune.cli.signals import sigterm_as_interrupt\n"
            "with sigterm_as_interrupt():\n"
            "    os.kill(os.getpid(), signal.SIGTERM)\n"
            "    signal.pause()\n"
        )
        ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True)
        assert ran.returncode == 143

    def test_a_second_one_ends_it_at_once(self) -> None:
        script = (
            "import os, signal\n"
            "from blockprune.cli.signals import sigterm_as_interrupt\n"
            "with sigterm_as_interrupt():\n"
            "    try:\n"
            "        os.kill(os.getpid(), signal.SIGTERM)\n"
            "        signal.pause()\n"
            "    except KeyboardInterrupt:\n"
            "        os.kill(os.getpid(), signal.SIGTERM)\n"
            "        signal.pause()\n"
        )
        ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True)
        assert ran.returncode == -signal.SIGTERM


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module")
def ticket() -> torch.nn.Module:
    return blockprune.remove_blocks(resnet20(), ["layer1.1"], torch.rand(IMAGES))


class TestFullDisk:
    @pytest.mark.parametrize("call", ["open", "save_file", "fsync", "replace"])
    def test_a_ticket_is_there_or_not(
        self,
        ticket: torch.nn.Module,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        call: str,
    ) -> None:
        path = tmp_path / "ticket.safetensors"
        path.write_text("precious")
        places = {"open": "pathlib.Path.open", "fsync": "os.fsync", "replace": "os.replace"}
        if call in places:
            monkeypatch.setattr(places[call], full)
        else:
            # As safetensors tells of it, which writes the file itself.
            def refuse(*_: Any, **__: Any) -> None:
                raise SafetensorError("No space left on device (os error 28)")

            monkeypatch.setattr("blockprune.tensor_files.save_file", refuse)
        with pytest.raises(TicketError, match="No space left"):
            blockprune.save_ticket(ticket, path, overwrite=True)
        monkeypatch.undo()
        assert path.read_text() == "precious"
        assert [entry.name for entry in tmp_path.iterdir()] == [path.name]

    @pytest.mark.parametrize("call", ["_write_json", "flush", "_digest"])
    def test_a_stage_is_there_or_not(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        store = StageStore(tmp_path)
        monkeypatch.setattr(stages_module, call, full)
        with pytest.raises(OSError, match="No space left"):
            store.write(STAGE, lambda folder: ({}, {}, ()))
        monkeypatch.undo()
        assert list(tmp_path.iterdir()) == []

    def test_a_run_that_cannot_even_begin(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = StageStore(tmp_path)
        monkeypatch.setattr(Path, "open", full)
        with pytest.raises(RunError, match=r"cannot be written to: .*No space left"), store.alone():
            pass

    def test_a_run_whose_record_finds_no_room(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = Spec.parse({**SPEC, "seeds": 1})
        replace = os.replace

        def replaced(source: Any, target: Any) -> None:
            if str(target).endswith("results.json"):
                full()
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr("os.replace", replaced)
            with pytest.raises(RunError, match=r"results\.json cannot be written"):
                run(asked, tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["stages"]
        events: list[str] = []
        record = run(asked, tmp_path, on_event=lambda event: events.append(event.kind))
        assert (set(events), record.failures) == ({"found"}, {})


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Return what mounts a small file system with some options, and unmount it afterwards."""
    place = tmp_path / "mounted"
    place.mkdir()
    is_mounted = False

    def mount(options: str) -> Path:
        nonlocal is_mounted
        ran = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True
        )
        if ran.returncode != 0:
            pytest.skip("mounting a file system needs to be root, outside of most containers")
        is_mounted = True
        return place

    try:
        yield mount
    except FileNotFoundError:
        pytest.skip("there is no mount on this system")
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", place], check=True)


class TestRealFileSystems:
    def test_a_ticket_on_a_full_one(
        self, ticket: torch.nn.Module, mounted: Callable[[str], Path]
    ) -> None:
        place = mounted("size=256k")
        with pytest.raises(TicketError, match=r"ticket.* cannot be written"):
            blockprune.save_ticket(ticket, place / "ticket.safetensors")
        with pytest.raises(CheckpointError, match="cannot be written"):
            save_state(TrainingState.of(ticket), place / "state")
        assert list(place.iterdir()) == []

    def test_a_lottery_on_a_full_one_ends_with_the_failures(
        self, tmp_path: Path, mounted: Callable[[str], Path]
    ) -> None:
        place = mounted("size=64k")
        code, _, err = ended(started("lottery", "run", spec_file(tmp_path), "--out", place / "run"))
        assert code == 1
        assert "No space left" in err
        assert "Traceback" not in err
        assert not list(place.glob("run/stages/.new-*"))

    def test_a_read_only_one(
        self, ticket: torch.nn.Module, tmp_path: Path, mounted: Callable[[str], Path]
    ) -> None:
        place = mounted("size=8m")
        StageStore(place / "run" / "stages")
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        with pytest.raises(TicketError, match="Read-only file system"):
            blockprune.save_ticket(ticket, place / "ticket.safetensors")
        for out in (place / "run", place / "new"):
            code, _, err = ended(started("lottery", "run", spec_file(tmp_path), "--out", out))
            assert code == 1
            assert "Read-only file system" in err.splitlines()[-1]
            assert err.splitlines()[-1].startswith("error: ")


class TestNames:
    def test_a_run_under_letters_of_any_script(self, tmp_path: Path) -> None:
        folder = tmp_path / NON_ASCII
        folder.mkdir()
        for encoding in ("utf-8", "ascii"):
            code, out, err = ended(
                started(
                    *("lottery", "run", spec_file(folder), "--out", folder / NON_ASCII),
                    PYTHONIOENCODING=encoding,
                )
            )
            assert (code, "Traceback" in err) == (0, False), err
            assert "Written to" in out
        text = (folder / NON_ASCII / "results.json").read_text(encoding="utf-8")
        assert NON_ASCII in RunRecord.from_json(text).command

    def test_a_ticket_under_letters_of_any_script_and_the_longest_name(
        self, ticket: torch.nn.Module, tmp_path: Path
    ) -> None:
        for name in (f"{NON_ASCII}.safetensors", "x" * 255):
            blockprune.save_ticket(ticket, tmp_path / name)
            found = blockprune.load_ticket(resnet20(), tmp_path / name)
            assert blockprune.plan_of(found).remove == ("layer1.1",)

    @pytest.mark.parametrize("name", ["x" * 256, "a\0b"], ids=["long", "null"])
    def test_names_that_no_file_can_have(
        self, ticket: torch.nn.Module, tmp_path: Path, name: str
    ) -> None:
        with pytest.raises(TicketError):
            blockprune.save_ticket(ticket, tmp_path / name)
        with pytest.raises(CheckpointError):
            save_state(TrainingState.of(ticket), tmp_path / name)
        with pytest.raises(BlockpruneError):
            StageStore(tmp_path / name)
        assert list(tmp_path.iterdir()) == []


class TestNoTerminal:
    @pytest.mark.parametrize(
        "environment",
        [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}, {"COLUMNS": "20"}, {"LC_ALL": "C"}],
        ids=lambda environment: "".join(environment) or "none",
    )
    def test_what_is_printed_is_plain_text(self, environment: dict[str, str]) -> None:
        code, out, err = ended(started("analyze", "blockprune:resnet20", **environment))
        assert (code, err) == (0, "")
        assert "7 removable blocks" in out
        assert "\x1b" not in out

    def test_a_lottery_prints_no_bar_of_escapes(self, tmp_path: Path) -> None:
        code, out, err = ended(
            started(
                *("lottery", "run", spec_file(tmp_path), "--out", tmp_path / "run"),
                COLUMNS="20",
                NO_COLOR="1",
            )
        )
        assert code == 0, err
        assert "\x1b" not in out + err
        assert "Written to" in out

    def test_a_reader_that_leaves_is_no_traceback(self) -> None:
        process = started("criteria")
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        err = process.stderr.read()
        process.stderr.close()
        process.wait(timeout=PATIENCE_S)
        assert "Traceback" not in err
