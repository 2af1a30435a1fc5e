"""Latency: what is run, how often, in which order. Never how fast: that belongs to benchmarks/."""

from __future__ import annotations

import logging
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blockprune.errors import BlockpruneError, MeasurementError, TraceError
from blockprune.profiling import Latency, compare_latency, measure_latency


class Recorder(nn.Module):
    """Writes its name, the batch it is given and its state into a log."""

    def __init__(self, name: str, log: list[tuple[str, int]]) -> None:
        super().__init__()
        self.name = name
        self.log = log
        self.weight = nn.Parameter(torch.ones(1))
        self.seen: list[tuple[bool, bool, int]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.log.append((self.name, len(x)))
        self.seen.append((self.training, torch.is_grad_enabled(), torch.get_num_threads()))
        return x * self.weight


def _runs(log: list[tuple[str, int]]) -> list[str]:
    """Names in the log, repetitions in a row taken together."""
    names = [name for name, _ in log]
    return [name for k, name in enumerate(names) if k == 0 or names[k - 1] != name]


def test_modules_take_turns_and_the_order_turns_over() -> None:
    log: list[tuple[str, int]] = []
    models = {name: Recorder(name, log) for name in "abc"}
    measured = compare_latency(models, torch.zeros(1, 2), repeats=3, warmup=1)
    # Estimates first (a b c), then rounds abc, cba, abc; equal neighbours melt together.
    assert "".join(_runs(log)) == "abc" + "abc" + "ba" + "bc"
    assert all(len(measured[name][0].samples_ms) == 3 for name in "abc")


def test_one_figure_a_batch_size_in_the_order_given() -> None:
    log: list[tuple[str, int]] = []
    found = measure_latency(
        Recorder("a", log), torch.zeros(2, 3), batch_sizes=(4, 1), repeats=2, warmup=1
    )
    assert [latency.batch_size for latency in found] == [4, 1]
    sizes = [size for _, size in log]
    assert sizes == sorted(sizes, reverse=True)
    assert set(sizes) == {4, 1}
    assert all(sample > 0 for latency in found for sample in latency.samples_ms)


def test_modules_run_in_evaluation_mode_without_gradients_and_get_their_modes_back() -> None:
    model = Recorder("a", [])
    frozen = nn.Sequential(model, nn.Dropout()).train()
    frozen[1].eval()
    before = torch.get_num_threads()
    measure_latency(frozen, torch.zeros(1, 2), repeats=2, warmup=1, threads=1)
    assert set(model.seen) == {(False, False, 1)}
    assert [module.training for module in frozen.modules()] == [True, True, False]
    assert torch.get_num_threads() == before


def test_every_batched_argument_follows_the_batch_size() -> None:
    shapes: list[tuple[Any, ...]] = []

    class Many(nn.Module):
        def forward(self, x: Tensor, images: list[Tensor], table: Tensor, scale: float) -> Tensor:
            shapes.append((len(x), len(images), len(table)))
            return x * scale

    inputs = {
        "x": torch.zeros(2, 3),
        "images": [torch.zeros(3), torch.zeros(4)],
        "table": torch.zeros(7, 5),
        "scale": 0.5,
    }
    for example in (inputs, tuple(inputs.values())):
        shapes.clear()
        measure_latency(Many(), example, batch_sizes=(5,), repeats=1, warmup=1)
        assert set(shapes) == {(5, 5, 7)}


def test_median_and_interquartile_range() -> None:
    samples = (5.0, 1.0, 9.0, 2.0, 4.0)
    latency = Latency(8, samples)
    assert latency.median_ms == statistics.median(samples) == 4.0
    assert latency.iqr_ms == 5.0 - 2.0
    assert Latency(8, (3.0,)).iqr_ms == 0.0


def test_the_ratio_is_taken_round_by_round() -> None:
    # The machine slows down tenfold; each round still says that `slow` takes twice as long.
    slow, fast = Latency(1, (2.0, 6.0, 20.0)), Latency(1, (1.0, 3.0, 10.0))
    assert slow.ratio_to(fast) == 2.0
    for other in (Latency(2, (1.0, 3.0, 10.0)), Latency(1, (1.0,))):
        with pytest.raises(MeasurementError, match="Only rounds of one comparison pair up"):
            slow.ratio_to(other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_sizes": ()}, "no batch size"),
        ({"batch_sizes": (1, 0)}, "A batch size must be a whole number from 1 on, got 0"),
        ({"batch_sizes": (1.5,)}, "got 1.5"),
        ({"batch_sizes": (True,)}, "got True"),
        ({"repeats": 0}, "repeats must be a whole number from 1 on, got 0"),
        ({"warmup": -1}, "warmup must be a whole number from 1 on, got -1"),
        ({"threads": 0}, "threads must be a whole number from 1 on, got 0"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(
    arguments: dict[str, Any], message: str
) -> None:
    log: list[tuple[str, int]] = []
    with pytest.raises(MeasurementError, match=message):
        measure_latency(Recorder("a", log), torch.zeros(1, 2), **arguments)
    assert log == []


def test_no_model_and_no_batch_axis_are_refused() -> None:
    with pytest.raises(MeasurementError, match="no model"):
        compare_latency({}, torch.zeros(1, 2))
    with pytest.raises(MeasurementError, match="no tensor with a batch axis"):
        measure_latency(nn.Identity(), torch.tensor(1.0))


def test_inputs_that_the_model_refuses_are_quoted() -> None:
    model = nn.Linear(3, 2).train()
    with pytest.raises(TraceError, match=r"model refused .* shapes cannot be multiplied") as info:
        measure_latency(model, torch.zeros(1, 4), repeats=1)
    assert isinstance(info.value, BlockpruneError)
    assert model.training


def test_the_extension_builder_s_logger_is_as_it_was() -> None:
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    measure_latency(nn.Identity(), torch.zeros(1, 2), repeats=1, warmup=1)
    assert logger.level == level


def test_a_batch_as_it_is_given() -> None:
    log: list[tuple[str, int]] = []
    [found] = measure_latency(
        Recorder("a", log), torch.zeros(3, 2), batch_sizes=None, repeats=2, warmup=1
    )
    assert found.batch_size == 3
    assert {size for _, size in log} == {3}

    class Scalar(nn.Module):
        def forward(self, x: float) -> Tensor:
            return torch.ones(2) * x

    [found] = measure_latency(Scalar(), (2.0,), batch_sizes=None, repeats=2, warmup=1)
    assert (found.batch_size, len(found.samples_ms)) == (1, 2)
