"""Moments of a training as a spec names them: "init", "25%", an epoch, a step."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated

from pydantic import BeforeValidator, ValidationError

from blockprune.errors import SpecError
from blockprune.lottery.steps import Step

__all__ = ["Moment", "MomentOrSame", "step_at"]


def step_at(moment: str | Step, epochs: int, per_epoch: int) -> Step:
    """Return the step that a moment is, in a training of so many epochs of so many batches.

    Raises:
        SpecError: it lies behind the end.

    Example:
        >>> from blockprune.lottery.moments import step_at
        >>> step_at("25%", epochs=20, per_epoch=12), step_at("12.5%", epochs=20, per_epoch=12)
        (Step(epoch=5, iteration=0), Step(epoch=2, iteration=6))
    """
    total = epochs * per_epoch
    if isinstance(moment, Step):
        done = moment.iterations(per_epoch)
    else:
        share = {"init": 0.0, "final": 1.0}.get(moment, _share(moment))
        assert share is not None, moment
        done = round(share * total)
    if done > total:
        raise SpecError(
            f"{moment} lies behind the end of the training, {epochs} epochs of {per_epoch} "
            "iterations."
        )
    return Step.of_iterations(done, per_epoch)


def _moment(value: object) -> object:
    """Return a moment as text or step; refuse what is none in a sentence that lists what is."""
    if isinstance(value, Step) or (
        isinstance(value, str) and (value in ("init", "final") or _share(value) is not None)
    ):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        value = {"epoch": value}
    if isinstance(value, Mapping):
        with suppress(ValidationError):
            return Step.model_validate(value, strict=True)
    raise ValueError(
        f'{value!r} is no moment of training: give "init", "final", a share such as "25%", an '
        "epoch such as 10, or { epoch = 2, iteration = 50 }"
    )


def _moment_or_same(value: object) -> object:
    return value if value == "scored_at" else _moment(value)


def _share(text: str) -> float | None:
    """Return "25%" as 0.25, None where it is no share in [0, 1]."""
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        return None
    return share if text.endswith("%") and 0 <= share <= 1 else None


Moment = Annotated[str | Step, BeforeValidator(_moment)]
"""When: "init", "final", a share of the training such as "25%", an epoch, or a `Step`."""

MomentOrSame = Annotated[str | Step, BeforeValidator(_moment_or_same)]
