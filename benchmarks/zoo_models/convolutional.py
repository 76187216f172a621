"""Convolutional networks of pytorchcv, timm, torchvision, segmentation_models_pytorch and monai: narrow where the constructor allows it."""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from benchmarks.zoo_models.entry import Architecture, images, randn


def _cv(name: str, **settings: Any) -> nn.Module:
    from pytorchcv.model_provider import get_model

    return get_model(name, pretrained=False, **settings)


def _timm(name: str, **settings: Any) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=10, **settings)


def _vision(name: str, **settings: Any) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None, **settings)


def _smp(name: str, **settings: Any) -> nn.Module:
    import segmentation_models_pytorch

    return getattr(segmentation_models_pytorch, name)("resnet18", encoder_weights=None, **settings)


def _monai(name: str, **settings: Any) -> nn.Module:
    import monai.networks.nets

    return getattr(monai.networks.nets, name)(**settings)


_MAKERS: dict[str, Callable[..., nn.Module]] = {
    "pytorchcv": _cv,
    "timm": _timm,
    "torchvision": _vision,
    "segmentation_models_pytorch": _smp,
    "monai": _monai,
}


def model_of(library: str, family: str, name: str, inputs: Callable[[int], Any] | None = None, **settings: Any) -> Architecture:
    """An architecture that its library builds by name; 64 x 64 pixels unless said otherwise."""
    return Architecture(name, library, family, functools.partial(_MAKERS[library], name, **settings), inputs or images())


def _of_names(library: str, family: str, names: str, size: int = 64) -> list[Architecture]:
    return [model_of(library, family, name, images(size)) for name in names.split()]


_SMALL_STAGES = {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48)}
_VOLUME = {"spatial_dims": 3, "in_channels": 1}


def _volumes(batch: int) -> Any:
    return randn(batch, 1, 32, 32, 32)


CLASSIFIERS = [
    *_of_names(
        "pytorchcv",
        "CNN",
        "resnet18_wd4 preresnet18_wd4 seresnet10 diaresnet10 resnestabc14 bam_resnet18 cbam_resnet18 peleenet darknet_tiny revnet38 "
        "dla46c hardnet39ds regnetx002 sparsenet121 octresnet10_ad2",
        224,
    ),
    *_of_names("pytorchcv", "CNN", "densenet40_k12_bc_cifar10 nin_cifar10 shakedropresnet20_cifar10 rir_cifar10", 32),
    *_of_names("timm", "CNN", "test_byobnet test_resnet test_nfnet dla46x_c selecsls42 res2net50_14w_8s gernet_s"),
    *_of_names("torchvision", "CNN", "squeezenet1_1 regnet_y_400mf resnet18"),
]

MOBILE = [
    *_of_names(
        "pytorchcv",
        "mobile",
        "mobilenet_wd4 mobilenetv2_wd4 mobilenetv3_small_w7d20 fdmobilenet_wd4 shufflenet_g1_wd4 shufflenetv2_wd2 shufflenetv2b_wd2 "
        "igcv3_wd4 ghostnet mnasnet_small menet108_8x1_g3 espnetv2_wd2 sqnxt23_w1 squeezenet_v1_1 mixnet_s",
        224,
    ),
    *_of_names("timm", "mobile", "test_efficientnet test_efficientnet_gn mobilenetv4_conv_small_035 repghostnet_050 lcnet_050 tinynet_e"),
    *_of_names("torchvision", "mobile", "mnasnet0_5 shufflenet_v2_x0_5"),
]

SEGMENTATION = [
    *[
        model_of("pytorchcv", "segmentation", name, images(64), in_size=(64, 64))
        for name in (
            "enet_cityscapes erfnet_cityscapes linknet_cityscapes lednet_cityscapes esnet_cityscapes edanet_cityscapes cgnet_cityscapes "
            "dabnet_cityscapes fpenet_cityscapes ctxnet_cityscapes fastscnn_cityscapes sinet_cityscapes unet_cityscapes"
        ).split()
    ],
    *[model_of("segmentation_models_pytorch", "segmentation", name) for name in ("Unet", "FPN", "MAnet", "PAN")],
    model_of("torchvision", "segmentation", "lraspp_mobilenet_v3_large", num_classes=5, weights_backbone=None),
    model_of("monai", "segmentation", "UNet", _volumes, **_VOLUME, out_channels=2, channels=(4, 8, 16), strides=(2, 2)),
    model_of("monai", "segmentation", "AttentionUnet", _volumes, **_VOLUME, out_channels=2, channels=(4, 8, 16), strides=(2, 2)),
    model_of("monai", "segmentation", "SegResNet", _volumes, **_VOLUME, out_channels=2, init_filters=8),
    model_of(
        "monai",
        "segmentation",
        "UNETR",
        _volumes,
        in_channels=1,
        out_channels=2,
        img_size=32,
        feature_size=8,
        hidden_size=32,
        mlp_dim=64,
        num_heads=2,
    ),
    model_of(
        "monai",
        "segmentation",
        "DynUNet",
        _volumes,
        **_VOLUME,
        out_channels=2,
        kernel_size=[3, 3],
        strides=[1, 2],
        upsample_kernel_size=[2],
        filters=[4, 8],
    ),
    model_of("monai", "segmentation", "HighResNet", _volumes, **_VOLUME, out_channels=2),
]

DETECTION = [
    model_of("pytorchcv", "detection and pose", "centernet_resnet18_voc", in_size=(64, 64)),
    model_of("pytorchcv", "detection and pose", "simplepose_resnet18_coco", in_size=(64, 64)),
    model_of("pytorchcv", "detection and pose", "simplepose_mobile_mobilenetv3_small_w1_coco", in_size=(64, 64)),
    model_of("pytorchcv", "detection and pose", "lwopenpose2d_mobilenet_cmupan_coco", in_size=(64, 64)),
    model_of("pytorchcv", "detection and pose", "lffd20x5s320v2_widerface", images(256), in_size=(256, 256)),
    model_of("pytorchcv", "detection and pose", "superpointnet", images(64, 1)),
]

HIERARCHICAL = [
    model_of("timm", "hierarchical and mixers", "convnext_atto", **_SMALL_STAGES),
    model_of("timm", "hierarchical and mixers", "convnextv2_atto", **_SMALL_STAGES),
    model_of("timm", "hierarchical and mixers", "inception_next_atto", depths=(1, 1, 1, 1), dims=(16, 24, 32, 48)),
    model_of("timm", "hierarchical and mixers", "mambaout_femto", depths=(1, 1, 1, 1), dims=(16, 24, 32, 48)),
    model_of(
        "timm",
        "hierarchical and mixers",
        "swin_tiny_patch4_window7_224",
        img_size=64,
        window_size=4,
        embed_dim=16,
        depths=(1, 1, 1, 1),
        num_heads=(1, 2, 2, 4),
    ),
    model_of(
        "timm",
        "hierarchical and mixers",
        "swinv2_tiny_window8_256",
        img_size=64,
        window_size=4,
        embed_dim=16,
        depths=(2, 1, 1, 1),
        num_heads=(1, 2, 2, 4),
    ),
    model_of("timm", "hierarchical and mixers", "mixer_s32_224", img_size=64),
    model_of("timm", "hierarchical and mixers", "resmlp_12_224", img_size=64),
    model_of("timm", "hierarchical and mixers", "poolformer_s12"),
    model_of("timm", "hierarchical and mixers", "caformer_s18"),
    model_of("timm", "hierarchical and mixers", "pvt_v2_b0", embed_dims=(16, 32, 32, 64), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)),
    model_of("timm", "hierarchical and mixers", "focalnet_tiny_srf", embed_dim=16, depths=(1, 1, 1, 1)),
    model_of(
        "timm",
        "hierarchical and mixers",
        "davit_tiny",
        embed_dims=(16, 32, 32, 64),
        depths=(1, 1, 1, 1),
        num_heads=(1, 2, 2, 4),
        num_groups=(1, 2, 2, 4),
    ),
    model_of("timm", "hierarchical and mixers", "edgenext_xx_small"),
    model_of("timm", "hierarchical and mixers", "mobilevit_xxs"),
    model_of("timm", "hierarchical and mixers", "efficientformer_l1", images(64), depths=(1, 1, 1, 2), embed_dims=(16, 32, 32, 64)),
    model_of("timm", "hierarchical and mixers", "fastvit_t8", layers=(1, 1, 1, 1), embed_dims=(16, 32, 48, 64)),
    model_of("timm", "hierarchical and mixers", "hiera_tiny_224", img_size=64, embed_dim=16, num_heads=1, stages=(1, 1, 1, 1)),
    model_of("timm", "hierarchical and mixers", "nest_tiny", img_size=64, embed_dims=(16, 32, 32), num_heads=(1, 2, 2), depths=(1, 1, 1)),
    model_of("timm", "hierarchical and mixers", "test_maxvit", images(64), img_size=64),
    model_of(
        "timm",
        "hierarchical and mixers",
        "gcvit_xxtiny",
        images(64),
        img_size=64,
        embed_dim=16,
        depths=(1, 1, 1, 1),
        num_heads=(1, 2, 2, 4),
    ),
    model_of("torchvision", "hierarchical and mixers", "swin_t"),
]

ARCHITECTURES = [*CLASSIFIERS, *MOBILE, *SEGMENTATION, *DETECTION, *HIERARCHICAL]
