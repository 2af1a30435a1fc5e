"""Models of text, sound and other sequences."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .configuration import BATCH, Built, Configuration

__all__ = ["CONFIGURATIONS"]

VOCABULARY = 97
LENGTH = 8


def _ids(length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, length))


def _vectors(width: int, length: int = LENGTH) -> Tensor:
    return torch.rand(BATCH, length, width)


def _litgpt(base: str, **options: Any) -> Built:
    from litgpt import GPT, Config

    sizes = {
        "n_layer": 3,
        "n_embd": 16,
        "n_head": 2,
        "n_query_groups": 2,
        "head_size": 8,
        "intermediate_size": 32,
        "vocab_size": VOCABULARY,
        "padded_vocab_size": VOCABULARY,
        "block_size": 32,
    }
    return GPT(Config.from_name(base, **{**sizes, **options})), _ids()


def _x_transformers(kind: str, **options: Any) -> Built:
    import x_transformers

    layers = getattr(x_transformers, kind)(dim=16, depth=3, heads=2, attn_dim_head=8, **options)
    model = x_transformers.TransformerWrapper(
        num_tokens=VOCABULARY, max_seq_len=16, attn_layers=layers
    )
    return model, _ids()


def _x_encoder_decoder() -> Built:
    import x_transformers

    sizes = {"num_tokens": VOCABULARY, "max_seq_len": 16, "depth": 2, "heads": 2}
    model = x_transformers.XTransformer(
        dim=16,
        **{f"{side}_{key}": value for side in ("enc", "dec") for key, value in sizes.items()},
    )
    return model, (_ids(), _ids(6))


def _lora(kind: str) -> Built:
    import peft
    import transformers as hf

    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    if kind == "Llama":
        config = hf.LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes)
        base, targets = hf.LlamaForCausalLM(config), ["q_proj", "v_proj"]
        inputs: dict[str, Tensor] = {"input_ids": _ids()}
    else:
        base = hf.ViTForImageClassification(hf.ViTConfig(image_size=32, patch_size=8, **sizes))
        targets = ["q_proj", "v_proj"]
        inputs = {"pixel_values": torch.rand(BATCH, 3, 32, 32)}
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=targets))
    return adapted, inputs


def _sentences() -> Built:
    import sentence_transformers
    import transformers as hf
    from sentence_transformers import models

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = hf.BertConfig(
                vocab_size=VOCABULARY,
                hidden_size=16,
                num_hidden_layers=3,
                num_attention_heads=2,
                intermediate_size=32,
            )
            self.auto_model = hf.BertModel(config)

        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            found = self.auto_model(
                input_ids=features["input_ids"], attention_mask=features["attention_mask"]
            )
            features["token_embeddings"] = found.last_hidden_state
            return features

    model = sentence_transformers.SentenceTransformer(
        modules=[Encoder(), models.Pooling(16), models.Normalize()], device="cpu"
    )
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, 6:] = 0
    return model, ({"input_ids": _ids(), "attention_mask": mask},)


def _linformer() -> Built:
    from linformer import LinformerLM

    model = LinformerLM(num_tokens=VOCABULARY, dim=16, seq_len=LENGTH, depth=3, heads=2, k=4)
    return model, _ids()


def _local() -> Built:
    from local_attention import LocalTransformer

    model = LocalTransformer(
        num_tokens=VOCABULARY,
        dim=16,
        depth=3,
        heads=2,
        dim_head=8,
        max_seq_len=16,
        local_attn_window_size=4,
        num_residual_streams=1,
    )
    return model, _ids()


def _perceiver() -> Built:
    from perceiver_pytorch import Perceiver

    model = Perceiver(
        num_freq_bands=2,
        depth=2,
        max_freq=4.0,
        num_latents=6,
        latent_dim=16,
        latent_heads=2,
        cross_dim_head=8,
        latent_dim_head=8,
        num_classes=5,
    )
    return model, torch.rand(BATCH, 8, 8, 3)


def _perceiver_io() -> Built:
    from perceiver_pytorch import PerceiverIO

    model = PerceiverIO(
        dim=12,
        queries_dim=16,
        logits_dim=5,
        depth=2,
        num_latents=6,
        latent_dim=16,
        latent_heads=2,
        cross_dim_head=8,
        latent_dim_head=8,
        decoder_ff=True,
    )
    return model, {"data": _vectors(12), "queries": _vectors(16, 4)}


def _conformer() -> Built:
    from conformer import Conformer

    return Conformer(dim=16, depth=2, dim_head=8, heads=2, conv_kernel_size=3), _vectors(16)


def _torchaudio(kind: str) -> Built:
    import torchaudio

    if kind == "Conformer":
        model: nn.Module = torchaudio.models.Conformer(
            input_dim=16, num_heads=2, ffn_dim=32, num_layers=2, depthwise_conv_kernel_size=3
        )
        return model, (_vectors(16), torch.tensor([LENGTH, 6]))
    if kind == "ConvTasNet":
        model = torchaudio.models.ConvTasNet(
            enc_num_feats=8,
            msk_num_feats=8,
            msk_num_hidden_feats=16,
            msk_num_layers=2,
            msk_num_stacks=2,
        )
        return model, torch.rand(BATCH, 1, 400)
    model = torchaudio.models.wav2vec2_model(
        extractor_mode="group_norm",
        extractor_conv_layer_config=[(8, 8, 4), (8, 4, 2)],
        extractor_conv_bias=False,
        encoder_embed_dim=16,
        encoder_projection_dropout=0.1,
        encoder_pos_conv_kernel=4,
        encoder_pos_conv_groups=2,
        encoder_num_layers=3,
        encoder_num_heads=2,
        encoder_attention_dropout=0.1,
        encoder_ff_interm_features=32,
        encoder_ff_interm_dropout=0.1,
        encoder_dropout=0.1,
        encoder_layer_norm_first=False,
        encoder_layer_drop=0.0,
        aux_num_out=5,
    )
    return model, torch.rand(BATCH, 400)


def _chronos() -> Built:
    import transformers as hf
    from chronos.chronos_bolt import ChronosBoltModelForForecasting

    config = hf.T5Config(
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        vocab_size=2,
        feed_forward_proj="relu",
        pad_token_id=0,
        decoder_start_token_id=0,
        chronos_config={
            "context_length": 32,
            "prediction_length": 8,
            "input_patch_size": 4,
            "input_patch_stride": 4,
            "quantiles": [0.1, 0.5, 0.9],
            "use_reg_token": True,
        },
    )
    return ChronosBoltModelForForecasting(config), {"context": torch.rand(BATCH, 32)}


CONFIGURATIONS = (
    Configuration(
        "litgpt",
        "Pythia",
        6,
        "attention and MLP side by side in 3 layers",
        functools.partial(_litgpt, "pythia-14m"),
    ),
    Configuration(
        "litgpt",
        "Llama",
        6,
        "attention and MLP of 3 layers",
        functools.partial(_litgpt, "Llama-3.2-1B"),
    ),
    Configuration(
        "litgpt",
        "Gemma 2",
        6,
        "attention and MLP of 3 layers",
        functools.partial(_litgpt, "Gemma-2-2b"),
    ),
    Configuration(
        "litgpt",
        "Mixtral",
        6,
        "attention and experts of 3 layers",
        functools.partial(_litgpt, "Mixtral-8x7B-v0.1", n_expert=4),
    ),
    Configuration(
        "x-transformers",
        "Decoder",
        6,
        "attention and MLP of 3 layers",
        functools.partial(_x_transformers, "Decoder"),
    ),
    Configuration(
        "x-transformers",
        "Encoder, rotary and RMSNorm",
        6,
        "attention and MLP of 3 layers",
        functools.partial(_x_transformers, "Encoder", rotary_pos_emb=True, use_rmsnorm=True),
    ),
    Configuration(
        "x-transformers",
        "XTransformer",
        10,
        "2 x 2 of the encoder, 2 x 3 of the decoder",
        _x_encoder_decoder,
    ),
    Configuration(
        "peft",
        "LoRA of Llama",
        6,
        "attention and MLP of 3 layers; LoRA adds to a projection",
        functools.partial(_lora, "Llama"),
    ),
    Configuration(
        "peft",
        "LoRA of ViT",
        6,
        "attention and MLP of 3 layers; LoRA adds to a projection",
        functools.partial(_lora, "ViT"),
    ),
    Configuration(
        "sentence-transformers",
        "BERT, pooling, norm",
        6,
        "attention and MLP of 3 layers",
        _sentences,
    ),
    Configuration("linformer", "LinformerLM", 6, "attention and MLP of 3 layers", _linformer),
    Configuration(
        "local-attention", "LocalTransformer", 6, "attention and MLP of 3 layers", _local
    ),
    Configuration(
        "perceiver-pytorch",
        "Perceiver",
        8,
        "attention across and within, each with an MLP, of 2 layers",
        _perceiver,
    ),
    Configuration(
        "perceiver-pytorch",
        "PerceiverIO",
        7,
        "2 across, 2 x 2 within, the MLP of the decoder",
        _perceiver_io,
    ),
    Configuration("conformer", "Conformer", 8, "4 of each of 2 layers", _conformer),
    Configuration(
        "torchaudio",
        "Conformer",
        8,
        "4 of each of 2 layers",
        functools.partial(_torchaudio, "Conformer"),
    ),
    Configuration(
        "torchaudio",
        "ConvTasNet",
        3,
        "4 blocks; the last hands on nothing but its skip connection",
        functools.partial(_torchaudio, "ConvTasNet"),
    ),
    Configuration(
        "torchaudio",
        "wav2vec 2.0",
        7,
        "attention and MLP of 3 layers, and the positional convolution",
        functools.partial(_torchaudio, "wav2vec2"),
    ),
    Configuration(
        "chronos-forecasting",
        "Chronos-Bolt",
        10,
        "2 x 2 of the encoder, 2 x 3 of the decoder",
        _chronos,
    ),
)
