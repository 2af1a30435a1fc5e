"""Attacks of adversarial-robustness-toolbox (extra `attacks`) within exact bounds.

What the library returns is cut to within epsilon and [0, 1] in the dtype of the model, to the last
bit, and judged on that. Accuracy under attack counts an image that is right both clean and
attacked.

``autoattack`` is not the published ensemble of four: the library has no FAB and no targeted
APGD. Its parts are the library's nearest, run in turn on the images that are left: APGD on cross
entropy, APGD on the ratio of logit differences (three classes or more), DeepFool cut to epsilon,
and Square; the result names them.

Sources: Goodfellow et al. 2015 (FGSM); Madry et al. 2018 (PGD); Moosavi-Dezfooli et al. 2016
(DeepFool); Croce and Hein 2020 (AutoAttack); https://github.com/Trusted-AI/
adversarial-robustness-toolbox.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from blockprune.errors import DataError, MeasurementError
from blockprune.robustness.corruptions import check_pixels
from blockprune.robustness.normalising import device_of, dtype_of, logits_of
from blockprune.robustness.projecting import cast_pixels, within
from blockprune.robustness.record import AttackChoice
from blockprune.robustness.toolbox import Run, attackable, library, with_gradient

__all__ = ["Attacked", "attack", "check_attacks", "transferred", "zero_gradients"]


@dataclass(frozen=True)
class Attacked:
    """What an attack made.

    Attributes:
        images: in the dtype of the model, within epsilon of the clean ones and in [0, 1].
        parts: what it consists of; one that comes when no image is left has nothing to do.
    """

    images: Tensor
    parts: tuple[str, ...]


def check_attacks() -> None:
    """Raise `MissingExtraError` unless the attacks can run."""
    library("art")


def attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    choice: AttackChoice,
    epsilon: float,
    *,
    seed: int = 0,
    batch_size: int = 256,
) -> Attacked:
    """Return images changed so that the model takes them for something else.

    The model's weights, gradients, modes and the generators are as before afterwards.

    Args:
        model: maps pixels in [0, 1] to logits (`Normalised` makes one of a model that expects
            normalised images); it runs in evaluation mode.
        images: ``(N, C, H, W)``, in [0, 1].
        labels: ``(N,)``, the right ones.
        choice: the attack; its ``epsilons`` are not looked at.
        epsilon: largest change of a pixel, in [0, 1]; for ``deepfool`` the largest L2 length,
            and images that need more are left clean.
        seed: of random starts and draws.
        batch_size: images at once; random starts depend on it.

    Raises:
        MissingExtraError: adversarial-robustness-toolbox is not installed.
        DataError: images or labels do not fit.
        MeasurementError: epsilon is negative, or the logits are NaN.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from blockprune.robustness import AttackChoice, attack
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        >>> images, labels = torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
        >>> found = attack(model, images, labels, AttackChoice(name="fgsm"), 8 / 255)
        >>> bool(((found.images - images).abs() <= 8 / 255).all())
        True
    """
    check_pixels(images)
    if labels.shape != images.shape[:1]:
        raise DataError(f"{len(images)} images have {len(labels)} labels; give one for each.")
    if not epsilon >= 0:
        raise MeasurementError(f"epsilon is 0 or more, got {epsilon}.")
    clean = cast_pixels(images, dtype_of(model)).to(device_of(model))
    labels = labels.to(clean.device)
    if epsilon == 0 or not len(clean):
        return Attacked(clean, ())
    with attackable(model, seed):
        run = Run(model, clean, labels, choice, epsilon, batch_size)
        return _METHODS[choice.name](run)


def transferred(
    source: nn.Module,
    target: nn.Module,
    images: Tensor,
    labels: Tensor,
    choice: AttackChoice,
    epsilon: float,
    *,
    seed: int = 0,
    batch_size: int = 256,
) -> float:
    """Return the target's accuracy on images that an attack made on the source.

    An image counts that the target gets right both clean and attacked. Arguments and errors are
    those of `attack`; both models map pixels to logits.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from blockprune.robustness import AttackChoice, transferred
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        >>> images, labels = torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
        >>> 0 <= transferred(model, model, images, labels, AttackChoice(name="fgsm"), 0.1) <= 1
        True
    """
    made = attack(source, images, labels, choice, epsilon, seed=seed, batch_size=batch_size).images
    if not len(made):
        raise MeasurementError("Accuracy of no images was asked for; give at least one.")
    right = [
        logits_of(target, seen, batch_size=batch_size).argmax(dim=1).cpu() == labels.cpu()
        for seen in (images, made)
    ]
    return (right[0] & right[1]).double().mean().item()


def zero_gradients(
    model: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int = 256
) -> float:
    """Return the share of images at which the loss has no gradient: all zeros, or not finite.

    Args:
        model: maps pixels in [0, 1] to logits.
        images: ``(N, C, H, W)``, at least one.
        labels: ``(N,)``.
        batch_size: images at once.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from blockprune.robustness.attacks import zero_gradients
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        >>> zero_gradients(model, torch.rand(2, 1, 4, 4), torch.tensor([0, 1]))
        0.0
    """
    if not len(images):
        raise MeasurementError("Gradients of no images were asked for; give at least one.")
    device, dtype = device_of(model), dtype_of(model)
    missing = 0
    with attackable(model, seed=0):
        pairs = zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True)
        for batch, right in pairs:
            seen = batch.detach().to(device, dtype, copy=True).requires_grad_()
            logits = with_gradient(model(seen), seen)
            loss = nn.functional.cross_entropy(logits, right.to(device), reduction="sum")
            (slope,) = torch.autograd.grad(loss, seen)
            flat = slope.flatten(1)
            missing += int(((flat == 0).all(1) | ~flat.isfinite().all(1)).sum())
    return missing / len(images)


def _fgsm(run: Run) -> Attacked:
    method = run.methods.FastGradientMethod(
        run.estimator, norm=np.inf, eps=run.epsilon, batch_size=run.batch_size
    )
    return Attacked(run.bounded(method), ("fgsm",))


def _pgd(run: Run) -> Attacked:
    method = run.methods.ProjectedGradientDescentPyTorch(
        run.estimator,
        norm=np.inf,
        eps=run.epsilon,
        eps_step=run.choice.step_share * run.epsilon,
        max_iter=run.choice.steps,
        num_random_init=run.choice.restarts,
        batch_size=run.batch_size,
        verbose=False,
    )
    return Attacked(run.bounded(method), ("pgd",))


def _deepfool_method(run: Run, steps: int) -> Any:
    return run.methods.DeepFool(
        run.estimator,
        max_iter=steps,
        epsilon=run.choice.overshoot,
        nb_grads=min(10, run.classes),
        batch_size=run.batch_size,
        verbose=False,
    )


def _deepfool(run: Run) -> Attacked:
    made = within(run.clean, run.generate(_deepfool_method(run, run.choice.steps)), None)
    lengths = (made.double() - run.clean.double()).flatten(1).norm(dim=1)
    near = (lengths <= run.epsilon)[:, None, None, None]
    return Attacked(torch.where(near, made, run.clean), ("deepfool",))


def _autoattack(run: Run) -> Attacked:
    bounds = {"norm": np.inf, "eps": run.epsilon, "batch_size": run.batch_size}

    def ascent(loss: str) -> Any:
        return run.methods.AutoProjectedGradientDescent(
            run.estimator,
            **bounds,
            eps_step=2 * run.epsilon,
            max_iter=run.choice.steps,
            nb_random_init=1,
            loss_type=loss,
            verbose=False,
        )

    parts: dict[str, Callable[[], Any]] = {
        "apgd-ce": lambda: ascent("cross_entropy"),
        "apgd-dlr": lambda: ascent("difference_logits_ratio"),
        "deepfool": lambda: _deepfool_method(run, run.choice.steps),
        "square": lambda: run.methods.SquareAttack(
            run.estimator,
            **bounds,
            max_iter=run.choice.queries,
            p_init=_square_share(run.clean),
            nb_restarts=1,
            verbose=False,
        ),
    }
    if run.classes < 3:
        # The ratio is over the first and the third largest logit.
        del parts["apgd-dlr"]
    made = run.clean.clone()
    every = torch.arange(len(made), device=made.device)
    left = every[run.right(made, every)]
    for part in parts.values():
        if not len(left):
            break
        tried = run.bounded(part(), left)
        held = run.right(tried, left)
        made[left[~held]] = tried[~held]
        left = left[held]
    return Attacked(made, tuple(parts))


def _square_share(images: Tensor) -> float:
    """Return the share of the image that the first square covers: 0.8, or what fits.

    The library needs a place to move the square to, also on small and oblong images.
    """
    height, width = images.shape[2:]
    return min(0.8, (min(height, width) - 0.6) ** 2 / (height * width))


_METHODS: dict[str, Callable[[Run], Attacked]] = {
    "fgsm": _fgsm,
    "pgd": _pgd,
    "deepfool": _deepfool,
    "autoattack": _autoattack,
}
