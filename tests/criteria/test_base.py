from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from blockprune.criteria import NoDataWarning, ScoringContext, main_output
from blockprune.criteria.base import Batch, batches_of
from blockprune.errors import CriterionError, DataError
from blockprune.tracing import Call
from tests.criteria.nets import CLASSES, Net, context, pair


class Branch(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.branch(x)
        return out


class Scale(nn.Module):
    """Bare parameters: a table with two real dimensions, and a gain with one."""

    def __init__(self, table: bool) -> None:
        super().__init__()
        if table:
            self.table = nn.Parameter(torch.ones(5, 4))
        self.gain = nn.Parameter(torch.ones(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        gain = self.gain.flatten()
        return x * gain + self.table.sum(0) if hasattr(self, "table") else x * gain


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        out: Tensor = super().forward(x, x, x, need_weights=False)[0]
        return out


def depthwise() -> nn.Module:
    return nn.Sequential(nn.Conv1d(4, 4, 1, groups=4), nn.BatchNorm1d(4))


def tied() -> nn.Module:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    return nn.Sequential(first, nn.ReLU(), second)


@pytest.mark.parametrize(
    ("branch", "shape", "weights"),
    [
        (lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)), (2, 4), ["branch.1.weight"]),
        (depthwise, (2, 4, 3), ["branch.0.weight"]),
        (
            lambda: SelfAttention(4, 2, batch_first=True),
            (2, 3, 4),
            ["branch.in_proj_weight", "branch.out_proj.weight"],
        ),
        (lambda: Scale(table=True), (2, 4), ["branch.table"]),
        (lambda: Scale(table=False), (2, 4), ["branch.gain"]),
        (lambda: nn.LayerNorm(4), (2, 4), ["branch.weight", "branch.bias"]),
        (tied, (2, 4), ["branch.0.weight"]),
        (
            lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
            (2, 4),
            ["branch.parametrizations.weight.original1"],
        ),
    ],
    ids=["linear", "depthwise", "attention", "table", "gain", "norm", "tied", "weight_norm"],
)
def test_which_parameters_are_weights(
    branch: Callable[[], nn.Module], shape: tuple[int, ...], weights: list[str]
) -> None:
    scoring = context(Branch(branch()), torch.zeros(shape))
    (block,) = scoring.blocks
    assert sorted(scoring.weights(block)) == sorted(weights)
    assert all(name in block.parameters for name in weights)


def test_weights_of_the_model_are_those_of_blocks_stem_and_head() -> None:
    scoring = context(Net(), pair(2)[0])
    expected = {"stem.weight", "fc.weight"}
    expected |= {f"blocks.{i}.conv{j}.weight" for i in range(3) for j in (1, 2)}
    assert set(scoring.all_trainable_weights()) == expected


@dataclasses.dataclass(frozen=True)
class Output:
    mask: Tensor
    logits: Tensor


class Named(NamedTuple):
    logits: Tensor
    auxiliary: Tensor | None


LOGITS = torch.tensor([[4.0, 2.0]])
MASK = torch.tensor([True])
OUTPUTS = [
    LOGITS,
    (MASK, LOGITS),
    [LOGITS, LOGITS + 1],
    {"mask": MASK, "nested": {"logits": LOGITS}},
    Named(LOGITS, None),
    Output(MASK, LOGITS),
]


@pytest.mark.parametrize("outputs", OUTPUTS, ids=lambda outputs: type(outputs).__name__)
def test_loss_of_any_output_structure_at_any_temperature(outputs: Any) -> None:
    scoring = context(Net(), pair(2)[0])
    labels = torch.tensor([1])
    assert main_output(outputs) is LOGITS
    assert scoring.loss(outputs, labels) == functional.cross_entropy(LOGITS, labels)
    cool = functional.cross_entropy(LOGITS / 2, labels)
    assert scoring.loss(outputs, labels, temperature=2) == cool
    given: list[Any] = []

    def loss(outputs: Any, targets: Tensor) -> Tensor:
        given.append(outputs)
        return functional.cross_entropy(main_output(outputs), targets)

    own = context(Net(), pair(2)[0], loss_fn=loss)
    assert own.loss(outputs, labels) == functional.cross_entropy(LOGITS, labels)
    assert own.loss(outputs, labels, temperature=2) == cool
    assert given[0] is outputs
    assert type(given[1]) is type(outputs)


def test_no_floating_point_output() -> None:
    with pytest.raises(CriterionError, match=r"tuple.*no floating-point tensor"):
        main_output((MASK, 3))


def test_classes_may_come_last() -> None:
    scoring = context(Net(), pair(2)[0])
    logits, labels = torch.randn(2, 5, 7), torch.arange(10).view(2, 5) % 7
    expected = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(scoring.loss(logits, labels), expected)
    second = logits.movedim(2, 1)
    torch.testing.assert_close(scoring.loss(second, labels), expected)


def test_ignored_labels_are_ignored() -> None:
    scoring = context(Net(), pair(2)[0])
    logits = torch.randn(3, 4)
    found = scoring.loss(logits, torch.tensor([1, -100, 2]))
    assert found == functional.cross_entropy(logits[[0, 2]], torch.tensor([1, 2]))


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (torch.tensor([0.5]), DataError, "integer class labels; the targets are torch.float32"),
        ("cat", DataError, "the targets are str"),
        (torch.tensor([2]), DataError, "from 2 to 2.*has 2 classes"),
        (torch.tensor([-1]), DataError, "from -1 to -1"),
        (torch.tensor([0, 1]), DataError, r"shape \(1, 2\) with targets of shape \(2,\)"),
    ],
)
def test_targets_that_do_not_suit_the_default_loss(
    targets: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        context(Net(), pair(2)[0]).loss(LOGITS, targets)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda out, y: out, r"one element, not shape \(1, 2\)"),
        (lambda out, y: 3.0, r"one element, not 3\.0"),
        (lambda out, y: out.sum() * float("nan"), "The loss is nan"),
        (lambda out, y: out.sum() / 0, "The loss is inf"),
        (lambda out, y: out["logits"], "loss_fn failed.*loss_fn\\(outputs, targets\\)"),
    ],
)
def test_loss_functions_that_return_no_loss(loss: Any, message: str) -> None:
    with pytest.raises(CriterionError, match=message):
        context(Net(), pair(2)[0], loss_fn=loss).loss(LOGITS, None)


def test_the_model_refuses_a_batch() -> None:
    scoring = context(Net(), pair(2)[0])
    batch = Batch(Call((torch.zeros(2, 5, 6, 6, dtype=torch.float64),), {}), None)
    with pytest.raises(DataError, match=r"Net does not run.*\(2, 5, 6, 6\).*5 channels"):
        scoring.outputs(batch)


def test_outputs_draw_equally_and_leave_the_generator() -> None:
    class Noisy(Net):
        def forward(self, x: Tensor) -> Tensor:
            x.add_(torch.randn_like(x))
            return super().forward(x)

    images, labels = pair(4)
    scoring = ScoringContext(Noisy(), (), [Batch(Call((images,), {}), labels)], Call((), {}))
    state = torch.get_rng_state()
    batch = scoring.first_batch()
    assert torch.equal(scoring.outputs(batch), scoring.outputs(batch))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(batch.call.args[0], pair(4)[0])


def test_batch_statistics_puts_back_what_a_forward_changes() -> None:
    class Counting(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            return super().forward(x)

    model, (images, labels) = Counting().eval(), pair(4)
    model.blocks[1].train()
    scoring = ScoringContext(model, (), [Batch(Call((images,), {}), labels)], Call((), {}))
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with scoring.batch_statistics():
        training = {type(module) for module in model.modules() if module.training}
        assert training == {nn.BatchNorm2d}
        scoring.outputs(scoring.first_batch())
        assert not torch.equal(model.norm.running_mean, state["norm.running_mean"])
        assert model.calls == 1
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_batches_are_taken_when_asked_for_and_kept() -> None:
    taken = []

    def batches() -> Any:
        for i in range(5):
            taken.append(i)
            yield Batch(Call((torch.full((2, 1), float(i)),), {}), torch.tensor([0, 1]))

    scoring = ScoringContext(nn.Linear(1, 2), (), batches(), Call((), {}))
    scoring.first_batch()
    assert taken == [0]
    assert scoring.first_batch() is scoring.first_batch()
    inner = iter(scoring.batches)
    assert [next(inner).call.args[0][0, 0].item() for _ in range(2)] == [0, 1]
    assert [batch.call.args[0][0, 0].item() for batch in scoring.batches] == [0, 1, 2, 3, 4]
    assert len(list(scoring.batches)) == 5
    assert taken == [0, 1, 2, 3, 4]


def test_parts_of_a_batch_cut_what_has_the_batch_dimension() -> None:
    call = Call((torch.arange(6).view(6, 1), torch.tensor(3)), {"table": torch.zeros(4, 2)})
    batch = Batch(call, {"labels": torch.arange(6)})
    assert len(batch) == 6
    part = batch.part(2, 5)
    assert part.call.args[0].flatten().tolist() == [2, 3, 4]
    assert part.call.args[1] == 3
    assert part.call.kwargs["table"].shape == (4, 2)
    assert part.targets["labels"].tolist() == [2, 3, 4]


def test_without_data_the_batch_is_random_and_says_so() -> None:
    images = torch.zeros(2, 3, 6, 6, dtype=torch.float64)
    scoring = context(Net(), images, seed=5)
    with pytest.warns(NoDataWarning, match="No data was given"):
        batch = scoring.first_batch()
    assert batch.call.args[0].shape == (16, 3, 6, 6)
    assert batch.call.args[0].dtype == torch.float64
    assert 0.8 < float(batch.call.args[0].std()) < 1.2
    assert batch.targets.shape == (16,)
    assert batch.targets.max() < CLASSES
    assert scoring.first_batch() is batch
    with pytest.warns(NoDataWarning):
        again = context(Net(), images, seed=5).first_batch()
    assert torch.equal(again.call.args[0], batch.call.args[0])
    assert torch.equal(again.targets, batch.targets)


@pytest.mark.filterwarnings("ignore::blockprune.criteria.NoDataWarning")
def test_random_batches_keep_ids_legal_and_side_inputs_as_they_are() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 4)
            self.mix = Branch(nn.Linear(4, 4))

        def forward(self, ids: Tensor, scale: Tensor, *, flag: bool = True) -> Tensor:
            out: Tensor = self.mix(self.embedding(ids)).movedim(2, 1) * scale
            return out

    ids = torch.tensor([[4, 0, 1], [2, 3, 4]])
    scoring = context(Tokens(), {"ids": ids, "scale": torch.tensor(2.0), "flag": True})
    batch = scoring.first_batch()
    assert torch.equal(batch.call.kwargs["ids"], ids.repeat(8, 1))
    assert batch.call.kwargs["scale"] == 2
    assert batch.call.kwargs["flag"] is True
    assert batch.targets.shape == (16, 3)


@pytest.mark.filterwarnings("ignore::blockprune.criteria.NoDataWarning")
def test_random_batches_that_cannot_be_made() -> None:
    model = nn.Linear(2, 2)
    nested = ScoringContext(model, (), None, Call(([torch.zeros(2, 2)],), {}))
    with pytest.raises(DataError, match="No random batch can be made"):
        nested.first_batch()
    flat = ScoringContext(nn.Flatten(0), (), None, Call((torch.zeros(2, 2),), {}))
    with pytest.raises(DataError, match=r"shape \(32,\), which no random class labels fit"):
        flat.first_batch()


def batches(data: Any, model: nn.Module | None = None) -> list[Batch]:
    return list(batches_of(model or nn.Linear(2, 2), data, torch.device("cpu")))


def test_data_is_a_pair_or_an_iterable_of_pairs() -> None:
    x, y = torch.zeros(2, 2), torch.tensor([0, 1])
    assert [len(batches(data)) for data in ((x, y), [x, y], [(x, y)], ((x, y), (x, y)))] == [
        1, 1, 1, 2,
    ]  # fmt: skip
    assert len(batches(item for item in [(x, y)] * 3)) == 3
    assert batches(((x,), y))[0].call.args[0] is not None
    assert list(batches(({"input": x}, y))[0].call.kwargs) == ["input"]
    assert batches((x, {"labels": y}))[0].targets["labels"].tolist() == [0, 1]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=1)
    assert [batch.targets.item() for batch in batches(loader)] == [0, 1]


def test_inputs_alone_are_batches_without_labels() -> None:
    x = torch.zeros(2, 2)
    for data in (x, {"input": x}, [x, x, x], iter([{"input": x}]), [{"input": x}, {"input": x}]):
        assert all(batch.targets is None for batch in batches(data))
    assert [len(batches(data)) for data in (x, [x, x, x], [{"input": x}, {"input": x}])] == [
        1,
        3,
        2,
    ]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=1)
    assert [(len(batch), batch.targets) for batch in batches(loader)] == [(1, None), (1, None)]
    assert batches((x, None))[0].targets is None


def test_no_labels_where_the_loss_needs_them() -> None:
    with pytest.raises(CriterionError, match="needs labels, and the batch has none"):
        context(Net(), pair(2)[0]).loss(LOGITS, None)


def test_the_loss_that_a_model_returns_comes_before_the_default_and_behind_the_users() -> None:
    own = {"loss": torch.tensor(7.0), "logits": LOGITS}
    labels = torch.tensor([1])
    scoring = context(Net(), pair(2)[0])
    assert scoring.loss(own, None) == 7
    assert scoring.loss(own, labels) == 7
    assert scoring.loss(own, None, temperature=2) == 3.5
    assert scoring.loss({"loss": None, "logits": LOGITS}, labels) == scoring.loss(LOGITS, labels)
    explicit = context(Net(), pair(2)[0], loss_fn=lambda out, y: out["logits"].sum())
    assert explicit.loss(own, None) == 6


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, "data must be .* got int"),
        ("digits", "data must be .* got str"),
        ([3, 4, 5], "batch 0 .* is a int, not"),
        ([(1, 2), (1, 2, 3)], "batch 0 .*example_inputs must be"),
        ([(torch.zeros(2, 2), 0), (1, 2, 3)], "batch 1 .* is a tuple of 3"),
        (((1, 2), torch.zeros(2)), "batch 0 .*does not take the example inputs"),
    ],
)
def test_data_of_another_form(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        batches(data)


def test_empty_data() -> None:
    empty = ScoringContext(nn.Linear(2, 2), (), [], Call((), {}))
    with pytest.raises(DataError, match="data is empty"):
        empty.first_batch()
    nothing = Batch(Call((torch.zeros(0, 2),), {}), torch.zeros(0))
    with pytest.raises(DataError, match="holds no sample"):
        ScoringContext(nn.Linear(2, 2), (), [nothing], Call((), {})).first_batch()
