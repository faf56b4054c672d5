"""Random models of a few thousand parameters, built from a config alone, in eval mode.

Every builder takes config fields that override its defaults. All weights are scrambled after the model's own
initialisation, so that no bias is 0, no norm is 1 and no layer is close to doing nothing. The weights follow from
torch's global seed, which `conftest.py` sets before each test.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

LAYERS = 3
WIDTH = 16
VOCABULARY = 64
LABELS = 5

VISION = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "num_labels": LABELS,
}
TEXT = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER = {**TEXT, "num_key_value_heads": 1, "head_dim": 8}


def build(family: str, head: str | None, defaults: dict[str, Any], config: dict[str, Any]) -> PreTrainedModel:
    """Build `<family>For<head>` from `<family>Config`, e.g. `build("Bert", "MaskedLM", TEXT, {})`; the body of None."""
    config_class = getattr(transformers, f"{family}Config")
    fields = {**defaults, **config}
    if head == "QuestionAnswering":
        fields["num_labels"] = 2
    model_class = getattr(transformers, f"{family}For{head}" if head else f"{family}Model")
    return scrambled(model_class(config_class(**fields))).eval()


@torch.no_grad()
def scrambled(model: PreTrainedModel) -> PreTrainedModel:
    """Add noise to every parameter in place; tied ones move once."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model


# ---- Images: (B, 1, 8, 8) in `pixel_values`, 4 patches, 5 classes ----


def word_tokenizer(words: int, prefix: str = "w", **special: str) -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, **{f"{prefix}{i}": i for i in range(1, words)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


def tiny_vit(head: str | None = "ImageClassification", **config: Any) -> PreTrainedModel:
    return build("ViT", head, VISION, config)


def tiny_vit_or_narrow(**config: Any) -> PreTrainedModel:
    """Narrow with two layers, so that a student of it gets connectors that are fitted to its teacher's width."""
    return tiny_vit(**config, **({"hidden_size": 8} if config.get("num_hidden_layers") == 2 else {}))


def tiny_deit(head: str = "ImageClassification", **config: Any) -> PreTrainedModel:
    """`head="ImageClassificationWithTeacher"` also reads the distillation token."""
    return build("DeiT", head, VISION, config)


def tiny_beit(**config: Any) -> PreTrainedModel:
    return build("Beit", "ImageClassification", {**VISION, "layer_scale_init_value": 0.5}, config)


def tiny_dinov2(**config: Any) -> PreTrainedModel:
    return build("Dinov2", "ImageClassification", VISION, config)


def tiny_siglip(**config: Any) -> PreTrainedModel:
    labels = config.pop("num_labels", LABELS)
    return build("Siglip", "ImageClassification", {"vision_config": {**VISION, **config}, "num_labels": labels}, {})


def tiny_clip(**config: Any) -> PreTrainedModel:
    labels = config.pop("num_labels", LABELS)
    return build("CLIP", "ImageClassification", {"vision_config": {**VISION, **config}, "num_labels": labels}, {})


def tiny_swin(**config: Any) -> PreTrainedModel:
    """Two stages of two layers; the stack is that of the stages."""
    defaults = {
        "image_size": 16,
        "patch_size": 2,
        "num_channels": 1,
        "embed_dim": 8,
        "depths": [2, 2],
        "num_heads": [2, 2],
        "window_size": 2,
        "num_labels": LABELS,
    }
    return build("Swin", "ImageClassification", defaults, config)


def tiny_resnet(**config: Any) -> PreTrainedModel:
    """Convolutions alone; its two stages are a stack, too, with another width and resolution after each."""
    defaults = {"num_channels": 1, "embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
    return build("ResNet", "ImageClassification", {**defaults, "num_labels": LABELS}, config)


def tiny_stages(family: str, **config: Any) -> PreTrainedModel:
    """A hierarchical or convolutional model by its family, on images of 32 x 32 (one channel)."""
    widths, heads = [8, 12, 16, 20], [1, 2, 2, 2]
    transformer = {"embed_dim": 8, "depths": [1, 1, 2], "num_heads": [1, 2, 2], "window_size": 2, "patch_size": 2}
    pyramid = {"hidden_sizes": widths, "depths": [1, 1, 1, 1], "num_attention_heads": heads}
    mobile = {"neck_hidden_sizes": [8, 8, 8, 12, 16, 20, 24], "hidden_sizes": [12, 16, 20], "num_attention_heads": 2}
    mobile["initializer_range"] = 0.5
    defaults = {
        "ConvNext": {"hidden_sizes": widths, "depths": [1, 1, 1, 1], "layer_scale_init_value": 0.5},
        "Cvt": {"embed_dim": [8, 12, 16], "num_heads": [1, 2, 2], "depth": [1, 2, 3]},
        "MobileViT": mobile,
        "PoolFormer": {"hidden_sizes": widths, "depths": [1, 1, 1, 2], "layer_scale_init_value": 0.5},
        "Pvt": pyramid,
        "PvtV2": pyramid,
        "Swin": transformer,
        "Swinv2": transformer,
    }[family]
    shape = {"image_size": 32, "num_channels": 1, "num_labels": LABELS}
    return build(family, "ImageClassification", {**shape, **defaults}, config)


# ---- Encoders of text: vocabulary of 64, padding 0 ----


def tiny_bert(head: str | None = "SequenceClassification", **config: Any) -> PreTrainedModel:
    return build("Bert", head, {**TEXT, "num_labels": LABELS}, config)


def tiny_roberta(head: str = "SequenceClassification", **config: Any) -> PreTrainedModel:
    return build("Roberta", head, {**TEXT, "num_labels": LABELS, "type_vocab_size": 1}, config)


def tiny_distilbert(head: str = "SequenceClassification", **config: Any) -> PreTrainedModel:
    defaults = {
        "dim": WIDTH,
        "n_layers": LAYERS,
        "n_heads": 2,
        "hidden_dim": 24,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 40,
        "pad_token_id": 0,
        "num_labels": LABELS,
    }
    return build("DistilBert", head, defaults, config)


def tiny_xlnet(head: str = "SequenceClassification", **config: Any) -> PreTrainedModel:
    """Its layers take states (T, B, D)."""
    defaults = {"d_model": WIDTH, "n_layer": LAYERS, "n_head": 2, "d_inner": 24, "dropout": 0.0}
    return build("XLNet", head, {**defaults, "vocab_size": VOCABULARY, "num_labels": LABELS}, config)


def tiny_fsmt(**config: Any) -> PreTrainedModel:
    """Its layers take states (T, B, D), too."""
    sizes = {"d_model": WIDTH, "encoder_layers": 2, "decoder_layers": LAYERS, "max_position_embeddings": 40}
    parts = {
        f"{part}_{name}": size
        for part in ("encoder", "decoder")
        for name, size in (("ffn_dim", 24), ("attention_heads", 2))
    }
    vocabularies = {"src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY, "langs": ["a", "b"]}
    return build("FSMT", "ConditionalGeneration", {**sizes, **parts, **vocabularies}, config)


def tiny_albert(head: str = "SequenceClassification", **config: Any) -> PreTrainedModel:
    """One layer that the model calls three times over."""
    return build("Albert", head, {**TEXT, "embedding_size": 8, "num_labels": LABELS}, config)


def tiny_modernbert(head: str = "SequenceClassification", **config: Any) -> PreTrainedModel:
    """Layers 0 and 3, 6, ... see everything, the others a window of 4 tokens."""
    special = {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 4, "num_labels": LABELS}
    return build("ModernBert", head, {**TEXT, **special}, config)


def tiny_deberta(head: str = "SequenceClassification", **config: Any) -> PreTrainedModel:
    """DeBERTa-v2 with the convolution that works between layers 0 and 1."""
    defaults = {
        **TEXT,
        "conv_kernel_size": 3,
        "conv_act": "gelu",
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "num_labels": LABELS,
        "pooler_hidden_size": config.get("hidden_size", WIDTH),
    }
    return build("DebertaV2", head, defaults, config)


# ---- Causal language models ----


def tiny_gpt2(head: str | None = None, **config: Any) -> PreTrainedModel:
    """`GPT2LMHeadModel`, or `GPT2For<head>`."""
    defaults = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 40}
    defaults |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if head is not None:
        return build("GPT2", head, {**defaults, "num_labels": LABELS}, config)
    return scrambled(transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**defaults, **config}))).eval()


def tiny_gpt_neox(**config: Any) -> PreTrainedModel:
    return build("GPTNeoX", "CausalLM", TEXT, config)


def tiny_llama(head: str = "CausalLM", **config: Any) -> PreTrainedModel:
    return build("Llama", head, DECODER, config)


def tiny_qwen3(head: str = "CausalLM", **config: Any) -> PreTrainedModel:
    """`layer_types` of its own: full, sliding (4 tokens), full."""
    defaults = {**DECODER, "use_sliding_window": True, "sliding_window": 4}
    layers = config.get("num_hidden_layers", LAYERS)
    defaults["layer_types"] = ["sliding_attention" if i % 2 else "full_attention" for i in range(layers)]
    return build("Qwen3", head, defaults, config)


def tiny_mixtral(head: str = "CausalLM", **config: Any) -> PreTrainedModel:
    """Layers of four experts, of which each token takes two."""
    return build("Mixtral", head, {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}, config)


def tiny_mistral(head: str = "CausalLM", **config: Any) -> PreTrainedModel:
    return build("Mistral", head, {**DECODER, "sliding_window": 4}, config)


def tiny_gemma3(**config: Any) -> PreTrainedModel:
    """Alternating full and sliding attention, with both soft-cappings."""
    layers = config.get("num_hidden_layers", LAYERS)
    defaults = {
        **DECODER,
        "sliding_window": 4,
        "layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)],
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 8,
    }
    config_class = transformers.Gemma3TextConfig
    return scrambled(transformers.Gemma3ForCausalLM(config_class(**{**defaults, **config}))).eval()


# ---- Encoder-decoders; the stack is that of the decoder ----


def tiny_t5(**config: Any) -> PreTrainedModel:
    defaults = {
        "d_model": WIDTH,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 2,
        "num_decoder_layers": LAYERS,
        "num_heads": 2,
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 0,
    }
    return build("T5", "ConditionalGeneration", defaults, config)


def tiny_bart(**config: Any) -> PreTrainedModel:
    defaults = {
        "d_model": WIDTH,
        "encoder_layers": 2,
        "decoder_layers": LAYERS,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 40,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": 2,
    }
    return build("Bart", "ConditionalGeneration", defaults, config)


# ---- Sounds, videos, and encoders of another kind than their decoders ----

WAVES = {
    **{name: VISION[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")},
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "num_labels": LABELS,
    "layerdrop": 0.0,
}


def tiny_waves(family: str = "Wav2Vec2", **config: Any) -> PreTrainedModel:
    return build(family, "SequenceClassification", WAVES, config)


def tiny_ast(**config: Any) -> PreTrainedModel:
    spectrogram = {"num_mel_bins": 8, "max_length": 16, "frequency_stride": 4, "time_stride": 4}
    return build("AST", "AudioClassification", {**VISION, **spectrogram}, config)


def tiny_whisper(head: str = "ConditionalGeneration", **config: Any) -> PreTrainedModel:
    bart = {name: value for name, value in tiny_bart().config.to_diff_dict().items() if name in BART_FIELDS}
    sound = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 12, "classifier_proj_size": 8}
    return build("Whisper", head, {**bart, **sound, "num_labels": LABELS}, config)


BART_FIELDS = (
    "d_model",
    "encoder_layers",
    "decoder_layers",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "vocab_size",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "decoder_start_token_id",
)


def tiny_videomae(**config: Any) -> PreTrainedModel:
    return build("VideoMAE", "VideoClassification", {**VISION, "num_frames": 4, "tubelet_size": 2}, config)


def tiny_captioner(image_size: int = 8, **config: Any) -> PreTrainedModel:
    """An encoder of images before a decoder of texts."""
    decoder = transformers.BertConfig(**{**TEXT, "is_decoder": True, "add_cross_attention": True, **config})
    encoder = transformers.ViTConfig(**{**VISION, "image_size": image_size})
    model = transformers.VisionEncoderDecoderModel(
        encoder=transformers.ViTModel(encoder), decoder=transformers.BertLMHeadModel(decoder)
    )
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    return scrambled(model).eval()


# ---- Heads whose labels have no row of logits each ----


def tiny_ctc(family: str = "Wav2Vec2", **config: Any) -> PreTrainedModel:
    """A vocabulary of 12, the first of which is the blank; nothing is dropped or masked in training."""
    still = {
        "hidden_dropout": 0.0,
        "activation_dropout": 0.0,
        "attention_dropout": 0.0,
        "feat_proj_dropout": 0.0,
        "final_dropout": 0.0,
        "apply_spec_augment": False,
    }
    fields = {"vocab_size": 12, "pad_token_id": 0, "ctc_loss_reduction": "mean", "feat_extract_norm": "layer"}
    return build(family, "CTC", {**WAVES, **still, **fields}, config)


def tiny_dpt(**config: Any) -> PreTrainedModel:
    """Maps of classes from what leaves all four layers; images of 16 x 16, and a loss that no batch norm mixes."""
    fields = {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "image_size": 16}
    fields |= {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "auxiliary_loss_weight": 0.0}
    fields["use_batch_norm_in_fusion_residual"] = False
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "semantic_classifier_dropout": 0.0}
    model = build("DPT", "SemanticSegmentation", {**VISION, **fields, **still}, config)
    model.head.head[1] = torch.nn.Identity()
    return model


def tiny_segformer(**config: Any) -> PreTrainedModel:
    """Four stages, of which the head reads all; images of 32 x 32, logits of 8 x 8."""
    fields = {"num_channels": 1, "depths": [1] * 4, "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2]}
    return build(
        "Segformer", "SemanticSegmentation", {**fields, "decoder_hidden_size": 8, "num_labels": LABELS}, config
    )


def tiny_yolos(**config: Any) -> PreTrainedModel:
    """Six queries on images of 16 x 16."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return build(
        "Yolos", "ObjectDetection", {**VISION, "num_detection_tokens": 6, "image_size": [16, 16], **still}, config
    )


def tiny_detr(**config: Any) -> PreTrainedModel:
    """Six queries; the stack is that of the decoder."""
    images = transformers.ResNetConfig(
        num_channels=3,
        embedding_size=4,
        hidden_sizes=[4, 8],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )
    bart = {name: value for name, value in tiny_bart().config.to_diff_dict().items() if name in BART_FIELDS[:7]}
    fields = {"num_queries": 6, "num_labels": LABELS, "dropout": 0.0, "backbone_config": images}
    return build("Detr", "ObjectDetection", {**bart, **fields}, config)
