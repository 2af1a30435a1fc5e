"""States of training: values that files give back whole, and files that lie are found out."""

from __future__ import annotations

import errno
import json
import os
import pickle
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from blockprune.errors import CheckpointError
from blockprune.lottery.state import TrainingState, load_state, save_state
from blockprune.lottery.steps import Step
from blockprune.models import resnet20
from blockprune.tensor_files import TensorFiles

TENSORS = {
    "float32": torch.randn(3, 2),
    "bfloat16": torch.randn(5).bfloat16(),
    "float16": torch.randn(1, 1).half(),
    "float64": torch.randn(2, 2, dtype=torch.float64),
    "int64": torch.tensor(7),
    "bool": torch.tensor([True, False]),
    "empty": torch.empty(0, 4),
    "nan": torch.tensor([torch.nan, -torch.inf, -0.0]),
    "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "a.name/with a slash": torch.ones(1),
    "__metadata__": torch.ones(2),
}


WHOLE = '{"format": "blockprune-state-2", "step": {"epoch": 0, "iteration": 0}, "averaged": false}'


def _example() -> TrainingState:
    return TrainingState(
        step=Step(epoch=3, iteration=7),
        weights=dict(TENSORS),
        momentum={"float32": torch.ones(3, 2)},
        ema={"float32": torch.zeros(3, 2), "empty": torch.empty(0, 4)},
    )


def _bits(tensors: dict[str, Tensor] | None) -> object:
    if tensors is None:
        return None
    return {
        name: (tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).tolist())
        for name, tensor in tensors.items()
    }


def _same(first: TrainingState, second: TrainingState) -> bool:
    return first.step == second.step and all(
        _bits(getattr(first, part)) == _bits(getattr(second, part))
        for part in ("weights", "momentum", "ema")
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the bytes of a file that holds `_example`."""
    path = tmp_path_factory.mktemp("written") / "state"
    save_state(_example(), path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file to write what may be read or refused, the same for all examples drawn."""
    return tmp_path_factory.mktemp("scratch") / "state"


class TestTrainingState:
    def test_of_a_model_is_its_state_and_no_longer_its_memory(self) -> None:
        model = resnet20()
        state = TrainingState.of(model)
        assert (state.step, state.momentum, state.ema) == (Step(), {}, None)
        assert _bits(state.weights) == _bits(dict(model.state_dict()))
        with torch.no_grad():
            model.fc.bias.fill_(5.0)
        assert not state.weights["fc.bias"].eq(5.0).any()

    def test_load_into_makes_a_model_the_same(self) -> None:
        model, other = resnet20(), resnet20()
        TrainingState.of(model).load_into(other)
        assert _bits(dict(model.state_dict())) == _bits(dict(other.state_dict()))

    @pytest.mark.parametrize(("averaged", "expected"), [(True, 2.0), (False, 1.0)])
    def test_averages_are_what_a_state_stands_for(self, averaged: bool, expected: float) -> None:
        layer = nn.Linear(1, 1, bias=False)
        state = TrainingState(
            Step(), {"weight": torch.ones(1, 1)}, ema={"weight": torch.full((1, 1), 2.0)}
        )
        state.load_into(layer, averaged=averaged)
        assert layer.weight.item() == expected

    def test_shared_weights_are_copied_once(self, tmp_path: Path) -> None:
        model = nn.ModuleDict({"one": nn.Linear(2, 2)})
        model["two"] = model["one"]
        state = TrainingState.of(model)
        assert state.weights["one.weight"] is state.weights["two.weight"]
        save_state(state, tmp_path / "state")
        again = load_state(tmp_path / "state")
        assert _same(again, state)
        again.load_into(model)

    def test_parts_of_one_tensor_are_not_taken_for_one_another(self) -> None:
        model = nn.Module()
        whole = torch.arange(6.0)
        model.register_buffer("whole", whole)
        model.register_buffer("front", whole[:3])
        model.register_buffer("back", whole[3:])
        model.register_buffer("none", torch.empty(0))
        model.register_buffer("nothing", torch.empty(0, 2))
        assert _bits(TrainingState.of(model).weights) == _bits(dict(model.state_dict()))

    def test_what_is_no_tensor_is_refused(self) -> None:
        class Odd(nn.Linear):
            def get_extra_state(self) -> Any:
                return {"calls": 3}

            def set_extra_state(self, state: Any) -> None:
                del state

        with pytest.raises(CheckpointError, match=r"_extra_state is a dict; .* tensors only"):
            TrainingState.of(Odd(1, 1))

    def test_a_misfit_is_named_and_nothing_loaded(self) -> None:
        model = resnet20()
        before = _bits(dict(model.state_dict()))
        state = TrainingState.of(resnet20(num_classes=3))
        with pytest.raises(CheckpointError, match=r"fc.bias is \(3,\) float32 where \(10,\)"):
            state.load_into(model)
        del state.weights["conv1.weight"]
        with pytest.raises(CheckpointError, match=r"conv1.weight is missing; .*fc.bias"):
            state.load_into(model)
        short = replace(TrainingState.of(model), ema={})
        with pytest.raises(CheckpointError, match=r"the average bn1.bias is .*\(and 136 more\)"):
            short.load_into(model)
        assert _bits(dict(model.state_dict())) == before


class TestFiles:
    def test_give_back_every_bit(self, written: bytes, scratch: Path) -> None:
        scratch.write_bytes(written)
        assert _same(load_state(scratch), _example())

    @pytest.mark.parametrize("ema", [None, {}])
    def test_no_averages_are_not_empty_averages(
        self, ema: dict[str, Tensor] | None, tmp_path: Path
    ) -> None:
        save_state(TrainingState(Step(), {}, ema=ema), tmp_path / "state")
        assert load_state(tmp_path / "state").ema == ema

    def test_equal_states_are_equal_files(self, written: bytes, tmp_path: Path) -> None:
        example = _example()
        turned = replace(example, weights=dict(reversed(example.weights.items())))
        save_state(turned, tmp_path / "state")
        assert (tmp_path / "state").read_bytes() == written

    def test_what_is_loaded_lives_without_its_file(self, written: bytes, scratch: Path) -> None:
        scratch.write_bytes(written)
        state = load_state(scratch)
        scratch.write_bytes(bytes(len(written)))
        assert _same(state, _example())

    @given(cut=st.integers(min_value=0))
    def test_cut_short(self, written: bytes, scratch: Path, cut: int) -> None:
        scratch.write_bytes(written[: cut % len(written)])
        with pytest.raises(CheckpointError, match="state is"):
            load_state(scratch)

    @given(where=st.integers(min_value=0), mask=st.integers(1, 255))
    def test_changed_anywhere(self, written: bytes, scratch: Path, where: int, mask: int) -> None:
        changed = bytearray(written)
        changed[where % len(written)] ^= mask
        scratch.write_bytes(changed)
        # White space in the header may change and mean the same; nothing else may.
        try:
            found = load_state(scratch)
        except CheckpointError:
            return
        assert _same(found, _example())

    def test_every_bit_of_the_tensors_counts(self, written: bytes, scratch: Path) -> None:
        begin = 8 + struct.unpack("<Q", written[:8])[0]
        for where in range(begin, len(written)):
            changed = bytearray(written)
            changed[where] ^= 1
            scratch.write_bytes(changed)
            with pytest.raises(CheckpointError, match="damaged: its contents do not match"):
                load_state(scratch)

    def test_tensors_of_no_part_are_refused(self, scratch: Path) -> None:
        # Whole, by the digest: as a later version might write.
        header = {"step": {"epoch": 0, "iteration": 0}, "averaged": False}
        files = TensorFiles("checkpoint", "x", json.loads(WHOLE)["format"], CheckpointError)
        files.write(scratch, {"weights/w": torch.ones(1), "scaler/w": torch.ones(1)}, header)
        with pytest.raises(CheckpointError, match=r"holds 'scaler/w', which is no part of a state"):
            load_state(scratch)

    @given(content=st.binary(max_size=200))
    def test_of_anything(self, scratch: Path, content: bytes) -> None:
        scratch.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a readable safetensors file"):
            load_state(scratch)

    @given(
        content=st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(
                        ["dtype", "shape", "data_offsets", "__metadata__", "blockprune", "x"]
                    ),
                    inner,
                    max_size=3,
                )
            ),
        )
    )
    def test_of_any_header(self, scratch: Path, content: object) -> None:
        header = json.dumps(content).encode()
        scratch.write_bytes(struct.pack("<Q", len(header)) + header)
        with pytest.raises(CheckpointError):
            load_state(scratch)

    def test_a_pickle_is_refused_and_not_run(self, tmp_path: Path) -> None:
        class Trap:
            def __reduce__(self) -> tuple[Any, ...]:
                return (Path.touch, (tmp_path / "sprung",))

        (tmp_path / "plain").write_bytes(pickle.dumps(Trap()))
        torch.save(Trap(), tmp_path / "torch")
        for name in ("plain", "torch"):
            with pytest.raises(CheckpointError, match="not a readable safetensors file"):
                load_state(tmp_path / name)
        assert not (tmp_path / "sprung").exists()

    @pytest.mark.parametrize(
        ("metadata", "message"),
        [
            (None, "is a safetensors file, but no checkpoint: save_state writes those"),
            ({"blockprune": "{"}, "does not hold a valid checkpoint header"),
            ({"blockprune": "[" * 10_000}, "does not hold a valid checkpoint header"),
            ({"blockprune": '{"format": "blockprune-ticket-2"}'}, "blockprune-state-2"),
            ({"blockprune": '{"format": "blockprune-state-1"}'}, "blockprune-state-2"),
            ({"blockprune": WHOLE}, "damaged: its contents do not match their digest"),
        ],
    )
    def test_foreign_files(
        self, metadata: dict[str, str] | None, message: str, tmp_path: Path
    ) -> None:
        save_file({"weights/x": torch.ones(2)}, tmp_path / "state", metadata=metadata)
        with pytest.raises(CheckpointError, match=message):
            load_state(tmp_path / "state")

    def test_absent_files_and_folders(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="there is no checkpoint file"):
            load_state(tmp_path / "absent")
        with pytest.raises(CheckpointError, match="there is no checkpoint"):
            load_state(tmp_path)
        with pytest.raises(CheckpointError, match=r"the folder .* does not exist"):
            save_state(_example(), tmp_path / "absent" / "state")

    def test_a_full_disk_leaves_what_was_there(
        self, written: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "state"
        path.write_bytes(written)

        def full(tensors: dict[str, Tensor], target: str, **rest: object) -> None:
            del tensors, rest
            Path(target).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("blockprune.tensor_files.save_file", full)
        with pytest.raises(CheckpointError, match=r"cannot be written: .*No space left on device"):
            save_state(TrainingState(Step(), {}), path)
        assert path.read_bytes() == written
        assert [file.name for file in tmp_path.iterdir()] == ["state"]

    def test_an_interruption_leaves_what_was_there(
        self, written: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "state"
        path.write_bytes(written)

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_state(TrainingState(Step(), {}), path)
        assert path.read_bytes() == written
        assert [file.name for file in tmp_path.iterdir()] == ["state"]

    def test_a_kind_of_tensor_that_files_cannot_hold(self, tmp_path: Path) -> None:
        sparse = torch.eye(2).to_sparse()
        with pytest.raises(CheckpointError, match="cannot be written"):
            save_state(TrainingState(Step(), {"x": sparse}), tmp_path / "state")
        assert not list(tmp_path.iterdir())
