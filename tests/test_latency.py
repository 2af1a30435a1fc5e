"""Latency: what is run, how often, in which order, and as what. Never how fast: that belongs to
benchmarks/."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blockprune.errors import BlockpruneError, MeasurementError, TraceError
from blockprune.profiling import (
    Execution,
    Latency,
    compare_latency,
    measure_latency,
    saturated_batch,
)
from blockprune.profiling import saturation as saturation_module


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


class Slowing:
    """A clock on a machine that slows down steadily: the n-th reading is n times the true time."""

    def __init__(self, log: list[tuple[str, int]], true_seconds: dict[str, float]) -> None:
        self.log = log
        self.true_seconds = true_seconds
        self.readings = 0

    def seconds(self, call: Callable[[], object], passes: int) -> float:
        call()
        self.readings += 1
        return self.readings * self.true_seconds[self.log[-1][0]]


def test_a_machine_that_slows_down_does_not_bend_the_ratio() -> None:
    log: list[tuple[str, int]] = []
    models = {name: Recorder(name, log) for name in ("dense", "ticket")}
    clock = Slowing(log, {"dense": 2.0, "ticket": 1.0})
    measured = compare_latency(models, torch.zeros(1, 2), repeats=8, warmup=1, clock=clock)
    [dense], [ticket] = measured["dense"], measured["ticket"]
    # Two readings of each come before the first round; the order turns over in each.
    places = [(5, 6), (8, 7), (9, 10), (12, 11), (13, 14), (16, 15), (17, 18), (20, 19)]
    assert dense.samples_ms == tuple(2e3 * first for first, _ in places)
    assert ticket.samples_ms == tuple(1e3 * second for _, second in places)
    ratios = sorted(2 * first / second for first, second in places)
    assert dense.ratio_to(ticket) == pytest.approx((ratios[3] + ratios[4]) / 2)
    # Eight rounds: the extremes, with 2 * (1/2) ** 8 left outside.
    assert dense.ratio_interval_to(ticket) == pytest.approx((ratios[0], ratios[-1]))
    low, high = dense.ratio_interval_to(ticket) or (0, 0)
    assert low < 2 < high


def test_short_passes_are_repeated_and_counted_out() -> None:
    log: list[tuple[str, int]] = []
    asked: list[int] = []

    class Quick:
        def seconds(self, call: Callable[[], object], passes: int) -> float:
            asked.append(passes)
            return 0.0005

    measure_latency(Recorder("a", log), torch.zeros(1, 2), repeats=2, warmup=3)
    compare_latency(
        {"a": Recorder("a", log)}, torch.zeros(1, 2), repeats=2, warmup=3, clock=Quick()
    )
    # The warm-up, one to see how long it takes, then as many as fill 2 ms.
    assert asked == [3, 1, 4, 4]


def test_throughput() -> None:
    assert Latency(8, (2.0, 4.0, 5.0)).samples_per_s == 8 / 0.004


class Formats(nn.Module):
    """Notes the number format and the memory layout of its input and its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
        self.seen: set[tuple[Any, ...]] = set()

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        last = torch.channels_last
        self.seen.add(
            (
                x.dtype,
                self.conv.weight.dtype,
                ids.dtype,
                x.is_contiguous(memory_format=last),
                self.conv.weight.is_contiguous(memory_format=last),
            )
        )
        return self.conv(x)

    def __deepcopy__(self, memo: dict[int, Any]) -> Formats:
        # The copy writes into the same set, or nobody would see what it ran as.
        copied = Formats()
        copied.load_state_dict(copy.deepcopy(self.state_dict(), memo))
        copied.seen = self.seen
        return copied


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_copies_run_in_the_format_asked_for(channels_last: bool, dtype: torch.dtype | None) -> None:
    model = Formats()
    weights = copy.deepcopy(model.state_dict())
    inputs = torch.rand(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)
    execution = Execution(channels_last=channels_last, dtype=dtype)
    measure_latency(model, inputs, batch_sizes=(2,), repeats=1, warmup=1, execution=execution)
    expected = dtype or torch.float32
    assert model.seen == {(expected, expected, torch.int64, channels_last, channels_last)}
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert model.conv.weight.is_contiguous()
    assert not model.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_volumes_lie_channels_last_as_well() -> None:
    model = nn.Conv3d(3, 4, 3)
    converted = Execution(channels_last=True).converted(model)
    assert converted.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(converted.weight, model.weight)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, "float16"])
def test_a_number_format_that_is_none_is_refused(dtype: Any) -> None:
    with pytest.raises(MeasurementError, match="dtype must be a floating-point format"):
        Execution(dtype=dtype)


@pytest.mark.filterwarnings("ignore")  # of the compiler's own imports
def test_compiled_copies_for_more_batch_sizes_than_torch_compiles_unasked(
    eager_compiler: list[object],
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    sizes = tuple(range(1, 11))
    execution = Execution(compile=True)
    found = measure_latency(
        model, torch.zeros(1, 4), batch_sizes=sizes, repeats=1, warmup=1, execution=execution
    )
    assert [latency.batch_size for latency in found] == list(sizes)
    # The trial of the compiler comes first.
    assert len(eager_compiler) == 1 + len(sizes)


def test_no_compiler_is_an_error_that_says_so_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, eager_compiler: list[object]
) -> None:
    def broken(model: Any, **options: Any) -> Any:
        raise RuntimeError("no C++ compiler found\nmany more lines")

    log: list[tuple[str, int]] = []
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(MeasurementError, match=r"torch\.compile does not work on cpu") as info:
        measure_latency(Recorder("a", log), torch.zeros(1, 2), execution=Execution(compile=True))
    assert "RuntimeError: no C++ compiler found. Install" in str(info.value)
    assert log == []


def test_a_module_that_alone_does_not_compile_is_named(
    monkeypatch: pytest.MonkeyPatch, eager_compiler: list[object]
) -> None:
    def selective(model: Any, **options: Any) -> Any:
        def fail(*args: Any) -> None:
            raise RuntimeError("graph too strange")

        return fail if isinstance(model, Recorder) else model

    monkeypatch.setattr(torch, "compile", selective)
    run = functools.partial(measure_latency, execution=Execution(compile=True))
    with pytest.raises(
        MeasurementError, match=r"model runs, and cannot be compiled: .*too strange"
    ):
        run(Recorder("a", []), torch.zeros(1, 2))
    # What the module itself refuses stays the inputs' fault.
    with pytest.raises(TraceError, match="model refused the example inputs"):
        run(nn.Linear(3, 2), torch.zeros(1, 4))


@pytest.mark.parametrize(
    ("curve", "limit", "size", "reason"),
    [
        # 1 -> 2 -> 4 pay, 8 brings 3 %.
        ([100.0, 190.0, 300.0, 309.0], 1024, 4, "throughput"),
        # More than 5 % each time, to the end.
        ([100.0, 200.0, 400.0], 4, 4, "limit"),
        ([100.0, 200.0, 400.0], 5, 4, "limit"),
        ([100.0], 1, 1, "limit"),
        ([100.0, 90.0], 1024, 1, "throughput"),
    ],
)
def test_the_saturated_batch_is_where_throughput_stops_growing(
    curve: list[float], limit: int, size: int, reason: str
) -> None:
    throughput = {2**power: value for power, value in enumerate(curve)}
    found = saturated_batch(nn.Identity(), None, limit=limit, throughput=throughput.__getitem__)
    assert (found.batch_size, found.reason) == (size, reason)
    assert found.samples_per_s == throughput


def test_a_batch_that_does_not_fit_ends_the_search() -> None:
    class Small(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 2:
                raise torch.OutOfMemoryError("3 GiB asked for")
            return super().forward(x)

    curve = itertools.count(1)

    def growing(size: int) -> float:
        if size > 2:
            measure_latency(Small(3, 3), torch.zeros(1, 3), batch_sizes=(size,))
        return 10.0 ** next(curve)

    found = saturated_batch(Small(3, 3), torch.zeros(1, 3), throughput=growing)
    assert (found.batch_size, found.reason) == (2, "memory")
    with pytest.raises(MeasurementError, match=r"model does not fit in the memory .* 3 GiB"):
        measure_latency(Small(3, 3), torch.zeros(1, 3), batch_sizes=(4,))


def test_throughput_is_measured_batch_by_batch() -> None:
    log: list[tuple[str, int]] = []
    found = saturated_batch(Recorder("a", log), torch.zeros(1, 2), limit=2, repeats=1)
    assert list(found.samples_per_s) == [1, 2]
    assert all(value > 0 for value in found.samples_per_s.values())
    sizes = [size for _, size in log]
    assert sizes == sorted(sizes)
    assert set(sizes) == {1, 2}


def test_throughput_is_samples_over_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def scripted(model: nn.Module, inputs: Any, **options: Any) -> list[Latency]:
        asked.append(options)
        [size] = options["batch_sizes"]
        return [Latency(size, {1: (9.0, 10.0, 50.0), 2: (16.0,)}.get(size, (32.0,)))]

    monkeypatch.setattr(saturation_module, "measure_latency", scripted)
    execution = Execution(channels_last=True)
    found = saturated_batch(nn.Identity(), None, limit=4, repeats=7, execution=execution)
    # One sample in 10 ms, two in 16, four in 32.
    assert found.samples_per_s == pytest.approx({1: 100, 2: 125, 4: 125})
    assert (found.batch_size, found.reason) == (2, "throughput")
    assert {(one["repeats"], one["execution"]) for one in asked} == {(7, execution)}


def test_what_fails_for_another_reason_than_memory_is_no_end_of_the_search() -> None:
    def failing(size: int) -> float:
        if size > 1:
            raise MeasurementError("the clock stands still") from RuntimeError("x")
        return 1.0

    with pytest.raises(MeasurementError, match="the clock stands still"):
        saturated_batch(nn.Identity(), None, throughput=failing)


@pytest.mark.parametrize("arguments", [{"limit": 0}, {"gain": 1.0}, {"gain": -0.1}, {"repeats": 0}])
def test_a_search_without_sense_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(MeasurementError):
        saturated_batch(nn.Identity(), torch.zeros(1, 2), **arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_timed_by_marks_in_its_queue() -> None:
    model = nn.Linear(64, 64).cuda()
    [found] = measure_latency(model, torch.zeros(1, 64), batch_sizes=(32,), repeats=3)
    assert len(found.samples_ms) == 3
    assert all(sample > 0 for sample in found.samples_ms)
