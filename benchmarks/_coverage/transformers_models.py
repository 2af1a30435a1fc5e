"""Small transformers models with random weights, built from a configuration in code.

Every builder returns a model and the keywords that its forward takes. Vocabularies are small, so
the special tokens are numbered within them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from .waking import wake

__all__ = ["BUILDERS", "build", "names"]

# The library logs every generation configuration it derives; warnings stay.
hf.logging.set_verbosity_warning()

BATCH = 2
VOCABULARY = 99

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDTHS = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 37,
}
VISION = {**WIDTHS, "image_size": 32, "patch_size": 8}
TEXT = {**WIDTHS, **SPECIAL, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
GROUPED = {**TEXT, "num_key_value_heads": 2}
PYRAMID = {"hidden_sizes": [8, 16, 24, 32], "depths": [2, 2, 3, 2]}
SEQ2SEQ = {
    **SPECIAL,
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 37,
    "decoder_start_token_id": 1,
}
SPEECH = {
    **WIDTHS,
    **SPECIAL,
    "vocab_size": 30,
    "conv_dim": [16, 16],
    "conv_stride": [4, 4],
    "conv_kernel": [8, 8],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}

Built = tuple[nn.Module, dict[str, Any]]


def _ids(length: int = 8) -> Tensor:
    """Return token ids, none of them special."""
    return torch.randint(3, VOCABULARY, (BATCH, length))


def _image(model: nn.Module, size: int = 32) -> Built:
    return model, {"pixel_values": torch.rand(BATCH, 3, size, size)}


def _text(model: nn.Module) -> Built:
    """Return the keywords of a causal language model."""
    return model, {"input_ids": _ids()}


def _masked(model: nn.Module) -> Built:
    """Return the keywords of an encoder, whose second sequence is padded."""
    mask = torch.ones(BATCH, 8, dtype=torch.long)
    mask[1, 6:] = 0
    return model, {"input_ids": _ids(), "attention_mask": mask}


def _pair(model: nn.Module) -> Built:
    return model, {"input_ids": _ids(), "decoder_input_ids": _ids(6)}


def _sound(model: nn.Module) -> Built:
    return model, {"input_values": torch.rand(BATCH, 800)}


def _vit() -> Built:
    return _image(hf.ViTForImageClassification(hf.ViTConfig(**VISION)))


def _deit() -> Built:
    return _image(hf.DeiTForImageClassification(hf.DeiTConfig(**VISION)))


def _beit() -> Built:
    return _image(hf.BeitForImageClassification(hf.BeitConfig(**VISION)))


def _swin() -> Built:
    config = hf.SwinConfig(
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2, 2],
        num_heads=[2, 2, 4],
        window_size=2,
    )
    return _image(hf.SwinForImageClassification(config))


def _swinv2() -> Built:
    config = hf.Swinv2Config(
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2, 2],
        num_heads=[2, 2, 4],
        window_size=2,
    )
    return _image(hf.Swinv2ForImageClassification(config))


def _convnext() -> Built:
    return _image(hf.ConvNextForImageClassification(hf.ConvNextConfig(**PYRAMID)), 64)


def _convnextv2() -> Built:
    return _image(hf.ConvNextV2ForImageClassification(hf.ConvNextV2Config(**PYRAMID)), 64)


def _resnet() -> Built:
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[2, 3, 3, 2])
    return _image(hf.ResNetForImageClassification(config), 64)


def _regnet() -> Built:
    config = hf.RegNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[2, 3, 3, 2], groups_width=8
    )
    return _image(hf.RegNetForImageClassification(config), 64)


def _dinov2() -> Built:
    return _image(hf.Dinov2ForImageClassification(hf.Dinov2Config(**VISION)))


def _segformer() -> Built:
    config = hf.SegformerConfig(
        hidden_sizes=[8, 8, 16, 16],
        depths=[2, 2, 2, 2],
        num_attention_heads=[1, 2, 2, 2],
        decoder_hidden_size=16,
    )
    return _image(hf.SegformerForSemanticSegmentation(config), 64)


def _mobilenet_v2() -> Built:
    config = hf.MobileNetV2Config(depth_multiplier=0.35, image_size=64)
    return _image(hf.MobileNetV2ForImageClassification(config), 64)


def _mobilevit() -> Built:
    config = hf.MobileViTConfig(
        image_size=64,
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 16, 24, 32, 40, 64],
        num_attention_heads=4,
    )
    return _image(hf.MobileViTForImageClassification(config), 64)


def _poolformer() -> Built:
    config = hf.PoolFormerConfig(**PYRAMID, num_channels=3)
    return _image(hf.PoolFormerForImageClassification(config), 64)


def _levit() -> Built:
    config = hf.LevitConfig(
        image_size=64,
        hidden_sizes=[16, 24, 32],
        num_attention_heads=[2, 3, 4],
        depths=[2, 2, 2],
        key_dim=[8, 8, 8],
    )
    return _image(hf.LevitForImageClassification(config), 64)


def _vit_mae() -> Built:
    config = hf.ViTMAEConfig(
        **VISION,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=24,
    )
    model, inputs = _image(hf.ViTMAEForPreTraining(config))
    # Which patches are masked is drawn, unless the noise that orders them is given.
    return model, {**inputs, "noise": torch.rand(BATCH, 16)}


def _dpt() -> Built:
    config = hf.DPTConfig(
        **VISION,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 16, 24, 32],
        fusion_hidden_size=16,
    )
    return _image(hf.DPTForDepthEstimation(config))


def _yolos() -> Built:
    config = hf.YolosConfig(**{**VISION, "image_size": [32, 32]}, num_detection_tokens=5)
    return _image(hf.YolosForObjectDetection(config))


def _clip() -> Built:
    config = hf.CLIPConfig(text_config=dict(TEXT), vision_config=dict(VISION))
    model, inputs = _image(hf.CLIPModel(config))
    return model, {"input_ids": _ids(), **inputs}


def _siglip() -> Built:
    config = hf.SiglipConfig(text_config=dict(TEXT), vision_config=dict(VISION))
    model, inputs = _image(hf.SiglipModel(config))
    return model, {"input_ids": _ids(64), **inputs}


def _bert() -> Built:
    return _masked(hf.BertForMaskedLM(hf.BertConfig(**TEXT)))


def _roberta() -> Built:
    return _masked(hf.RobertaForMaskedLM(hf.RobertaConfig(**TEXT)))


def _distilbert() -> Built:
    config = hf.DistilBertConfig(
        vocab_size=VOCABULARY,
        dim=32,
        n_layers=4,
        n_heads=4,
        hidden_dim=37,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    return _masked(hf.DistilBertForMaskedLM(config))


def _electra() -> Built:
    return _masked(hf.ElectraForMaskedLM(hf.ElectraConfig(**TEXT, embedding_size=16)))


def _albert() -> Built:
    return _masked(hf.AlbertForMaskedLM(hf.AlbertConfig(**TEXT, embedding_size=16)))


def _deberta_v2() -> Built:
    config = hf.DebertaV2Config(
        **TEXT, relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"]
    )
    return _masked(hf.DebertaV2ForMaskedLM(config))


def _modernbert() -> Built:
    config = hf.ModernBertConfig(**TEXT, cls_token_id=1, sep_token_id=2)
    return _masked(hf.ModernBertForMaskedLM(config))


def _gpt2() -> Built:
    config = hf.GPT2Config(
        **SPECIAL, vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=4, n_head=4
    )
    return _text(hf.GPT2LMHeadModel(config))


def _gpt_neox() -> Built:
    return _text(hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**TEXT)))


def _gptj() -> Built:
    config = hf.GPTJConfig(
        **SPECIAL,
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=32,
        n_layer=4,
        n_head=4,
        rotary_dim=4,
    )
    return _text(hf.GPTJForCausalLM(config))


def _opt() -> Built:
    config = hf.OPTConfig(
        **SPECIAL,
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=4,
        ffn_dim=37,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    )
    return _text(hf.OPTForCausalLM(config))


def _bloom() -> Built:
    config = hf.BloomConfig(**SPECIAL, vocab_size=VOCABULARY, hidden_size=32, n_layer=4, n_head=4)
    return _text(hf.BloomForCausalLM(config))


def _falcon() -> Built:
    config = hf.FalconConfig(
        **SPECIAL,
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    return _text(hf.FalconForCausalLM(config))


def _llama() -> Built:
    return _text(hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)))


def _mistral() -> Built:
    return _text(hf.MistralForCausalLM(hf.MistralConfig(**GROUPED)))


def _mixtral() -> Built:
    # The experts' matrices are multiplied in one kernel, which wants them aligned.
    widths = {**GROUPED, "intermediate_size": 48}
    config = hf.MixtralConfig(**widths, num_local_experts=4, num_experts_per_tok=2)
    return _text(hf.MixtralForCausalLM(config))


def _qwen2() -> Built:
    return _text(hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED)))


def _qwen3() -> Built:
    return _text(hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED, head_dim=8)))


def _gemma2() -> Built:
    return _text(hf.Gemma2ForCausalLM(hf.Gemma2Config(**GROUPED, head_dim=8)))


def _phi() -> Built:
    return _text(hf.PhiForCausalLM(hf.PhiConfig(**TEXT)))


def _olmo2() -> Built:
    return _text(hf.Olmo2ForCausalLM(hf.Olmo2Config(**GROUPED)))


def _t5() -> Built:
    config = hf.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=3,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    return _pair(hf.T5ForConditionalGeneration(config))


def _bart() -> Built:
    config = hf.BartConfig(**SEQ2SEQ, max_position_embeddings=64)
    return _pair(hf.BartForConditionalGeneration(config))


def _whisper() -> Built:
    config = hf.WhisperConfig(
        **SEQ2SEQ, num_mel_bins=16, max_source_positions=20, max_target_positions=32
    )
    model = hf.WhisperForConditionalGeneration(config)
    features = torch.rand(BATCH, 16, 40)
    return model, {"input_features": features, "decoder_input_ids": _ids(6)}


def _wav2vec2() -> Built:
    return _sound(hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**SPEECH)))


def _hubert() -> Built:
    return _sound(hf.HubertForCTC(hf.HubertConfig(**SPEECH)))


def _detr() -> Built:
    backbone = hf.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[2, 2, 2, 2],
        out_features=["stage4"],
    )
    config = hf.DetrConfig(
        backbone_config=backbone,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=37,
        decoder_ffn_dim=37,
        num_queries=5,
    )
    return _image(hf.DetrForObjectDetection(config), 64)


BUILDERS: dict[str, Callable[[], Built]] = {
    "ViT": _vit,
    "DeiT": _deit,
    "BEiT": _beit,
    "Swin": _swin,
    "Swinv2": _swinv2,
    "ConvNeXt": _convnext,
    "ConvNeXtV2": _convnextv2,
    "ResNet": _resnet,
    "RegNet": _regnet,
    "DINOv2": _dinov2,
    "SegFormer": _segformer,
    "MobileNetV2": _mobilenet_v2,
    "MobileViT": _mobilevit,
    "PoolFormer": _poolformer,
    "LeViT": _levit,
    "ViTMAE": _vit_mae,
    "DPT": _dpt,
    "YOLOS": _yolos,
    "DETR": _detr,
    "CLIP": _clip,
    "SigLIP": _siglip,
    "BERT": _bert,
    "RoBERTa": _roberta,
    "DistilBERT": _distilbert,
    "ELECTRA": _electra,
    "ALBERT": _albert,
    "DeBERTa-v2": _deberta_v2,
    "ModernBERT": _modernbert,
    "GPT-2": _gpt2,
    "GPT-NeoX": _gpt_neox,
    "GPT-J": _gptj,
    "OPT": _opt,
    "Bloom": _bloom,
    "Falcon": _falcon,
    "Llama": _llama,
    "Mistral": _mistral,
    "Mixtral": _mixtral,
    "Qwen2": _qwen2,
    "Qwen3": _qwen3,
    "Gemma2": _gemma2,
    "Phi": _phi,
    "OLMo2": _olmo2,
    "T5": _t5,
    "BART": _bart,
    "Whisper": _whisper,
    "wav2vec2": _wav2vec2,
    "HuBERT": _hubert,
}


def names() -> list[str]:
    """Return the names of the models, which are those of their papers."""
    return list(BUILDERS)


def build(name: str) -> Built:
    """Build a model with random weights, and the keywords for its forward."""
    model, inputs = BUILDERS[name]()
    return wake(model), inputs
