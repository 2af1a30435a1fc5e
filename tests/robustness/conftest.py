"""Two small networks trained on digits, and the digits as pixels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from blockprune.data import load_digits
from blockprune.robustness import Normalisation, PixelData, pixels_of


def _trained(images: torch.Tensor, labels: torch.Tensor, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(512, 10),
    )
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(4):
        for rows in torch.randperm(len(images)).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimiser.step()
    optimiser.zero_grad()
    return model


@pytest.fixture(scope="session")
def digits():
    """The two networks in training mode, the test pixels and the normalisation."""
    data = load_digits()
    images = torch.stack([image for image, _ in data.train])
    labels = torch.tensor([int(label) for _, label in data.train])
    # The darkest and the brightest pixel of the digits are 0 and 1.
    low, high = images.min().item(), images.max().item()
    normalisation = Normalisation(mean=(-low / (high - low),), deviation=(1 / (high - low),))
    models = [_trained(images, labels, seed) for seed in (0, 1)]
    found: PixelData = pixels_of(data.test, normalisation)
    return models, found, normalisation
