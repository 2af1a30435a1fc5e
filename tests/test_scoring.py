from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from blockprune.batches import first_inputs
from blockprune.blocks import find_blocks
from blockprune.criteria import CRITERIA, Criterion, ScoringContext
from blockprune.errors import BlockpruneError, CriterionError, DataError, TraceError
from blockprune.scoring import NoDataWarning, ScoreTable, score_blocks
from tests.criteria.nets import Net, pair

DATA = pair()
NAMES = [f"blocks.{i}" for i in range(3)]


class Watched(Net):
    """Everything that scoring could disturb, and every generator drawn from."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        noise = torch.rand(()) + random.random() + float(np.random.rand())
        return super().forward(self.drop(x)) * noise


@pytest.mark.parametrize("name", CRITERIA)
def test_one_number_for_each_block_in_order(name: str) -> None:
    model = Net()
    table = score_blocks(model, name, DATA)
    analysis = find_blocks(model, DATA[0])
    assert list(table.scores) == NAMES
    assert all(type(score) is float for score in table.scores.values())
    assert (table.criterion, table.granularity, table.seed) == (name, "branch", 0)
    assert table.fingerprint == analysis.fingerprint


@pytest.mark.parametrize("name", CRITERIA)
def test_scoring_changes_nothing(name: str) -> None:
    model = Watched()
    model.norm.eval()
    model.stem.bias.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    seen: list[int] = []
    model.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    model.fc.weight.register_hook(lambda _: seen.append(2))
    images, labels = pair()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    score_blocks(model, name, (images, labels), seed=3)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [key for key, p in model.named_parameters() if not p.requires_grad] == ["stem.bias"]
    assert [key for key, p in model.named_parameters() if p.grad is not None] == ["fc.weight"]
    assert torch.equal(model.fc.weight.grad, torch.ones_like(model.fc.weight))
    assert (model.calls, seen) == (0, [])
    assert len(model.blocks[0]._forward_hooks) == 1
    assert torch.equal(images, DATA[0])
    assert not images.requires_grad


@pytest.mark.parametrize("name", ["random", "snip", "grasp"])
def test_scores_depend_on_the_seed_and_on_no_generator(name: str) -> None:
    model = Watched()
    first = score_blocks(model, name, DATA, seed=1)
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    assert score_blocks(model, name, DATA, seed=1) == first
    assert score_blocks(model, name, DATA, seed=2).scores != first.scores


def test_generators_are_restored_after_an_error_too() -> None:
    def failing(context: ScoringContext) -> dict[str, float]:
        torch.rand(1)
        raise ArithmeticError("my own")

    model = Net()
    state = torch.get_rng_state()
    with pytest.raises(ArithmeticError, match="my own"):
        score_blocks(model, failing, DATA)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_data_there_is_a_warning_and_scores() -> None:
    model = Net()
    with pytest.warns(NoDataWarning):
        first = score_blocks(model, "grasp", example_inputs=DATA[0])
    with pytest.warns(NoDataWarning):
        assert score_blocks(model, "grasp", example_inputs=DATA[0]) == first


def test_without_anything_the_shape_is_inferred() -> None:
    model = Net()
    model.image_size = 6
    with pytest.warns(NoDataWarning):
        assert list(score_blocks(model, "snip").scores) == NAMES
    with pytest.raises(TraceError, match="example_inputs"):
        score_blocks(nn.ReLU(), "snip")


def test_criteria_that_read_no_data_do_not_ask_for_it() -> None:
    for name in ("l1", "random"):
        assert list(score_blocks(Net(), name, example_inputs=DATA[0]).scores) == NAMES


def test_a_generator_gives_its_first_batch_once() -> None:
    taken = []

    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(3):
            taken.append(i)
            yield DATA

    model = Net()
    table = score_blocks(model, "snip", stream())
    assert taken == [0]
    assert table == score_blocks(model, "snip", DATA)


def test_a_shuffling_loader_is_reproducible() -> None:
    dataset = torch.utils.data.TensorDataset(*DATA)
    loader = torch.utils.data.DataLoader(dataset, batch_size=6, shuffle=True)
    model = Net()
    state = torch.get_rng_state()
    first = score_blocks(model, "snip", loader, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert score_blocks(model, "snip", loader, seed=1) == first
    assert score_blocks(model, "snip", loader, seed=2).scores != first.scores


def test_first_inputs_leave_everything_to_be_read() -> None:
    model = Net()
    dataset = torch.utils.data.TensorDataset(*DATA)
    loader = torch.utils.data.DataLoader(dataset, batch_size=5, shuffle=True)
    state = torch.get_rng_state()
    call, same = first_inputs(model, loader)
    assert torch.equal(torch.get_rng_state(), state)
    assert same is loader
    assert torch.equal(call.args[0], next(iter(loader))[0][:2])
    call, stream = first_inputs(model, iter([DATA, DATA]))
    assert torch.equal(call.args[0], DATA[0][:2])
    assert len(list(stream)) == 2
    with pytest.raises(DataError, match="data is empty"):
        first_inputs(model, iter(()))


def test_a_model_of_one_batch_size_is_shown_the_whole_batch() -> None:
    class Fixed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.view(12, 3, 6, 6))

    call, _ = first_inputs(Fixed(), DATA)
    assert torch.equal(call.args[0], DATA[0])
    assert list(score_blocks(Fixed(), "snip", DATA).scores) == NAMES


class Structured(Net):
    """Several inputs, and an output that is a dictionary."""

    def forward(self, x: Tensor, shift: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"labels": torch.zeros(1, dtype=torch.int64), "out": super().forward(x + shift)}


def test_tuple_and_dict_inputs_and_dict_outputs() -> None:
    model, (images, labels) = Structured(), DATA
    shift = torch.zeros((), dtype=torch.float64)
    positional = score_blocks(model, "grasp", ((images, shift), labels))
    keywords = score_blocks(model, "grasp", ({"x": images, "shift": shift}, labels))
    plain = Net()
    plain.load_state_dict(model.state_dict())
    assert positional.scores == keywords.scores == score_blocks(plain, "grasp", DATA).scores


def test_own_loss_function() -> None:
    model, (images, _) = Net(), DATA
    values = torch.randn(12, 3, dtype=torch.float64)
    table = score_blocks(model, "snip", (images, values), functional.mse_loss)
    assert all(score > 0 for score in table.scores.values())
    with pytest.raises(DataError, match="Pass the loss_fn"):
        score_blocks(model, "snip", (images, values))


def test_an_analysis_given_is_used() -> None:
    model = Net()
    analysis = find_blocks(model, DATA[0], granularity="layer")
    table = score_blocks(model, "l1", DATA, analysis=analysis)
    assert (table.granularity, table.fingerprint) == ("layer", analysis.fingerprint)
    assert score_blocks(model, "l1", DATA, granularity="layer") == table
    assert score_blocks(model, "l1", analysis=analysis) == table
    with pytest.raises(CriterionError, match="analysis is of another model"):
        score_blocks(nn.Linear(2, 2), "l1", example_inputs=torch.zeros(1, 2), analysis=analysis)


def test_own_criteria_are_named_after_the_callable() -> None:
    def smallest(context: ScoringContext) -> dict[str, Any]:
        return {b.name: np.float32(b.params) for b in reversed(context.blocks)}

    table = score_blocks(Net(), smallest, DATA)
    assert (table.criterion, list(table.scores)) == ("smallest", NAMES)
    assert set(map(type, table.scores.values())) == {float}

    class Own:
        def __call__(self, context: ScoringContext) -> dict[str, Tensor]:
            return {block.name: torch.tensor(1.0) for block in context.blocks}

    assert score_blocks(Net(), Own(), DATA).criterion == "Own"  # type: ignore[arg-type]


def test_a_criterion_may_spoil_its_copy() -> None:
    def vandal(context: ScoringContext) -> dict[str, float]:
        with torch.no_grad():
            for parameter in context.model.parameters():
                parameter.zero_()
        return dict.fromkeys((block.name for block in context.blocks), 0.0)

    model = Net()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    score_blocks(model, vandal, DATA)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


GOOD = dict.fromkeys(NAMES, 1.0)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"blocks.0": 1.0}, "'blocks.1'"),
        (GOOD | {"blocks.9": 1.0}, "'blocks.9', which is no block.*Did you mean"),
        (GOOD | {"blocks.1": float("nan")}, "'blocks.1' nan"),
        (GOOD | {"blocks.2": float("-inf")}, "'blocks.2' -inf"),
        (GOOD | {"blocks.2": torch.tensor(float("nan"))}, "'blocks.2'"),
        (GOOD | {"blocks.2": torch.zeros(2)}, "'blocks.2'"),
        (GOOD | {"blocks.0": "high"}, "'blocks.0' 'high'"),
        (GOOD | {"blocks.0": None}, "'blocks.0' None"),
        ([1.0, 2.0, 3.0], "returned a list"),
        (None, "returned a NoneType"),
    ],
)
def test_results_that_are_no_scores(result: Any, message: str) -> None:
    with pytest.raises(CriterionError, match=message):
        score_blocks(Net(), lambda context: result, DATA)


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        ("grap", "no criterion 'grap'. Did you mean grasp"),
        ("", "Known: random, l1"),
        (3, "not int"),
    ],
)
def test_unknown_criteria(criterion: Any, message: str) -> None:
    with pytest.raises(CriterionError, match=message):
        score_blocks(Net(), criterion, DATA)


def _nan_images() -> tuple[Tensor, Tensor]:
    images, labels = pair()
    images[0, 0, 0, 0] = float("nan")
    return images, labels


@pytest.mark.parametrize("name", ["snip", "grasp"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data is empty"),
        (iter(()), "data is empty"),
        (_nan_images(), "loss is nan"),
        ((torch.zeros(4, 5, 6, 6).double(), torch.zeros(4).long()), "5 channels"),
        ((DATA[0], DATA[1] + 7), "labels go from 0 to 2"),
        ([3], "batch 0 of the data is a int"),
    ],
    ids=["list", "iterator", "nan", "channels", "labels", "no pair"],
)
def test_bad_data_is_an_error_that_says_so(name: str, data: Any, message: str) -> None:
    with pytest.raises(BlockpruneError, match=message):
        score_blocks(Net(), name, data)


def test_a_weight_that_is_not_finite_is_found_by_its_block() -> None:
    model = Net()
    with torch.no_grad():
        model.blocks[1].conv1.weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(CriterionError, match=r"'blocks\.1' inf"):
        score_blocks(model, "l1", DATA)


def test_a_model_without_blocks_has_no_scores() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 3)).double()
    table = score_blocks(model, "grasp", DATA)
    assert isinstance(table, ScoreTable)
    assert table.scores == {}


def test_every_criterion_of_the_table_satisfies_the_protocol() -> None:
    criteria: list[Criterion] = list(CRITERIA.values())
    assert all(map(callable, criteria))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda() -> None:
    model = Net().cuda()
    state = torch.cuda.get_rng_state()
    table = score_blocks(model, "grasp", DATA)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert table.scores == pytest.approx(score_blocks(model.cpu(), "grasp", DATA).scores, rel=1e-8)


def test_only_criteria_that_say_they_do_not_write_share_the_memory_of_the_weights() -> None:
    class Reading:
        reads_only = True

        def __call__(self, context: ScoringContext) -> dict[str, float]:
            pointers.append(context.model.fc.weight.data_ptr())
            assert context.model.fc.weight is not model.fc.weight
            return dict.fromkeys((block.name for block in context.blocks), 0.0)

    class Unsaid(Reading):
        reads_only = False

    pointers: list[int] = []
    model = Net()
    for criterion in (Reading(), Unsaid()):
        score_blocks(model, criterion, DATA)
    assert pointers[0] == model.fc.weight.data_ptr() != pointers[1]
