"""Batches: the example says nothing about how many samples and tokens come later."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockprune
from tests.recording.law import Trial, right, right_or_refused
from tests.recording.nets import WIDTH, Block, Net, features, ones, padded


class Queries(nn.Module):
    """Learned queries of batch one that attend to a batch, as a Perceiver's latents do."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.latents = nn.Parameter(torch.randn(1, 3, WIDTH))
        self.plain = nn.Parameter(torch.randn(3, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.first, self.second = Attends(), Attends()
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = {
            "latents": lambda: self.latents,
            "normed": lambda: self.norm(self.latents),
            "added": lambda: self.latents + self.plain,
            "unsqueezed": lambda: self.plain[None],
            "expanded": lambda: self.latents.expand(x.shape[0], -1, -1),
            "repeated": lambda: self.latents.repeat(len(x), 1, 1),
            "zeros": lambda: torch.zeros(1, 3, WIDTH) + self.plain,
            "no_batch": lambda: self.plain,
        }[self.how]()
        return self.head(self.second(self.first(z, x), x))


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return z + self.f((z @ x.transpose(-1, -2) * 0.3).softmax(-1) @ x)


@pytest.mark.parametrize("how", ["latents", "normed", "added", "unsqueezed", "zeros", "no_batch"])
@pytest.mark.parametrize("batch", [1, 3])
def test_queries_of_batch_one(how: str, batch: int) -> None:
    """The first merge makes the batch: its shortcut is of another shape as soon as there are two.

    The dense model then returns a row for each sample; a ticket without the first branch goes on
    with one row and differs in shape where no other branch makes it right, so that it is refused,
    or repeats the row.
    """
    trials = [Trial(features(4)), Trial(features(1)), Trial(features(2, 7), train=True)]
    right_or_refused(Queries(how), features(batch), trials, cut="first", zero="first.f")


@pytest.mark.parametrize("how", ["latents", "normed", "expanded", "repeated"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("preserve_root", [False, True])
def test_the_block_behind_the_queries(how: str, batch: int, preserve_root: bool) -> None:
    right(
        Queries(how),
        features(batch),
        [Trial(features(4)), Trial(features(1)), Trial(features(2, 7), train=True)],
        cut="second",
        zero="second.f",
        preserve_root=preserve_root,
    )


@pytest.mark.parametrize("how", ["expanded", "repeated"])
@pytest.mark.parametrize("batch", [1, 3])
def test_queries_that_are_made_as_many_as_samples(how: str, batch: int) -> None:
    right(
        Queries(how),
        features(batch),
        [Trial(features(4)), Trial(features(1)), Trial(features(2, 7))],
        cut="first",
        zero="first.f",
    )


def test_both_queries_go() -> None:
    right_or_refused(
        Queries("latents"),
        features(1),
        [Trial(features(4))],
        cut=["first", "second"],
        zero=["first.f", "second.f"],
    )


class Positions(nn.Module):
    """A shortcut that has one row, or one token, by nature."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(shape))
        self.f = nn.Linear(WIDTH, WIDTH)
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.table + self.f(x + self.table))


@pytest.mark.parametrize("shape", [(1, 5, WIDTH), (5, WIDTH), (1, 1, WIDTH), (WIDTH,)], ids=str)
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_table_is_no_shortcut(shape: tuple[int, ...], tokens: int) -> None:
    model, x = Positions(shape), features(1, 5 if 5 in shape else tokens)
    assert "" not in blockprune.find_blocks(model, x).names
    right(model, x, [Trial(features(3, x.shape[1]))], cut="block", zero="block.f")


class Gated(nn.Module):
    """A shortcut that is pooled over the tokens, of which the example may have one."""

    def __init__(self, keep: bool) -> None:
        super().__init__()
        self.keep = keep
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.f = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        pooled = x.mean(1, keepdim=True)
        return self.head(pooled + self.f(x * pooled))


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_pooled_shortcut_of_one_token(tokens: int) -> None:
    model, x = Gated(True), features(2, tokens)
    analysis = blockprune.find_blocks(model, x)
    for name in analysis.names:
        right_or_refused(model, x, [Trial(features(2, 6))], cut=name, zero="f")


class Attention(nn.Module):
    """Attention that masks, in one of the usual ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.qkv, self.f = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.how == "sdpa":
            keep = None if mask is None else mask.bool()[:, None]
            out = nn.functional.scaled_dot_product_attention(q, k, v, keep)
            return x + self.f(out)
        scores = q @ k.transpose(-1, -2) * WIDTH**-0.5
        if mask is not None:
            if self.how == "filled":
                scores = scores.masked_fill(mask[:, None] == 0, -1e9)
            elif self.how == "where":
                scores = torch.where(mask[:, None].bool(), scores, torch.tensor(-1e9))
            elif self.how == "added":
                scores = scores + (1 - mask[:, None].to(x)) * -1e9
            else:
                scores = scores * mask[:, None]
        return x + self.f(scores.softmax(-1) @ v)


@pytest.mark.parametrize("how", ["sdpa", "filled", "where", "added", "multiplied"])
@pytest.mark.parametrize("preserve_root", [False, True])
def test_masks_that_are_padded_later(how: str, preserve_root: bool) -> None:
    right(
        Net(Attention(how), Block(), Attention(how)),
        (features(), ones()),
        [
            Trial((features(), padded())),
            Trial((features(3, 7), padded(3, 7)), train=True),
            Trial((features(1, 2), ones(1, 2))),
        ],
        cut=["blocks.1", "blocks.2"],
        zero=["blocks.1.f", "blocks.2.f"],
        preserve_root=preserve_root,
    )


class Images(nn.Module):
    """Convolutions and norms, with a head for images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(*[ImageBlock() for _ in range(3)])
        self.head = nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(self.stem(images))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


class ImageBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.f = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(self.norm(x).relu())


@pytest.mark.parametrize("batch", [1, 2])
def test_images_of_other_sizes(batch: int) -> None:
    torch.manual_seed(0)
    shapes = [(3, 3, 8, 8), (1, 3, 5, 9), (2, 3, 16, 4)]
    trials = [Trial(torch.rand(shape), train) for shape in shapes for train in (False, True)]
    example = torch.rand(batch, 3, 8, 8)
    right(Images(), example, trials, cut="blocks.1", zero="blocks.1.f")


@pytest.mark.parametrize("pack", ["tuple", "dict"])
def test_batches_in_containers(pack: str) -> None:
    def inputs(*shape: int, later: bool = False) -> Any:
        mask = padded(*shape) if later else ones(*shape)
        x = features(*shape)
        return (x, mask) if pack == "tuple" else {"x": x, "mask": mask}

    right(
        Net(Attention("filled"), Block()),
        inputs(1, 5),
        [Trial(inputs(4, 5, later=True)), Trial(inputs(2, 9, later=True))],
        cut="blocks.1",
        zero="blocks.1.f",
    )


def test_an_empty_batch() -> None:
    net = Net(Block(), Block())
    trial = Trial((features(0), ones(0)), backward=False)
    right_or_refused(net, (features(), ones()), [trial], cut="blocks.1", zero="blocks.1.f")
