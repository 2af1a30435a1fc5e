"""From a model to graphs: regions, shapes, aliases and names. See `regions`."""

from __future__ import annotations

from blockprune.tracing.calls import Call, as_call, copy_of_state, refused
from blockprune.tracing.copying import (
    aliased_copy,
    copy_graph,
    copy_model,
    isolated,
    structural_copy,
)
from blockprune.tracing.facts import Facts, Place
from blockprune.tracing.guards import GUARDS
from blockprune.tracing.interpreting import CallInterpreter, bound_values
from blockprune.tracing.placing import Followed, assemble
from blockprune.tracing.regions import (
    COMPILED,
    NOT_EXECUTED,
    LeafModules,
    Region,
    TracedModel,
    trace_model,
)
from blockprune.tracing.state import surroundings_kept
from blockprune.tracing.values import (
    TensorFact,
    holds_tensor,
    map_tensors,
    storage_of,
    tensors_in,
)

__all__ = [
    "COMPILED",
    "GUARDS",
    "NOT_EXECUTED",
    "Call",
    "CallInterpreter",
    "Facts",
    "Followed",
    "LeafModules",
    "Place",
    "Region",
    "TensorFact",
    "TracedModel",
    "aliased_copy",
    "as_call",
    "assemble",
    "bound_values",
    "copy_graph",
    "copy_model",
    "copy_of_state",
    "holds_tensor",
    "isolated",
    "map_tensors",
    "refused",
    "storage_of",
    "structural_copy",
    "surroundings_kept",
    "tensors_in",
    "trace_model",
]
