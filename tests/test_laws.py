"""The laws of removal, on every net of the zoo and on random architectures.

the empty plan               = the dense model
the ticket                   = the dense model with the branches multiplied by zero
A, then B                    = {A, B}
the dense model              is untouched, bit for bit
parameters dropped           = block.params, the cost table
state_dict keys              are a strict subset, tensors equal
every kept parameter         is trained if the reference trains it
save, then load              = the ticket
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import blockprune
from blockprune.costs import block_costs
from blockprune.surgery.remnants import Dissolved
from tests import zoo
from tests.oracle import Hook, Tap, call, disagreements, flatten, outcome, trainable
from tests.strategies import Architecture, Net, architectures, truth
from tests.zoo import Entry

# Nets with something to remove; the others have no ticket.
RESIDUAL = [e for e in zoo.ENTRIES if e.branches]
every_net = pytest.mark.parametrize("entry", zoo.cases(RESIDUAL))
each_mode = pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])


# ---------------------------------------------------------------- helpers


@functools.cache
def _case(name: str) -> tuple[nn.Module, Any, blockprune.BlockAnalysis, dict[str, Tap | Hook]]:
    """The net, its example, its analysis, and what to zero for each block that was found.

    Shared between tests: none may change it, and `test_dense_model_is_untouched` shows
    that blockprune does not.
    """
    entry = zoo.BY_NAME[name]
    net, inputs = entry.build(), entry.example()
    analysis = blockprune.find_blocks(net, inputs)
    zeros = {n: z for n, z in entry.zeros.items() if n in analysis.names}
    # Branches without a fixed name come in execution order, as the blocks do.
    unnamed = [b.zero for b in entry.branches if b.name is None]
    strangers = [n for n in analysis.names if n not in zeros]
    zeros |= dict(zip(strangers, unnamed, strict=False))
    return net, inputs, analysis, zeros


@functools.cache
def _cut(name: str, names: tuple[str, ...]) -> nn.Module:
    """The verified ticket without the blocks `names`; shared, so not to be changed either."""
    net, inputs, _, _ = _case(name)
    return blockprune.remove_blocks(net, names, inputs)


@functools.cache
def _trains(name: str) -> bool:
    net, inputs, _, _ = _case(name)
    return trainable(net, inputs)


def _choices(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Each block alone, neighbours, and all of them."""
    chosen = [(name,) for name in names[:4]]
    if len(names) > 2:
        chosen.append((names[0], names[-1]))
    if len(names) > 1:
        chosen.append(tuple(names))
    return chosen


def _assert_same(problems: list[str], what: object) -> None:
    assert not problems, f"{what}: " + "; ".join(problems[:8])


def _assert_is_reference(
    ticket: nn.Module,
    dense: nn.Module,
    zeros: Iterable[Tap | Hook],
    inputs: Any,
    *,
    train: bool,
    salt: int = 0,
    backward: bool = True,
) -> None:
    zeros = tuple(zeros)
    mine = outcome(ticket, inputs, train=train, salt=salt, backward=backward)
    theirs = outcome(dense, inputs, train=train, salt=salt, backward=backward, zeros=zeros)
    buffers = not any(isinstance(z, Tap) and z.call is not None for z in zeros)
    _assert_same(disagreements(mine, theirs, buffers=buffers), zeros)


def _state(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that an innocent bystander could notice."""
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = parameters | dict(model.named_buffers(remove_duplicate=False))
    return {
        "tensors": {n: t.detach().clone() for n, t in tensors.items()},
        "identity": {n: (id(t), t._version) for n, t in tensors.items()},
        "requires_grad": {n: t.requires_grad for n, t in tensors.items()},
        "grad": {n: None if p.grad is None else p.grad.clone() for n, p in parameters.items()},
        "modes": {n: m.training for n, m in modules.items()},
        "classes": {n: (id(m), type(m)) for n, m in modules.items()},
        "hooks": {
            n: {k: len(v) for k, v in vars(m).items() if k.endswith("_hooks") and v is not None}
            for n, m in modules.items()
        },
        "attributes": {
            n: {k: repr(v) for k, v in vars(m).items() if not k.startswith("_")}
            for n, m in modules.items()
        },
        "tensor_hooks": {n: len(t._backward_hooks or ()) for n, t in tensors.items()},
    }


def _assert_equal_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    for part in before:
        assert before[part].keys() == after[part].keys(), part
        for name, value in before[part].items():
            now = after[part][name]
            same = torch.equal(value, now) if isinstance(value, Tensor) else value == now
            assert same, f"{part} of {name!r} changed"


def _generators() -> tuple[Any, ...]:
    return random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()


# ---------------------------------------------------------------- the central law


@pytest.mark.parametrize("entry", zoo.cases(zoo.ENTRIES))
@each_mode
def test_empty_plan_is_the_identity(entry: Entry, train: bool) -> None:
    net, _, _, _ = _case(entry.name)
    ticket = _cut(entry.name, ())
    backward = _trains(entry.name)
    for salt in entry.salts:
        for batch in (2, 3):
            _assert_is_reference(
                ticket, net, (), entry.example(batch), train=train, salt=salt, backward=backward
            )


@every_net
@each_mode
def test_ticket_is_the_zero_branch_reference(entry: Entry, train: bool) -> None:
    net, inputs, analysis, zeros = _case(entry.name)
    backward = _trains(entry.name)
    for names in _choices(analysis.names):
        ticket = _cut(entry.name, names)
        off = [zeros[n] for n in names]
        for salt in entry.salts:
            _assert_is_reference(
                ticket, net, off, inputs, train=train, salt=salt, backward=backward
            )


@every_net
@each_mode
def test_ticket_follows_other_batch_sizes(entry: Entry, train: bool) -> None:
    net, _, analysis, zeros = _case(entry.name)
    names = analysis.names[-1:]
    ticket = _cut(entry.name, names)
    for batch in (1, 5):
        if batch == 1 and train and any("BatchNorm" in type(m).__name__ for m in net.modules()):
            continue  # torch refuses statistics over one value
        _assert_is_reference(
            ticket,
            net,
            [zeros[n] for n in names],
            entry.example(batch),
            train=train,
            backward=False,
        )


@every_net
@each_mode
def test_a_layer_goes_with_all_of_its_branches(entry: Entry, train: bool) -> None:
    net, inputs, _, zeros = _case(entry.name)
    layers = blockprune.find_blocks(net, inputs, granularity="layer")
    for block in layers.blocks[:2]:
        plan = blockprune.make_plan(
            layers, {b.name: float(b is not block) for b in layers.blocks}, p=1
        )
        if block.contains:
            continue  # one block that takes others along is not one block
        assert plan.remove == (block.name,)
        ticket = blockprune.remove_blocks(net, plan, inputs)
        off = [zeros[n] for n in block.branches]
        _assert_is_reference(ticket, net, off, inputs, train=train, backward=_trains(entry.name))


@every_net
@pytest.mark.parametrize("cut_in", [False, True], ids=["cut_in_eval", "cut_in_train"])
def test_the_mode_it_was_cut_in_does_not_matter(entry: Entry, cut_in: bool) -> None:
    net, inputs, analysis, zeros = _case(entry.name)
    names = analysis.names[:1]
    ticket = blockprune.remove_blocks(copy.deepcopy(net).train(cut_in), names, inputs)
    assert ticket.training is cut_in
    assert all(m.training is cut_in for m in ticket.modules())
    for train in (True, False):
        _assert_is_reference(
            ticket, net, [zeros[n] for n in names], inputs, train=train, backward=False
        )


@pytest.mark.filterwarnings("ignore:pass-throughs stay:UserWarning")
@every_net
def test_preserving_the_root_changes_nothing(entry: Entry) -> None:
    net, inputs, _, zeros = _case(entry.name)
    analysis = blockprune.find_blocks(net, inputs, preserve_root=True)
    names = [n for n in analysis.names if n in zeros]
    ticket = blockprune.remove_blocks(net, names, inputs, preserve_root=True)
    assert isinstance(ticket, type(net))
    for train in (False, True):
        _assert_is_reference(
            ticket,
            net,
            [zeros[n] for n in names],
            inputs,
            train=train,
            backward=_trains(entry.name),
        )


# ---------------------------------------------------------------- composition


@every_net
def test_a_then_b_is_both_at_once(entry: Entry) -> None:
    _, inputs, analysis, _ = _case(entry.name)
    nested = {inner for b in analysis.blocks for inner in b.contains}
    names = [n for n in analysis.names if n not in nested]
    if len(names) < 2 or any(b.name is None for b in entry.branches):
        pytest.skip("fewer than two independent blocks of a fixed name")
    first, second = names[0], names[-1]
    both = _cut(entry.name, (first, second))
    once = _cut(entry.name, (first,))
    twice = blockprune.remove_blocks(once, (second,), inputs)
    assert twice.state_dict().keys() == both.state_dict().keys()
    for train in (False, True):
        mine = outcome(twice, inputs, train=train, backward=_trains(entry.name))
        theirs = outcome(both, inputs, train=train, backward=_trains(entry.name))
        _assert_same(disagreements(mine, theirs), names)


@every_net
def test_the_order_of_names_does_not_matter(entry: Entry) -> None:
    net, inputs, analysis, _ = _case(entry.name)
    forward = _cut(entry.name, analysis.names)
    backward = blockprune.remove_blocks(net, analysis.names[::-1], inputs, verify=False)
    assert blockprune.plan_of(forward) == blockprune.plan_of(backward)
    _assert_same(
        disagreements(
            outcome(forward, inputs, train=False, backward=False),
            outcome(backward, inputs, train=False, backward=False),
            ulps=0,
        ),
        analysis.names,
    )


# ---------------------------------------------------------------- the dense model


@every_net
def test_dense_model_is_untouched(entry: Entry) -> None:
    net, inputs = entry.build(), entry.example()
    # A model in use: mixed modes, gradients from an earlier step, somebody's hook.
    net.train()
    next(iter(net.children())).eval()
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    leaf = next(m for m in net.modules() if not any(m.children()))
    leaf.register_forward_hook(lambda module, args, output: None)
    before, generators = _state(net), _generators()
    copies = [x.clone() for x in flatten(inputs)[0] if isinstance(x, Tensor)]

    analysis = blockprune.find_blocks(net, inputs)
    blockprune.find_blocks(net, inputs, granularity="layer")
    plan = blockprune.make_plan(analysis, p=len(analysis.blocks))
    ticket = blockprune.remove_blocks(net, plan, inputs)

    _assert_equal_state(before, _state(net))
    assert _generators() == generators
    originals = [x for x in flatten(inputs)[0] if isinstance(x, Tensor)]
    assert all(map(torch.equal, copies, originals)), "the example inputs changed"
    with torch.no_grad():
        for parameter in ticket.parameters():
            parameter.add_(1)
        for buffer in ticket.buffers():
            buffer.add_(1)
    _assert_equal_state(before, _state(net))  # the ticket owns its tensors


# ---------------------------------------------------------------- what is kept


@every_net
def test_parameters_dropped_are_those_of_the_block(entry: Entry) -> None:
    net, _, analysis, _ = _case(entry.name)
    dense = sum(p.numel() for p in net.parameters())
    spare = sum(
        p.numel() for n, p in net.named_parameters() if entry.unused and n.startswith(entry.unused)
    )
    costs = block_costs(analysis)
    for block in analysis.blocks:
        ticket = _cut(entry.name, (block.name,))
        kept = sum(p.numel() for p in ticket.parameters())
        # What no forward ever read may go as well; nothing else may.
        assert dense - kept - block.params in (0, spare), block.name
        assert costs[block.name].params == block.params


@every_net
def test_state_dict_is_a_subset_of_the_dense_one(entry: Entry) -> None:
    net, _, analysis, _ = _case(entry.name)
    dense = net.state_dict()
    for names in _choices(analysis.names):
        ticket = _cut(entry.name, names)
        state = ticket.state_dict()
        assert state.keys() <= dense.keys()
        if any(analysis.block(n).params for n in names):
            assert state.keys() < dense.keys()
        for key, tensor in state.items():
            assert torch.equal(tensor, dense[key]), key
            assert tensor.dtype == dense[key].dtype
        # A dense checkpoint loads into the ticket, less what was removed.
        ticket.load_state_dict({k: dense[k] for k in state}, strict=True)


@every_net
def test_frozen_stays_frozen(entry: Entry) -> None:
    net, inputs, analysis, _ = _case(entry.name)
    net = copy.deepcopy(net)
    for i, parameter in enumerate(net.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    dense = {n: p.requires_grad for n, p in net.named_parameters(remove_duplicate=False)}
    ticket = blockprune.remove_blocks(net, analysis.names[:1], inputs, verify=False)
    for name, parameter in ticket.named_parameters(remove_duplicate=False):
        assert parameter.requires_grad is dense[name], name


@every_net
def test_nothing_of_a_removed_block_is_left(entry: Entry) -> None:
    net, inputs, analysis, _ = _case(entry.name)
    drops = [b.dropped for b in entry.branches if b.name in analysis.names]
    ticket = _cut(entry.name, analysis.names)
    gone = tuple(prefix for prefixes in drops for prefix in prefixes)
    assert not [n for n, _ in ticket.named_parameters() if gone and n.startswith(gone)]
    # Every layer still there is called, unless the dense model does not call it either.
    assert _called(ticket, inputs) >= _called(net, inputs) & _leaves(ticket)


def _leaves(model: nn.Module) -> set[str]:
    modules = model.named_modules()
    return {n for n, m in modules if not any(m.children()) and not isinstance(m, Dissolved)}


def _called(model: nn.Module, inputs: Any) -> set[str]:
    """Names of the modules without children that a forward pass calls, in either mode."""
    model = copy.deepcopy(model)
    called: set[str] = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    for train in (False, True):
        call(model.train(train), inputs)
    return called & _leaves(model)


# ---------------------------------------------------------------- the ticket as a module


@every_net
def test_save_and_load_are_exact(entry: Entry, tmp_path: Path) -> None:
    net, inputs, analysis, _ = _case(entry.name)
    ticket = blockprune.remove_blocks(net, analysis.names[:1], inputs)
    with torch.no_grad():
        for parameter in ticket.parameters():
            parameter.add_(0.125)  # a trained ticket: its weights are not the dense ones
    path = tmp_path / "ticket.safetensors"
    blockprune.save_ticket(ticket, path)
    loaded = blockprune.load_ticket(entry.build(), path)
    assert blockprune.plan_of(loaded) == blockprune.plan_of(ticket)
    mine, theirs = loaded.state_dict(), ticket.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    for train in (False, True):
        _assert_same(
            disagreements(
                outcome(loaded, inputs, train=train, backward=_trains(entry.name)),
                outcome(ticket, inputs, train=train, backward=_trains(entry.name)),
                ulps=0,
            ),
            path.name,
        )


@every_net
def test_deepcopy_is_exact_and_independent(entry: Entry) -> None:
    _, inputs, analysis, _ = _case(entry.name)
    ticket = _cut(entry.name, analysis.names[:1])
    before = {k: v.clone() for k, v in ticket.state_dict().items()}
    twin = copy.deepcopy(ticket)
    assert blockprune.plan_of(twin) == blockprune.plan_of(ticket)
    for train in (False, True):
        mine = outcome(twin, inputs, train=train, backward=False)
        theirs = outcome(ticket, inputs, train=train, backward=False)
        _assert_same(disagreements(mine, theirs, ulps=0), "twin")
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert all(torch.equal(v, before[k]) for k, v in ticket.state_dict().items())


@every_net
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["double", "bfloat16"])
def test_the_ticket_converts_like_the_dense_model(entry: Entry, dtype: torch.dtype) -> None:
    net, inputs, analysis, zeros = _case(entry.name)

    def convert(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    inputs = torch.utils._pytree.tree_map(convert, inputs)
    names = analysis.names[:1]
    ticket = blockprune.remove_blocks(net, names, _case(entry.name)[1], verify=False).to(dtype)
    dense = copy.deepcopy(net).to(dtype)
    off = [zeros[n] for n in names]
    try:
        outcome(dense, inputs, train=False, backward=False)
    except RuntimeError as error:
        # A plain tensor stays as it was made; what torch refuses in the dense model
        # it refuses in the ticket, unless the refusing branch is gone.
        pytest.skip(f"the dense model does not convert: {error}")
    _assert_is_reference(ticket, dense, off, inputs, train=False, backward=False)


# ---------------------------------------------------------------- random architectures


def _agrees(spec: Architecture, train: bool, names: Sequence[str], net: Net, x: Any) -> None:
    ticket = blockprune.remove_blocks(net, names, x)
    known = truth(spec).removable
    off = [known[n] for n in names]
    _assert_is_reference(ticket, net, off, x, train=train, backward=trainable(net, x))
    other = (torch.randn(3, 3, 6, 6),)
    _assert_is_reference(ticket, net, off, other, train=train, backward=False)


@given(architectures)
def test_random_architectures_are_analysed_rightly(spec: Architecture) -> None:
    net = Net(spec)
    analysis = blockprune.find_blocks(net, torch.randn(2, 3, 6, 6))
    wanted = truth(spec)
    assert analysis.names == tuple(wanted.removable)
    refused = {r.name.partition("#")[0]: str(r.reason) for r in analysis.rejections}
    assert len(analysis.rejections) == len(wanted.refused)
    for owner, reasons in wanted.refused.items():
        reason = next((why for name, why in refused.items() if name == owner), None)
        assert reason in reasons, f"{owner}: {reason} instead of one of {sorted(reasons)}"


@given(architectures, st.data())
@each_mode
def test_random_tickets_are_the_zero_branch_reference(
    train: bool, spec: Architecture, data: st.DataObject
) -> None:
    net = Net(spec)
    x = (torch.randn(2, 3, 6, 6),)
    removable = list(truth(spec).removable)
    if not removable:
        return
    names = data.draw(st.lists(st.sampled_from(removable), min_size=1, unique=True))
    _agrees(spec, train, names, net, x)


@given(architectures, st.data())
def test_random_dense_models_are_untouched(spec: Architecture, data: st.DataObject) -> None:
    net = Net(spec).train(data.draw(st.booleans()))
    before, generators = _state(net), _generators()
    x = torch.ones(2, 3, 6, 6)
    analysis = blockprune.find_blocks(net, x)
    blockprune.remove_blocks(net, blockprune.make_plan(analysis, p=0.5), x)
    _assert_equal_state(before, _state(net))
    assert _generators() == generators


@given(architectures, st.data())
def test_random_parameters_add_up(spec: Architecture, data: st.DataObject) -> None:
    net = Net(spec)
    x = torch.ones(2, 3, 6, 6)
    analysis = blockprune.find_blocks(net, x)
    if not analysis.blocks:
        return
    block = data.draw(st.sampled_from(analysis.blocks))
    ticket = blockprune.remove_blocks(net, (block.name,), x, verify=False)
    dense, kept = (sum(p.numel() for p in m.parameters()) for m in (net, ticket))
    assert dense - kept == block.params == block_costs(analysis)[block.name].params
