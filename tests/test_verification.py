"""The proof of a ticket fails where the ticket is wrong, however little, and says where.

Each test damages what the surgery makes, on its way to the proof; the oracle is that the undamaged
one passes and the damaged one does not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import blockprune
from blockprune.errors import BlockpruneError, VerificationError
from blockprune.surgery import record_of, remove
from blockprune.tracing import copy_graph

INPUTS = torch.rand(3, 6, generator=torch.Generator().manual_seed(0))
Damage = Callable[[fx.Graph], None]


class Block(nn.Module):
    """A residual block that does something else in train mode than in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(functional.relu(self.norm(self.linear(x))))


class Row(nn.Module):
    """Blocks in a row, and no list: a shorter one could be right where the graph is damaged."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        for number, block in enumerate(blocks):
            self.add_module(str(number), block)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.children():
            x = block(x)
        return x


class Net(nn.Module):
    """Three blocks between a stem and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.blocks = Row(Block(), Block(), Block())
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.blocks(self.stem(x))
        return {"logits": self.head(x), "best": self.head(x).argmax(1), "width": 6}


class Inside(nn.Module):
    """The same, in a root that cannot be followed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Net()

    def forward(self, x: Tensor) -> Any:
        if float(x.sum()) > 1e6:
            return {}
        return self.inner(x)


@pytest.fixture(params=[Net, Inside], ids=["whole", "region"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    built: nn.Module = request.param()
    with torch.no_grad():
        for module in built.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.uniform_(-1, 1)
                module.running_var.uniform_(0.5, 2)
    return built


def first_block(model: nn.Module) -> str:
    return "inner.blocks.0" if isinstance(model, Inside) else "blocks.0"


def cut(model: nn.Module) -> nn.Module:
    return blockprune.remove_blocks(model, [first_block(model)], INPUTS)


def node(graph: fx.Graph, ending: str, op: str = "call_module") -> fx.Node:
    [found] = [n for n in graph.nodes if n.op == op and str(n.target).endswith(ending)]
    return found


def behind(graph: fx.Graph, place: fx.Node, make: Callable[[fx.Node], fx.Node]) -> None:
    """Let all readers of a node read what `make` makes of it."""
    with graph.inserting_after(place):
        new = make(place)
    place.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def with_call(
    ending: str, function: Callable[..., Any], *arguments: Any, op: str = "call_module"
) -> Damage:
    def damage(graph: fx.Graph) -> None:
        behind(
            graph,
            node(graph, ending, op),
            lambda place: graph.call_function(function, (place, *arguments)),
        )

    return damage


def without(ending: str) -> Damage:
    def damage(graph: fx.Graph) -> None:
        gone = node(graph, ending)
        gone.replace_all_uses_with(gone.args[0])
        graph.erase_node(gone)

    return damage


def another_input(graph: fx.Graph) -> None:
    """Let the head read what comes before the last block."""
    for head in graph.nodes:
        if head.op == "call_module" and str(head.target).endswith("head"):
            head.replace_input_with(head.args[0], node(graph, "blocks.2.linear").args[0])


def another_weight(graph: fx.Graph) -> None:
    place = node(graph, "blocks.1.linear")
    place.target = str(place.target).replace("blocks.1", "blocks.2")


def other_outputs(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(graph: fx.Graph) -> None:
        [output] = (n for n in graph.nodes if n.op == "output")
        output.args = (change(dict(output.args[0])),)

    return damage


@pytest.fixture
def damaged(monkeypatch: pytest.MonkeyPatch) -> Callable[[Damage], None]:
    """Damage each ticket's graph from now on."""
    right = remove.ticket_graph

    def set_up(damage: Damage) -> None:
        def wrong(*args: Any) -> fx.Graph:
            graph = right(*args)
            damage(graph)
            graph.lint()
            return graph

        monkeypatch.setattr(remove, "ticket_graph", wrong)

    return set_up


def test_the_right_one_passes(model: nn.Module) -> None:
    assert record_of(cut(model)).verified == ("eval", "train")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("damage", "where"),
    [
        (another_input, "eval mode at .*node 'head'"),
        (another_weight, r"eval mode at .*node 'blocks_1_linear'|inner_blocks_1"),
        (with_call("blocks.1.linear", torch.mul, 1.0001), "eval mode at .*node '.*norm'"),
        (with_call("blocks.2.norm", torch.add, 1e-4), "eval mode at .*largest difference"),
        (with_call("stem", torch.Tensor.double), "fails where .* runs, in eval mode"),
        (with_call("stem", torch.Tensor.reshape, (5, 5)), "fails where .* runs, in eval mode"),
        (with_call("blocks.2.norm", torch.full_like, torch.nan), "eval mode at .*difference nan"),
        (without("blocks.2.norm"), "eval mode at .*node '.*relu"),
        (without("blocks.2.dropout"), "in train mode at .*node 'add"),
        (with_call("blocks.2.linear", torch.Tensor.detach), "in eval mode: the gradient of "),
        (with_call("stem", torch.Tensor.detach), r"in eval mode: the gradient of '.*stem\."),
        (
            other_outputs(lambda o: {**o, "logits": o["best"]}),
            r"\(3,\) torch.int64 instead of \(3, 4\) torch.float32",
        ),
        (other_outputs(lambda o: {**o, "more": o["logits"]}), r"'more': 'Tensor'.* instead of"),
        (other_outputs(lambda o: {**o, "width": 5}), r"'width': 5.* instead of .*'width': 6"),
        (other_outputs(lambda o: list(o.values())), "gives .*list.* instead of .*dict"),
    ],
    ids=[
        *("another_input", "another_weight", "scaled", "shifted", "another_type", "another_shape"),
        *("nan", "no_norm", "no_dropout", "detached", "stem_detached", "another_output"),
        *("one_more_output", "another_number", "another_container"),
    ],
)
def test_a_damaged_graph_does_not(
    model: nn.Module, damaged: Callable[[Damage], None], damage: Damage, where: str
) -> None:
    before = copy.deepcopy(model.state_dict())
    damaged(damage)
    with pytest.raises(VerificationError, match=where):
        cut(model)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_integers_that_differ_are_counted(
    model: nn.Module, damaged: Callable[[Damage], None]
) -> None:
    def damage(graph: fx.Graph) -> None:
        behind(
            graph,
            node(graph, "argmax", "call_method"),
            lambda place: graph.call_function(torch.add, (place, 1)),
        )

    damaged(damage)
    with pytest.raises(VerificationError, match=r"3 elements of a torch\.int64 tensor differ"):
        cut(model)


def test_outputs_that_take_no_gradient_any_more(
    model: nn.Module, damaged: Callable[[Damage], None]
) -> None:
    def damage(graph: fx.Graph) -> None:
        [output] = (n for n in graph.nodes if n.op == "output")
        outputs = dict(output.args[0])
        with graph.inserting_before(output):
            outputs["logits"] = graph.call_method("detach", (outputs["logits"],))
        output.args = (outputs,)

    damaged(damage)
    with pytest.raises(VerificationError, match=r"in eval mode: the gradient of '.*stem\."):
        cut(model)


def scaled(module: nn.Module, name: str) -> None:
    setattr(module, name, nn.Parameter(getattr(module, name).detach() * 1.001))


@pytest.mark.parametrize(
    ("place", "change"),
    [
        ("blocks.1.linear", lambda module: scaled(module, "weight")),
        ("blocks.1.norm", lambda module: module.running_mean.add_(0.01)),
        ("head", lambda module: scaled(module, "bias")),
    ],
    ids=["weight", "running_mean", "bias"],
)
def test_weights_that_were_not_transferred(
    model: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    change: Callable[[nn.Module], None],
) -> None:
    right = remove.assemble

    def wrong(*args: Any) -> nn.Module:
        ticket = right(*args)
        change(getattr(ticket, "inner", ticket).get_submodule(place))
        return ticket

    monkeypatch.setattr(remove, "assemble", wrong)
    with pytest.raises(VerificationError, match="differs from the zero-branch reference"):
        cut(model)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (with_call("stem", torch.mul, 1.001), "the ticket differs .* in eval mode: largest"),
        (with_call("stem", torch.Tensor.double), "the ticket fails .* in eval mode: RuntimeError"),
        (other_outputs(lambda o: list(o.values())), "the ticket differs .* gives .*list"),
    ],
    ids=["numbers", "types", "containers"],
)
def test_a_module_that_does_not_do_what_its_graph_says(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, damage: Damage, message: str
) -> None:
    right = remove.graph_module

    def wrong(path: str, module: nn.Module, graph: fx.Graph) -> nn.Module:
        other, _ = copy_graph(graph)
        damage(other)
        return right(path, module, other)

    monkeypatch.setattr(remove, "graph_module", wrong)
    with pytest.raises(VerificationError, match=message):
        cut(model)


class TestRounding:
    """Another order of summation is no difference, and nothing else hides behind that."""

    @staticmethod
    def cancelling(size: float) -> Damage:
        def damage(graph: fx.Graph) -> None:
            def there_and_back(place: fx.Node) -> fx.Node:
                far = graph.call_function(torch.add, (place, size))
                with graph.inserting_after(far):
                    return graph.call_function(torch.sub, (far, size))

            place = node(graph, "stem")
            with graph.inserting_after(place):
                far = graph.call_function(torch.add, (place, size))
            with graph.inserting_after(far):
                back = graph.call_function(torch.sub, (far, size))
            place.replace_all_uses_with(back, delete_user_cb=lambda user: user is not far)

        return damage

    def test_what_is_rounding_alone_passes(
        self, model: nn.Module, damaged: Callable[[Damage], None]
    ) -> None:
        damaged(self.cancelling(100.0))
        ticket = cut(model)
        assert record_of(ticket).verified == ("eval", "train")  # type: ignore[union-attr]
        assert all(parameter.dtype == torch.float32 for parameter in ticket.parameters())

    def test_what_is_left_in_double_precision_does_not(
        self, model: nn.Module, damaged: Callable[[Damage], None]
    ) -> None:
        damaged(with_call("stem", torch.mul, 1 + 1e-6))
        with pytest.raises(VerificationError):
            cut(model)

    # More than half a unit in the last place, and less than what four are.
    @pytest.mark.parametrize(
        ("dtype", "factor"), [(torch.bfloat16, 1.01), (torch.float16, 1.01), (torch.float16, 1.002)]
    )
    def test_half_precision_hides_nothing(
        self, damaged: Callable[[Damage], None], dtype: torch.dtype, factor: float
    ) -> None:
        model, inputs = Net().to(dtype), INPUTS.to(dtype)
        ticket = blockprune.remove_blocks(model, ["blocks.0"], inputs)
        assert record_of(ticket).verified == ("eval", "train")  # type: ignore[union-attr]
        damaged(with_call("stem", torch.mul, factor))
        with pytest.raises(VerificationError):
            blockprune.remove_blocks(model, ["blocks.0"], inputs)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_rounding_of_half_precision_passes(
        self, damaged: Callable[[Damage], None], dtype: torch.dtype
    ) -> None:
        damaged(self.cancelling(100.0))
        ticket = blockprune.remove_blocks(Net().to(dtype), ["blocks.0"], INPUTS.to(dtype))
        assert record_of(ticket).verified == ("eval", "train")  # type: ignore[union-attr]

    @pytest.mark.parametrize(("size", "passes"), [(0.0625, True), (100.0, False)])
    def test_half_precision_alone_is_given_some_room(
        self, damaged: Callable[[Damage], None], size: float, passes: bool
    ) -> None:
        class Half(Net):
            def forward(self, x: Tensor) -> Any:
                return super().forward(x.bfloat16())

        damaged(self.cancelling(size))
        model, inputs = Half().bfloat16(), INPUTS.bfloat16()
        if passes:
            assert blockprune.remove_blocks(model, ["blocks.0"], inputs)(inputs)["width"] == 6
        else:
            with pytest.raises(VerificationError, match="values up to"):
                blockprune.remove_blocks(model, ["blocks.0"], inputs)

    def test_the_first_difference_is_told_where_double_precision_cannot_run(
        self, damaged: Callable[[Damage], None]
    ) -> None:
        class Single(Net):
            def forward(self, x: Tensor) -> Any:
                return super().forward(x.float())

        damaged(self.cancelling(100.0))
        with pytest.raises(VerificationError, match="values up to"):
            cut(Single())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_number_on_both_sides_is_equal(
    damaged: Callable[[Damage], None], dtype: torch.dtype
) -> None:
    model, inputs = Net().to(dtype), INPUTS.to(dtype)
    with torch.no_grad():
        model.head.bias[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    ticket = blockprune.remove_blocks(model, ["blocks.0"], inputs)
    assert ticket.eval()(inputs)["logits"][:, :3].isfinite().any().item() is False
    damaged(with_call("stem", torch.mul, 1.1))
    with pytest.raises(VerificationError):
        blockprune.remove_blocks(model, ["blocks.0"], inputs)


# --- the trace, and what cannot be compared -------------------------------------------------------


class Counting(nn.Module):
    """A forward with a state of its own that no trace can see."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.box = {"calls": 0}

    def forward(self, x: Tensor) -> Tensor:
        self.box["calls"] += 1
        return self.block(x) * float(self.box["calls"])


def test_a_state_that_a_graph_cannot_hold_stays_with_its_class() -> None:
    model = Counting().eval()
    ticket = blockprune.remove_blocks(model, ["block"], INPUTS).eval()
    assert model.box == {"calls": 0}
    for calls in (1, 2, 3):
        assert torch.equal(ticket(INPUTS), INPUTS * calls)


class WearingOut(nn.Module):
    """A forward that refuses after so many calls, of its copies too."""

    left: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        WearingOut.left -= 1
        if WearingOut.left < 0:
            raise OSError("worn out")
        return self.block(x)


def test_a_model_that_refuses_at_any_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, refused = WearingOut().eval(), 0
    for calls in range(20):
        monkeypatch.setattr(WearingOut, "left", calls)
        try:
            ticket = blockprune.remove_blocks(model, ["block"], INPUTS)
        except BlockpruneError:
            refused += 1
        else:
            monkeypatch.setattr(WearingOut, "left", 1)
            assert ticket(INPUTS).equal(INPUTS)
    assert 0 < refused < 20


class Inverse(nn.Module):
    """A matrix that can be inverted only with its branch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.inv(x + (self.linear(x) * 0 + torch.eye(6)))


def test_a_reference_that_does_not_run() -> None:
    model = Inverse()
    [block] = blockprune.find_blocks(model, torch.zeros(6, 6)).blocks
    with pytest.raises(VerificationError, match=r"fails in eval mode: .*singular"):
        blockprune.remove_blocks(model, [block.name], torch.zeros(6, 6))
    # Where it runs, it is removed.
    invertible = torch.eye(6) * 2
    ticket = blockprune.remove_blocks(model, [block.name], invertible)
    assert ticket(invertible).allclose(torch.eye(6) / 2)


class Sparse(nn.Module):
    """Embeddings with sparse gradients before two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 6, sparse=True)
        self.blocks = nn.Sequential(nn.Identity(), Block(), Block())

    def forward(self, words: Tensor) -> Tensor:
        return self.blocks(self.words(words))


def test_sparse_gradients_are_compared(damaged: Callable[[Damage], None]) -> None:
    words = torch.tensor([1, 2, 2, 7])
    ticket = blockprune.remove_blocks(Sparse(), ["blocks.1"], words)
    assert record_of(ticket).verified == ("eval", "train")  # type: ignore[union-attr]
    damaged(with_call("words", torch.Tensor.detach))
    with pytest.raises(VerificationError, match=r"the gradient of 'words\.weight' differs"):
        blockprune.remove_blocks(Sparse(), ["blocks.1"], words)
