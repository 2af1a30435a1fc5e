"""Each gap of an encoder-decoder is weighted by the mask of its own sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockprune
from tests.recovery.test_promises import same, state


def t5() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=32,
        d_model=8,
        d_kv=4,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        use_cache=False,
    )
    return transformers.T5ForConditionalGeneration(config).double().eval()


def batch() -> dict[str, Tensor]:
    """Sentences and their translations, as long as each other, padded to different lengths."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for prefix in ("", "decoder_"):
        found[f"{prefix}input_ids"] = torch.randint(1, 32, (12, 7), generator=generator)
        ends = torch.randint(2, 8, (12, 1), generator=generator)
        found[f"{prefix}attention_mask"] = (torch.arange(7) < ends).long()
    return found


def cut(gone: str, data: dict[str, Tensor]) -> tuple[nn.Module, nn.Module]:
    dense = t5()
    few = {name: value[:2] for name, value in data.items()}
    return dense, blockprune.remove_blocks(dense, gone, few, verify=False)


def weighted_by(
    mask: Tensor, ticket: nn.Module, dense: nn.Module, data: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return the weights after a recovery with a mask that is passed by hand."""

    def mask_fn(call: Any) -> Tensor:
        # One batch is split in two: what is fitted, and what is held out.
        first = call.kwargs["input_ids"]
        rows = [i for row in first for i in range(12) if torch.equal(data["input_ids"][i], row)]
        return mask[rows]

    return state(blockprune.recover(ticket, dense, data, ridge=1e-3, mask_fn=mask_fn))


ENCODER, DECODER = "encoder.block.0.layer.1", "decoder.block.0.layer.2"


@pytest.mark.parametrize(
    ("gone", "mask"), [(ENCODER, "attention_mask"), (DECODER, "decoder_attention_mask")]
)
def test_sequences_of_the_same_length(gone: str, mask: str) -> None:
    data = batch()
    dense, ticket = cut(gone, data)
    found = state(blockprune.recover(ticket, dense, data, ridge=1e-3))
    assert same(found, weighted_by(data[mask], ticket, dense, data))
    [other] = {"attention_mask", "decoder_attention_mask"} - {mask}
    assert not same(found, weighted_by(data[other], ticket, dense, data))


@pytest.mark.parametrize("tokens", ["decoder_input_ids", "labels"])
def test_a_decoder_without_a_mask_does_not_get_the_encoders(tokens: str) -> None:
    data = batch()
    del data["decoder_attention_mask"]
    data[tokens] = data.pop("decoder_input_ids")
    dense, ticket = cut(DECODER, data)
    found = state(blockprune.recover(ticket, dense, data, ridge=1e-3))
    assert same(found, weighted_by(torch.ones(12, 7), ticket, dense, data))
    assert not same(found, weighted_by(data["attention_mask"], ticket, dense, data))
