"""Give the bits a parameter group of their own: optional, for those who want their own rate for them."""

import itertools

from torch import nn
from torch.optim.optimizer import Optimizer

from diffq_fx.compression import require_compressions


def setup_optimizer(optimizer: Optimizer, model: nn.Module, *, bits_lr: float = 1e-3) -> Optimizer:
    """Put the bits of a prepared model into their own group of the optimizer: rate ``bits_lr``, no weight decay.

    Nothing needs this call; without it the bits train with the rate of the group they are in. It may come before or after the model is
    wrapped (DistributedDataParallel), and once or several times.

    Args:
        optimizer: any torch optimizer that holds the model's weights, with the bits among them or not.
        model: prepared, or a module that holds prepared ones.
        bits_lr: learning rate of the bits.

    Returns:
        The same optimizer.

    Raises:
        PreparationError: the model is not prepared.
        ValueError: the optimizer holds no parameter of the model, no weight has trainable bits, or ``bits_lr`` is not positive.

    Example:
        >>> import torch
        >>> from diffq_fx import prepare_diffq
        >>> prepared = prepare_diffq(torch.nn.Linear(32, 32), torch.zeros(1, 32))
        >>> optimizer = setup_optimizer(torch.optim.SGD(prepared.parameters(), lr=0.1), prepared, bits_lr=0.01)
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.1, 0.01]
    """
    compressions = require_compressions(model, "setup_optimizer")
    if not bits_lr > 0:
        raise ValueError(f"setup_optimizer: bits_lr must be positive, got {bits_lr}.")
    bits = [quantizer.logits for compression in compressions for quantizer in compression.learned]
    if not bits:
        raise ValueError(f"setup_optimizer: no weight has trainable bits: the model was prepared with {compressions[0].method.name}.")
    ours = {id(logits) for logits in bits}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not held & {id(p) for p in model.parameters()}:
        raise ValueError(
            f"setup_optimizer: the {type(optimizer).__name__} holds no parameter of this model. "
            "Build it from the prepared model's parameters()."
        )
    names = {id(p): name for name, p in model.named_parameters()} if "param_names" in optimizer.param_groups[0] else {}
    for group in optimizer.param_groups:
        kept = [id(p) not in ours for p in group["params"]]
        group.update({key: list(itertools.compress(group[key], kept)) for key in ("params", "param_names") if key in group})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    own = [(names[id(logits)], logits) for logits in bits] if names else bits
    optimizer.add_param_group({"params": own, "lr": bits_lr, "weight_decay": 0.0})
    return optimizer
