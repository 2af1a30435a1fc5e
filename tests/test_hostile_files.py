"""Files from strangers: cut short, changed, absurd or sly, they end in an error of ours.

Whatever a file holds, reading it runs nothing of it, writes nothing, and takes no more time and
memory than a file of its size deserves.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import blockprune
from blockprune.errors import BlockpruneError, CheckpointError, PlanError, TicketError
from blockprune.lottery import Spec
from blockprune.lottery.stages import RunError, Stage, StageStore
from blockprune.lottery.state import TrainingState, load_state, save_state
from blockprune.plan import PruningPlan
from blockprune.report import read_run, write_run_report
from blockprune.tensor_files import digest_of
from tests.fake_run import fake_run

INPUT = torch.rand(1, 2)
DEEP = 100_000
HUGE = 10**400
"""A number that JSON can write and no float can hold."""

FIELDS = [
    *("plan", "call", "aliases", "preserve_root", "leaf_modules"),
    *("plan.remove", "plan.scores", "plan.budget", "plan.granularity", "call.args", "call.kwargs"),
]
KINDS: list[Any] = [
    *(-1, HUGE, float("nan"), "x", [[]], [["a", "b"]], {"a": []}, {"tuple": 7}),
    *({"tensor": []}, {"dict": []}, {"list": None}, {"a": 1, "b": 2}),
]

# The same file is written again for each example; nothing of an earlier one is left.
REUSED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


class Block(nn.Module):
    """The smallest residual block there is."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x).relu()


def small() -> nn.Module:
    return nn.Sequential(Block(), Block())


@pytest.fixture(scope="module")
def ticket_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "ticket.safetensors"
    blockprune.save_ticket(blockprune.remove_blocks(small(), ["0"], INPUT), path)
    return path.read_bytes()


@pytest.fixture
def ticket(ticket_bytes: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "ticket.safetensors"
    path.write_bytes(ticket_bytes)
    return path


@pytest.fixture
def unchanged(tmp_path: Path) -> Iterator[None]:
    """Assert that nothing appears beside what the test itself has written."""
    outside = tmp_path.parent
    before = sorted(os.listdir(outside))
    yield
    assert sorted(os.listdir(outside)) == before


def header_of(path: Path) -> Any:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["blockprune"])


def with_header(path: Path, text: str) -> None:
    """Write another header into a ticket file, with a digest that fits: a file made on purpose."""
    tensors = load_file(path)
    try:
        header = json.loads(text)
        header["digest"] = digest_of({k: v for k, v in header.items() if k != "digest"}, tensors)
        text = json.dumps(header)
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass  # No JSON object, so no place for a digest.
    save_file(tensors, path, metadata={"blockprune": text})


class TestTickets:
    @REUSED
    @given(kept=st.floats(0, 1, exclude_max=True))
    def test_cut_short(self, ticket: Path, ticket_bytes: bytes, kept: float) -> None:
        ticket.write_bytes(ticket_bytes[: int(kept * len(ticket_bytes))])
        with pytest.raises(TicketError):
            blockprune.load_ticket(small(), ticket)

    @REUSED
    @given(where=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
    def test_changed_anywhere(
        self, ticket: Path, ticket_bytes: bytes, where: float, mask: int
    ) -> None:
        changed = bytearray(ticket_bytes)
        changed[int(where * len(changed))] ^= mask
        ticket.write_bytes(changed)
        with pytest.raises(TicketError):
            blockprune.load_ticket(small(), ticket)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "null",
            "[]",
            "{",
            "NaN",
            "[" * DEEP,
            '{"a":' * DEEP,
            '{"format": "blockprune-ticket-1"}',
            '{"format": "blockprune-ticket-2"}',
            '{"format": ["blockprune-ticket-2"]}',
            '{"format": "blockprune-ticket-2", "plan": ' + "9" * 100_000 + "}",
            json.dumps({"format": "x" * 10**6}),
        ],
        ids=range(12),
    )
    def test_any_header(self, ticket: Path, text: str) -> None:
        with_header(ticket, text)
        with pytest.raises(TicketError) as error:
            blockprune.load_ticket(small(), ticket)
        assert len(str(error.value)) < 1000

    @pytest.mark.parametrize("path", FIELDS)
    @pytest.mark.parametrize("value", KINDS, ids=lambda value: repr(value)[:20])
    def test_a_field_of_another_kind(self, ticket: Path, path: str, value: Any) -> None:
        header = header_of(ticket)
        *parents, last = path.split(".")
        place = header
        for parent in parents:
            place = place[parent]
        place[last] = value
        with_header(ticket, json.dumps(header))
        with pytest.raises(BlockpruneError):
            blockprune.load_ticket(small(), ticket)

    @pytest.mark.parametrize(
        ("shape", "dtype"),
        [
            ([10**12], "float32"),
            ([10**6, 10**6], "int8"),
            ([2**62, 4], "float32"),
            ([0, HUGE], "float32"),
            ([10**30], "float32"),
            ([-1, 2], "float32"),
            ([1.5, 2], "float32"),
            ([True, 2], "float32"),
            (["1", 2], "float32"),
            ("12", "float32"),
            ([1] * 5000, "float32"),
            ([1, 2], "__doc__"),
            ([1, 2], "load"),
            ([1, 2], "qint8"),
            ([1, 2], "complex64"),
            ([1, 2], ["float32"]),
        ],
        ids=str,
    )
    def test_inputs_that_cannot_be(self, ticket: Path, shape: Any, dtype: Any) -> None:
        header = header_of(ticket)
        header["call"]["args"] = {"tuple": [{"tensor": [shape, dtype]}]}
        with_header(ticket, json.dumps(header))
        with pytest.raises(BlockpruneError):
            blockprune.load_ticket(small(), ticket)

    def test_many_inputs_are_counted_together(self, ticket: Path) -> None:
        header = header_of(ticket)
        header["call"]["args"] = {"tuple": [{"tensor": [[2**20], "float32"]}] * 300}
        with_header(ticket, json.dumps(header))
        with pytest.raises(TicketError, match="more than 268,435,456 numbers"):
            blockprune.load_ticket(small(), ticket)

    def test_what_could_not_be_loaded_is_not_saved(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cut = blockprune.remove_blocks(small(), ["0"], torch.rand(50, 2))
        monkeypatch.setattr("blockprune.tickets._MOST_INPUT_NUMBERS", 99)
        with pytest.raises(TicketError, match="fewer samples"):
            blockprune.save_ticket(cut, tmp_path / "ticket")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.usefixtures("unchanged")
    @pytest.mark.parametrize("name", ["../0", "/etc/passwd", "..\\0", "0\0", "a" * 10**5])
    def test_names_that_leave_the_model(self, ticket: Path, name: str) -> None:
        whole = ticket.read_bytes()
        for change in (
            lambda header: header["plan"].update(remove=[name]),
            lambda header: header.update(aliases={name: "1.branch.bias"}),
            lambda header: header.update(aliases={"1.branch.bias": name, name: name}),
        ):
            ticket.write_bytes(whole)
            header = header_of(ticket)
            change(header)
            with_header(ticket, json.dumps(header))
            with pytest.raises(BlockpruneError):
                blockprune.load_ticket(small(), ticket)
        ticket.write_bytes(whole)
        header = header_of(ticket)
        save_file({**load_file(ticket), name.replace("\0", ""): torch.zeros(1)}, ticket)
        with_header(ticket, json.dumps(header))
        with pytest.raises(TicketError):
            blockprune.load_ticket(small(), ticket)
        assert [path.name for path in ticket.parent.iterdir()] == [ticket.name]

    def test_a_size_in_the_first_bytes_is_not_believed(self, ticket: Path) -> None:
        whole = ticket.read_bytes()
        for size in (0, 1, len(whole) * 2, 10**8, 2**40, 2**63, 2**64 - 1):
            ticket.write_bytes(struct.pack("<Q", size) + whole[8:])
            with pytest.raises(TicketError, match="not a readable safetensors file"):
                blockprune.load_ticket(small(), ticket)

    def test_patterns_take_no_time_to_match(self, ticket: Path) -> None:
        header = header_of(ticket)
        header["leaf_modules"] = ["*a" * 5000 + "b", "[" * 5000]
        with_header(ticket, json.dumps(header))
        with pytest.raises(BlockpruneError, match="leaf_modules"):
            blockprune.load_ticket(small(), ticket)

    @pytest.mark.parametrize("path", ["a\0b", "x" * 300, "/dev/null", "."], ids=ascii)
    def test_paths_that_name_no_file(self, path: str) -> None:
        with pytest.raises(TicketError):
            blockprune.load_ticket(small(), path)

    @pytest.mark.parametrize(
        "value", ["9" * 10**5, "[" * 150 + "]" * 150, '"\\ud800"'], ids=range(3)
    )
    def test_an_entry_that_nobody_reads(self, ticket: Path, value: str) -> None:
        text = json.dumps(header_of(ticket))
        whole = text.removesuffix("}") + f', "more": {value}' + "}"
        save_file(load_file(ticket), ticket, metadata={"blockprune": whole})
        with pytest.raises(TicketError):
            blockprune.load_ticket(small(), ticket)

    def test_what_tampers_here_makes_whole_files(self, ticket: Path) -> None:
        with_header(ticket, json.dumps(header_of(ticket)))
        assert blockprune.plan_of(blockprune.load_ticket(small(), ticket)).remove == ("0",)

    def test_a_plan_that_decides_nothing_else_is_proved_too(self, ticket: Path) -> None:
        header = header_of(ticket)
        header["plan"]["p"] = 2
        save_file(load_file(ticket), ticket, metadata={"blockprune": json.dumps(header)})
        with pytest.raises(TicketError, match="damaged: its contents do not match their digest"):
            blockprune.load_ticket(small(), ticket)


class TestPlans:
    PLAN = PruningPlan(remove=("0",), granularity="branch", scores={"0": 0.5}, fingerprint="f")

    @given(kept=st.floats(0, 1, exclude_max=True))
    def test_cut_short(self, kept: float) -> None:
        text = self.PLAN.to_json()
        with pytest.raises(PlanError):
            PruningPlan.from_json(text[: int(kept * len(text))])

    @given(where=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
    def test_changed_anywhere(self, where: float, mask: int) -> None:
        changed = bytearray(self.PLAN.to_json().encode())
        changed[int(where * len(changed))] ^= mask
        try:
            found = PruningPlan.from_json(bytes(changed))
        except PlanError:
            return
        assert PruningPlan.from_json(found.to_json()) == found

    @pytest.mark.parametrize(
        "text",
        ["[" * DEEP, '{"remove":' * DEEP, '{"p": ' + "9" * 10**5 + "}", '"\ud800"', '"\\ud800"'],
        ids=range(5),
    )
    def test_absurd_text(self, text: str) -> None:
        with pytest.raises(PlanError):
            PruningPlan.from_json(text)

    @pytest.mark.parametrize("kind", ["keep_macs", "keep_params"])
    def test_a_number_above_all_floats_is_a_number(self, kind: Any) -> None:
        values = json.loads(self.PLAN.to_json())
        assert PruningPlan.from_json(json.dumps({**values, "p": HUGE})).p == HUGE
        budget = {"kind": kind, "value": HUGE}
        found = PruningPlan.from_json(json.dumps({**values, "budget": budget})).budget
        assert found is not None
        assert found.value == HUGE

    @pytest.mark.parametrize(
        "changes",
        [
            {"p": -HUGE},
            {"p": -1.0},
            {"p": True},
            {"version": 2},
            {"version": "1"},
            {"version": HUGE},
            {"budget": {"kind": "max_latency_ms", "value": HUGE}},
            {"budget": {"kind": "keep_macs", "value": -HUGE}},
            {"budget": {"kind": "keep_macs", "value": 0.0}},
            {"scores": {"0": HUGE}},
            {"remove": ["0"] * 10_000},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_a_field_out_of_range(self, changes: dict[str, Any]) -> None:
        values = json.loads(self.PLAN.to_json())
        with pytest.raises(PlanError):
            PruningPlan.from_json(json.dumps({**values, **changes}))


class TestStates:
    @pytest.mark.parametrize("path", ["a\0b", "x" * 300], ids=ascii)
    def test_paths_that_name_no_file(self, path: str) -> None:
        state = TrainingState.of(small())
        with pytest.raises(CheckpointError):
            load_state(path)
        with pytest.raises(CheckpointError):
            save_state(state, path)

    @pytest.mark.parametrize("step", [{"epoch": -1}, {"epoch": 0.5}, {"epoch": "[" * DEEP}])
    def test_steps_that_cannot_be(self, tmp_path: Path, step: dict[str, Any]) -> None:
        path = tmp_path / "state"
        header = {"format": "blockprune-state-2", "step": step, "averaged": False}
        text = json.dumps({**header, "digest": digest_of(header, {})})
        save_file({}, path, metadata={"blockprune": text})
        with pytest.raises(CheckpointError, match="does not hold a valid checkpoint header: step"):
            load_state(path)


class TestRuns:
    TEXT = fake_run().to_json()

    @REUSED
    @given(kept=st.floats(0, 1, exclude_max=True))
    def test_cut_short(self, tmp_path: Path, kept: float) -> None:
        path = tmp_path / "results.json"
        path.write_text(self.TEXT[: int(kept * (len(self.TEXT) - 2))], encoding="utf-8")
        with pytest.raises(BlockpruneError):
            read_run(path)

    @REUSED
    @given(where=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
    def test_changed_anywhere(self, tmp_path: Path, where: float, mask: int) -> None:
        path = tmp_path / "results.json"
        changed = bytearray(self.TEXT.encode())
        changed[int(where * len(changed))] ^= mask
        path.write_bytes(changed)
        try:
            found = read_run(path)
        except BlockpruneError:
            return
        # NaN is not equal to itself; the text of a record is.
        assert type(found).from_json(found.to_json()).to_json() == found.to_json()

    @pytest.mark.parametrize(
        "text",
        ["[" * DEEP, '{"a":' * DEEP, '{"version": ' + "9" * 10**5 + "}", "[]", '{"version": 2}'],
        ids=range(5),
    )
    def test_absurd_text(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "results.json"
        path.write_text(text)
        with pytest.raises(BlockpruneError) as error:
            read_run(path)
        assert len(str(error.value)) < 1000

    @pytest.mark.parametrize("path", ["a\0b", "x" * 300, "/dev/null", "absent"], ids=ascii)
    def test_paths_that_name_no_run(self, path: str) -> None:
        with pytest.raises(BlockpruneError):
            read_run(Path(path))

    @pytest.mark.usefixtures("unchanged")
    @pytest.mark.parametrize("field", ["accuracy", "params", "macs", "latency_ms", "blocks"])
    @pytest.mark.parametrize("value", [-1, 0, 10**18, 1e300], ids=repr)
    def test_numbers_that_no_run_has(self, tmp_path: Path, field: str, value: float) -> None:
        values = json.loads(self.TEXT)
        for network in values["networks"]:
            network[field] = value
        path = tmp_path / "results.json"
        path.write_text(json.dumps(values))
        out = tmp_path / "out"
        out.mkdir()
        # A page of such numbers, or an error of ours; never anything else.
        try:
            files = write_run_report(read_run(path), out)
        except BlockpruneError:
            return
        assert sorted(files) == sorted(os.listdir(out))

    @pytest.mark.usefixtures("unchanged")
    def test_names_with_paths_and_markup_stay_text(self, tmp_path: Path) -> None:
        name = "../../<script>alert(1)</script>/\0"
        record = fake_run().model_copy(update={"name": name, "notes": (name,)})
        files = write_run_report(record, tmp_path)
        assert sorted(os.listdir(tmp_path)) == sorted(files)
        assert "<script>alert(1)" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def changed_spec(**changes: Any) -> dict[str, Any]:
    base = {
        "name": "hostile",
        "model": {"name": "blockprune:resnet20"},
        "recipe": {"epochs": 2},
        "criteria": "snip",
        "p": 1,
    }
    return {**base, **changes}


class TestSpecs:
    TEXT = json.dumps(changed_spec())

    @REUSED
    @given(kept=st.floats(0, 1, exclude_max=True), name=st.sampled_from(["s.json", "s.toml"]))
    def test_cut_short(self, tmp_path: Path, kept: float, name: str) -> None:
        (tmp_path / name).write_text(self.TEXT[: int(kept * len(self.TEXT))])
        with pytest.raises(BlockpruneError):
            Spec.read(tmp_path / name)

    @REUSED
    @given(where=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
    def test_changed_anywhere(self, tmp_path: Path, where: float, mask: int) -> None:
        changed = bytearray(self.TEXT.encode())
        changed[int(where * len(changed))] ^= mask
        (tmp_path / "s.json").write_bytes(changed)
        try:
            found = Spec.read(tmp_path / "s.json")
        except BlockpruneError:
            return
        assert Spec.parse(found.model_dump(mode="json")) == found

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("s.json", "[" * DEEP),
            ("s.json", '{"a":' * DEEP),
            ("s.json", "9" * 10**5),
            ("s.json", "[]"),
            ("s.toml", "a = " + "[" * DEEP),
            ("s.toml", "a = " + "9" * 10**5),
            ("s.toml", "a = nan"),
        ],
        ids=range(7),
    )
    def test_absurd_text(self, tmp_path: Path, name: str, text: str) -> None:
        (tmp_path / name).write_text(text)
        with pytest.raises(BlockpruneError):
            Spec.read(tmp_path / name)

    @pytest.mark.parametrize(
        "changes",
        [
            {"seeds": -1},
            {"seeds": 10**12},
            {"p": HUGE * -1},
            {"p": float("nan")},
            {"recipe": {"epochs": -1}},
            {"recipe": {"epochs": 2, "lr": float("nan")}},
            {"recipe": {"epochs": 2, "batch_size": 0}},
            {"xi_points": float("inf")},
            {"model": {"name": "x", "arguments": "[" * DEEP}},
        ],
        ids=lambda changes: str(changes)[:40],
    )
    def test_numbers_that_no_run_can_have(self, changes: dict[str, Any]) -> None:
        with pytest.raises(BlockpruneError):
            Spec.parse(changed_spec(**changes))


STAGE = Stage("score", {"seed": 0})


@pytest.fixture
def store(tmp_path: Path) -> StageStore:
    store = StageStore(tmp_path / "stages")

    def make(folder: Path) -> Any:
        (folder / "tensors").write_bytes(b"numbers")
        return {"best": 1}, {"seconds": 0.5}, ("a note",)

    store.write(STAGE, make)
    return store


def write_manifest(store: StageStore, change: Callable[[Any], object]) -> None:
    path = store.path(STAGE) / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


class TestStages:
    """What is not whole is made again, and told of; nothing outside the folder is read."""

    def found(self, store: StageStore) -> list[str]:
        told: list[str] = []
        assert store.find(STAGE, told.append) is None
        assert not store.path(STAGE).exists()
        return told

    @pytest.mark.parametrize("file", ["manifest.json", "output.json", "times.json", "tensors"])
    @pytest.mark.parametrize("content", [b"", b"[" * DEEP, b'{"a":' * DEEP, b"\xff", b"null"])
    def test_any_content(self, store: StageStore, file: str, content: bytes) -> None:
        (store.path(STAGE) / file).write_bytes(content)
        assert "damaged" in self.found(store)[0]

    @pytest.mark.parametrize("name", ["/dev/zero", "../../secret", "..", "a\0b", "x" * 300, ""])
    def test_a_manifest_that_names_other_files(self, store: StageStore, name: str) -> None:
        write_manifest(store, lambda manifest: manifest["files"].update({name: "0"}))
        assert "is missing" in self.found(store)[0]

    @pytest.mark.parametrize("files", [{}, [], None, {"output.json": 1}, {"times.json": []}])
    def test_a_manifest_that_names_too_little(self, store: StageStore, files: Any) -> None:
        write_manifest(store, lambda manifest: manifest.update(files=files))
        assert "damaged" in self.found(store)[0]

    @pytest.mark.parametrize("target", ["/dev/zero", "/etc/passwd"])
    def test_links_are_not_followed(self, store: StageStore, target: str) -> None:
        file = store.path(STAGE) / "tensors"
        file.unlink()
        file.symlink_to(target)
        assert "tensors is no plain file" in self.found(store)[0]
        assert Path(target).exists()

    def test_a_pipe_is_not_waited_for(self, store: StageStore) -> None:
        os.mkfifo(store.path(STAGE) / "pipe")
        assert "pipe is no plain file" in self.found(store)[0]

    @pytest.mark.parametrize(
        ("file", "value"),
        [
            ("output.json", []),
            ("output.json", {"found": [], "notes": []}),
            ("output.json", {"found": {}, "notes": [1]}),
            ("output.json", {"found": {}}),
            ("times.json", []),
        ],
    )
    def test_digests_that_fit_do_not_make_it_an_output(
        self, store: StageStore, file: str, value: Any
    ) -> None:
        from blockprune.lottery.stages import _digest

        path = store.path(STAGE) / file
        path.write_text(json.dumps(value))
        write_manifest(store, lambda manifest: manifest["files"].update({file: _digest(path)}))
        assert "damaged" in self.found(store)[0]

    def test_a_folder_that_is_a_link_is_left(self, store: StageStore, tmp_path: Path) -> None:
        elsewhere = tmp_path / "elsewhere"
        shutil.move(store.path(STAGE), elsewhere)
        (elsewhere / "tensors").write_bytes(b"changed")
        store.path(STAGE).symlink_to(elsewhere)
        with pytest.raises(RunError, match="cannot be removed"):
            store.find(STAGE)
        assert (elsewhere / "tensors").read_bytes() == b"changed"

    def test_the_lock_writes_into_nothing(self, store: StageStore, tmp_path: Path) -> None:
        precious = tmp_path / "precious"
        precious.write_text("kept")
        (store.folder / ".lock").symlink_to(precious)
        with store.alone():
            assert precious.read_text() == "kept"
        assert precious.read_text() == "kept"
