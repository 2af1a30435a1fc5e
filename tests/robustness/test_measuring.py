"""One call for everything, and a record that is read without torch."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from blockprune.errors import DataError, MeasurementError
from blockprune.robustness import (
    AttackChoice,
    CorruptedFiles,
    Normalisation,
    Normalised,
    PixelData,
    RobustnessResult,
    corrupt,
    pixels_of,
    robustness_of,
)
from blockprune.robustness.pictures import pictures_of
from blockprune.robustness.record import AttackCurve


def test_the_whole_record(digits) -> None:
    pytest.importorskip("art")
    (model, dense), data, normalisation = digits
    model.train()
    told = []
    attacks = [
        AttackChoice(name="fgsm", epsilons=(0.0, 0.1)),
        AttackChoice(name="pgd", epsilons=(0.0, 0.1), steps=5),
        AttackChoice(name="deepfool", epsilons=(0.0, 0.3, 3.0), steps=10),
    ]
    found = robustness_of(
        model,
        data,
        normalisation=normalisation,
        dense=dense,
        corruptions=("fog", "saturate"),
        severities=(1, 4),
        shifts={"the same": torch.utils.data.TensorDataset(data.images, data.labels)},
        attacks=attacks,
        samples=40,
        on_event=lambda *event: told.append(event),
    )
    result = RobustnessResult.model_validate(json.loads(json.dumps(found)))
    assert result.model_dump(mode="json") == found
    assert model.training
    model.eval()
    mean = torch.tensor(normalisation.mean).item()
    seen = corrupt(data.images, "fog", 4)
    with torch.no_grad():
        logits = model((seen - mean) / normalisation.deviation[0])
    expected = (logits.argmax(1) == data.labels).double().mean().item()
    assert result.corruptions[1].accuracy == pytest.approx(expected)
    assert result.mean_error == result.corruption_errors["fog"]
    assert result.shifts[0].found == result.clean
    assert result.attacked == 40
    for curve in result.attacks:
        assert curve.accuracies[-1] <= curve.accuracies[0]
        assert curve.transferred[0] == curve.accuracies[0]
    assert result.attacks[2].accuracies[-1] < 0.1
    assert 0 < result.attacks[2].median_distance <= 3
    assert result.flags == ()
    assert result.zero_gradients == 0
    assert 0.5 < result.agreement <= 1
    assert len(result.examples) == 8
    check_pictures(result, model, data, normalisation)
    assert [done for done, _, _ in told] == list(range(1, told[-1][1] + 1))


def check_pictures(result, model, data, normalisation) -> None:
    """Compare what the pictures show with the images, and the decisions with the model's."""
    assert [picture.index for picture in result.pictures] == list(result.examples[:4])
    for picture in result.pictures:
        assert picture.label == data.labels[picture.index]
        names = [view.name for view in picture.views]
        assert names[0] == "clean"
        assert names[1].startswith(("fog", "saturate"))
        assert names[2:] == [curve.choice.name for curve in result.attacks]
        for view in picture.views:
            shown = Image.open(io.BytesIO(base64.b64decode(view.png)))
            assert (shown.format, shown.size) == ("PNG", (8, 8))
        clean = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.views[0].png))))
        pixels = data.images[picture.index, 0].numpy()
        assert np.abs(clean / 255 - pixels).max() <= 0.5 / 255 + 1e-6
        with torch.no_grad():
            own = data.images[picture.index :][:1] - normalisation.mean[0]
            decided = model(own / normalisation.deviation[0]).argmax(1).item()
        assert picture.views[0].decided == decided == picture.label


def test_large_images_are_made_small() -> None:
    (picture,) = pictures_of(
        Normalised(_Constant(), Normalisation()),
        PixelData(torch.rand(1, 3, 40, 200), torch.zeros(1, dtype=torch.long)),
        [0],
        corruptions=(),
        attacks=(),
        seed=0,
    )
    shown = Image.open(io.BytesIO(base64.b64decode(picture.views[0].png)))
    assert (shown.size, shown.mode) == ((96, 19), "RGB")


def test_neither_corruption_nor_attack(digits) -> None:
    (model, _), data, normalisation = digits
    found = robustness_of(model, data, normalisation=normalisation, corruptions=())
    result = RobustnessResult.model_validate(found)
    assert result.corrupted_by is None
    assert result.mean_error is None
    assert result.attacks == ()
    assert result.agreement is None


def test_files_in_place_of_what_is_made(tmp_path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "fog.npy", pixels)
    np.save(tmp_path / "labels.npy", np.zeros(10, dtype=np.uint8))
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    data = PixelData(torch.rand(2, 3, 32, 32), torch.tensor([0, 0]))
    found = robustness_of(
        model,
        data,
        normalisation=Normalisation(),
        corruptions=("fog",),
        files=CorruptedFiles(tmp_path),
    )
    assert found["corrupted_by"] == "files"
    means = torch.from_numpy(pixels).float().div(255).mean((1, 2))
    right = (model[2](means).argmax(1) == 0).double().reshape(5, 2).mean(1)
    assert [row["accuracy"] for row in found["corruptions"]] == right.tolist()


def test_half_precision_and_outputs_with_logits() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 3)

        def forward(self, images):
            return SimpleNamespace(logits=self.layer(images.flatten(1)))

    data = PixelData(torch.rand(6, 1, 4, 4), torch.arange(6) % 3)
    model = Wrapped().to(torch.bfloat16)
    found = robustness_of(model, data, normalisation=Normalisation(), corruptions=("snow",))
    assert len(found["corruptions"]) == 5


def test_pixels_come_back() -> None:
    pixels = torch.rand(4, 3, 8, 8)
    normalisation = Normalisation(mean=(0.1, 0.2, 0.3), deviation=(0.4, 0.5, 0.6))
    shape = (3, 1, 1)
    mean = torch.tensor(normalisation.mean).reshape(shape)
    deviation = torch.tensor(normalisation.deviation).reshape(shape)
    normalised = (pixels - mean) / deviation
    dataset = torch.utils.data.TensorDataset(normalised, torch.arange(4))
    found = pixels_of(dataset, normalisation)
    assert torch.allclose(found.images, pixels, atol=1e-6)
    again = Normalised(nn.Flatten(), normalisation)(found.images)
    assert torch.allclose(again, normalised.flatten(1), atol=1e-5)
    with pytest.raises(DataError, match=r"instead of \[0, 1\]"):
        pixels_of(dataset, Normalisation(mean=(9.0,)))
    with pytest.raises(DataError, match="of 2 channels"):
        pixels_of(dataset, Normalisation(mean=(0.0, 0.0), deviation=(1.0, 1.0)))


def test_bad_input(digits) -> None:
    (model, _), data, normalisation = digits
    plain = Normalisation()
    with pytest.raises(DataError, match="no test images"):
        robustness_of(model, data.rows(torch.arange(0)), normalisation=normalisation)
    with pytest.raises(DataError, match="no corruption 'fogg'"):
        robustness_of(model, data, normalisation=normalisation, corruptions=("fogg",))
    with pytest.raises(DataError, match="One integer label"):
        PixelData(data.images, data.labels[:3])
    with pytest.raises(MeasurementError, match="logits"):
        robustness_of(nn.Identity(), data, normalisation=plain, corruptions=())
    with pytest.raises(ValueError, match="2 channels and deviation 1"):
        Normalisation(mean=(0.0, 0.0))


def test_what_no_figure_can_be_of(digits) -> None:
    (model, _), data, normalisation = digits
    colours = Normalisation(mean=(0.5, 0.5), deviation=(0.5, 0.5))
    with pytest.raises(DataError, match="is of 2 channels, the images have 1"):
        robustness_of(model, data, normalisation=colours, corruptions=())
    with pytest.raises(DataError, match="data set is empty"):
        pixels_of(torch.utils.data.TensorDataset(torch.zeros(0, 1, 8, 8), torch.zeros(0)), colours)

    class Broken(nn.Module):
        def forward(self, images):
            return torch.full((len(images), 10), torch.nan)

    with pytest.raises(MeasurementError, match="logits have NaN, so it decides nothing"):
        robustness_of(Broken(), data, normalisation=normalisation, corruptions=())
    pytest.importorskip("art")
    for samples in (0, -3):
        with pytest.raises(DataError, match=f"1 or more; got {samples}"):
            robustness_of(
                model,
                data,
                normalisation=normalisation,
                corruptions=(),
                attacks=[AttackChoice(name="fgsm")],
                samples=samples,
            )


def test_a_curve_has_one_accuracy_for_each_epsilon() -> None:
    choice = AttackChoice(name="fgsm", epsilons=(0.0, 0.1))
    AttackCurve(choice=choice, parts=("fgsm",), accuracies=(0.9, 0.1), transferred=(0.9, 0.2))
    for wrong in ({"accuracies": (0.9,)}, {"transferred": (0.9, 0.2, 0.1)}):
        values = {"accuracies": (0.9, 0.1), **wrong}
        [count] = map(len, wrong.values())
        with pytest.raises(ValueError, match=f"{count} accuracies for 2 epsilons"):
            AttackCurve(choice=choice, parts=("fgsm",), **values)


class _Whole(nn.Module):
    """A network that makes its pixels whole numbers, and so has no gradient at all."""

    def __init__(self, dtype=torch.float32) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 3, dtype=dtype)
        # Nothing that an image has to do with, though a loss can be differentiated by it.
        self.scale = torch.ones((), dtype=dtype, requires_grad=True)

    def forward(self, images):
        whole = (255 * images).to(torch.int64).to(images.dtype)
        return self.layer(whole.flatten(1) / 255) * self.scale


class _Unbound(_Whole):
    def forward(self, images):
        with torch.no_grad():
            return super().forward(images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", [_Whole, _Unbound])
def test_a_network_that_cuts_its_gradient_is_flagged(kind, dtype) -> None:
    pytest.importorskip("art")
    torch.manual_seed(0)
    model = kind(dtype)
    images = torch.rand(40, 1, 4, 4)
    with torch.no_grad():
        labels = model(images.to(dtype)).argmax(1)
    found = robustness_of(
        model,
        PixelData(images, labels),
        normalisation=Normalisation(),
        corruptions=(),
        attacks=[
            AttackChoice(name="fgsm", epsilons=(0.2,)),
            AttackChoice(name="pgd", epsilons=(0.2,), steps=2),
            AttackChoice(name="deepfool", epsilons=(0.2,), steps=2),
            AttackChoice(name="autoattack", epsilons=(0.2,), steps=2, queries=200),
        ],
    )
    assert found["zero_gradients"] == 1
    assert any("no gradient at 100%" in flag for flag in found["flags"])
    by_name = {curve["choice"]["name"]: curve["accuracies"][0] for curve in found["attacks"]}
    # A gradient of zero has no sign to follow; Square needs none.
    assert by_name["fgsm"] == by_name["deepfool"] == 1
    assert by_name["autoattack"] < 1


def test_the_record_needs_no_torch() -> None:
    code = "import sys, blockprune.robustness.record; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class _Constant(nn.Module):
    """Two classes, always the second one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.01, 0.02]))

    def forward(self, images):
        return images.mean((1, 2, 3))[:, None] * self.weight + torch.tensor([0.0, 1.0])


@pytest.mark.parametrize("label", [0, 1])
def test_a_network_that_is_always_wrong_or_always_right(label) -> None:
    pytest.importorskip("art")
    data = PixelData(torch.rand(5, 1, 4, 4), torch.full((5,), label))
    attacks = [
        AttackChoice(name="pgd", epsilons=(0.1,)),
        AttackChoice(name="deepfool", epsilons=(0.1,), steps=2),
        AttackChoice(name="autoattack", epsilons=(0.1,), steps=2, queries=2),
    ]
    found = robustness_of(
        _Constant(), data, normalisation=Normalisation(), corruptions=(), attacks=attacks
    )
    assert [curve["accuracies"] for curve in found["attacks"]] == [[float(label)]] * 3
    # Accuracy that no attack lowers is a sign, where there was something to lower.
    assert any("does not lower" in flag for flag in found["flags"]) == bool(label)
    assert len(found["examples"]) == 5 * label
    parts = ["apgd-ce", "deepfool", "square"] if label else []
    assert found["attacks"][2]["parts"] == parts
