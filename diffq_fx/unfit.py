"""Models that prepare cannot work on: each gets one sentence, before anything is changed."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from diffq_fx.compression import find_compressions
from diffq_fx.errors import PreparationError
from diffq_fx.parts import CHILD
from diffq_fx.selection import Selection
from diffq_fx.storage import StoredWeight
from diffq_fx.weights import QUANTIZER_SUFFIX, STORED_SUFFIX, owner_of

_MAKE_A_WEIGHT = {
    WeightNorm: ("torch.nn.utils.weight_norm", "Use torch.nn.utils.parametrizations.weight_norm"),
    SpectralNorm: ("torch.nn.utils.spectral_norm", "Use torch.nn.utils.parametrizations.spectral_norm"),
    BasePruningMethod: ("torch.nn.utils.prune", "Make the pruning permanent with torch.nn.utils.prune.remove"),
}


def refuse_unfit(model: nn.Module, caller: str) -> None:
    """Refuse what is no float model, modules whose forward is no Python of theirs, and weights that a hook makes.

    Raises:
        TypeError: it is no module.
        PreparationError: names the module and what to do.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: expected a torch.nn.Module, got {type(model).__name__}.")
    sentences = (
        *_about_the_model(model),
        *(each for path, module in model.named_modules() for each in _about(module, path or "the model")),
    )
    if sentences:
        raise PreparationError(f"{caller}: {sentences[0]}")


def _about_the_model(model: nn.Module) -> Iterator[str]:
    if find_compressions(model):
        yield f"the {type(model).__name__} is prepared already. Train it, or start from the float model."
    if any(isinstance(module, StoredWeight) for module in model.modules()):
        yield f"the {type(model).__name__} is converted: its weights are integers. Start from the float model."
    if hasattr(model, CHILD):
        yield f"the model has an attribute {CHILD!r} of its own, which a prepared model needs. Rename it."
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            yield f"{name!r} is not initialized yet: run the model once before it is prepared."
        elif parameter.is_meta:
            yield f"{name!r} is on the meta device and has no values. Load the weights first."
        elif parameter.is_inference():
            yield f"{name!r} was made under torch.inference_mode() and can never train. Make the model outside of it."


def _about(module: nn.Module, where: str) -> Iterator[str]:
    if "_orig_mod" in module._modules:  # torch._dynamo is slow to import
        yield f"{where} is compiled by torch.compile. Prepare the module inside, its _orig_mod, and compile the prepared model."
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        yield (
            f"{where} is a {type(module).__name__}. Prepare the module inside first, and wrap the prepared model then: "
            "the wrapper has to know the parameters of the bits."
        )
    if isinstance(module, torch.jit.ScriptModule):
        yield (
            f"{where} is a {type(module).__name__} of torch.jit, whose weights only TorchScript reads. Prepare the model in "
            "Python that it was made from."
        )
        return  # it tells of no hooks
    for hook in module._forward_pre_hooks.values():
        for kind, (name, advice) in _MAKE_A_WEIGHT.items():
            if isinstance(hook, kind):
                made = getattr(hook, "name", getattr(hook, "_tensor_name", "weight"))
                yield f"{where} makes its {made} in a hook of {name}, where no quantizer can stand.\n  {advice}."


def refuse_unfit_names(model: nn.Module, selection: Selection, caller: str) -> None:
    """Refuse attributes of the user's that stand where quantizers and stored weights go.

    Raises:
        PreparationError: names the attribute and the weight.
    """
    for name in selection.names():
        owner, attribute = owner_of(model, name)
        for suffix in (QUANTIZER_SUFFIX, STORED_SUFFIX):
            if hasattr(owner, attribute + suffix):
                raise PreparationError(
                    f"{caller}: the model has an attribute {name + suffix!r} of its own, where what quantizes the weight {name!r} goes. "
                    "Rename it, or leave the weight in float with exclude."
                )
