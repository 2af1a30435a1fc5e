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
    (r"^asked for by leaf_modules", "Leave it out of leaf_modules to have it looked into."),
    (
        r"^called with different constant",
        "Call it with the same constants at every place: use one module for each constant, with "
        "the constant as an attribute.",
    ),
    (
        r"^its graph does not do what it does",
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
        r"in train mode than in eval mode",
        "Move what follows self.training into a module of its own, or build the model without that "
        "part (an auxiliary head, for instance).",
    ),
    (
        r"grad or autocast mode",
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
        r"sets the attribute|item assignment",
        "Make a new value in place of writing into this one: torch.where or torch.cat for items, a "
        f"new output object for attributes. Otherwise {_OWN_MODULE}.",
    ),
    (
        r"random generator",
        "Draw with torch, such as torch.rand. Or name the module inside that draws in "
        "leaf_modules: what is around it is then looked into.",
    ),
    (
        r"which a graph cannot hold",
        "Return a tuple, a plain dictionary or a dataclass in its place.",
    ),
    (
        r"control flow",
        "Write the condition on an attribute of the module, or on an argument that is no tensor, "
        "in place of the value or size of a tensor. Or pass example_inputs (--input-shape) that "
        f"take a way without it. Otherwise {_OWN_MODULE}.",
    ),
    (
        r"iterated|iterable|'len' is not supported|argument after \*",
        "Take the number of steps, or of sizes, from the module in place of the tensor: `for i in "
        "range(self.n)`, `a, b, c = x.shape`. Where it loops over what another module of this list "
        f"returns, begin with that one. Otherwise {_OWN_MODULE}.",
    ),
    (
        r"integer|\bint\(\)|\bfloat\(\)|real number|indices must be",
        "Take the number from an attribute of the module, in place of the value or size of a "
        f"tensor. Otherwise {_OWN_MODULE}.",
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
