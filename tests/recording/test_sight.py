"""Sight: residual branches are found, and can go, in models that today's code does not see into."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import blockprune
from tests.recording.law import Trial, right, right_or_refused
from tests.recording.nets import WIDTH, Block, features, ones, padded

pytestmark = pytest.mark.filterwarnings("ignore:pass-throughs stay:UserWarning")

# ----------------------------------------------------------------- transformers of torch


def encoder(norm_first: bool, batch_first: bool = True, activation: Any = "relu") -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        WIDTH, 2, 6, 0.0, activation, batch_first=batch_first, norm_first=norm_first
    )
    return wakened(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


def wakened(module: nn.Module) -> nn.Module:
    """Give each parameter values of its own: the layers of a stack are copies of one."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


class Masked(nn.Module):
    """An encoder and a way to give it masks."""

    def __init__(self, inner: nn.Module, how: str) -> None:
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        hidden = mask == 0
        length = x.shape[1] if mask.shape[0] == x.shape[0] else x.shape[0]
        causal = nn.Transformer.generate_square_subsequent_mask(length)
        if self.how == "none":
            return self.inner(x)
        if self.how == "padding":
            return self.inner(x, src_key_padding_mask=hidden)
        if self.how == "padding_as_floats":
            bias = torch.zeros(mask.shape).masked_fill(hidden, float("-inf"))
            return self.inner(x, src_key_padding_mask=bias)
        if self.how == "causal":
            return self.inner(x, mask=causal, is_causal=True)
        if self.how == "causal_not_told":
            return self.inner(x, mask=causal)
        if self.how == "causal_by_position":
            return self.inner(x, causal == float("-inf"))
        return self.inner(x, mask=causal == float("-inf"), src_key_padding_mask=hidden)


WAYS = [
    *("none", "padding", "padding_as_floats", "causal", "causal_not_told"),
    *("causal_by_position", "both"),
]


def encoder_trial(batch_first: bool, batch: int, tokens: int, mask: Tensor) -> Any:
    x = features(batch, tokens)
    return (x if batch_first else x.transpose(0, 1)), mask


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch", "tokens"])
def test_an_encoder_with_masks(how: str, norm_first: bool, batch_first: bool) -> None:
    model = Masked(encoder(norm_first, batch_first), how)
    example = encoder_trial(batch_first, 2, 5, ones(2, 5))
    names = blockprune.find_blocks(model, example).names
    assert len(names) == 4
    later = Trial(encoder_trial(batch_first, 3, 6, padded(3, 6)))
    right(
        model,
        example,
        [Trial(encoder_trial(batch_first, 2, 5, padded(2, 5))), later],
        cut=[names[1], names[2]],
        zero=["inner.layers.0.linear2", "inner.layers.1.self_attn.out_proj"],
    )


@pytest.mark.parametrize(
    "activation",
    ["gelu", functional.silu, torch.tanh, nn.Hardswish(), lambda x: x.relu() ** 2],
    ids=["gelu", "silu", "tanh", "module", "lambda"],
)
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"])
def test_activations_of_an_encoder(activation: Any, norm_first: bool) -> None:
    model = Masked(encoder(norm_first, activation=activation), "padding")
    names = blockprune.find_blocks(model, (features(), ones())).names
    assert len(names) == 4
    right(
        model,
        (features(), ones()),
        [Trial((features(), padded()))],
        cut=names[3],
        zero="inner.layers.1.linear2",
    )


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"])
@pytest.mark.parametrize("preserve_root", [False, True])
def test_a_bare_encoder_with_masks_as_inputs(norm_first: bool, preserve_root: bool) -> None:
    model = encoder(norm_first)

    def inputs(mask: Tensor) -> Any:
        return {"src": features(), "src_key_padding_mask": mask == 0}

    found = blockprune.find_blocks(model, inputs(ones()), preserve_root=preserve_root)
    assert len(found.names) == 4
    right(
        model,
        inputs(ones()),
        [Trial(inputs(padded()))],
        cut=found.names[0],
        zero="layers.0.self_attn.out_proj",
        preserve_root=preserve_root,
    )


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_the_fast_path_of_an_encoder() -> None:
    """Without gradients torch packs what is no padding; what it returns there is told."""

    class Kept(Masked):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return super().forward(x, mask) * mask[..., None]

    layer = nn.TransformerEncoderLayer(WIDTH, 2, 6, 0.0, batch_first=True)
    model = Kept(wakened(nn.TransformerEncoder(layer, 2)), "padding").eval()
    names = blockprune.find_blocks(model, (features(), ones())).names
    assert len(names) == 4
    # The fast path rounds in its own way.
    trial = Trial((features(), padded()), within=torch.no_grad, ulps=200)
    right(
        model, (features(), ones()), [trial], cut=names[2], zero="inner.layers.1.self_attn.out_proj"
    )


class Decodes(nn.Module):
    """A decoder with a memory and masks of both."""

    def __init__(self, norm_first: bool, batch_first: bool, how: str) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(
            WIDTH, 2, 6, 0.0, batch_first=batch_first, norm_first=norm_first
        )
        self.inner = wakened(nn.TransformerDecoder(layer, 1))
        self.how = how

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        if self.how == "none":
            return self.inner(x, memory)
        if self.how == "memory":
            return self.inner(x, memory, memory_key_padding_mask=mask == 0)
        length = x.shape[1] if self.inner.layers[0].self_attn.batch_first else x.shape[0]
        causal = torch.ones(length, length).triu(1).bool()
        return self.inner(
            x, memory, causal, memory_key_padding_mask=mask == 0, tgt_is_causal=self.how == "told"
        )


@pytest.mark.parametrize("how", ["none", "memory", "causal", "told"])
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch", "tokens"])
def test_a_decoder(how: str, norm_first: bool, batch_first: bool) -> None:
    def inputs(batch: int, tokens: int, mask: Tensor) -> Any:
        x, memory = features(batch, tokens), features(batch, mask.shape[1], seed=1)
        if not batch_first:
            x, memory = x.transpose(0, 1), memory.transpose(0, 1)
        return x, memory, mask

    model = Decodes(norm_first, batch_first, how)
    example = inputs(2, 4, ones(2, 5))
    names = blockprune.find_blocks(model, example).names
    assert len(names) == 3
    right(
        model,
        example,
        [Trial(inputs(2, 4, padded(2, 5))), Trial(inputs(3, 2, padded(3, 7)))],
        cut=[names[0], names[1]],
        zero=["inner.layers.0.self_attn.out_proj", "inner.layers.0.multihead_attn.out_proj"],
    )


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre", "post"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_whole_transformer(norm_first: bool, masked: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nested tensors, which are not asked for
        model = wakened(
            nn.Transformer(WIDTH, 2, 1, 1, 6, 0.0, batch_first=True, norm_first=norm_first)
        )

    def inputs(mask: Tensor) -> dict[str, Any]:
        x = {"src": features(*mask.shape), "tgt": features(mask.shape[0], 4, seed=1)}
        if not masked:
            return x
        hidden = mask == 0
        causal = torch.ones(4, 4).triu(1).bool()
        more = {"tgt_mask": causal, "src_key_padding_mask": hidden}
        return {**x, **more, "memory_key_padding_mask": hidden}

    names = blockprune.find_blocks(model, inputs(ones())).names
    assert len(names) == 5
    right(
        model,
        inputs(ones()),
        [Trial(inputs(padded()))],
        cut=[names[0], names[4]],
        zero=["encoder.layers.0.self_attn.out_proj", "decoder.layers.0.linear2"],
    )


# ------------------------------------------------------------------- introspected shapes


def star_of_the_shape(self: Block, x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:2], -1)


def length_of_the_shape(self: Block, x: Tensor) -> Tensor:
    assert len(x.size()) == 3
    return x


def length_of_a_variable(self: Block, x: Tensor) -> Tensor:
    shape = x.size()
    if len(shape) == 3:
        b, n, c = shape
        return x.view(b, n, c)
    return x


def star_in_a_tuple(self: Block, x: Tensor) -> Tensor:
    b, n, c, h = *x.shape, 2
    return x.view(b, n, h, c // h).flatten(2)


def zipped(self: Block, x: Tensor) -> Tensor:
    extra = [size % window for size, window in zip(x.shape[1:], (1, 1), strict=True)]
    return functional.pad(x, (0, extra[1], 0, extra[0]))


def star_of_chunks(self: Block, x: Tensor) -> Tensor:
    whole, first, second = (x, *x.chunk(2, -1))
    return whole + torch.cat([second, first], -1)


def dimensions(self: Block, x: Tensor) -> Tensor:
    return x[None] if x.dim() != 3 else x


def half_is_clipped(self: Block, x: Tensor) -> Tensor:
    return x.clip(-6, 6) if x.dtype == torch.float16 else x


def note_on_a_value(self: Block, x: Tensor) -> Tensor:
    y = self.f(x)
    y.note = 1  # type: ignore[attr-defined]
    return y


def product_of_a_shape(self: Block, x: Tensor) -> Tensor:
    return x.view(math.prod(x.shape[:2]), -1).view_as(x)


def island(self: Block, x: Tensor) -> Tensor:
    with torch.no_grad():
        mean = x.mean()
    return x + 0 * mean


def is_tensor(self: Block, x: Tensor) -> Tensor:
    assert torch.is_tensor(x)
    assert isinstance(x, Tensor)
    return x


def iterated_shape(self: Block, x: Tensor) -> Tensor:
    sizes = [size for size in x.shape]  # noqa: C416
    return x.reshape(sizes)


def enumerated_shape(self: Block, x: Tensor) -> Tensor:
    for axis, size in enumerate(x.shape):
        assert x.size(axis) == size
    return x


def functional_attention(self: Block, x: Tensor) -> Tensor:
    heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
    out = functional.scaled_dot_product_attention(heads, heads, heads)
    return out.transpose(1, 2).flatten(2)


def sum_by_letters(self: Block, x: Tensor) -> Tensor:
    return torch.einsum("bnc,bmc->bnm", x, x).softmax(-1) @ x


LOOKS = [
    star_of_the_shape,
    length_of_the_shape,
    length_of_a_variable,
    star_in_a_tuple,
    zipped,
    star_of_chunks,
    dimensions,
    half_is_clipped,
    note_on_a_value,
    product_of_a_shape,
    island,
    is_tensor,
    iterated_shape,
    enumerated_shape,
    functional_attention,
    sum_by_letters,
]


class Looks(Block):
    """Looks at the shape of what it gets."""

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        return x + self.f(self.act(self, x))


@pytest.mark.parametrize("look", LOOKS, ids=lambda look: look.__name__)
def test_blocks_that_look_at_shapes(look: Callable[..., Tensor]) -> None:
    model = nn.Sequential(Looks(look), Looks(look), Looks(look))
    assert blockprune.find_blocks(model, features()).names == ("0", "1", "2")
    right(model, features(), [Trial(features(3, 4))], cut=["1"], zero=["1.f"])


class ByType(nn.Module):
    """A root that tests the type of an argument."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.blocks = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x: Any, t: Any = None) -> Any:
        if self.how == "list" and isinstance(x, Tensor):
            x = [x]
        if self.how == "list":
            x = torch.cat(x)
        if self.how == "step" and not torch.is_tensor(t):
            t = torch.tensor([t])
        if self.how == "match":
            match x:
                case Tensor():
                    pass
                case {"x": inner}:
                    x = inner
        if self.how == "raises" and not isinstance(x, Tensor):
            raise TypeError(f"expected a tensor, got {type(x).__name__}")
        for block in self.blocks:
            x = block(x)
        if self.how == "step":
            x = x + t.reshape(-1, 1, 1).float()
        return x


@pytest.mark.parametrize("how", ["list", "step", "match", "raises"])
@pytest.mark.parametrize("preserve_root", [False, True])
def test_roots_that_test_types(how: str, preserve_root: bool) -> None:
    model = ByType(how)
    example = (features(), torch.tensor([3, 4])) if how == "step" else features()
    found = blockprune.find_blocks(model, example, preserve_root=preserve_root)
    assert found.names == ("blocks.0", "blocks.1", "blocks.2")
    later = (features(), torch.tensor([7, 1])) if how == "step" else features(3, 2)
    right(
        model,
        example,
        [Trial(later)],
        cut="blocks.1",
        zero="blocks.1.f",
        preserve_root=preserve_root,
    )


# ----------------------------------------------------------------------- scripted children


def scripted(module: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and still met
        return torch.jit.script(module)


def compiled_by_trace(module: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(module, features())


class HasScripted(nn.Module):
    """A block with a scripted part in its branch."""

    def __init__(self, make: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.inner = make(nn.Sequential(nn.Linear(WIDTH, 5), nn.ReLU(), nn.Linear(5, WIDTH)))
        self.f = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(self.inner(x))


class ScriptedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
# A copy of what torch.jit made has weights that are no leaves, and is asked for their gradients.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("make", [scripted, compiled_by_trace], ids=["script", "trace"])
@pytest.mark.parametrize("preserve_root", [False, True])
def test_scripted_children(make: Callable[..., Any], preserve_root: bool) -> None:
    model = nn.Sequential(HasScripted(make), HasScripted(make), make(ScriptedBlock()))
    analysis = blockprune.find_blocks(model, features(), preserve_root=preserve_root)
    assert analysis.names[:2] == ("0", "1")
    inner = WIDTH * 5 + 5 + 5 * WIDTH + WIDTH
    assert analysis.block("1").params == inner + WIDTH * WIDTH + WIDTH
    right(
        model,
        features(),
        [Trial(features(3, 2)), Trial(features(), train=True)],
        cut="1",
        zero="1.f",
        preserve_root=preserve_root,
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_function() -> None:
    def gate(x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return -x
        return x.sigmoid() * x

    class Gated(Block):
        def forward(self, x: Tensor, mask: Any = None) -> Tensor:
            return x + self.f(self.act(x))

    function = scripted(gate)
    model = nn.Sequential(*[Gated(Function(function)) for _ in range(3)])
    assert blockprune.find_blocks(model, features()).names == ("0", "1", "2")
    right(model, features(), [Trial(features(3, 2))], cut="1", zero="1.f")


class Function:
    """Calls a function; unlike what torch.jit returns, it can be copied."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __deepcopy__(self, memo: Any) -> Function:
        return self


# -------------------------------------------------------------------- names of children

NAMES = ["1x", "a-b", "class", "with space", "lambda", "None", "é", "x", "_", "self", "0", "print"]


class Named(nn.Module):
    """Blocks under names that are no identifiers, or mean something else in Python."""

    def __init__(self, name: str, where: str) -> None:
        super().__init__()
        self.name, self.where = name, where
        self.stem = nn.Linear(WIDTH, WIDTH)
        if where == "child":
            self.add_module(name, Block())
        if where == "dict":
            self.many = nn.ModuleDict({name: Block(), f"{name}2": Block()})
        if where == "parameter":
            self.register_parameter(name, nn.Parameter(torch.randn(WIDTH)))
        if where == "buffer":
            self.register_buffer(name, torch.randn(WIDTH))
        self.last = Block()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.where == "dict":
            for block in self.many.values():
                x = block(x)
        elif self.where == "child":
            x = getattr(self, self.name)(x)
        else:
            x = x * getattr(self, self.name)
        return self.last(x)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["child", "dict"])
def test_children_of_any_name(name: str, where: str) -> None:
    path = name if where == "child" else f"many.{name}"
    model = Named(name, where)
    found = blockprune.find_blocks(model, features()).names
    assert found == ((path, "last") if where == "child" else (path, f"{path}2", "last"))
    trials = [Trial(features(3))]
    right(model, features(), trials, cut=path, zero=f"{path}.f")
    ticket = right(model, features(), trials, cut="last", zero="last.f")
    assert f"{path}.f.weight" in ticket.state_dict()


@pytest.mark.parametrize("name", NAMES[:4])
@pytest.mark.parametrize("where", ["parameter", "buffer"])
def test_weights_of_any_name(name: str, where: str) -> None:
    ticket = right(Named(name, where), features(), [Trial(features(3))], cut="last", zero="last.f")
    assert name in ticket.state_dict()


@pytest.mark.parametrize("name", NAMES[:3])
def test_names_further_down_and_under_a_root_that_reads(name: str) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(name, Named(name, "child"))

        def forward(self, x: Tensor) -> Tensor:
            if x.sum().item() > 1e9:
                return x
            return getattr(self, name)(x)

    path = f"{name}.{name}"
    for preserve_root in (False, True):
        right(
            Reads(),
            features(),
            [Trial(features(3))],
            cut=path,
            zero=f"{path}.f",
            preserve_root=preserve_root,
        )


# ------------------------------------------------------------------ class-level attributes


class Anchors(nn.Module):
    """A head with attributes of its class, which its forward overwrites on the instance."""

    anchors = torch.empty(0)
    shape: Any = None
    strides: Any = ()
    ready = False

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.o = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "shape" and self.shape != x.shape:
            self.anchors = torch.arange(x.shape[1]).float()[:, None]
            self.shape = x.shape
        if self.how == "length" and len(self.anchors) != x.shape[1]:
            self.anchors = torch.arange(x.shape[1]).float()[:, None]
        if self.how == "flag" and not self.ready:
            self.anchors, self.ready = torch.ones(1, 1), True
        if self.how == "pair" and (not self.training or self.shape is None):
            self.anchors, self.strides = (t * 0.5 for t in self.make(x))
            self.shape = x.shape
        return self.o(x) + self.anchors.sum()

    @staticmethod
    def make(x: Tensor) -> tuple[Tensor, Tensor]:
        n = x.shape[1]
        return torch.arange(n, dtype=x.dtype), torch.ones(n, dtype=x.dtype)


class Detects(nn.Module):
    """Keeps the outputs of its layers, as the detectors of YOLO do."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.model = nn.ModuleList([Block(), Block(), Anchors(how)])
        self.save = [1]

    def forward(self, x: Tensor) -> Any:
        kept = []
        for i, module in enumerate(self.model):
            x = module(x)
            kept.append(x if i in self.save else None)
        return x, kept[1]


@pytest.mark.parametrize("how", ["shape", "length", "flag", "pair"])
@pytest.mark.parametrize("warm", [0, 1, 2])
def test_attributes_of_a_class_that_a_forward_overwrites(how: str, warm: int) -> None:
    """The model is fresh, has run before, or has run before on another size."""
    model = Detects(how).eval()
    if warm:
        with torch.no_grad():
            model(features(2, 5 if warm == 1 else 7))
    assert blockprune.find_blocks(model, features()).names == ("model.0", "model.1")
    assert Anchors.anchors.numel() == 0
    assert Anchors.shape is None
    right(
        model,
        features(),
        [Trial(features()), Trial(features(3, 4)), Trial(features(2, 9), train=True)],
        cut="model.1",
        zero="model.1.f",
    )


# ----------------------------------------------------------------------- parallel branches

Add = Callable[[Tensor, Tensor, Tensor], Tensor]

ORDERS: dict[str, Add] = {
    "x+a+m": lambda x, a, m: x + a + m,
    "a+x+m": lambda x, a, m: a + x + m,
    "a+m+x": lambda x, a, m: a + m + x,
    "m+a+x": lambda x, a, m: m + a + x,
    "x+(a+m)": lambda x, a, m: x + (a + m),
    "(x+m)+a": lambda x, a, m: (x + m) + a,
    "m+(x+a)": lambda x, a, m: m + (x + a),
    "torch.add": lambda x, a, m: torch.add(torch.add(a, m), x),
    "in_place": lambda x, a, m: a.add_(m).add_(x),
    "sum": lambda x, a, m: sum([a, m], x),
    "operator": lambda x, a, m: operator.iadd(a + m, x),
}


class Parallel(nn.Module):
    """Attention and perceptron side by side on one norm."""

    def __init__(self, add: Add) -> None:
        super().__init__()
        self.add = add
        self.n = nn.LayerNorm(WIDTH)
        self.a = nn.Linear(WIDTH, WIDTH)
        self.m = nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = self.n(x)
        return self.add(x, self.a(h), self.m(h))


@pytest.mark.parametrize("add", ORDERS.values(), ids=ORDERS)
def test_parallel_branches_in_any_order(add: Add) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), *[Parallel(add) for _ in range(2)])
    analysis = blockprune.find_blocks(model, features())
    assert sorted(analysis.names) == ["1.a", "1.m", "2.a", "2.m"]
    assert analysis.block("1.a").params == WIDTH * WIDTH + WIDTH
    assert blockprune.find_blocks(model, features(), "layer").names == ("1", "2")
    trials = [Trial(features(3, 2), train=True)]
    right(model, features(), trials, cut="1.a", zero="1.a")
    right(model, features(), trials, cut=["1.m", "2.a"], zero=["1.m.2", "2.a"])
    ticket = right(model, features(), trials, cut=["1.a", "1.m"], zero=["1.a", "1.m.2"])
    assert not any(name.startswith("1.") for name in ticket.state_dict())


class Three(nn.Module):
    """Three branches, one of them with a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.n, self.o = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.n(x)
        return self.a(h) + (self.b(h).relu() + self.c(self.o(x))) * 1.0 + x


def test_three_branches_beside_one_another() -> None:
    """The sum of two of them is scaled: it goes as one, or each of them goes."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Three())
    names = blockprune.find_blocks(model, features()).names
    assert "1.a" in names
    right(model, features(), [Trial(features(3))], cut="1.a", zero="1.a")


class Joint(nn.Module):
    """Attention over two streams together; each has a projection of its own at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv_x, self.qkv_y = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out_x, self.out_y = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        parts = zip(self.qkv_x(x).chunk(3, -1), self.qkv_y(y).chunk(3, -1), strict=True)
        q, k, v = (torch.cat(pair, 1) for pair in parts)
        out = functional.scaled_dot_product_attention(q, k, v)
        first, second = out[:, : x.shape[1]], out[:, x.shape[1] :]
        return x + self.out_x(first), y + self.out_y(second)


class TwoStreams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Joint(), Joint()])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            x, y = layer(x, y)
        return torch.cat([x, y], 1)


def test_the_exclusive_end_of_joint_attention_goes() -> None:
    model, example = TwoStreams(), (features(), features(2, 3, seed=1))
    analysis = blockprune.find_blocks(model, example)
    assert len(analysis.names) == 4
    # In the first layer each stream still needs the keys and values of the other.
    assert analysis.blocks[0].params == WIDTH * WIDTH + WIDTH
    trials = [Trial((features(3, 4), features(3, 6, seed=2)))]
    for cut, zero in zip(
        analysis.names,
        [f"layers.{i}.out_{s}" for i in (0, 1) for s in "xy"],
        strict=True,
    ):
        right(model, example, trials, cut=cut, zero=zero)


class Shared(nn.Module):
    """A branch whose whole inside is needed elsewhere stays."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(x + h) * h


def test_a_branch_that_is_needed_whole_is_refused() -> None:
    model = nn.Sequential(Shared(), Block())
    analysis = blockprune.find_blocks(model, features())
    assert analysis.names == ("1",)
    assert any(str(rejection.reason) == "branch_escapes" for rejection in analysis.rejections)


# ------------------------------------------------------- attention that returns its weights


class Weighs(nn.Module):
    """Attention that returns its weights beside its output."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.f = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.transpose(1, 2) * 0.3
        if mask is not None:
            scores = scores + (1.0 - mask[:, None]) * -1e4
        weights = scores.softmax(-1)
        return self.f(weights @ v), weights


class Layer(nn.Module):
    """Attention and a perceptron; what it returns beside its output differs by library."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.norm, self.attn = nn.LayerNorm(WIDTH), Weighs()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 6), nn.GELU(), nn.Linear(6, WIDTH))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        outputs = self.attn(self.norm(x), mask)
        x = x + outputs[0]
        x = x + self.mlp(x)
        if self.how == "tuple":
            return (x, *outputs[1:])
        if self.how == "dict":
            return {"x": x, "weights": outputs[1]}
        return x, None


class Weighing(nn.Module):
    """Collects the weights of its layers, or does not."""

    def __init__(self, how: str, collect: bool) -> None:
        super().__init__()
        self.collect = collect
        self.layers = nn.ModuleList([Layer(how) for _ in range(3)])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        weights = []
        for layer in self.layers:
            outputs = layer(x, mask)
            x, w = outputs.values() if isinstance(outputs, dict) else outputs
            weights.append(w)
        return (x, tuple(weights)) if self.collect else x


@pytest.mark.parametrize("how", ["tuple", "dict", "none"])
@pytest.mark.parametrize("collect", [False, True])
@pytest.mark.parametrize("preserve_root", [False, True])
def test_a_layer_that_returns_weights_goes_whole_or_is_not_offered(
    how: str, collect: bool, preserve_root: bool
) -> None:
    model, example = Weighing(how, collect), (features(), ones().float())
    analysis = blockprune.find_blocks(model, example, "layer", preserve_root=preserve_root)
    whole = sum(parameter.numel() for parameter in model.layers[1].parameters())
    if how == "none" or not (collect or preserve_root):
        assert analysis.names == ("layers.0", "layers.1", "layers.2")
    if "layers.1" in analysis.names:
        assert analysis.block("layers.1").params == whole
        right_or_refused(
            model,
            example,
            [Trial((features(), padded().float()))],
            cut="layers.1",
            zero=["layers.1.attn.f", "layers.1.mlp.2"],
            granularity="layer",
            preserve_root=preserve_root,
        )


def test_the_branches_of_such_layers() -> None:
    """The weights are still returned; what only the merge needs goes."""
    model, example = Weighing("tuple", True), (features(), ones().float())
    names = blockprune.find_blocks(model, example).names
    assert len(names) == 6
    trials = [Trial((features(), padded().float()))]
    right(model, example, trials, cut=names[2], zero="layers.1.attn.f")
    right(model, example, trials, cut=names[3], zero="layers.1.mlp.2")
