"""Models of transformers, tiny and with random weights: cut, generating, stored, reloaded."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockprune

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
IDS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        **SIZES, **IDS, vocab_size=64, num_hidden_layers=4, num_key_value_heads=2
    )
    return transformers.LlamaForCausalLM(config)


def qwen2() -> nn.Module:
    config = transformers.Qwen2Config(
        **SIZES, **IDS, vocab_size=64, num_hidden_layers=4, num_key_value_heads=2
    )
    return transformers.Qwen2ForCausalLM(config)


def gemma2() -> nn.Module:
    """Layers that attend to a window, and layers that attend to all, by turns."""
    config = transformers.Gemma2Config(
        **SIZES,
        **IDS,
        vocab_size=64,
        num_hidden_layers=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
    )
    return transformers.Gemma2ForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=64, n_embd=32, n_layer=4, n_head=4, **IDS
    )
    return transformers.GPT2LMHeadModel(config)


def tokens(length: int = 6) -> Tensor:
    return torch.randint(2, 64, (2, length), generator=torch.Generator().manual_seed(0))


EXAMPLE = {"input_ids": tokens()}
LANGUAGE = pytest.mark.parametrize("build", [llama, qwen2, gemma2, gpt2])


@pytest.fixture(autouse=True)
def quiet() -> Any:
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)


def layers_of(model: nn.Module) -> tuple[str, ...]:
    return blockprune.find_blocks(model, EXAMPLE, granularity="layer", preserve_root=True).names


def continued(model: nn.Module, *, cached: bool, mask: Tensor | None = None) -> Tensor:
    return model.generate(
        tokens(), attention_mask=mask, max_new_tokens=10, do_sample=False, use_cache=cached
    )


def padded() -> Tensor:
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :3] = 0
    return mask


def bypassing(model: nn.Module, *names: str) -> nn.Module:
    """Return the eager model with the named layers handing their input on."""
    model = copy.deepcopy(model)

    def input_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *out[1:]) if isinstance(out, tuple) else given

    for name in names:
        model.get_submodule(name).register_forward_hook(input_of, with_kwargs=True)
    return model


@LANGUAGE
def test_a_language_model_of_two_layers_fewer_generates_and_reloads(
    build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    dense = build().eval()
    layers = layers_of(dense)
    assert len(layers) == 4
    for gone in ([layers[0], layers[2]], [layers[1], layers[2]]):
        ticket = blockprune.remove_blocks(dense, gone, EXAMPLE, preserve_root=True)
        assert type(ticket) is type(dense)
        assert ticket.config.num_hidden_layers == 2
        reference = bypassing(dense, *gone)
        assert torch.equal(ticket(**EXAMPLE).logits, reference(**EXAMPLE).logits)
        assert sorted(slots_of(ticket)) == [0, 1]
        found = continued(ticket, cached=True)
        assert torch.equal(found, continued(ticket, cached=False))
        assert torch.equal(
            continued(ticket, cached=True, mask=padded()),
            continued(ticket, cached=False, mask=padded()),
        )
        assert torch.equal(found, continued(reference, cached=False))
        ticket.save_pretrained(tmp_path)
        again = type(dense).from_pretrained(tmp_path).eval()
        assert again.state_dict().keys() == ticket.state_dict().keys()
        assert torch.equal(again(**EXAMPLE).logits, ticket(**EXAMPLE).logits)
        assert torch.equal(continued(again, cached=True), found)
    assert dense.config.num_hidden_layers == 4
    assert sorted(slots_of(dense)) == [0, 1, 2, 3]


def slots_of(model: nn.Module) -> list[int]:
    return [vars(module)["layer_idx"] for module in model.modules() if "layer_idx" in vars(module)]


def test_lists_of_layers_in_a_configuration_lose_the_entries_of_those_that_went() -> None:
    dense = gemma2().eval()
    assert dense.config.layer_types == ["sliding_attention", "full_attention"] * 2
    ticket = blockprune.remove_blocks(
        dense, ["model.layers.1", "model.layers.2"], EXAMPLE, preserve_root=True
    )
    assert ticket.config.layer_types == ["sliding_attention", "full_attention"]
    ticket = blockprune.remove_blocks(dense, ["model.layers.1"], EXAMPLE, preserve_root=True)
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    assert ticket.config.layer_types == kinds
    assert dense.config.layer_types == ["sliding_attention", "full_attention"] * 2


@LANGUAGE
def test_a_model_without_its_first_attention_generates_alike_with_a_cache(
    build: Callable[[], nn.Module],
) -> None:
    dense = build().eval()
    names = blockprune.find_blocks(dense, EXAMPLE, preserve_root=True).names
    attentions = [name for name in names if "attn" in name]
    for gone in ([attentions[0]], [*attentions[1:3], names[-1]]):
        ticket = blockprune.remove_blocks(dense, gone, EXAMPLE, preserve_root=True)
        for mask in (None, padded()):
            assert torch.equal(
                continued(ticket, cached=True, mask=mask),
                continued(ticket, cached=False, mask=mask),
            )


def test_a_layer_and_a_branch_can_go_together() -> None:
    dense = llama().eval()
    gone = ["model.layers.0", "model.layers.2.self_attn"]
    ticket = blockprune.remove_blocks(dense, gone, EXAMPLE, preserve_root=True)
    assert len(ticket.model.layers) == 3
    assert torch.equal(continued(ticket, cached=True), continued(ticket, cached=False))


def test_prune_ranks_the_layers_of_a_language_model() -> None:
    dense = llama().eval()
    inputs = {"input_ids": tokens(), "labels": tokens()}
    ticket = blockprune.prune(
        dense, "l1", 2, example_inputs=inputs, granularity="layer", preserve_root=True
    )
    assert len(ticket.model.layers) == 2
    assert torch.equal(continued(ticket, cached=True), continued(ticket, cached=False))


def test_a_ticket_file_holds_a_language_model(tmp_path: Path) -> None:
    dense = llama().eval()
    ticket = blockprune.remove_blocks(dense, "model.layers.1", EXAMPLE, preserve_root=True)
    blockprune.save_ticket(ticket, tmp_path / "ticket")
    again = blockprune.load_ticket(dense, tmp_path / "ticket")
    assert again.config.num_hidden_layers == 3
    assert torch.equal(again(**EXAMPLE).logits, ticket(**EXAMPLE).logits)


def test_a_scale_that_depends_on_the_place_stays_and_is_told() -> None:
    config = transformers.GPT2Config(
        vocab_size=64,
        n_positions=64,
        n_embd=32,
        n_layer=3,
        n_head=4,
        scale_attn_by_inverse_layer_idx=True,
        **IDS,
    )
    dense = transformers.GPT2LMHeadModel(config).eval()
    with pytest.warns(UserWarning, match=r"scaling of 'transformer\.h\.\d\.attn'"):
        ticket = blockprune.remove_blocks(dense, "transformer.h.0", EXAMPLE, preserve_root=True)
    reference = bypassing(dense, "transformer.h.0")
    assert torch.equal(ticket(**EXAMPLE).logits, reference(**EXAMPLE).logits)


def test_encoder_and_decoder_follow_their_own_entries(tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, **IDS
    )
    config.decoder_start_token_id = 0
    dense = transformers.T5ForConditionalGeneration(config).eval()
    example = {"input_ids": tokens(), "decoder_input_ids": tokens(4)}
    analysis = blockprune.find_blocks(dense, example, granularity="layer")
    # The first block of each stack computes the position bias of all.
    assert {"encoder.block.1", "encoder.block.2", "decoder.block.1"} <= set(analysis.names)
    assert "encoder.block.0" not in analysis.names
    gone = ["encoder.block.1", "decoder.block.1", "decoder.block.2"]
    ticket = blockprune.remove_blocks(dense, gone, example, preserve_root=True)
    assert (ticket.config.num_layers, ticket.config.num_decoder_layers) == (2, 1)
    reference = bypassing(dense, *gone)
    assert torch.equal(ticket(**example).logits, reference(**example).logits)
    ticket.save_pretrained(tmp_path)
    again = type(dense).from_pretrained(tmp_path).eval()
    assert torch.equal(again(**example).logits, ticket(**example).logits)


def test_a_vision_model_reloads_and_a_post_norm_model_as_an_approximation(tmp_path: Path) -> None:
    images = {"pixel_values": torch.rand(2, 3, 16, 16)}
    config = transformers.ViTConfig(**SIZES, num_hidden_layers=3, image_size=16, patch_size=8)
    dense = transformers.ViTForImageClassification(config).eval()
    names = blockprune.find_blocks(dense, images, granularity="layer", preserve_root=True).names
    ticket = blockprune.remove_blocks(dense, names[1], images, preserve_root=True)
    ticket.save_pretrained(tmp_path / "vit")
    again = type(dense).from_pretrained(tmp_path / "vit").eval()
    assert torch.equal(again(**images).logits, ticket(**images).logits)

    config = transformers.BertConfig(**SIZES, vocab_size=64, num_hidden_layers=3, pad_token_id=0)
    dense = transformers.BertForMaskedLM(config).eval()
    gone = ["bert.encoder.layer.1"]
    with pytest.raises(blockprune.BlockNotRemovableError, match="layer_approx"):
        blockprune.remove_blocks(dense, gone, EXAMPLE, preserve_root=True)
    with pytest.warns(blockprune.ApproximationWarning):
        ticket = blockprune.remove_blocks(
            dense, gone, EXAMPLE, preserve_root=True, granularity="layer_approx"
        )
    assert ticket.config.num_hidden_layers == 2
    reference = bypassing(dense, *gone)
    assert torch.equal(ticket(**EXAMPLE).logits, reference(**EXAMPLE).logits)
    ticket.save_pretrained(tmp_path / "bert")
    again = type(dense).from_pretrained(tmp_path / "bert").eval()
    assert torch.equal(again(**EXAMPLE).logits, ticket(**EXAMPLE).logits)


# --- configurations that say it in some way of their own ----------------------------------------


class OwnConfig(transformers.PretrainedConfig):
    """Says how many layers there are as `depth`, and what follows from it as `spare`."""

    model_type = "own"

    def __init__(self, heads: int = 4, depth: int = 4, spare: int | None = None, **rest: Any):
        if 8 % heads:
            raise ValueError(f"{heads} heads do not divide 8")
        self.heads, self.depth = heads, depth
        self.spare = depth if spare is None else spare
        super().__init__(**rest)


class PairsConfig(transformers.PretrainedConfig):
    """Says how many pairs of layers there are."""

    model_type = "pairs"

    def __init__(self, pairs: int = 2, **rest: Any):
        self.pairs = pairs
        super().__init__(**rest)


class StagesConfig(transformers.PretrainedConfig):
    """Says how many layers there are in each stage."""

    model_type = "stages"

    def __init__(self, depths: Any = (3, 4), **rest: Any):
        self.depths = list(depths)
        super().__init__(**rest)


class Scaled(nn.Module):
    """A layer that may compute with its number, in code that no trace can follow."""

    def __init__(self, slot: int, computes: bool = False) -> None:
        super().__init__()
        self.f, self.attention = nn.Linear(8, 8), Numbered(slot, computes)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.f(x).relu()


class Numbered(nn.Module):
    def __init__(self, slot: int, computes: bool) -> None:
        super().__init__()
        self.layer_idx, self.mix, self.computes = slot, nn.Linear(8, 8), computes

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().abs().max()) > 1e6:
            raise ValueError("too large")
        return self.mix(x) * (1 + self.layer_idx if self.computes else 1)


class OwnModel(transformers.PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "own"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.spare != config.depth:
            raise ValueError("depth and spare differ")
        self.layers = nn.ModuleList(self.layer(slot) for slot in range(config.depth))
        self.post_init()

    def layer(self, slot: int) -> nn.Module:
        return Scaled(slot)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class CountingModel(OwnModel):
    """Its attention computes with its number."""

    def layer(self, slot: int) -> nn.Module:
        return Scaled(slot, computes=True)


class PairsModel(OwnModel):
    config_class = PairsConfig

    def __init__(self, config: Any) -> None:
        transformers.PreTrainedModel.__init__(self, config)
        self.layers = nn.ModuleList(Scaled(slot) for slot in range(2 * config.pairs))
        self.post_init()


class StagesModel(OwnModel):
    config_class = StagesConfig

    def __init__(self, config: Any) -> None:
        transformers.PreTrainedModel.__init__(self, config)
        self.first, self.second = (
            nn.ModuleList(Scaled(slot) for slot in range(depth)) for depth in config.depths
        )
        self.post_init()

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.first, *self.second):
            x = layer(x)
        return x


def without(model: nn.Module, *names: str) -> nn.Module:
    """Return the eager model with the named modules handing their one input on."""
    model = copy.deepcopy(model)
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda module, args, out: args[0])
    return model


STREAM = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("dense", "gone", "left"),
    [
        (lambda: OwnModel(OwnConfig()), ["layers.1"], {"heads": 4, "depth": 3, "spare": 3}),
        (
            lambda: StagesModel(StagesConfig()),
            ["second.0", "second.2", "first.1"],
            {"depths": [2, 2]},
        ),
    ],
)
def test_the_entry_that_counts_the_layers_is_found_by_what_it_builds(
    dense: Callable[[], Any], gone: list[str], left: dict[str, Any], tmp_path: Path
) -> None:
    model = dense().eval()
    ticket = blockprune.remove_blocks(model, gone, STREAM, granularity="layer", preserve_root=True)
    assert {name: getattr(ticket.config, name) for name in left} == left
    assert torch.equal(ticket(STREAM), without(model, *gone)(STREAM))
    ticket.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(again(STREAM), ticket(STREAM))


def changed_by_hand() -> Any:
    model = OwnModel(OwnConfig())
    model.layers[0].f = nn.Linear(8, 8, bias=False)
    return model


@pytest.mark.parametrize("dense", [lambda: PairsModel(PairsConfig()), changed_by_hand])
def test_a_configuration_that_cannot_say_it_is_left_alone_and_told(
    dense: Callable[[], Any],
) -> None:
    model = dense().eval()
    before = model.config.to_dict()
    with pytest.warns(UserWarning, match="configuration could not be brought in step"):
        ticket = blockprune.remove_blocks(
            model, "layers.1", STREAM, granularity="layer", preserve_root=True
        )
    assert len(ticket.layers) == 3
    assert ticket.config.to_dict() == before
    assert torch.equal(ticket(STREAM), without(model, "layers.1")(STREAM))


@pytest.mark.parametrize("kind", [OwnModel, CountingModel])
def test_slots_of_a_cache_move_up_only_where_nothing_is_computed_with_them(kind: Any) -> None:
    model = kind(OwnConfig(depth=3)).eval()
    gone = "layers.0.attention"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ticket = blockprune.remove_blocks(model, gone, STREAM, preserve_root=True)
    computes = kind is CountingModel
    assert slots_of(ticket) == ([1, 2] if computes else [0, 1])
    assert ["keep their slots" in str(warning.message) for warning in told] == [True] * computes
    reference = copy.deepcopy(model)
    reference.get_submodule(gone).register_forward_hook(lambda module, args, out: 0 * out)
    assert torch.equal(ticket(STREAM), reference(STREAM))
