"""compress_blocks: one block of a model after another, so that the memory is that of the model and some copies of one block."""

import time
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from diffq_fx import _compat
from diffq_fx.arguments import check_flags
from diffq_fx.capture.copies import copy_replacing
from diffq_fx.errors import DiffQError
from diffq_fx.example import Example
from diffq_fx.hub import tell_libraries
from diffq_fx.methods.base import Method
from diffq_fx.methods.diffq import DiffQConfig
from diffq_fx.post_training.batches import Calibration
from diffq_fx.post_training.compress import compress, limits_of
from diffq_fx.threads import TRACING

_CALLER = "compress_blocks"


@torch.inference_mode(False)
def compress_blocks(
    model: nn.Module,
    batches: Iterable[Any],
    blocks: str,
    config: DiffQConfig | Mapping[str, Method] | None = None,
    *,
    steps: int | None = None,
    minutes: float | None = None,
    progress: bool = True,
) -> nn.Module:
    """Compress the blocks of a decoder one after another, each as :func:`~diffq_fx.compress` does it.

    Beside the model there are then the hidden states of all batches and some copies of one block, not of the model. A block is to give
    what the float block gives, by the relative squared error, for what the compressed blocks before it give (as layers do in GPTQ,
    arXiv:2210.17323). Each block meets the target by itself: no bits go from one to another, and weights outside the blocks stay in float.

    Args:
        model: a float model whose blocks form a chain: the first positional input of each is the output, or the first of the outputs, of
            the one before. It is left as it was.
        batches: as for :func:`~diffq_fx.compress`. Of a model of transformers without a cache: ``{"input_ids": ids, "use_cache": False}``.
        blocks: a pattern of their names, such as ``"model.layers.*"``.
        config: settings of a block, with a target; or a mapping of the names of weights within a block.
        steps: most steps of the tuning of each block.
        minutes: most minutes of it all, about, shared out evenly; 10 by default.
        progress: whether a bar shows the stage of each block.

    Returns:
        The model with converted blocks, in eval mode.

    Raises:
        ValueError: no module has such a name, the blocks form no chain, one is called with an object that it may change, or as for
            :func:`~diffq_fx.compress`.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), nn.Sequential(nn.Linear(64, 64)))
        >>> converted = compress_blocks(model, [torch.randn(16, 64) for _ in range(4)], "[12]", steps=0, progress=False)
        >>> [type(weight).__name__ for weight in (converted[0].weight, converted[1][1].weight_quantized)]
        ['Parameter', 'IntegerWeight']
    """
    check_flags(_CALLER, progress=progress)
    limits = limits_of(steps, minutes, time.monotonic())
    paths = [path for path, _ in model.named_modules() if fnmatchcase(path, blocks) and path.count(".") == blocks.count(".")]
    if not paths:
        names = ", ".join(path for path, module in model.named_modules() if isinstance(module, nn.ModuleList | nn.Sequential)) or "none"
        raise ValueError(f"{_CALLER}: no module is called {blocks!r}; lists of modules are: {names}.")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    data = Calibration(batches, device)
    examples = [*data.tuned_on, *(data.held_out if data.held_out is not data.tuned_on else ())]
    shared = {id(parameter): parameter for path in paths for parameter in model.get_submodule(path).parameters()}
    own = copy_replacing(model, shared).eval()
    with TRACING:
        chains = [_chain(own, paths, example) for example in examples]
        for number, path in enumerate(paths):
            calls = [Example((hidden, *rests[number].args), rests[number].kwargs) for hidden, rests in chains]
            left = max(1 - limits.share, 1 / len(paths)) * limits.seconds / 60 / (len(paths) - number)
            try:
                block = compress(own.get_submodule(path), calls, config, kind="features", steps=steps, minutes=left, progress=progress)
            except (DiffQError, ValueError) as error:
                raise type(error)(f"{_CALLER}: block {path!r}, within which weights have their names: {error}") from error
            own.set_submodule(path, block)
            with torch.no_grad():
                chains = [(_first(call.run(block)), rests) for call, (_, rests) in zip(calls, chains, strict=True)]
    tell_libraries(own)
    return own


@torch.no_grad()
def _chain(model: nn.Module, paths: list[str], example: Example) -> tuple[Tensor, list[Example]]:
    """The first block's input, and what each is called with beside its input."""
    rests: list[Example] = []
    hidden: list[Tensor] = []

    def before(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        expected = paths[len(rests)] if len(rests) < len(paths) else "no further call"
        if path != expected or not args or not isinstance(args[0], Tensor) or (hidden and args[0] is not hidden[-1]):
            raise ValueError(
                f"{_CALLER}: the blocks are no chain: at the call of {path!r}, expected {expected} with the output of the block before as "
                "its first positional input. Name blocks that follow each other."
            )
        for value in _compat.tree_leaves((args, kwargs)):
            if not isinstance(value, Tensor | bool | int | float | str | None):
                raise ValueError(
                    f"{_CALLER}: block {path!r} is called with a {type(value).__name__}, which it may change. Of a cache: give the model "
                    "use_cache=False with each batch."
                )
        rests.append(Example(args[1:], kwargs))
        hidden.append(args[0])

    def after(output: Any) -> None:
        hidden[1:] = [_first(output)]

    handles = []
    for path in paths:
        block = model.get_submodule(path)
        handles.append(block.register_forward_pre_hook(lambda _, args, kwargs, path=path: before(path, args, kwargs), with_kwargs=True))
        handles.append(block.register_forward_hook(lambda _, args, output: after(output)))
    try:
        example.run(model)
    finally:
        for handle in handles:
            handle.remove()
    if len(rests) != len(paths):
        raise ValueError(f"{_CALLER}: of {len(paths)} blocks called {', '.join(paths)} the model runs {len(rests)}.")
    return hidden[0], rests


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
