"""What names a stage, and that its output is whole or absent."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blockprune.lottery.cases import Moments, cases_of
from blockprune.lottery.nodes import Unfolding
from blockprune.lottery.spec import Spec
from blockprune.lottery.stages import Output, RunError, Stage, StageStore
from tests.lottery_models import SPEC

STAGE = Stage("score", {"seed": 0, "setting": {"threads": 1}})
FOUND = {"scores": {"a": 0.1 + 0.2}}


def dense_key(**changes: Any) -> str:
    spec = Spec.parse({**SPEC, **changes})
    told = {
        "model": spec.model.model_dump(),
        "data": spec.data.model_dump(),
        "granularity": spec.granularity,
        "threads": spec.threads,
    }
    moments = Moments(spec.recipe.epochs, per_epoch=6)
    unfolding = Unfolding(spec, told, cases_of(spec, [1], moments), moments, ())
    stage = unfolding.nodes()[0].stage({})
    assert stage is not None
    return stage.key


@pytest.fixture
def store(tmp_path: Path) -> StageStore:
    return StageStore(tmp_path / "stages")


def write(store: StageStore) -> Path:
    def make(folder: Path) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]:
        (folder / "weights.bin").write_bytes(bytes(range(256)))
        return FOUND, {"seconds": [1.5]}, ("a note",)

    store.write(STAGE, make)
    return store.path(STAGE)


class TestKeys:
    def test_the_order_of_keys_does_not_matter(self) -> None:
        assert Stage("score", {"setting": {"threads": 1}, "seed": 0}).key == STAGE.key

    @pytest.mark.parametrize(
        "other",
        [
            Stage("plan", STAGE.inputs),
            Stage("score", {**STAGE.inputs, "seed": 1}),
            Stage("score", {**STAGE.inputs, "more": None}),
            Stage("score", {**STAGE.inputs, "seed": 0.0}),
        ],
    )
    def test_kind_and_inputs_do(self, other: Stage) -> None:
        assert other.key != STAGE.key

    def test_so_does_the_version(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("blockprune.lottery.stages.version", lambda name: "99")
        assert Stage(STAGE.kind, STAGE.inputs).key != STAGE.key

    @pytest.mark.parametrize(
        "changes",
        [
            {"name": "other"},
            {"criteria": ["l1", "grasp"]},
            {"p": [1, 2]},
            {"xi_points": 0.5},
            {"confidence": 0.9},
            {"latency": {"batch": 2}},
            {"similarities": True},
            {"controls": {"random": False}},
            {"min_blocks_per_stage": 2},
            {"images_per_class": 3},
            {"checkpoint_epochs": 1},
            {"seeds": [0, 5]},
        ],
        ids=str,
    )
    def test_a_training_does_not_depend_on_what_comes_behind_it(
        self, changes: dict[str, Any]
    ) -> None:
        assert dense_key(**changes) == dense_key()

    @pytest.mark.parametrize(
        "changes",
        [
            {"model": {"name": "tests.lottery_models:tiny", "arguments": {"channels": 8}}},
            {"data": {"options": {"test_share": 0.7}}},
            {"data": {"image_size": 16, "options": {"test_share": 0.8}}},
            {"recipe": {**SPEC["recipe"], "lr": 0.04}},
            {"recipe": {**SPEC["recipe"], "epochs": 3}},
            {"recipe": {**SPEC["recipe"], "batch_size": 32}},
            {"seeds": [1]},
            {"threads": 2},
            {"test_every_epoch": True},
            {"rewound_to": "50%"},
        ],
        ids=str,
    )
    def test_it_depends_on_what_decides_it(self, changes: dict[str, Any]) -> None:
        assert dense_key(**changes) != dense_key()


class TestStore:
    def test_what_was_written_is_found(self, store: StageStore) -> None:
        assert store.find(STAGE) is None
        folder = write(store)
        assert store.find(STAGE) == Output(folder, FOUND, {"seconds": [1.5]}, ("a note",))

    @pytest.mark.parametrize(
        "error",
        [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError("x")],
        ids=lambda error: type(error).__name__,
    )
    def test_nothing_half_written_is_left(self, store: StageStore, error: BaseException) -> None:
        def make(folder: Path) -> Any:
            (folder / "weights.bin").write_bytes(b"half")
            raise error

        with pytest.raises(type(error)):
            store.write(STAGE, make)
        assert list(store.folder.iterdir()) == []

    @pytest.mark.parametrize(
        "damage",
        [
            lambda folder: (folder / "weights.bin").write_bytes(b"other"),
            lambda folder: (folder / "weights.bin").unlink(),
            lambda folder: (folder / "output.json").write_text("{}"),
            lambda folder: (folder / "times.json").write_text(""),
            lambda folder: (folder / "manifest.json").write_text("{}"),
            lambda folder: (folder / "manifest.json").write_text("[1]"),
            lambda folder: (folder / "manifest.json").write_bytes(b"\xff"),
            lambda folder: (folder / "manifest.json").unlink(),
        ],
    )
    def test_damage_is_found_told_and_removed(
        self, store: StageStore, damage: Callable[[Path], Any]
    ) -> None:
        folder = write(store)
        damage(folder)
        told: list[str] = []
        assert store.find(STAGE, told.append) is None
        assert len(told) == 1
        assert STAGE.folder in told[0]
        assert not folder.exists()
        write(store)
        assert store.find(STAGE) is not None

    def test_one_changed_bit_is_enough(self, store: StageStore) -> None:
        file = write(store) / "weights.bin"
        content = bytearray(file.read_bytes())
        content[100] ^= 1
        file.write_bytes(content)
        assert store.find(STAGE) is None

    def test_the_output_of_another_stage_is_not_taken(self, store: StageStore) -> None:
        other = Stage("score", {"seed": 1})
        shutil.copytree(write(store), store.path(other))
        assert store.find(other) is None

    def test_two_writers_leave_one_output(self, store: StageStore) -> None:
        folder = write(store)
        before = (folder / "manifest.json").read_bytes()
        write(store)
        assert (folder / "manifest.json").read_bytes() == before
        assert [path.name for path in store.folder.iterdir()] == [folder.name]

    def test_a_file_in_the_way_stays(self, store: StageStore) -> None:
        store.path(STAGE).write_text("mine")
        assert store.find(STAGE) is None
        with pytest.raises(OSError, match=STAGE.folder):
            write(store)
        assert [path.name for path in store.folder.iterdir()] == [STAGE.folder]
        assert store.path(STAGE).read_text() == "mine"

    def test_checkpoints_go_when_the_output_is_there(self, store: StageStore) -> None:
        checkpoint = store.unfinished(STAGE) / "epoch-000001"
        checkpoint.mkdir(parents=True)
        write(store)
        assert not store.unfinished(STAGE).exists()

    def test_what_a_killed_writer_left_is_cleared(self, store: StageStore) -> None:
        folder = write(store)
        left = store.folder / f".new-{STAGE.folder}-abc"
        left.mkdir()
        (left / "weights.bin").write_bytes(b"half")
        store.clear()
        assert (left.exists(), folder.exists()) == (False, True)

    def test_one_run_at_a_time(self, store: StageStore) -> None:
        with (
            store.alone(),
            pytest.raises(RunError, match="Another run is at work"),
            StageStore(store.folder).alone(),
        ):
            pytest.fail("two runs at once")
        with store.alone():
            pass

    def test_a_system_without_locks_runs_all_the_same(
        self, store: StageStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "fcntl", None)
        with store.alone():
            folder = write(store)
        assert list(store.folder.iterdir()) == [folder]

    def test_a_folder_that_cannot_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(RunError, match="cannot be written to"):
            StageStore(tmp_path / "file" / "stages")

    def test_the_manifest_says_what_the_stage_was(self, store: StageStore) -> None:
        manifest = json.loads((write(store) / "manifest.json").read_text())
        assert (manifest["kind"], manifest["inputs"]) == (STAGE.kind, STAGE.inputs)
