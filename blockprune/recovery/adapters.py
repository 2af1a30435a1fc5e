"""Low-rank adapters (LoRA): put on linear layers by peft, and merged at the end."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from blockprune.errors import MissingExtraError, RecoveryError
from blockprune.recovery.passes import Inspected
from blockprune.recovery.reach import watched
from blockprune.tracing import Call

__all__ = ["add_adapters", "layers_in", "merge_adapters"]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def layers_in(network: Inspected, call: Call, trained: Collection[str]) -> list[str]:
    """Return the names of the layers that can have an adapter.

    These are linear operations that are called as modules, once in a pass. Their weights may be
    trained, and nothing else reads them. Convolutions with groups are none of them.
    """
    seen = watched(network, call)
    candidates: dict[str, nn.Module] = {}
    for operation in seen.calls:
        name, _, attribute = operation.weight.rpartition(".")
        module = network.model.get_submodule(name)
        is_known = isinstance(module, _LAYERS) or operation.layout == "outputs last"
        is_alone = operation.weight in trained and seen.uses[operation.weight] == 1
        if attribute == "weight" and operation.groups == 1 and is_known and is_alone:
            candidates[name] = module
    called: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name, module in candidates.items()
    ]
    try:
        network.values(call)
    finally:
        for hook in hooks:
            hook.remove()
    return called


def add_adapters(model: nn.Module, rank: int, layers: Sequence[str]) -> None:
    """Put adapters on layers of `model`; these alone require gradients afterwards.

    Args:
        model: changed in place.
        rank: of each adapter.
        layers: qualified names of linear and convolution layers.

    Raises:
        MissingExtraError: peft is not installed.
        RecoveryError: there is no layer, or one that peft has no adapter for.
    """
    peft = _peft()
    if not layers:
        raise RecoveryError(
            "lora_rank asks for adapters of linear layers, and the model calls none. Leave it out "
            "to train all weights."
        )
    # A list would be taken for endings of names.
    pattern = "|".join(map(re.escape, layers))
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=pattern)
    try:
        with warnings.catch_warnings():
            # It says that it does what is right for a layer whose weight has the inputs first.
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            peft.inject_adapter_in_model(config, model)
    except ValueError as error:
        raise RecoveryError(f"peft cannot put adapters of rank {rank} here: {error}") from error


def merge_adapters(model: nn.Module) -> None:
    """Add the adapters of `model` to the weights that they stand beside, and take them away."""
    _peft()
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [item for item in model.named_modules() if isinstance(item[1], BaseTunerLayer)]
    for name, layer in adapted:
        layer.merge(safe_merge=True)
        model.set_submodule(name, layer.get_base_layer())


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError(
            "lora_rank needs peft, which is not installed: pip install 'blockprune[lora]'"
        ) from error
    return peft
