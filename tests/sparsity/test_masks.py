from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from blockprune.errors import BlockpruneError, MaskError
from blockprune.sparsity import LayerSparsity, Mask, with_prune
from blockprune.tensor_files import digest_of
from tests.sparsity.nets import Small, Tied, half_mask, small


def test_full_takes_the_weights_of_convolutions_and_linear_layers_alone() -> None:
    model = nn.Sequential(
        nn.Conv1d(1, 2, 3),
        nn.Conv3d(1, 2, 1),
        nn.ConvTranspose2d(2, 1, 2),
        nn.BatchNorm2d(2),
        nn.Embedding(4, 2),
        nn.LayerNorm(2),
        nn.Linear(2, 2),
        nn.LSTM(2, 2),
    )
    mask = Mask.full(model)
    assert list(mask.keep) == ["0.weight", "1.weight", "2.weight", "6.weight"]
    assert (mask.kept, mask.total) == (6 + 2 + 8 + 4, 20)
    assert mask.density == 1.0


def test_a_shared_weight_counts_once_and_is_masked_under_both_names() -> None:
    model = Tied()
    mask = Mask.full(model)
    assert list(mask.keep) == ["first.weight"]
    assert mask.total == 16
    none = Mask({"first.weight": torch.zeros(4, 4, dtype=torch.bool)}, mask.aliases)
    found = none.apply(model.state_dict())
    assert not found["first.weight"].any()
    assert not found["second.weight"].any()
    untied = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
    with pytest.raises(MaskError, match=r"second\.weight and first\.weight are two weights"):
        mask.fits(untied)
    with pytest.raises(MaskError, match=r"first\.weight and second\.weight are one weight"):
        Mask.full(untied).fits(model)


def test_a_weight_shared_with_an_embedding_goes_by_its_first_name() -> None:
    model = nn.ModuleDict({"tokens": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
    model["head"].weight = model["tokens"].weight
    mask = Mask.full(model)
    assert list(mask.keep) == ["tokens.weight"]
    assert mask.aliases == {"head.weight": "tokens.weight"}


def test_models_without_such_weights_are_refused() -> None:
    with pytest.raises(MaskError, match="no convolution and no linear layer"):
        Mask.full(nn.BatchNorm2d(3))
    with pytest.raises(MaskError, match="has no shape yet"):
        Mask.full(nn.Sequential(nn.LazyLinear(3)))
    model = small()
    with_prune(model, half_mask(model))
    with pytest.raises(MaskError, match="the weight of conv is computed from others"):
        Mask.full(model)
    with pytest.raises(MaskError, match=r"conv\.weight is pruned by torch"):
        half_mask(small()).fits(model)
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(MaskError, match="remove_parametrizations"):
        Mask.full(normed)


def test_counts_and_collapse() -> None:
    mask = Mask({"a": torch.tensor([True, False, False, False]), "b": torch.zeros(3) > 0})
    assert mask.layers == {"a": LayerSparsity(1, 4), "b": LayerSparsity(0, 3)}
    assert (mask.kept, mask.total, mask.density) == (1, 7, 1 / 7)
    assert mask.layers["a"].sparsity == 0.75
    assert mask.collapsed == ("b",)


def test_a_mask_is_a_value() -> None:
    given = torch.ones(3, dtype=torch.bool)
    mask = Mask({"a": given})
    given[0] = False
    assert mask.kept == 3
    twin = Mask({"a": torch.ones(3, dtype=torch.bool)})
    assert mask == twin
    assert len({mask, twin}) == 1
    assert mask != Mask({"a": given})
    assert mask != Mask({"b": torch.ones(3, dtype=torch.bool)})
    assert mask != Mask({"a": torch.ones(3, 1, dtype=torch.bool)})
    assert mask != "mask"
    assert pickle.loads(pickle.dumps(mask)) == mask


def test_only_booleans_are_masks() -> None:
    with pytest.raises(MaskError, match=r"that of a is torch\.float32"):
        Mask({"a": torch.ones(3)})
    with pytest.raises(MaskError, match="cannot be another name"):
        Mask({"a": torch.ones(3) > 0}, {"b": "c"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_apply_multiplies_and_leaves_the_input(dtype: torch.dtype) -> None:
    model = small().to(dtype)
    mask = half_mask(model)
    weights = model.state_dict()
    before = {name: tensor.clone() for name, tensor in weights.items()}
    found = mask.apply(weights)
    for name, tensor in weights.items():
        assert tensor.equal(before[name])
        assert found[name].dtype == tensor.dtype
        if name in mask.keep:
            assert found[name].equal(tensor * mask.keep[name])
            assert found[name].data_ptr() != tensor.data_ptr()
        else:
            assert found[name] is tensor


def test_a_pruned_weight_is_zero_even_where_it_was_not_finite() -> None:
    mask = Mask({"a": torch.tensor([True, False, False])})
    found = mask.apply({"a": torch.tensor([1.0, torch.nan, torch.inf])})
    assert found["a"].tolist() == [1.0, 0.0, 0.0]


def test_what_does_not_fit_is_named() -> None:
    mask = Mask({"head.weight": torch.ones(3, 6) > 0, "heads.weight": torch.ones(2) > 0})
    with pytest.raises(MaskError, match=r"Small: heads\.weight is missing\. Did you mean head\."):
        mask.fits(Small())
    wrong = Mask({"head.weight": torch.ones(2, 6) > 0})
    with pytest.raises(MaskError, match=r"head\.weight is \(3, 6\), and \(2, 6\) in the mask"):
        wrong.fits(Small())
    with pytest.raises(MaskError, match=r"head\.weight is \(3, 6\), and \(2, 6\) in the mask"):
        wrong.apply(Small().state_dict())
    with pytest.raises(MaskError, match="is missing"):
        wrong.apply({})
    Mask.full(Small()).fits(Small())


def test_files_round_trip_in_order(tmp_path: Path) -> None:
    mask = Mask({"z": torch.rand(4, 5) < 0.5, "a": torch.rand(7) < 0.5}, {"b": "a"})
    mask.save(tmp_path / "mask")
    mask.save(tmp_path / "again")
    found = Mask.load(tmp_path / "mask")
    assert found == mask
    assert list(found.keep) == ["z", "a"]
    assert found.aliases == {"b": "a"}
    assert (tmp_path / "mask").read_bytes() == (tmp_path / "again").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "mask"]


def test_files_that_are_no_masks_are_refused(tmp_path: Path) -> None:
    mask = half_mask(small())
    mask.save(tmp_path / "mask")
    whole = (tmp_path / "mask").read_bytes()
    with safe_open(tmp_path / "mask", framework="pt") as file:
        header = json.loads(file.metadata()["blockprune"])

    def refused(match: str) -> None:
        with pytest.raises(MaskError, match=match) as caught:
            Mask.load(tmp_path / "bad")
        assert isinstance(caught.value, BlockpruneError)

    refused("there is no mask file")
    for cut in (0, 4, len(whole) // 2, len(whole) - 1):
        (tmp_path / "bad").write_bytes(whole[:cut])
        refused("not a readable safetensors file")
    for place in range(len(whole) - mask.total, len(whole), 37):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        (tmp_path / "bad").write_bytes(flipped)
        refused("damaged")
    (tmp_path / "bad").write_bytes(pickle.dumps({"keep": 1}))
    refused("not a readable safetensors file")
    save_file({"a": torch.ones(3)}, tmp_path / "bad")
    refused("no mask: Mask.save writes those")
    save_file({"a": torch.ones(3)}, tmp_path / "bad", metadata={"blockprune": "{}"})
    refused("does not hold a valid mask header")
    del header["digest"]
    header.update(layers=["a"], aliases={})
    for tensors in ({"a": torch.ones(3)}, {"b": torch.ones(3) > 0}):
        text = json.dumps({**header, "digest": digest_of(header, tensors)})
        save_file(tensors, tmp_path / "-".join(tensors), metadata={"blockprune": text})
    (tmp_path / "a").replace(tmp_path / "bad")
    refused("a mask is boolean")
    (tmp_path / "b").replace(tmp_path / "bad")
    refused("not those that its header names")


def test_nothing_half_written(tmp_path: Path) -> None:
    with pytest.raises(MaskError, match="does not exist"):
        half_mask(small()).save(tmp_path / "none" / "mask")
    (tmp_path / "mask").mkdir()
    with pytest.raises(MaskError, match="cannot be written"):
        half_mask(small()).save(tmp_path / "mask")
    assert [path.name for path in tmp_path.iterdir()] == ["mask"]
