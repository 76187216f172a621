"""EfficientNet-B3 and DeiT-B with fresh weights, from whichever library of architectures is installed."""

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from recipes.common.recipe import Lacking

_TIMM = {"efficientnet_b3": "efficientnet_b3", "deit_b": "deit_base_patch16_224", "deit_b_distilled": "deit_base_distilled_patch16_224"}


def make_model(name: str, classes: int, *, size: int = 224, **smaller: Any) -> nn.Module:
    """The net, by timm, transformers or, of EfficientNet alone, pytorchcv.

    Args:
        name: efficientnet_b3, deit_b, or deit_b_distilled, with a head for each of DeiT's two tokens.
        classes: of the data.
        size: of the pictures.
        smaller: settings of transformers' config in place of those of DeiT-B, for a trial.
    """
    if importlib.util.find_spec("timm") is not None and not smaller:
        import timm

        return timm.create_model(_TIMM[name], num_classes=classes, **({"img_size": size} if name.startswith("deit") else {}))
    if importlib.util.find_spec("transformers") is not None:
        return _of_transformers(name, classes, size, smaller)
    if name == "efficientnet_b3" and importlib.util.find_spec("pytorchcv") is not None:
        from pytorchcv.model_provider import get_model

        return get_model("efficientnet_b3", num_classes=classes)
    raise Lacking(f"{name} needs timm or transformers: pip install timm.")


def _of_transformers(name: str, classes: int, size: int, smaller: dict[str, Any]) -> nn.Module:
    import transformers as tf

    if name == "efficientnet_b3":
        shape = {"width_coefficient": 1.2, "depth_coefficient": 1.4, "hidden_dim": 1536, "dropout_rate": 0.3, "image_size": size}
        return Scores(tf.EfficientNetForImageClassification(tf.EfficientNetConfig(num_labels=classes, **{**shape, **smaller})))
    shape = {"image_size": size, "num_labels": classes, **smaller}
    if name == "deit_b":
        return Scores(tf.ViTForImageClassification(tf.ViTConfig(**shape)))
    return TwoHeads(tf.DeiTModel(tf.DeiTConfig(**shape), add_pooling_layer=False), classes)


class Scores(nn.Module):
    """A classifier of transformers that takes pictures and gives scores."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pictures: Tensor) -> Tensor:
        """Scores, shape (N, classes)."""
        return self.net(pixel_values=pictures).logits


class TwoHeads(nn.Module):
    """DeiT (Touvron et al., arXiv:2012.12877): one head reads the class token, one the distillation token."""

    def __init__(self, net: nn.Module, classes: int) -> None:
        super().__init__()
        self.net = net
        width: int = net.config.hidden_size  # pyright: ignore[reportAssignmentType,reportAttributeAccessIssue]
        self.head, self.distillation_head = nn.Linear(width, classes), nn.Linear(width, classes)

    def forward(self, pictures: Tensor) -> Tensor:
        """Scores of both heads, shape (N, 2, classes)."""
        features = self.net(pixel_values=pictures).last_hidden_state
        return torch.stack([self.head(features[:, 0]), self.distillation_head(features[:, 1])], 1)
