"""The truth of the zoo is consistent in itself, and the analysis finds exactly that truth."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch
from torch import nn

import blockprune
from tests import zoo
from tests.oracle import disagreements, outcome, trainable
from tests.zoo import Branch, Entry

every_net = pytest.mark.parametrize("entry", zoo.ENTRIES, ids=[e.name for e in zoo.ENTRIES])


# ------------------------------------------------- the truth, without blockprune


def test_names_of_the_zoo_are_unique() -> None:
    assert len(zoo.BY_NAME) == len(zoo.ENTRIES) >= 25


@every_net
def test_each_branch_matters_and_owns_the_parameters_said(entry: Entry) -> None:
    net, inputs = entry.build(), entry.example()
    if not trainable(net, inputs):
        pytest.skip("inference only")
    dense = outcome(net, inputs, train=False)
    assert dense.gradients is not None
    for branch in entry.branches:
        off = outcome(net, inputs, train=False, zeros=[branch.zero])
        assert disagreements(off, dense), f"zeroing {branch.zero} changes nothing"
        assert off.gradients is not None
        lost = {n for n, g in dense.gradients.items() if g is not None and off.gradients[n] is None}
        below = {n for n in dense.gradients if n.startswith(branch.dropped)}
        assert lost == {n for n in below if dense.gradients[n] is not None}
        if not entry.name.startswith("frozen"):
            assert lost == below


# ------------------------------------------------- the analysis against the truth


@functools.cache
def _found(name: str, granularity: str = "branch") -> blockprune.BlockAnalysis:
    """The analysis of a net of the zoo: a value, so that tests may share it."""
    entry = zoo.BY_NAME[name]
    return blockprune.find_blocks(entry.build(), entry.example(), granularity=granularity)


def _expected(branches: tuple[Branch, ...]) -> tuple[int, int]:
    return sum(b.required for b in branches), len(branches)


@every_net
def test_branches_are_found(entry: Entry) -> None:
    analysis = _found(entry.name)
    required = {b.name for b in entry.branches if b.required and b.name is not None}
    allowed = {b.name for b in entry.branches if b.name is not None}
    found = set(analysis.names)
    assert len(found) == len(analysis.names), "names are not unique"
    assert all(found), "a block without a name"
    assert required <= found
    unnamed = sum(b.name is None for b in entry.branches)
    assert len(found - allowed) <= unnamed, f"not removable: {found - allowed}"
    least, most = _expected(entry.branches)
    assert least <= len(found) <= most


@every_net
def test_owners(entry: Entry) -> None:
    analysis = _found(entry.name)
    owners = {b.name: b.owner for b in entry.branches if b.name and b.owner is not None}
    found = {b.name: b.owner for b in analysis.blocks if b.name in owners}
    assert found == {name: owners[name] for name in found}


@every_net
def test_blocks_stand_in_execution_order(entry: Entry) -> None:
    names = list(_found(entry.name).names)
    order = [b.name for b in entry.branches if b.name in names]
    assert [n for n in names if n in order] == order


@every_net
def test_parameters_of_each_block(entry: Entry) -> None:
    net = entry.build()
    analysis = _found(entry.name)
    for branch in entry.branches:
        if branch.name in analysis.names:
            names = dict(net.named_parameters())
            gone = sum(p.numel() for n, p in names.items() if n.startswith(branch.dropped))
            assert analysis.block(branch.name).params == gone


@every_net
def test_rejections_and_their_reasons(entry: Entry) -> None:
    analysis = _found(entry.name)
    for rejection in analysis.rejections:
        assert rejection.name
        assert rejection.detail
    if entry.rejections is None:
        pytest.skip("the reasons are open")
    found = Counter(str(r.reason) for r in analysis.rejections)
    if "opaque" not in entry.rejections:
        del found["opaque"]
    assert found == entry.rejections


@every_net
def test_layers(entry: Entry) -> None:
    branches, layers = _found(entry.name), _found(entry.name, "layer")
    assert layers.granularity == "layer"
    # Every branch belongs to exactly one layer block.
    members = [name for block in layers.blocks for name in block.branches]
    assert sorted(members) == sorted(branches.names)
    if entry.layers is not None:
        assert layers.names == entry.layers
    elif all(b.name is not None for b in entry.branches):
        assert layers.names == branches.names


@every_net
def test_nesting(entry: Entry) -> None:
    analysis = _found(entry.name)
    for name, inner in (entry.contains or {}).items():
        assert set(analysis.block(name).contains) == set(inner)


def test_a_long_skip_contains_the_body() -> None:
    entry = zoo.BY_NAME["long_skip"]
    analysis = _found(entry.name)
    (outer,) = [b for b in analysis.blocks if b.owner == ""]
    assert set(outer.contains) == {"body.0", "body.2"}


def test_names_of_one_module_called_twice_differ_by_a_number() -> None:
    entry = zoo.BY_NAME["shared_block"]
    names = _found(entry.name).names
    assert len(set(names)) == 2
    assert any("#" in name for name in names)


def test_stages_of_a_resnet() -> None:
    entry = zoo.BY_NAME["resnet"]
    analysis = _found(entry.name)
    assert [s.blocks for s in analysis.stages] == [("layer1.0", "layer1.1"), ("layer2.1",)]
    assert [s.fixed for s in analysis.stages] == [0, 1]
    assert [tuple(s.shape) for s in analysis.stages] == [(2, 4, 4, 4), (2, 8, 2, 2)]
    assert [b.stage for b in analysis.blocks] == [0, 0, 1]
    assert [tuple(b.shape) for b in analysis.blocks] == [(2, 4, 4, 4)] * 2 + [(2, 8, 2, 2)]


def test_a_branch_reads_the_parameters_it_shares() -> None:
    entry = zoo.BY_NAME["shared_function"]
    net = entry.build()
    for block in _found(entry.name).blocks:
        assert set(block.parameters) == {n for n, _ in net.named_parameters() if n[:2] == "f."}
        assert block.params == 0


def test_an_untraceable_layer_is_never_passed_over_in_silence() -> None:
    # torch's own encoder layer looks at its input in Python: it is either followed, or named.
    entry = zoo.BY_NAME["transformer_encoder_layer"]
    analysis = _found(entry.name)
    opaque = [r for r in analysis.rejections if r.reason == "opaque"]
    assert len(analysis.blocks) == 2 or any(r.name.startswith("1") for r in opaque)


def test_a_layer_that_is_a_pass_through_names_its_module() -> None:
    entry = zoo.BY_NAME["attention"]
    layers = _found(entry.name, "layer")
    assert [b.branches for b in layers.blocks] == [
        (f"layers.{i}.attention", f"layers.{i}.mlp") for i in range(2)
    ]
    assert [b.owner for b in layers.blocks] == ["layers.0", "layers.1"]


def test_the_analysis_of_one_net_is_equal_twice_and_differs_from_another() -> None:
    entry = zoo.BY_NAME["resnet"]
    first = blockprune.find_blocks(entry.build(), entry.example())
    second = blockprune.find_blocks(entry.build(), entry.example())
    assert first == second
    assert first.fingerprint == second.fingerprint
    other = zoo.BY_NAME["pre_activation"]
    assert blockprune.find_blocks(other.build(), other.example()).fingerprint != first.fingerprint


def test_hundreds_of_blocks(large: bool) -> None:
    count = 1000 if large else 250
    net = zoo.deep(count)
    analysis = blockprune.find_blocks(net, zoo.tokens(2))
    assert analysis.names == tuple(str(i + 1) for i in range(count))
    ticket = blockprune.remove_blocks(net, analysis.names[1:], zoo.tokens(2), verify=False)
    x = zoo.tokens(3)[0]
    with torch.no_grad():
        assert torch.equal(ticket(x), net[1](net[0](x)))
    assert sum(isinstance(m, nn.Linear) for m in ticket.modules()) == 2


def test_the_example_may_be_a_tensor_a_tuple_or_a_dict() -> None:
    entry = zoo.BY_NAME["pre_activation"]
    net = entry.build()
    (x,) = entry.example()
    assert isinstance(x, torch.Tensor)
    names = blockprune.find_blocks(net, x).names
    assert blockprune.find_blocks(net, (x,)).names == names
    assert blockprune.find_blocks(net, {"x": x}).names == names
