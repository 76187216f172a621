"""Diffusion and generative networks of diffusers, monai and denoising_diffusion_pytorch; images with text of transformers."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.zoo_models.convolutional import model_of
from benchmarks.zoo_models.entry import Architecture, images, randn
from benchmarks.zoo_models.language import BODY, LENGTH, TEXT, VOCABULARY, ids, tiny

DIFFUSION, MULTIMODAL = "diffusion", "multimodal"


def _diffuser(name: str, **settings: Any) -> nn.Module:
    import diffusers

    return getattr(diffusers, name)(**settings)


def _model(name: str, inputs: Callable[[int], Any], **settings: Any) -> Architecture:
    return Architecture(name, "diffusers", DIFFUSION, functools.partial(_diffuser, name, **settings), inputs)


def _unet(**settings: Any) -> nn.Module:
    return importlib.import_module("denoising_diffusion_pytorch").Unet(**settings)


def _noisy(*shape: int, text: int = 0, name: str = "sample", **more: Any) -> Callable[[int], Any]:
    def inputs(batch: int) -> dict[str, Any]:
        given = {name: randn(batch, *shape), "timestep": torch.full((batch,), 10)}
        given |= {"encoder_hidden_states": randn(batch, 6, text)} if text else {}
        return given | {each: make(batch) for each, make in more.items()}

    return inputs


def _control(batch: int) -> Any:
    return {**_noisy(4, 16, 16, text=32)(batch), "controlnet_cond": randn(batch, 3, 32, 32)}


_BLOCKS = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
_CROSS = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 32, "attention_head_dim": 8, **_BLOCKS}
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
_CODER = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2, **_BLOCKS}

_DIFFUSION = [
    _model(
        "UNet2DModel",
        _noisy(3, 16, 16),
        sample_size=16,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **_BLOCKS,
        attention_head_dim=8,
    ),
    _model(
        "UNet2DConditionModel", _noisy(4, 16, 16, text=32), sample_size=16, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **_CROSS
    ),
    _model(
        "UNet3DConditionModel",
        _noisy(4, 2, 16, 16, text=32),
        sample_size=16,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        **_BLOCKS,
    ),
    _model("ControlNetModel", _control, conditioning_embedding_out_channels=(8, 16), **_CROSS),
    _model("AutoencoderKL", images(32), latent_channels=4, **_CODER),
    _model(
        "AutoencoderTiny",
        images(32),
        encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(16, 16),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ),
    _model("VQModel", images(32), latent_channels=4, num_vq_embeddings=16, **_CODER),
    _model(
        "DiTTransformer2DModel",
        _noisy(4, 16, 16, name="hidden_states", class_labels=lambda batch: torch.arange(batch)),
        **_HEADS,
        in_channels=4,
        sample_size=16,
        num_embeds_ada_norm=10,
        norm_num_groups=8,
    ),
    _model(
        "PixArtTransformer2DModel",
        _noisy(4, 16, 16, text=32, name="hidden_states"),
        **_HEADS,
        in_channels=4,
        sample_size=16,
        cross_attention_dim=32,
        caption_channels=32,
        use_additional_conditions=False,
    ),
    _model(
        "SD3Transformer2DModel",
        _noisy(4, 16, 16, text=32, name="hidden_states", pooled_projections=lambda batch: randn(batch, 32)),
        **_HEADS,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
    ),
    _model(
        "SanaTransformer2DModel",
        _noisy(4, 16, 16, text=32, name="hidden_states"),
        **_HEADS,
        in_channels=4,
        out_channels=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=32,
        sample_size=16,
    ),
    _model(
        "AuraFlowTransformer2DModel",
        _noisy(4, 16, 16, text=32, name="hidden_states"),
        sample_size=16,
        in_channels=4,
        patch_size=2,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=64,
    ),
    _model(
        "LTXVideoTransformer3DModel",
        lambda batch: {
            "hidden_states": randn(batch, 16, 8),
            "encoder_hidden_states": randn(batch, 6, 32),
            "timestep": torch.full((batch,), 10),
            "encoder_attention_mask": torch.ones(batch, 6).bool(),
            "num_frames": 1,
            "height": 4,
            "width": 4,
        },
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    ),
    _model(
        "PriorTransformer",
        lambda batch: {
            "hidden_states": randn(batch, 32),
            "timestep": torch.full((batch,), 10),
            "proj_embedding": randn(batch, 32),
            "encoder_hidden_states": randn(batch, 6, 32),
        },
        **_HEADS,
        embedding_dim=32,
        num_embeddings=6,
        additional_embeddings=4,
    ),
    _model("T2IAdapter", images(32), channels=[16, 32], num_res_blocks=1, downscale_factor=8),
    Architecture(
        "Unet",
        "denoising_diffusion_pytorch",
        DIFFUSION,
        functools.partial(_unet, dim=16, dim_mults=(1, 2), flash_attn=False),
        lambda batch: (randn(batch, 3, 16, 16), torch.full((batch,), 10)),
    ),
    model_of(
        "monai",
        DIFFUSION,
        "DiffusionModelUNet",
        lambda batch: (randn(batch, 1, 16, 16), torch.full((batch,), 10)),
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        channels=(16, 32),
        attention_levels=(False, True),
        num_res_blocks=1,
        num_head_channels=16,
        norm_num_groups=8,
    ),
]


def _captioned(batch: int) -> Any:
    return {**ids(batch), "pixel_values": randn(batch, 3, 32, 32)}


_VISION = {**BODY, "image_size": 32, "patch_size": 16}
_TOWERS = {"text_config": {**BODY, **TEXT, "projection_dim": 32}, "vision_config": {**_VISION, "projection_dim": 32}, **dict.fromkeys(BODY)}


def _with_image(token: int, places: int) -> Callable[[int], Any]:
    """Texts that begin with the places of an image."""

    def inputs(batch: int) -> Any:
        text = ids(batch)["input_ids"].clamp(max=VOCABULARY - 3)
        text[:, :places] = token
        return {"input_ids": text, "pixel_values": randn(batch, 3, 32, 32)}

    return inputs


def _boxed(batch: int) -> Any:
    return {**ids(batch), "bbox": torch.arange(4).expand(batch, LENGTH, 4).contiguous()}


_MULTIMODAL = [
    tiny("CLIPModel", "CLIPConfig", MULTIMODAL, _captioned, **_TOWERS, projection_dim=32),
    tiny("SiglipModel", "SiglipConfig", MULTIMODAL, _captioned, **_TOWERS),
    tiny("AltCLIPModel", "AltCLIPConfig", MULTIMODAL, _captioned, **_TOWERS, projection_dim=32),
    tiny("BlipForConditionalGeneration", "BlipConfig", MULTIMODAL, _captioned, **_TOWERS),
    tiny("ViltModel", "ViltConfig", MULTIMODAL, _captioned, **TEXT, image_size=32, patch_size=16),
    tiny(
        "LxmertModel",
        "LxmertConfig",
        MULTIMODAL,
        lambda batch: {**ids(batch), "visual_feats": randn(batch, 3, 16), "visual_pos": randn(batch, 3, 4)},
        **TEXT,
        visual_feat_dim=16,
        l_layers=1,
        r_layers=1,
        x_layers=1,
    ),
    tiny("LayoutLMModel", "LayoutLMConfig", MULTIMODAL, _boxed, **TEXT),
    tiny("LiltModel", "LiltConfig", MULTIMODAL, _boxed, **TEXT, hidden_size=48),
    tiny(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        MULTIMODAL,
        _with_image(65, 4),
        **dict.fromkeys(BODY),
        image_token_index=65,
        vision_config={"model_type": "clip_vision_model", **_VISION, "projection_dim": 32},
        text_config={"model_type": "llama", **BODY, **TEXT, "num_key_value_heads": 2},
        vision_feature_select_strategy="default",
    ),
    tiny(
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        MULTIMODAL,
        _with_image(65, 4),
        **dict.fromkeys(BODY),
        image_token_index=65,
        projection_dim=32,
        vision_config={"model_type": "siglip_vision_model", **_VISION},
        text_config={"model_type": "gemma", **BODY, **TEXT, "num_key_value_heads": 1, "head_dim": 16},
    ),
    tiny(
        "VisualBertModel",
        "VisualBertConfig",
        MULTIMODAL,
        lambda batch: {**ids(batch), "visual_embeds": randn(batch, 3, 16)},
        **TEXT,
        visual_embedding_dim=16,
    ),
]

ARCHITECTURES = [*_DIFFUSION, *_MULTIMODAL]
