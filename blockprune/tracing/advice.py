"""What would get a trace past a reason in `TracedModel.opaque`: one entry for each kind."""

from __future__ import annotations

import re

__all__ = ["advice"]

_OWN_MODULE = (
    "put these lines into a module of their own, which is then called as it is, and the code "
    "around it is looked into"
)

_ADVICE = (
    (
        r"^not executed by",
        "Pass example_inputs (--input-shape) that reach it, or build the model without it.",
    ),
    (r"^it was compiled", "Pass the module that it was made from, and compile the ticket."),
    (
        r"of which a graph knows nothing",
        "Hand the object on to a module of its own that uses it, which is then called as it is.",
    ),
    (
        r"more in its __call__",
        "Move what its __call__ does around super().__call__ into its forward.",
    ),
    (r"^asked for by leaf_modules", "Leave it out of leaf_modules to have it looked into."),
    (
        r"^called with different constant|^does something else at another place",
        "Call it with the same constants at every place: use one module for each constant, with "
        "the constant as an attribute.",
    ),
    (
        r"^replacing this module by its graph",
        "Return from its forward what the code around it collects from the modules inside, with "
        "hooks for instance.",
    ),
    (
        r"signature that cannot be bound",
        "Give it a forward in Python that names its parameters.",
    ),
    (
        r"required keyword-only argument",
        "Give that argument a default, or take it out from behind the * in the signature.",
    ),
    (
        r"in train mode than in eval mode|not called as often in every run",
        "Move what follows self.training, or the number of samples, into a module of its own, or "
        "build the model without that part (an auxiliary head, for instance).",
    ),
    (
        r"autograd\.Function|autocast mode|grad mode|grad or autocast state|"
        r"under (autocast|no grad)",
        "Use no_grad or autocast around the call of the model, not in the forward (requires_grad "
        "freezes weights as well). Where it has to stay, or is in a torch.autograd.Function, "
        f"{_OWN_MODULE}.",
    ),
    (
        r"neither an input, a parameter nor a buffer",
        "Register the tensor with register_buffer, pass it as an argument, or make it in the "
        "forward with a function of torch, such as torch.zeros.",
    ),
    (
        r"(sets|reads) the attribute|calls \w+ on a tensor",
        "Make a new value in place of changing this one: torch.where or torch.cat for items, "
        f"detach() for gradients. Otherwise {_OWN_MODULE}.",
    ),
    (
        r"random generator|^changes ",
        f"Draw with torch, such as torch.rand, and keep state in buffers. Otherwise {_OWN_MODULE}.",
    ),
    (
        r"which a graph cannot hold",
        "Pass it as an argument, or return a tuple, a plain dictionary or a dataclass in its "
        "place. A model that makes a cache does not with use_cache=False.",
    ),
    (
        r"reads numbers from a tensor|goes by how many numbers",
        "Write the condition on an attribute of the module, or on an argument that is no tensor, "
        "in place of the numbers in a tensor. Or pass example_inputs (--input-shape) that take a "
        f"way without it. Otherwise {_OWN_MODULE}.",
    ),
    (
        r"(goes by|reads) a size",
        "Take the number from an attribute of the module, in place of a tensor. "
        f"Otherwise {_OWN_MODULE}.",
    ),
    (
        r"goes by the device|type of a tensor as text|something else under",
        "Hand a dtype or device on (to torch.zeros, for instance) and write no condition on it, or "
        f"none but on an attribute of the module. Otherwise {_OWN_MODULE}.",
    ),
    (
        r"goes by the argument",
        "Keep that flag in an attribute of the module, in place of handing it on as an argument.",
    ),
    (
        r"weights are parametrized",
        "Call torch.nn.utils.parametrize.remove_parametrizations on it first.",
    ),
    (
        r"activation checkpointing",
        "Nothing is lost: the blocks inside are looked into one by one, and checkpointing stays.",
    ),
    (
        r"does not run on inputs",
        "Pass other example_inputs (--input-shape), or name it in leaf_modules.",
    ),
)

_FALLBACK = (
    "Write it with functions of torch on tensors only, pass example_inputs (--input-shape) that "
    f"take another way, or {_OWN_MODULE}. A module inside that causes it can be named in "
    "leaf_modules."
)


def advice(reason: str) -> str:
    """Return what would have a module looked into that was not, for this reason.

    Example:
        >>> advice("asked for by leaf_modules (Attention)")
        'Leave it out of leaf_modules to have it looked into.'
    """
    # The line of code that a reason ends with says anything.
    kind = reason.partition(" (at ")[0]
    return next((text for pattern, text in _ADVICE if re.search(pattern, kind)), _FALLBACK)
