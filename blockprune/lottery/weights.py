"""Weights policies: what a ticket's weights and schedule start from.

=================  ======================  ======================  =========================
policy             weights                 schedule                epochs trained of ``n``
=================  ======================  ======================  =========================
``rewind``         the dense ones of       of step ``k`` on        ``n - k``
                   step ``k``
``learning-rate``  the dense final ones    of step ``k`` on        ``n - k``
``reinit``         new, from a seed        from its beginning      ``n``
``finetune``       the dense final ones    a constant small rate   as many as asked for
=================  ======================  ======================  =========================

The optimiser starts anew, unless it is carried over. Weights are those that training moved, not
their averages. A ticket holds a part of the dense model's weights under the dense model's names,
so a state of the dense model is cut down to it by name.

Sources: Frankle and Carbin, "The lottery ticket hypothesis", 2019, and Frankle et al., "Linear mode
connectivity and the lottery ticket hypothesis", 2020 (rewind); Renda et al., "Comparing rewinding
and fine-tuning in neural network pruning", 2020 (learning-rate, finetune); Liu et al., "Rethinking
the value of network pruning", 2019 (reinit).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, get_args

from torch import Tensor, nn

from blockprune.errors import CheckpointError, close_names
from blockprune.lottery.recipe import Recipe
from blockprune.lottery.record import Weights
from blockprune.lottery.state import TrainingState, summary
from blockprune.lottery.steps import Step
from blockprune.randomness import preserved_rng, seed_rng
from blockprune.surgery.record import record_of, translated

__all__ = ["Start", "finetuning", "fitted", "reinitialised", "start_of"]


class Start(NamedTuple):
    """What `train` needs: ``train(ticket, data, start.recipe, start=start.state)``."""

    state: TrainingState
    recipe: Recipe


def start_of(
    policy: Weights,
    ticket: nn.Module,
    *,
    recipe: Recipe,
    dense_state_at: Callable[[Step], TrainingState] | None = None,
    dense_final: TrainingState | None = None,
    rewound_to: Step | None = None,
    seed: int | None = None,
    fresh: TrainingState | None = None,
    carry_optimizer: bool = False,
    finetune_epochs: int | None = None,
    finetune_lr: float | None = None,
) -> Start:
    """Return the state and the recipe that a policy trains a ticket from; nothing is changed.

    Args:
        policy: "rewind", "learning-rate", "reinit" or "finetune".
        ticket: cut from the dense model; only its names and shapes matter, but to a "reinit"
            without `fresh`.
        recipe: that trained the dense model.
        dense_state_at: returns the dense model's state of a moment; for "rewind".
        dense_final: the dense model's state at the end; for "learning-rate" and "finetune".
        rewound_to: the moment ``k``; for "rewind" and "learning-rate".
        seed: of the new weights; for "reinit" without `fresh`.
        fresh: the state of a dense model built anew, to take the new weights from; right whatever
            initialisation the model's constructor applies (see `reinitialised`).
        carry_optimizer: carry over the velocities, and the averages where the recipe has some,
            that the state the weights come from holds for what is left of the model.
        finetune_epochs: for "finetune".
        finetune_lr: the constant learning rate; for "finetune".

    Raises:
        CheckpointError: an unknown policy; one without what it needs, or with what it has no use
            for; a state that does not fit the ticket, with the names and shapes.
        pydantic.ValidationError: `finetune_epochs` or `finetune_lr` is out of range.

    Example:
        >>> import torch, blockprune
        >>> from blockprune.lottery.recipe import Recipe
        >>> from blockprune.lottery.state import TrainingState
        >>> from blockprune.lottery.weights import start_of
        >>> from blockprune.models import resnet20
        >>> dense = resnet20()
        >>> ticket = blockprune.remove_blocks(dense, ["layer1.1"], torch.rand(1, 3, 32, 32))
        >>> final, recipe = TrainingState.of(dense), Recipe(epochs=10, lr=0.1)
        >>> start = start_of(
        ...     "finetune", ticket, recipe=recipe, dense_final=final,
        ...     finetune_epochs=2, finetune_lr=0.001,
        ... )
        >>> start.recipe.epochs, len(final.weights) - len(start.state.weights)
        (2, 14)
    """
    _check_policy(
        policy,
        {
            "dense_state_at": dense_state_at,
            "dense_final": dense_final,
            "rewound_to": rewound_to,
            "finetune_epochs": finetune_epochs,
            "finetune_lr": finetune_lr,
        },
    )
    if policy == "reinit":
        if carry_optimizer:
            raise CheckpointError('"reinit" has no optimiser state to carry over.')
        return Start(_new(ticket, seed, fresh), recipe)
    if policy == "rewind":
        assert dense_state_at is not None
        assert rewound_to is not None
        state = fitted(dense_state_at(rewound_to), ticket)
    else:
        assert dense_final is not None
        state = replace(fitted(dense_final, ticket), step=rewound_to or Step())
    if policy == "finetune":
        assert finetune_epochs is not None
        assert finetune_lr is not None
        recipe = finetuning(recipe, epochs=finetune_epochs, lr=finetune_lr)
    return Start(state if carry_optimizer else replace(state, momentum={}, ema=None), recipe)


def finetuning(recipe: Recipe, *, epochs: int, lr: float) -> Recipe:
    """Return `recipe` with a constant rate for so many epochs, and all else as it is.

    Raises:
        pydantic.ValidationError: `epochs` or `lr` is out of range.

    Example:
        >>> from blockprune.lottery.recipe import PAPER_RECIPE
        >>> from blockprune.lottery.weights import finetuning
        >>> short = finetuning(PAPER_RECIPE, epochs=40, lr=0.001)
        >>> short.learning_rate(0, 391), short.learning_rate(40 * 391 - 1, 391)
        (0.001, 0.001)
    """
    constant: dict[str, Any] = {
        "schedule": "milestones",
        "milestones": (),
        "warmup_epochs": 0.0,
        "final_lr": 0.0,
    }
    return Recipe(**{**recipe.model_dump(), **constant, "epochs": epochs, "lr": lr})


def fitted(state: TrainingState, ticket: nn.Module) -> TrainingState:
    """Return the part of a dense model's state that belongs to a ticket, under its names.

    Args:
        state: of the dense model that the ticket was cut from.
        ticket: any number of blocks removed, also none.

    Raises:
        CheckpointError: the ticket has weights that the state lacks, or of other shapes or types.

    Example:
        >>> import torch, blockprune
        >>> from blockprune.lottery.state import TrainingState
        >>> from blockprune.lottery.weights import fitted
        >>> from blockprune.models import resnet20
        >>> dense = resnet20()
        >>> ticket = blockprune.remove_blocks(dense, ["layer1.1"], torch.rand(1, 3, 32, 32))
        >>> part = fitted(TrainingState.of(dense), ticket)
        >>> part.weights.keys() == ticket.state_dict().keys()
        True
    """
    record = record_of(ticket)
    # Layers of a list move up when one before them goes.
    renamed = record.renamed if record is not None else {}
    dense_names = {name: translated(name, renamed) for name in ticket.state_dict()}

    def part(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: values[dense] for name, dense in dense_names.items() if dense in values}

    found = TrainingState(
        step=state.step,
        weights=part(state.weights),
        momentum=part(state.momentum),
        ema=None if state.ema is None else part(state.ema),
    )
    problems = found.misfits(ticket)
    if problems:
        raise CheckpointError(f"the state does not fit the ticket: {summary(problems)}.")
    return found


def reinitialised(model: nn.Module, seed: int) -> TrainingState:
    """Return a state of `model` with new weights, drawn by each module's own `reset_parameters`.

    That is torch's default for the module, whatever the model's constructor does to the weights
    afterwards; where it does something, take the state of a model built anew instead. Buffers of
    modules that have no such method stay as they are.

    Raises:
        CheckpointError: a module holds parameters and has no `reset_parameters`.

    Example:
        >>> import torch
        >>> from blockprune.lottery.weights import reinitialised
        >>> layer = torch.nn.Linear(3, 2)
        >>> first, second = reinitialised(layer, seed=1), reinitialised(layer, seed=1)
        >>> first.weights["weight"].equal(second.weights["weight"])
        True
        >>> first.weights["weight"].equal(layer.weight)
        False
    """
    twin = copy.deepcopy(model)
    lacking = [
        f"{name or 'the model itself'} ({type(module).__name__})"
        for name, module in twin.named_modules()
        if _reset_of(module) is None and any(True for _ in module.parameters(recurse=False))
    ]
    if lacking:
        raise CheckpointError(
            f"these modules hold parameters and have no reset_parameters: {summary(lacking)}. "
            "Build the dense model anew and give its state as fresh."
        )
    with preserved_rng():
        seed_rng(seed)
        # Parts before wholes, as constructors do it: a whole may set weights of its parts.
        for module in reversed(list(twin.modules())):
            reset = _reset_of(module)
            if reset is not None:
                reset()
    return TrainingState.of(twin)


def _reset_of(module: nn.Module) -> Callable[[], object] | None:
    # torch's own MultiheadAttention has the method under the second name.
    for name in ("reset_parameters", "_reset_parameters"):
        method = getattr(module, name, None)
        if callable(method):
            return method  # type: ignore[no-any-return]
    return None


def _new(ticket: nn.Module, seed: int | None, fresh: TrainingState | None) -> TrainingState:
    if fresh is not None:
        state = fitted(fresh, ticket)
        return replace(state, step=Step(), momentum={}, ema=None)
    if seed is None:
        raise CheckpointError('"reinit" needs a seed, or fresh: the state of a new dense model.')
    return reinitialised(ticket, seed)


_NEEDS: dict[str, tuple[str, ...]] = {
    "rewind": ("dense_state_at", "rewound_to"),
    "learning-rate": ("dense_final", "rewound_to"),
    "reinit": (),
    "finetune": ("dense_final", "finetune_epochs", "finetune_lr"),
}


def _check_policy(policy: str, given: Mapping[str, object]) -> None:
    if policy not in _NEEDS:
        raise CheckpointError(
            f"there is no weights policy {policy!r}; there are {', '.join(get_args(Weights))}."
            f"{close_names(policy, _NEEDS)}"
        )
    missing = [name for name in _NEEDS[policy] if given[name] is None]
    if missing:
        raise CheckpointError(f'"{policy}" needs {", ".join(missing)}.')
    # The states of the dense model may be given to every policy; a choice that a policy does not
    # follow would mislead.
    choices = ("rewound_to", "finetune_epochs", "finetune_lr")
    useless = [name for name in choices if given[name] is not None and name not in _NEEDS[policy]]
    if useless:
        raise CheckpointError(f'"{policy}" has no use for {", ".join(useless)}.')
