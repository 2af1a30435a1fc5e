"""Peak memory of nets whose peak can be worked out by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockprune
from blockprune.errors import MeasurementError
from blockprune.models import resnet20
from blockprune.profiling import Execution, inference_memory, training_memory

FLOAT = 4
SAMPLES = 10


def working(model: nn.Module, width: int, **options: Any) -> int:
    return inference_memory(model, torch.zeros(SAMPLES, width), **options).working_bytes


def test_a_layer_holds_its_output_and_the_one_before() -> None:
    net = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 16), nn.Linear(16, 2))
    # While the second layer works: 4 and 16 values a sample; afterwards 16 and 2.
    assert working(net, 8) == FLOAT * SAMPLES * (4 + 16)


def test_views_and_operations_in_place_cost_nothing() -> None:
    net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(inplace=True), nn.Flatten(), nn.Identity())
    assert working(net, 8) == FLOAT * SAMPLES * 4


def test_a_shortcut_is_held_until_it_is_added() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(8, 6)
            self.branch = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return x + self.branch(x)

    # The shortcut beside the branch's 5 and 6; then shortcut, branch and sum.
    assert working(Residual(), 8) == FLOAT * SAMPLES * max(6 + 5 + 6, 6 + 6 + 6)


def test_the_state_counts_each_storage_once() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    net[2].weight = net[0].weight
    found = inference_memory(net, torch.zeros(SAMPLES, 8))
    weights, biases, scales = 8 * 8, 8 + 8, 8 + 8
    statistics = FLOAT * (8 + 8) + 8  # and a count of batches, 64 bits wide
    floats = weights + biases + scales + SAMPLES * 8
    assert found.state_bytes == FLOAT * floats + statistics
    assert found.peak_bytes == found.state_bytes + found.working_bytes
    assert found.source == "tracked tensors"


def test_half_as_many_bits_take_half_the_memory() -> None:
    net = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 16))
    weight = net[0].weight
    whole = inference_memory(net, torch.zeros(SAMPLES, 8))
    half = inference_memory(net, torch.zeros(SAMPLES, 8), execution=Execution(dtype=torch.bfloat16))
    assert (2 * half.working_bytes, 2 * half.state_bytes) == (
        whole.working_bytes,
        whole.state_bytes,
    )
    assert net[0].weight is weight
    assert weight.dtype == torch.float32


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_memory_grows_with_the_batch(batch_size: int) -> None:
    net = nn.Linear(8, 4)
    found = inference_memory(net, torch.zeros(1, 8), batch_size=batch_size)
    assert found.batch_size == batch_size
    assert found.working_bytes == FLOAT * batch_size * 4
    assert found.state_bytes == FLOAT * (8 * 4 + 4 + batch_size * 8)


class Tanhs(nn.Sequential):
    """Layers as wide as their input; each hyperbolic tangent keeps its output for the backward."""

    def __init__(self, depth: int) -> None:
        super().__init__(*(part for _ in range(depth) for part in (nn.Linear(4, 4), nn.Tanh())))


@pytest.mark.parametrize("depth", [1, 3, 6])
def test_training_keeps_one_activation_a_layer_for_the_backward_pass(depth: int) -> None:
    net, samples = Tanhs(depth), 10_000
    activation = FLOAT * samples * 4
    inputs = torch.zeros(samples, 4)
    found = training_memory(net, inputs, loss_fn=lambda y: y.sum())
    # At the last layer: all outputs kept, and that of its linear part. Beyond that there are
    # only gradients of weights, at most as large as the weights, twice, and a few numbers.
    weights = FLOAT * depth * (4 * 4 + 4)
    assert (depth + 1) * activation <= found.working_bytes
    assert found.working_bytes <= (depth + 1) * activation + 2 * weights + 64
    # Weights and their momentum.
    assert found.state_bytes == 2 * weights + FLOAT * samples * 4
    # Without gradients two outputs at a time do, whatever the depth.
    assert inference_memory(net, inputs).working_bytes == 2 * activation


def test_measuring_is_repeatable_and_leaves_no_trace() -> None:
    model = resnet20().train()
    before = copy.deepcopy(model.state_dict())
    images, random = torch.rand(2, 3, 32, 32), torch.get_rng_state()
    measured = [(inference_memory(model, images), training_memory(model, images)) for _ in range(2)]
    assert measured[0] == measured[1]
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_a_ticket_trains_in_less_memory() -> None:
    dense, images = resnet20(), torch.rand(4, 3, 32, 32)
    ticket = blockprune.remove_blocks(dense, "layer1.1", images)
    whole, less = training_memory(dense, images), training_memory(ticket, images)
    # Two convolutions and two normalisations keep their inputs, ReLUs in between their outputs:
    # at least four tensors of 16 x 32 x 32 for each of 4 images.
    assert whole.working_bytes - less.working_bytes >= 4 * FLOAT * 4 * 16 * 32 * 32
    assert whole.state_bytes - less.state_bytes >= 2 * FLOAT * 4704


def test_what_the_model_refuses_is_quoted() -> None:
    with pytest.raises(MeasurementError, match="does not run on the example inputs: RuntimeError"):
        inference_memory(nn.Linear(3, 2), torch.zeros(1, 4))
    with pytest.raises(MeasurementError, match=r"does not train .* loss_fn of what it returns"):
        training_memory(nn.BatchNorm1d(3), torch.zeros(1, 3))
    with pytest.raises(MeasurementError, match="no parameter that requires a gradient"):
        training_memory(nn.ReLU(), torch.zeros(1, 3))
    with pytest.raises(MeasurementError, match="whole number from 1 on, got 0"):
        inference_memory(nn.Linear(3, 2), torch.zeros(1, 3), batch_size=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_allocator_is_asked() -> None:
    net, side = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 256)).cuda(), 1024
    found = inference_memory(net, torch.zeros(side, 256))
    assert found.source == "CUDA allocator"
    # It hands out multiples of 512 bytes, which these are; kernels may ask for scratch space.
    outputs = FLOAT * side * (512 + 256)
    assert outputs <= found.working_bytes <= outputs + 64 * 2**20
