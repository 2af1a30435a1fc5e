"""`recover`: a ticket that works again, from its dense model and a few samples."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from blockprune.batches import device_of, first_inputs
from blockprune.blocks import BlockAnalysis
from blockprune.errors import RecoveryError, VerificationError, memory_errors
from blockprune.losses import LossFunction
from blockprune.recovery.data import Batches, MaskFunction
from blockprune.recovery.distill import Run, distilled
from blockprune.recovery.distillation import Distillation, OnProgress
from blockprune.recovery.fitting import FAMILIES
from blockprune.recovery.folding import tensors_of, write_into
from blockprune.recovery.masks import Masks
from blockprune.recovery.methods import check_method, check_options
from blockprune.recovery.networks import networks_of
from blockprune.recovery.origin import analysed, record_of_ticket, warn_of_another
from blockprune.recovery.passes import Inspected
from blockprune.recovery.running_statistics import recalibrate_norms
from blockprune.recovery.work import Work
from blockprune.surgery import (
    GapRecord,
    RecoveryRecord,
    TicketRecord,
    attach,
    cuts_of,
    translated,
)
from blockprune.tracing import Call, copy_model, isolated, structural_copy, tensors_in

__all__ = ["recover", "recovery_of"]


def recovery_of(ticket: nn.Module) -> RecoveryRecord | None:
    """Return how a ticket was recovered, None if it was not.

    Raises:
        RecoveryError: the module is not a ticket.
    """
    return record_of_ticket(ticket).recovery


def recover(
    ticket: nn.Module,
    dense_model: nn.Module,
    data: Any,
    method: str = "refit",
    *,
    ridge: float | None = None,
    max_batches: int | None = None,
    mask_fn: MaskFunction | None = None,
    in_place: bool = False,
    recipe: Distillation | None = None,
    loss_fn: LossFunction | None = None,
    accelerator: Accelerator | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    on_progress: OnProgress | None = None,
) -> nn.Module:
    """Return the ticket with weights that make up for the blocks it has lost.

    A cut turns the stream behind a run of removed blocks into the stream in front of it. The last
    linear operation that adds into that stream (a convolution, `nn.Linear`, the projection of an
    attention; a normalisation may stand behind it) is fitted, so that the stream becomes the one
    that the dense model has behind the run::

        min over P  sum over samples and positions  |u + A (Z P - Z P0) - h|^2
                    + ridge * mean(diag Z^T Z) * |P - P0|^2

    with h the stream of the dense model, u that of the ticket, Z what the operation reads, P0 its
    weight and A what lies between it and the stream. Gaps are fitted in order of execution, each on
    the stream as the earlier ones left it. No label is needed; no layer is added; names, shapes and
    the number of parameters stay. Behind a layer or RMS norm (post-norm layers), A holds the norm's
    statistics; the norm's weight and bias are fitted as well, and what the stream becomes is
    measured. A gap that no linear operation reaches is left as it is.

    The method "distill" trains all weights instead, towards the outputs of the dense model and its
    stream; after "refit" it starts close to them.

    Args:
        ticket: from `prune`, `remove_blocks` or `load_ticket`.
        dense_model: what it was cut from, trained; left untouched.
        data: batches of inputs such as the network will see, as for `score_blocks`; labels are not
            looked at. They are read several times; those of a generator are kept.
        method: "refit" fits the whole weight; "map" a square map of its outputs (ReplaceMe),
            "scale" one number (Prune&Comp); "moments" refits, and then gives each output the mean
            and the variance of what it was fitted to, which least squares does not reach; "norms"
            takes the running statistics of batch normalisations again, and fits nothing; "distill"
            trains, see `Distillation`.
        ridge: how strongly a weight is held to what it is; 0 is plain least squares. None: the
            best of a few on every fourth batch, which is left out of the fit for that. Let batches
            differ as the data do (other photos, other texts), or a small ridge looks too good.
        max_batches: at most so many batches are read; None: all.
        mask_fn: is given the call of the model, with `args` and `kwargs`, and returns the weight of
            each position, a tensor (samples, positions). None: the argument
            `attention_mask`, where there is one of that shape; for the decoder of an
            encoder-decoder `decoder_attention_mask`.
        in_place: change the ticket itself, which saves the memory of a copy.
        recipe: of "distill".
        loss_fn: of the labels, where the recipe gives them a weight, called with the outputs and
            the targets; None: the loss that the model returns, else cross entropy.
        accelerator: device and mixed precision of "distill"; None: those of the model.
        checkpoint: file that "distill" writes now and then, and goes on from if it exists: the
            same weights come out, on a CPU bit for bit, if the data come in the same order.
        on_progress: called after each gap, or each step of "distill".

    Returns:
        A copy of the ticket, or the ticket, in the mode that it was in. `recovery_of` has what was
        done for each gap.

    Raises:
        RecoveryError: the ticket is none, or not of this dense model; too few samples; activations
            that are not finite.
        DataError: the data are empty, or no arguments of the model.
        CheckpointError: the checkpoint is damaged, or of something else.
        CriterionError: the recipe gives labels a weight, and there are none, or loss_fn fails.
        TrainingDivergedError: the loss of "distill" is not finite.
        MissingExtraError: the recipe asks for adapters, and peft is not installed.
        TraceError: the dense model does not run on them.

    Example:
        >>> import torch, blockprune
        >>> from blockprune.models import resnet20
        >>> dense, images = resnet20(), torch.rand(64, 3, 32, 32)
        >>> ticket = blockprune.remove_blocks(dense, ["layer2.1"], images[:2])
        >>> ticket = blockprune.recover(ticket, dense, images)
        >>> [gap] = blockprune.recovery_of(ticket).gaps
        >>> gap.weights, gap.residual_after < gap.residual_before
        (('layer2.0.conv2.weight',), True)

    Source:
        "ReplaceMe: Network Simplification via Depth Pruning and Transformer Block Linearization",
        2025, for "map"; "refit" fits every input of the operation instead.
    """
    check_method(method)
    if ridge is not None and not ridge >= 0:
        raise RecoveryError(f"a ridge is a number of at least 0, not {ridge!r}.")
    check_options(
        method,
        {"ridge": ridge, "mask_fn": mask_fn, "recipe": recipe, "loss_fn": loss_fn}
        | {"accelerator": accelerator, "checkpoint": checkpoint},
    )
    record = record_of_ticket(ticket)
    warn_of_another(ticket, dense_model, record)
    example, data = first_inputs(dense_model, data)
    batches = Batches(dense_model, data, max_batches)
    masks = Masks(inspect.signature(dense_model.forward), mask_fn)
    with memory_errors(), _plainly(dense_model):
        result = ticket if in_place else copy_model(ticket)
        analysis = analysed(dense_model, record, example)
        if method == "norms":
            _renormalise(result, batches)
            gaps: tuple[GapRecord, ...] = ()
        else:
            is_trained = method == "distill"
            networks = networks_of(
                dense_model,
                analysis,
                cuts_of(analysis, record.plan.remove, record.plan.granularity),
                _by_dense_names(ticket, record),
                everywhere=is_trained,
            )
            if is_trained:
                gaps = distilled(
                    networks,
                    _trained(ticket, record),
                    example,
                    batches,
                    masks,
                    recipe or Distillation(),
                    Run(loss_fn, accelerator, checkpoint, on_progress),
                )
            else:
                work = Work(networks, batches, masks)
                gaps = work.all_recovered(example, FAMILIES[method], ridge, on_progress)
            _fill(result, networks.cut, record, example)
            gaps = _by_plan_names(gaps, analysis, record)
    recovery = RecoveryRecord(
        method=method, samples=batches.samples, gaps=gaps, before=record.recovery
    )
    attach(result, dataclasses.replace(record, recovery=recovery))
    return result


@contextlib.contextmanager
def _plainly(model: nn.Module) -> Iterator[None]:
    """Run a block in the precision of the model, and so that gradients can be taken in it."""
    device = device_of(model)
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        yield


def _by_plan_names(
    gaps: tuple[GapRecord, ...], analysis: BlockAnalysis, record: TicketRecord
) -> tuple[GapRecord, ...]:
    """Return the gaps with their blocks as the plan names them: layers, not their branches."""
    names = {
        cut.name: block
        for block in record.plan.remove
        for cut in cuts_of(analysis, [block], record.plan.granularity)
    }
    return tuple(
        gap.model_copy(
            update={"blocks": tuple(dict.fromkeys(names.get(name, name) for name in gap.blocks))}
        )
        for gap in gaps
    )


def _renormalise(ticket: nn.Module, batches: Batches) -> None:
    """Take the running statistics again, with a copy that has no hooks of the user.

    Raises:
        RecoveryError: there are none.
    """
    if not any("running_mean" in name for name, _ in ticket.named_buffers()):
        raise RecoveryError(
            "'norms' takes running statistics of batch normalisations again, and the ticket has "
            "none. 'refit' needs none."
        )
    copied = structural_copy(ticket)
    recalibrate_norms(copied, batches.inputs())
    found = tensors_of(copied)
    renewed = {name: found[name] for name, _ in ticket.named_buffers()}
    if not all(bool(torch.isfinite(value).all()) for value in renewed.values()):
        raise RecoveryError(
            "running statistics of these data are not finite. Leave out the samples that cause it."
        )
    write_into(dict(ticket.named_buffers()), renewed)


def _trained(ticket: nn.Module, record: TicketRecord) -> frozenset[str]:
    """Return the names, in the dense model, of the parameters that require gradients."""
    return frozenset(
        translated(name, record.renamed)
        for name, parameter in ticket.named_parameters(remove_duplicate=False)
        if parameter.requires_grad
    )


def _fill(ticket: nn.Module, cut: Inspected, record: TicketRecord, example: Call) -> None:
    """Write the weights of the cut model into a ticket, and prove that it then computes the same.

    Raises:
        VerificationError: it does not; it is as it was.
    """
    own, found = _by_dense_names(ticket, record), tensors_of(cut.model)
    changed = {name: found[name] for name in own if not torch.equal(found[name], own[name])}
    before = {name: own[name].detach().clone() for name in changed}
    write_into(own, changed)
    outputs = _outputs(cut.model, example), _outputs(structural_copy(ticket), example)
    for one, other in zip(*outputs, strict=True):
        if not one.is_floating_point() or not one.numel():
            continue
        room = torch.finfo(one.dtype).eps ** 0.5
        if not torch.allclose(other, one, rtol=room, atol=room * float(one.abs().max())):
            write_into(own, before)
            raise VerificationError(
                "with the new weights the ticket does not compute what the cut model does; its "
                "weights are as they were."
            )


def _by_dense_names(ticket: nn.Module, record: TicketRecord) -> dict[str, Tensor]:
    """Return the parameters and buffers of a ticket, by the names that the dense model has."""
    return {translated(name, record.renamed): tensor for name, tensor in tensors_of(ticket).items()}


def _outputs(model: nn.Module, call: Call) -> list[Tensor]:
    given = call.map(lambda tensor: tensor.clone())
    with isolated(), torch.no_grad():
        return list(tensors_in(model.eval()(*given.args, **given.kwargs)))
