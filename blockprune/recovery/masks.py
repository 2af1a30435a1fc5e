"""Which positions of a gap count: the mask among a model's arguments that belongs to its sequence.

An encoder-decoder takes two masks, `attention_mask` and `decoder_attention_mask`, and a decoder
that attends to something else takes an `encoder_attention_mask`. Which one belongs to a stream is
found by trial: the arguments whose names begin alike are given without their last position, and the
stream of their own sequence gets shorter by one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor

from blockprune.errors import RecoveryError, raise_if_out_of_memory
from blockprune.recovery.data import MaskFunction
from blockprune.tracing import Call, tensors_in

__all__ = ["NOTHING_COUNTS", "Masks"]

_MASK = "attention_mask"
NOTHING_COUNTS = "no position counts: mask_fn, or the attention mask, gives all of them weight 0."


class Masks:
    """The masks of a model.

    Args:
        signature: of its forward.
        mask_fn: see `recover`; it goes before all arguments.

    Attributes:
        mask_fn: the same.
    """

    def __init__(self, signature: inspect.Signature, mask_fn: MaskFunction | None) -> None:
        self._signature, self.mask_fn = signature, mask_fn
        names = list(signature.parameters)
        prefixes = {name.removesuffix(_MASK) for name in names if name.endswith(_MASK)} - {""}
        # Those with something else than a mask: a sequence of their own.
        self._prefixes = [
            prefix
            for prefix in prefixes
            if any(name.startswith(prefix) and not name.endswith(_MASK) for name in names)
        ]

    def name_for(self, call: Call, run: Callable[[Call], Tensor]) -> str | None:
        """Return the name of the argument that masks a stream; None if it is of no sequence known.

        Args:
            call: arguments of the model.
            run: returns the stream for arguments.
        """
        if self.mask_fn is not None or not self._prefixes:
            return _MASK
        stream = run(call)
        for prefix in (*self._prefixes, ""):
            shorter = self._shortened(call, prefix, stream)
            if shorter is None:
                continue
            try:
                length = run(shorter).shape[1]
            except (RuntimeError, ValueError, IndexError) as error:
                raise_if_out_of_memory(error)
                continue  # It needs what it was given.
            if length == stream.shape[1] - 1:
                return prefix + _MASK
        return None

    def of(self, call: Call, name: str | None) -> Tensor | None:
        """Return the weight of each position, where a user or the call has one.

        Raises:
            RecoveryError: what the user's function returns is none.
        """
        if self.mask_fn is None:
            found = self._signature.bind(*call.args, **call.kwargs).arguments
            mask = None if name is None else found.get(name, call.kwargs.get(name))
            return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        mask = self.mask_fn(call)
        samples = {len(tensor) for tensor in tensors_in((call.args, call.kwargs)) if tensor.dim()}
        if not isinstance(mask, Tensor) or mask.dim() != 2 or len(mask) not in samples:
            what = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(type(mask))
            raise RecoveryError(
                "mask_fn is given the call of the model (call.args, call.kwargs) and returns a "
                f"tensor (samples, positions) of weights, not {what}. For example: "
                "lambda call: call.kwargs['input_ids'] != 0."
            )
        if mask.is_complex() or not bool((mask >= 0).all()):
            raise RecoveryError(
                "mask_fn returns weights of positions, which are numbers of at least 0; these are "
                f"{mask.dtype}, and some are negative or no numbers."
            )
        return mask

    def _shortened(self, call: Call, prefix: str, stream: Tensor) -> Call | None:
        """Return a call whose arguments of one prefix lack a position; None if there are none."""
        if stream.dim() != 3 or stream.shape[1] < 2:
            return None
        others = tuple(other for other in self._prefixes if other != prefix)
        bound = self._signature.bind(*call.args, **call.kwargs)
        changed = False
        for name, value in bound.arguments.items():
            # Labels are targets: they do not make a sequence longer or shorter, nor count here.
            is_own = name.startswith(prefix) and not name.startswith(others) and name != "labels"
            if is_own and isinstance(value, Tensor) and value.shape[:2] == stream.shape[:2]:
                bound.arguments[name] = value[:, :-1]
                changed = True
        return Call(bound.args, bound.kwargs) if changed else None
