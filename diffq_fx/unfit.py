"""Models that prepare cannot work on: each gets one sentence, before anything is changed."""

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from diffq_fx.errors import PreparationError
from diffq_fx.selection import Selection
from diffq_fx.weights import QUANTIZER_SUFFIX, STORED_SUFFIX, owner_of

_MAKE_A_WEIGHT = {
    WeightNorm: ("torch.nn.utils.weight_norm", "Use torch.nn.utils.parametrizations.weight_norm"),
    SpectralNorm: ("torch.nn.utils.spectral_norm", "Use torch.nn.utils.parametrizations.spectral_norm"),
    BasePruningMethod: ("torch.nn.utils.prune", "Make the pruning permanent with torch.nn.utils.prune.remove"),
}


def refuse_unfit_modules(model: nn.Module, caller: str) -> None:
    """Refuse modules whose forward is no Python of theirs, and weights that a hook makes.

    Raises:
        PreparationError: names the module and what to do.
    """
    made_in_inference = next((name for name, p in model.named_parameters() if not nn.parameter.is_lazy(p) and p.is_inference()), None)
    if made_in_inference is not None:
        raise PreparationError(
            f"{caller}: {made_in_inference!r} was made under torch.inference_mode() and can never train. Make the model outside of it."
        )
    for path, module in model.named_modules():
        where = path or "the model"
        if "_orig_mod" in module._modules:  # torch._dynamo is slow to import
            raise PreparationError(
                f"{caller}: {where} is compiled by torch.compile. Prepare the module inside, its _orig_mod, and compile the prepared model."
            )
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise PreparationError(
                f"{caller}: {where} is a {type(module).__name__}. Prepare the module inside first, and wrap the prepared model then: "
                "the wrapper has to know the parameters of the bits."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise PreparationError(
                f"{caller}: {where} is a {type(module).__name__} of torch.jit, whose weights only TorchScript reads. Prepare the model in "
                "Python that it was made from."
            )
        for hook in module._forward_pre_hooks.values():
            for kind, (name, advice) in _MAKE_A_WEIGHT.items():
                if isinstance(hook, kind):
                    made = getattr(hook, "name", getattr(hook, "_tensor_name", "weight"))
                    raise PreparationError(
                        f"{caller}: {where} makes its {made} in a hook of {name}, where no quantizer can stand.\n  {advice}."
                    )


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
