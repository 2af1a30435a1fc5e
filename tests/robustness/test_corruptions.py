"""Corruptions on the fly: deterministic, in range, and what they say they are."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch

from blockprune.errors import DataError
from blockprune.robustness import CORRUPTIONS, corrupt
from blockprune.robustness.draws import Draws
from blockprune.robustness.record import COMMON_CORRUPTIONS, EXTRA_CORRUPTIONS

SHAPES = [(5, 1, 8, 8), (3, 3, 32, 32), (2, 3, 40, 64), (2, 1, 4, 5)]


def smooth(shape: tuple[int, ...]) -> torch.Tensor:
    coarse = torch.rand(*shape[:2], 4, 4)
    return torch.nn.functional.interpolate(coarse, size=shape[2:], mode="bilinear")


def test_the_table_has_the_named_nineteen() -> None:
    assert tuple(CORRUPTIONS) == COMMON_CORRUPTIONS + EXTRA_CORRUPTIONS
    assert len(COMMON_CORRUPTIONS) == 15


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_what_happens_to_an_image_does_not_depend_on_the_batch(name, shape) -> None:
    images = torch.rand(shape)
    state, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()
    for severity in (1, 5):
        whole = corrupt(images, name, severity, seed=3)
        alone = [
            corrupt(images[k : k + 1], name, severity, seed=3, first_index=k)
            for k in range(len(images))
        ]
        assert torch.equal(whole, torch.cat(alone))
        assert whole.shape == images.shape
        assert whole.dtype == images.dtype
        assert whole.min() >= 0
        assert whole.max() <= 1
    assert torch.equal(state, torch.get_rng_state())
    assert (legacy == np.random.get_state()[1]).all()


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "fog", "spatter", "glass_blur"])
def test_the_seed_matters(name) -> None:
    images = torch.rand(2, 3, 16, 16)
    assert not torch.equal(corrupt(images, name, 3, seed=0), corrupt(images, name, 3, seed=1))


def test_severity_grows_on_average() -> None:
    images = smooth((30, 3, 32, 32))
    distances = []
    for severity in range(1, 6):
        made = [corrupt(images, name, severity) - images for name in COMMON_CORRUPTIONS]
        distances.append(torch.stack(made).square().mean().sqrt().item())
    assert distances == sorted(distances)
    assert distances[0] > 0


def test_noise_has_the_published_size() -> None:
    images = torch.full((4, 3, 32, 32), 0.5, dtype=torch.float64)
    for severity, scale in enumerate((0.04, 0.06, 0.08, 0.09, 0.10), start=1):
        noise = corrupt(images, "gaussian_noise", severity) - images
        assert noise.std().item() == pytest.approx(scale, rel=0.03)
        assert abs(noise.mean().item()) < 0.003
    # A Poisson number of mean c x, over c, has the variance x / c.
    shot = corrupt(images, "shot_noise", 5)
    assert shot.var().item() == pytest.approx(0.5 / 50, rel=0.1)
    changed = corrupt(images, "impulse_noise", 5) != images
    assert changed.double().mean().item() == pytest.approx(0.07, rel=0.1)


def test_colours_follow_hue_saturation_value() -> None:
    images = torch.rand(1, 3, 4, 4, dtype=torch.float64)
    brighter = corrupt(images, "brightness", 4)
    greyer = corrupt(images, "saturate", 1)
    for y in range(4):
        for x in range(4):
            hue, saturation, value = colorsys.rgb_to_hsv(*images[0, :, y, x].tolist())
            expected = colorsys.hsv_to_rgb(hue, saturation, min(1, value + 0.2))
            assert brighter[0, :, y, x].tolist() == pytest.approx(expected, abs=1e-9)
            expected = colorsys.hsv_to_rgb(hue, saturation * 0.3, value)
            assert greyer[0, :, y, x].tolist() == pytest.approx(expected, abs=1e-9)


def test_contrast_keeps_the_mean() -> None:
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64) * 0.5 + 0.25
    found = corrupt(images, "contrast", 5)
    assert torch.allclose(found.mean((2, 3)), images.mean((2, 3)))
    assert torch.allclose(found.std((2, 3)), 0.15 * images.std((2, 3)))


@pytest.mark.parametrize(
    "name", ["defocus_blur", "gaussian_blur", "motion_blur", "zoom_blur", "glass_blur"]
)
def test_blurs_leave_a_plain_image(name) -> None:
    images = torch.full((2, 3, 32, 32), 0.4, dtype=torch.float64)
    for severity in range(1, 6):
        assert torch.allclose(corrupt(images, name, severity), images, atol=1e-12)


def test_elastic_transform_without_ripples_is_affine() -> None:
    rows = torch.arange(32, dtype=torch.float64) / 31
    ramp = (0.3 + 0.4 * rows)[None, None, :, None].expand(1, 1, 32, 32)
    inner = corrupt(ramp, "elastic_transform", 1)[0, 0, 8:-8, 8:-8]
    curved = inner[:-2] - 2 * inner[1:-1] + inner[2:]
    assert curved.abs().max() < 1e-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_stays(dtype) -> None:
    found = corrupt(torch.rand(2, 1, 8, 8).to(dtype), "frost", 5)
    assert found.dtype == dtype
    assert found.max() <= 1


def test_chunks_make_no_difference(monkeypatch) -> None:
    images = torch.rand(7, 1, 8, 8)
    whole = corrupt(images, "shot_noise", 2)
    monkeypatch.setattr("blockprune.robustness.corruptions._CHUNK_VALUES", 130)
    assert torch.equal(whole, corrupt(images, "shot_noise", 2))


def test_no_images_are_no_images() -> None:
    assert corrupt(torch.zeros(0, 3, 8, 8), "snow", 1).shape == (0, 3, 8, 8)


def test_draws_are_uniform_and_normal() -> None:
    draws = Draws(0, "test", 1, 0, 2000)
    uniform, normal = draws.uniform(7), draws.normal(7)
    assert 0 <= uniform.min() < uniform.max() < 1
    assert uniform.mean() == pytest.approx(0.5, abs=0.01)
    assert normal.std() == pytest.approx(1, abs=0.02)
    assert abs(np.corrcoef(uniform.T) - np.eye(7)).max() < 0.1


def test_an_index_counts_from_0() -> None:
    with pytest.raises(DataError, match="first_index must be 0 or more, got -1"):
        corrupt(torch.rand(1, 3, 8, 8), "fog", 1, first_index=-1)


@pytest.mark.parametrize(
    ("images", "name", "severity", "match"),
    [
        (torch.rand(1, 3, 8, 8), "gausian_noise", 1, "Did you mean gaussian_noise"),
        (torch.rand(1, 3, 8, 8), "fog", 6, "severities 1 to 5, got 6"),
        (torch.rand(1, 3, 8, 8) * 2 - 1, "fog", 1, r"Pixels lie in \[0, 1\]"),
        (torch.full((1, 3, 8, 8), torch.nan), "fog", 1, r"Pixels lie in \[0, 1\]"),
        (torch.rand(3, 8, 8), "fog", 1, "tensors"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "fog", 1, "uint8"),
        (torch.rand(1, 2, 8, 8), "fog", 1, "1 or 3 channels"),
        (torch.rand(1, 1, 3, 8), "fog", 1, "4 x 4 is the least"),
    ],
)
def test_bad_input(images, name, severity, match) -> None:
    with pytest.raises(DataError, match=match):
        corrupt(images, name, severity)
