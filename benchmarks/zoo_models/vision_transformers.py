"""Vision transformers of timm, vit_pytorch and transformers, of 32 channels and two layers."""

import functools
import importlib
from typing import Any

from torch import nn

from benchmarks.zoo_models.convolutional import model_of
from benchmarks.zoo_models.entry import Architecture, images, randn
from benchmarks.zoo_models.language import BODY, tiny

_BODY = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2}


def _vit(module: str, name: str, **settings: Any) -> nn.Module:
    return getattr(importlib.import_module(f"vit_pytorch.{module}"), name)(**settings)


def _lucid(module: str, name: str, inputs: Any = None, **settings: Any) -> Architecture:
    return Architecture(name, "vit_pytorch", "ViT", functools.partial(_vit, module, name, **settings), inputs or images())


_LUCID = {"image_size": 64, "patch_size": 16, "num_classes": 10, "dim": 32, "depth": 2, "heads": 2, "mlp_dim": 64}
_HF = {"image_size": 64, "patch_size": 16}


ARCHITECTURES = [
    model_of("timm", "ViT", "vit_tiny_patch16_224", **_BODY),
    model_of("timm", "ViT", "vit_relpos_small_patch16_224", **_BODY),
    model_of("timm", "ViT", "deit3_small_patch16_224", **_BODY),
    model_of("timm", "ViT", "beit_base_patch16_224", **_BODY),
    model_of("timm", "ViT", "eva02_tiny_patch14_224", images(56), **(_BODY | {"img_size": 56})),
    model_of("timm", "ViT", "cait_xxs24_224", **_BODY, depth_token_only=1),
    model_of("timm", "ViT", "xcit_nano_12_p16_224", **_BODY),
    model_of("timm", "ViT", "convit_tiny", **_BODY, local_up_to_layer=1),
    model_of("timm", "ViT", "crossvit_tiny_240", images(240), embed_dim=(16, 32), num_heads=(2, 2), depth=((1, 1, 0),)),
    model_of("timm", "ViT", "levit_128s", images(224), embed_dim=(32, 48, 64), num_heads=(2, 3, 4), depth=(1, 1, 1), key_dim=8),
    model_of("timm", "ViT", "test_vit3", images(160)),
    _lucid("vit", "ViT", **_LUCID),
    _lucid("simple_vit", "SimpleViT", **_LUCID),
    _lucid("deepvit", "DeepViT", **_LUCID),
    _lucid("parallel_vit", "ViT", **_LUCID, num_parallel_branches=2),
    _lucid("cait", "CaiT", **(_LUCID | {"cls_depth": 1})),
    _lucid("vit_for_small_dataset", "ViT", **_LUCID),
    _lucid(
        "simple_vit_3d",
        "SimpleViT",
        lambda batch: randn(batch, 3, 4, 32, 32),
        image_size=32,
        image_patch_size=16,
        frames=4,
        frame_patch_size=2,
        num_classes=10,
        dim=48,
        depth=2,
        heads=2,
        mlp_dim=64,
    ),
    _lucid("cct", "CCT", img_size=64, embedding_dim=32, n_conv_layers=1, num_layers=2, num_heads=2, mlp_ratio=2, num_classes=10),
    tiny("ViTForImageClassification", "ViTConfig", "ViT", images(), **_HF),
    tiny("Dinov2ForImageClassification", "Dinov2Config", "ViT", images(), **_HF),
    tiny("DINOv3ViTModel", "DINOv3ViTConfig", "ViT", images(), **_HF),
    tiny("BeitForImageClassification", "BeitConfig", "ViT", images(), **_HF),
    tiny("ViTMAEModel", "ViTMAEConfig", "ViT", images(), **_HF, mask_ratio=0.0),
    tiny("IJepaModel", "IJepaConfig", "ViT", images(), **_HF),
    tiny(
        "YolosForObjectDetection", "YolosConfig", "detection and pose", images(), image_size=[64, 64], patch_size=16, num_detection_tokens=5
    ),
    tiny("VideoMAEModel", "VideoMAEConfig", "ViT", lambda batch: randn(batch, 4, 3, 32, 32), image_size=32, patch_size=16, num_frames=4),
    tiny(
        "TimesformerModel", "TimesformerConfig", "ViT", lambda batch: randn(batch, 4, 3, 32, 32), image_size=32, patch_size=16, num_frames=4
    ),
    *(
        tiny(
            f"{name}ForImageClassification",
            f"{name}Config",
            "hierarchical and mixers",
            images(),
            image_size=64,
            patch_size=4,
            embed_dim=16,
            depths=[1, 1],
            num_heads=[1, 2],
            num_attention_heads=None,  # else it stands for the list
            window_size=4,
        )
        for name in ("Swin", "Swinv2")
    ),
    tiny(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        "hierarchical and mixers",
        images(),
        **dict.fromkeys(BODY),
        hidden_sizes=[16, 24, 32, 48],
        depths=[1, 1, 1, 1],
    ),
    tiny(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        "segmentation",
        images(),
        hidden_sizes=[16, 32, 32, 64],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=32,
    ),
    tiny(
        "DPTForDepthEstimation",
        "DPTConfig",
        "segmentation",
        images(),
        image_size=64,
        patch_size=16,
        num_hidden_layers=4,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16, 16, 16, 16],
        fusion_hidden_size=16,
    ),
    tiny(
        "VitPoseForPoseEstimation",
        "VitPoseConfig",
        "detection and pose",
        images(),
        backbone_config={
            "model_type": "vitpose_backbone",
            "image_size": [64, 64],
            "patch_size": [16, 16],
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        },
    ),
    tiny(
        "SuperPointForKeypointDetection",
        "SuperPointConfig",
        "detection and pose",
        images(),
        encoder_hidden_sizes=[16, 16, 16, 16],
        decoder_hidden_size=32,
        descriptor_decoder_dim=32,
        keypoint_decoder_dim=65,
    ),
]
