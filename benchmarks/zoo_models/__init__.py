"""Architectures of libraries that nobody here wrote, in small forms with random weights: nothing is downloaded."""

from itertools import zip_longest
from typing import Any

import torch

from benchmarks.zoo_models.entry import Architecture


def architectures() -> list[Architecture]:
    """All of them, the first of every family, the second of every family and so on: a run that ends early has seen all families."""
    from benchmarks.zoo_models import convolutional, generative, graphs, language, speech, speech_transformers, vision_transformers

    modules = (convolutional, vision_transformers, language, speech, speech_transformers, generative, graphs)
    found = [each for module in modules for each in module.ARCHITECTURES]
    families: dict[str, list[Architecture]] = {}
    for each in found:
        families.setdefault(each.family, []).append(each)
    return [each for turn in zip_longest(*families.values()) for each in turn if each]


def import_libraries() -> None:
    """Import what the models are made of, once for all processes.

    torchvision's operators are compiled against torch with CUDA: beside a torch without it only what needs none of them is used, and
    their registration is left out.
    """
    register = torch.library.register_fake

    def register_if_there(operator: Any, *args: Any, **kwargs: Any) -> Any:
        if str(operator).startswith("torchvision::") and not hasattr(torch.ops.torchvision, str(operator).rpartition(":")[2]):
            return lambda function: function
        return register(operator, *args, **kwargs)

    torch.library.register_fake = register_if_there
    import torchvision  # noqa: F401

    torch.library.register_fake = register
    import diffusers  # noqa: F401
    import peft  # noqa: F401
    import timm  # noqa: F401
    import torch_geometric.nn  # noqa: F401
    import transformers  # noqa: F401
