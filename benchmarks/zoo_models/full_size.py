"""Architectures as large as their libraries make them by default, with one sample of the default size and random weights."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.zoo_models.entry import Architecture, randn, tokens
from benchmarks.zoo_models.language import hf_model

WORDS = 128
"""Tokens of a text: configs give the largest number alone."""


def _of(library: str, name: str, build: Callable[[], nn.Module], inputs: Any) -> Architecture:
    return Architecture(name, library, "full size", build, lambda _: inputs())


def _image(library: str, name: str) -> Architecture:
    def build() -> nn.Module:
        import timm
        import torchvision

        return torchvision.models.get_model(name) if library == "torchvision" else timm.create_model(name)

    return _of(library, name, build, lambda: randn(1, 3, 224, 224))


def _text(architecture: str, config: str, more: str = "") -> Architecture:
    build = functools.partial(hf_model, architecture, config)
    return _of("transformers", architecture, build, lambda: {name: tokens(30_000, 1, WORDS) for name in ("input_ids", *more.split())})


def _configured(architecture: str, config: str, inputs: Callable[[], Any]) -> Architecture:
    return _of("transformers", architecture, functools.partial(hf_model, architecture, config), inputs)


def _torchaudio(name: str, inputs: Callable[[], Any], **settings: Any) -> Architecture:
    def build() -> nn.Module:
        import torchaudio.models

        return getattr(torchaudio.models, name)(**settings)

    return _of("torchaudio", name, build, inputs)


def _unet() -> nn.Module:
    """In the form of Ho et al. (arXiv:2006.11239) for CIFAR-10: the default has 274 million parameters."""
    import diffusers

    down, up = ["DownBlock2D"] * 4, ["UpBlock2D"] * 4
    down[1], up[2] = "AttnDownBlock2D", "AttnUpBlock2D"
    return diffusers.UNet2DModel(sample_size=32, block_out_channels=(128, 256, 256, 256), down_block_types=down, up_block_types=up)


_VISION = "resnet50 densenet121 regnet_y_1_6gf mobilenet_v3_large efficientnet_b0 convnext_tiny vit_b_16 swin_t"

ARCHITECTURES = [
    *(_image("torchvision", name) for name in _VISION.split()),
    *(_image("timm", name) for name in ("mixer_s16_224", "deit_small_patch16_224")),
    _text("BertForSequenceClassification", "BertConfig"),
    _text("DistilBertForSequenceClassification", "DistilBertConfig"),
    _text("GPT2LMHeadModel", "GPT2Config"),
    _text("T5ForConditionalGeneration", "T5Config", "decoder_input_ids"),
    _configured("SegformerForSemanticSegmentation", "SegformerConfig", lambda: {"pixel_values": randn(1, 3, 512, 512)}),
    _configured(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        lambda: {"input_features": randn(1, 80, 3000), "decoder_input_ids": tokens(30_000, 1, WORDS)},
    ),
    _configured("Wav2Vec2ForCTC", "Wav2Vec2Config", lambda: {"input_values": randn(1, 16_000)}),
    _of("diffusers", "UNet2DModel", _unet, lambda: (randn(1, 3, 32, 32), torch.tensor([7]))),
    _torchaudio("ConvTasNet", lambda: randn(1, 1, 16_000)),
    _torchaudio(
        "Conformer",
        lambda: (randn(1, 200, 80), torch.tensor([200])),
        input_dim=80,
        num_heads=4,
        ffn_dim=128,
        num_layers=4,
        depthwise_conv_kernel_size=31,
    ),
]
