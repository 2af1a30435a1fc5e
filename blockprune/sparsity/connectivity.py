"""Linear mode connectivity: what the error does on the straight line between two trained networks.

    instability = max over alpha of error((1 - alpha) W + alpha W') - (error(W) + error(W')) / 2

Two trainings that share their beginning end in one basin where this is about 0 (below two points
of error in the paper). Running statistics of batch normalisation are those of neither network in
between, so they are taken anew at each point, and the ends are left as they were trained.

Source: Frankle et al., "Linear mode connectivity and the lottery ticket hypothesis", 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blockprune.errors import CheckpointError
from blockprune.randomness import preserved_rng

__all__ = ["Connectivity", "connectivity", "interpolated"]

POINTS = 30


@dataclass(frozen=True)
class Connectivity:
    """Errors on the line between two networks.

    Attributes:
        alphas: where, from 0 (the first network) to 1 (the second).
        errors: there, in the unit of what evaluated them.
    """

    alphas: tuple[float, ...]
    errors: tuple[float, ...]

    @property
    def instability(self) -> float:
        """The largest error minus the mean of the two ends, in the unit of `errors`."""
        return max(self.errors) - (self.errors[0] + self.errors[-1]) / 2


def connectivity(
    model: nn.Module,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    evaluate: Callable[[nn.Module], float],
    *,
    alphas: int | Sequence[float] = POINTS,
    recalibrate: Callable[[nn.Module], object] | None = None,
) -> Connectivity:
    """Return the errors on the line between two states of `model`, which is as before afterwards.

    Args:
        model: given the weights of each point for a while.
        a: the first ``state_dict``.
        b: the second one.
        evaluate: returns the error of a model, such as 1 - accuracy.
        alphas: how many points, evenly spaced with both ends; or the points, from 0 to 1.
        recalibrate: is given the model at each point between the ends, to take the running
            statistics of its batch normalisations anew: `recalibrate_norms` with some training
            batches. None: they are interpolated like weights.

    Raises:
        CheckpointError: the states do not fit one another or the model; `alphas` does not go
            from 0 to 1; an error is not a finite number.

    Example:
        >>> import torch
        >>> from blockprune.sparsity import connectivity
        >>> layer = torch.nn.Linear(1, 1, bias=False)
        >>> a, b = ({"weight": torch.tensor([[v]])} for v in (-1.0, 1.0))
        >>> found = connectivity(layer, a, b, lambda m: 1 - m.weight.item() ** 2, alphas=3)
        >>> found.errors, found.instability
        ((0.0, 1.0, 0.0), 1.0)
    """
    points = _points(alphas)
    own = {name: _copy(value) for name, value in model.state_dict().items()}
    # Of the model, and of the other state: two that agree with one another may fit neither.
    _check_fit(a, own, "the first state", type(model).__name__)
    _check_fit(b, own, "the second state", type(model).__name__)
    modes = {module: module.training for module in model.modules()}
    errors = []
    try:
        with preserved_rng():
            for alpha in points:
                model.load_state_dict(interpolated(a, b, alpha))
                if recalibrate is not None and 0 < alpha < 1:
                    recalibrate(model)
                errors.append(_error(evaluate(model), alpha))
    finally:
        model.load_state_dict(own)
        for module, mode in modes.items():
            module.training = mode
    return Connectivity(points, tuple(errors))


def interpolated(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """Return ``(1 - alpha) a + alpha b`` of two states; new tensors, of their types.

    Whole numbers, such as counts of batches, are those of `a` between the ends; the ends are exact.

    Args:
        a: the state at 0.
        b: the state at 1.
        alpha: in [0, 1].

    Raises:
        CheckpointError: names, shapes or types differ, or alpha is not in [0, 1].

    Example:
        >>> import torch
        >>> from blockprune.sparsity import interpolated
        >>> interpolated({"w": torch.tensor([0.0])}, {"w": torch.tensor([4.0])}, 0.25)["w"]
        tensor([1.])
    """
    if not 0 <= alpha <= 1:
        raise CheckpointError(f"alpha is in [0, 1], not {alpha!r}.")
    _check_fit(b, a, "the second state", "the first")
    if alpha in (0, 1):
        return {name: _copy(value) for name, value in (b if alpha else a).items()}
    return {name: _between(value, b[name], alpha) for name, value in a.items()}


def _points(alphas: int | Sequence[float]) -> tuple[float, ...]:
    if isinstance(alphas, int):
        if alphas < 2:
            raise CheckpointError(
                f"a line has at least 2 points, its ends; {alphas} were asked for."
            )
        return tuple(i / (alphas - 1) for i in range(alphas))
    points = tuple(map(float, alphas))
    if len(points) < 2 or (points[0], points[-1]) != (0.0, 1.0) or list(points) != sorted(points):
        raise CheckpointError(f"alphas go from 0 to 1 in order, ends included, not {points}.")
    return points


def _between(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    if not (a.is_floating_point() or a.is_complex()):
        return a.detach().clone()
    # In 16 bits the sum would be rounded twice.
    wide = torch.promote_types(a.dtype, torch.float32)
    between: Tensor = torch.lerp(a.detach().to(wide), b.detach().to(a.device, wide), alpha)
    return between.to(a.dtype)


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _check_fit(found: Mapping[str, Any], wanted: Mapping[str, Any], what: str, to: str) -> None:
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} has no place" for name in found if name not in wanted]
    for name in found.keys() & wanted.keys():
        ours, theirs = found[name], wanted[name]
        if not isinstance(ours, Tensor):
            problems.append(f"{name} is a {type(ours).__name__}, and no tensor")
        elif (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            problems.append(
                f"{name} is {tuple(ours.shape)} {ours.dtype} where {tuple(theirs.shape)} "
                f"{theirs.dtype} is needed"
            )
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(f"{what} does not fit {to}: {'; '.join(sorted(problems)[:3])}{more}.")


def _error(value: float, alpha: float) -> float:
    if not isinstance(value, int | float | Tensor) or not math.isfinite(float(value)):
        raise CheckpointError(f"evaluate returned {value!r} at alpha {alpha:.3g}, not one number.")
    return float(value)
