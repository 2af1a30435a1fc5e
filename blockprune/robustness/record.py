"""What robustness was asked for and found: plain values, read and written as JSON, no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from blockprune.errors import close_names

__all__ = [
    "COMMON_CORRUPTIONS",
    "EXTRA_CORRUPTIONS",
    "SEVERITIES",
    "AttackChoice",
    "AttackCurve",
    "AttackName",
    "CorruptionAccuracy",
    "Normalisation",
    "Picture",
    "Proportion",
    "RobustnessChoice",
    "RobustnessResult",
    "ShiftAccuracy",
    "View",
]

COMMON_CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
"""The fifteen that the mean error of CIFAR-10-C and ImageNet-C is over."""

EXTRA_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""Four more, which the benchmarks hold out for tuning."""

SEVERITIES = (1, 2, 3, 4, 5)

AttackName = Literal["fgsm", "pgd", "deepfool", "autoattack"]

_EPSILONS = tuple(k / 255 for k in (0, 1, 2, 4, 8, 16))
_RADII = (0.0, 0.25, 0.5, 1.0, 2.0)
_STEPS = {"fgsm": 1, "pgd": 20, "deepfool": 50, "autoattack": 100}

Share = Annotated[float, Field(ge=0, le=1)]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Normalisation(_Value):
    """What a model expects of pixels `x` in [0, 1]: ``(x - mean) / deviation`` a channel.

    Attributes:
        mean: of each channel, or one number for all.
        deviation: of each channel, or one number for all; above 0.
    """

    mean: Annotated[tuple[float, ...], Field(min_length=1)] = (0.0,)
    deviation: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (1.0,)

    @model_validator(mode="after")
    def _of_one_length(self) -> Normalisation:
        if len(self.mean) != len(self.deviation):
            raise ValueError(
                f"mean has {len(self.mean)} channels and deviation {len(self.deviation)}; "
                "give as many of one as of the other"
            )
        return self


class AttackChoice(_Value):
    """An attack with its settings; the defaults are the usual ones.

    Attributes:
        name: of the attack.
        epsilons: largest change of a pixel (in [0, 1], L-infinity) of each point of the curve,
            rising; for ``deepfool``, which looks for the least change, radii in L2.
        steps: of ``pgd`` (20), ``deepfool`` (50) and each part of ``autoattack`` (100); 1 for
            ``fgsm``.
        step_share: step of ``pgd`` as a share of epsilon: 0.25 is 2/255 at 8/255.
        restarts: random starts of ``pgd``.
        overshoot: of ``deepfool``.
        queries: of the Square part of ``autoattack``, an image.
    """

    name: AttackName
    epsilons: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)] = ()
    steps: Annotated[int, Field(ge=0)] = 0
    step_share: Annotated[float, Field(gt=0)] = 0.25
    restarts: Annotated[int, Field(ge=1)] = 1
    overshoot: Annotated[float, Field(ge=0)] = 0.02
    queries: Annotated[int, Field(ge=1)] = 5000

    @model_validator(mode="before")
    @classmethod
    def _usual(cls, given: object) -> object:
        """Fill what depends on the attack."""
        if not isinstance(given, dict) or given.get("name") not in _STEPS:
            return given
        name = given["name"]
        usual = {
            "epsilons": _RADII if name == "deepfool" else _EPSILONS,
            "steps": _STEPS[name],
        }
        return usual | given

    @model_validator(mode="after")
    def _consistent(self) -> AttackChoice:
        if self.steps < 1 or (self.name == "fgsm" and self.steps != 1):
            raise ValueError(f"{self.name} has {self.steps} steps; fgsm takes 1, the others more")
        if any(one >= two for one, two in zip(self.epsilons, self.epsilons[1:], strict=False)):
            raise ValueError(f"epsilons rise from one to the next, got {self.epsilons}")
        if self.name != "deepfool" and self.epsilons[-1] > 1:
            raise ValueError(
                f"epsilon is in pixels from 0 to 1, got {self.epsilons[-1]}; 8 of 255 is 8 / 255"
            )
        return self

    @property
    def norm(self) -> Literal["Linf", "L2"]:
        """The norm that epsilon is measured in."""
        return "L2" if self.name == "deepfool" else "Linf"


def _named(value: object) -> object:
    """Let a word stand for a list of corruptions, and one name for a list of it."""
    words = {"all": (*COMMON_CORRUPTIONS, *EXTRA_CORRUPTIONS), "common": COMMON_CORRUPTIONS}
    words["none"] = ()
    if isinstance(value, str):
        return words.get(value, (value,))
    return value


def _known(names: tuple[str, ...]) -> tuple[str, ...]:
    known = (*COMMON_CORRUPTIONS, *EXTRA_CORRUPTIONS)
    for name in names:
        if name not in known:
            raise ValueError(
                f"there is no corruption {name!r}.{close_names(name, known)} There are "
                f'{", ".join(known)}; and "all", "common" (the first fifteen), "none"'
            )
    if len(set(names)) < len(names):
        raise ValueError(f"a corruption is named twice: {', '.join(names)}")
    return names


def _attacks(value: object) -> object:
    """Let the name of an attack stand for it with its usual settings."""
    several = value if isinstance(value, list | tuple) else (value,)
    return tuple({"name": one} if isinstance(one, str) else one for one in several)


class RobustnessChoice(_Value):
    """What is measured of each network."""

    corruptions: Annotated[tuple[str, ...], BeforeValidator(_named), AfterValidator(_known)] = (
        Field(
            default=COMMON_CORRUPTIONS,
            description='Names of corruptions, "common" (fifteen), "all" (nineteen) or "none".',
        )
    )
    severities: tuple[Annotated[int, Field(ge=1, le=5)], ...] = Field(
        default=SEVERITIES, description="Of each corruption, 1 to 5."
    )
    corruption_files: str | None = Field(
        default=None,
        description="Folder of CIFAR-10-C, CIFAR-100-C or ImageNet-C inside the folder of the "
        "data, to read corruptions from. None: they are made on the fly.",
    )
    shifts: dict[str, str] = Field(
        default_factory=dict,
        description="Other test sets: a name, and its folder inside the folder of the data. The "
        'names "cifar10.1" (v6), "cifar10.1-v4" and "cifar10.2" are read in their published form, '
        "any other as a folder of images for each class.",
    )
    attacks: Annotated[tuple[AttackChoice, ...], BeforeValidator(_attacks)] = Field(
        default=(),
        description='"fgsm", "pgd", "deepfool", "autoattack", or tables of AttackChoice.',
    )
    samples: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Test images that are attacked, drawn by the seed. None: all."
    )
    controls: bool = Field(default=True, description="Measure the controls beside tickets too.")

    @model_validator(mode="after")
    def _something(self) -> RobustnessChoice:
        if not self.severities and self.corruptions:
            raise ValueError("severities is empty: name some of 1 to 5, or no corruptions")
        if len(set(self.severities)) < len(self.severities):
            raise ValueError(f"a severity is named twice: {', '.join(map(str, self.severities))}")
        if len({attack.name for attack in self.attacks}) < len(self.attacks):
            raise ValueError("an attack is named twice; give several epsilons to one")
        if self.corruption_files is not None and not self.corruptions:
            raise ValueError("corruption_files has no use without corruptions")
        return self


class Proportion(_Value):
    """A share of images, with its 95 % Wilson interval."""

    images: Annotated[int, Field(ge=1)]
    accuracy: Share
    low: Share
    high: Share


class CorruptionAccuracy(_Value):
    """Accuracy under one corruption at one severity."""

    name: str
    severity: Annotated[int, Field(ge=1, le=5)]
    accuracy: Share


class ShiftAccuracy(_Value):
    """Accuracy on another test set."""

    name: str
    found: Proportion


class AttackCurve(_Value):
    """Accuracy against epsilon under one attack.

    An image counts as right where it is right both clean and attacked, so that epsilon 0 has the
    clean accuracy of the images attacked.

    Attributes:
        choice: the attack and its settings; ``choice.epsilons`` are the abscissae.
        parts: what the attack consists of, of ``autoattack`` more than one; empty where no image
            was there to attack.
        accuracies: white-box, one for each epsilon.
        transferred: under the attack made on the dense model; None without one.
        median_distance: for ``deepfool``, the median L2 length of the changes that fooled the
            model; None for the others, or where none did.
    """

    choice: AttackChoice
    parts: tuple[str, ...]
    accuracies: tuple[Share, ...]
    transferred: tuple[Share, ...] | None = None
    median_distance: float | None = None

    @model_validator(mode="after")
    def _one_for_each(self) -> AttackCurve:
        for found in (self.accuracies, self.transferred):
            if found is not None and len(found) != len(self.choice.epsilons):
                raise ValueError(
                    f"{len(found)} accuracies for {len(self.choice.epsilons)} epsilons"
                )
        return self


class View(_Value):
    """A picture of a test image.

    Attributes:
        name: "clean", a corruption with its severity, or an attack.
        decided: the class that the network sees in it.
        png: the picture, a PNG file in base64.
    """

    name: str
    decided: int
    png: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]+={0,2}$", max_length=200_000)]


class Picture(_Value):
    """A test image in several views; `label` is what it shows."""

    index: Annotated[int, Field(ge=0)]
    label: int
    views: tuple[View, ...]


class RobustnessResult(_Value):
    """How one network stands up; what `robustness_of` returns, as JSON.

    Attributes:
        seed: of every draw.
        clean: on all test images.
        corrupted_by: whether corruptions were ``"made"`` on the fly, read from ``"files"``, or
            not asked for.
        corruptions: one for each corruption and severity.
        corruption_errors: mean error over severities of each corruption.
        severity_errors: mean error over corruptions at each severity; keys are "1" to "5".
        mean_error: mean of ``corruption_errors`` over the common fifteen of those measured;
            None where none of them was.
        shifts: one for each other test set.
        attacked: number of test images that were attacked.
        attacks: one for each attack.
        zero_gradients: share of the attacked images with a loss gradient of all zeros; None
            without an attack.
        flags: why the attacks may say too much of the network's robustness; empty is good.
        ece: expected calibration error on the clean images, 15 bins.
        agreement: share of clean images on which this network and the dense one decide alike;
            None without a dense one.
        examples: indices of a few test images that are right clean, wrong under attack first.
        pictures: of the first of these, clean, corrupted and attacked.
    """

    seed: int
    clean: Proportion
    corrupted_by: Literal["made", "files"] | None
    corruptions: tuple[CorruptionAccuracy, ...]
    corruption_errors: dict[str, Share]
    severity_errors: dict[str, Share]
    mean_error: Share | None
    shifts: tuple[ShiftAccuracy, ...]
    attacked: int
    attacks: tuple[AttackCurve, ...]
    zero_gradients: Share | None
    flags: tuple[str, ...]
    ece: Share
    agreement: Share | None
    examples: tuple[int, ...]
    pictures: tuple[Picture, ...] = ()
