"""What finishes a training: true rounding at frozen bits, and batch norm statistics of the rounded weights."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from diffq_fx.compression import require_compressions
from diffq_fx.example import Example, in_eval


def freeze_bits(model: nn.Module) -> None:
    """End the noise: round the bits of a prepared model for good, and train on with truly rounded weights (straight-through estimator).

    Under noise the bits train; with final bits the weights train for the rounding that eval() and convert do.
    ``DiffQConfig(training_steps=...)`` calls it by itself.

    Args:
        model: prepared with trainable bits, or a module that holds such ones.

    Raises:
        PreparationError: the model is not prepared, or none of its weights has trainable bits.

    Example:
        >>> from diffq_fx import prepare_diffq
        >>> prepared = prepare_diffq(nn.Linear(32, 32), torch.zeros(1, 32))
        >>> freeze_bits(prepared)
        >>> torch.equal(prepared.train()(torch.ones(1, 32)), prepared.eval()(torch.ones(1, 32)))
        True
    """
    compressions = require_compressions(model, "freeze_bits")
    learned = [compression for compression in compressions if compression.learned]
    for compression in learned or compressions[:1]:
        compression.config  # noqa: B018  says so where no weight has trainable bits
        compression.freeze()


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterable[Any]) -> None:
    """Gather the running statistics of every batch norm again, with the weights truly rounded and nothing else in train mode.

    Statistics that were gathered under noise are those of a net with more variance than the converted one has.

    Args:
        model: prepared or converted.
        batches: inputs as for the model's example: a tensor, a tuple of positional or a dict of keyword arguments each.

    Raises:
        ValueError: there is no batch; the statistics are as they were.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        >>> reestimate_batch_norm(net, [torch.ones(8, 4)])
        >>> torch.allclose(net[1].running_mean, net[0](torch.ones(4)))
        True
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    before = [(norm.momentum, {name: buffer.clone() for name, buffer in norm.named_buffers()}) for norm in norms]
    count = 0
    try:
        with in_eval(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a plain mean over the batches
                norm.training = True
            for batch in batches:
                Example.of(batch).run(model)
                count += 1
        if not count:
            raise ValueError(
                "reestimate_batch_norm: there is no batch. Give an iterable of inputs, such as a few batches of the training set."
            )
    except BaseException:  # an interrupt too: the statistics are put back, then it goes on
        for norm, (_, buffers) in zip(norms, before, strict=True):
            for name, buffer in buffers.items():
                norm.get_buffer(name).copy_(buffer)
        raise
    finally:
        for norm, (momentum, _) in zip(norms, before, strict=True):
            norm.momentum = momentum
