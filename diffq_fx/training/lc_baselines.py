"""What LC quantization is compared with, and how the paper counts compression (arXiv:1707.04319)."""

import time
from functools import partial

import torch
from torch import nn

from diffq_fx.compression import require_compression
from diffq_fx.errors import PreparationError
from diffq_fx.methods.learning_compression import shared_groups
from diffq_fx.training.lc import LCProgress, LStep, TrainingFunction, lc_penalty, lc_step, lc_weights
from diffq_fx.training.safety import train_or_go_back

_FLOAT_BITS = 32


def direct_compression(model: nn.Module) -> float:
    """Compress the weights as they are: one C step without any penalty, the paper's baseline DC.

    Args:
        model: prepared with :class:`~diffq_fx.methods.LC`.

    Returns:
        ``||w - Delta|| / ||w||`` over all LC weights.

    Example:
        >>> from diffq_fx import prepare
        >>> from diffq_fx.methods import LC
        >>> prepared = prepare(nn.Linear(16, 16), torch.zeros(1, 16), LC(entries=256))
        >>> direct_compression(prepared) < 1e-3  # an entry for each of its 256 weights
        True
    """
    return lc_step(model, next_mu=0.0, augmented=False)


def iterated_direct_compression(model: nn.Module, train: TrainingFunction, *, iterations: int) -> list[LCProgress]:
    """Compress, train on from the compressed weights, compress again: the paper's baseline iDC. It writes the weights.

    Args:
        model: prepared with :class:`~diffq_fx.methods.LC`.
        train: as for :class:`LCLoop`; its penalty is zero.
        iterations: 1 or more.

    Returns:
        The turns.

    Raises:
        DivergenceError: a training step left values that are not finite; the model is as it was before that step.
        ValueError: ``iterations`` is less than 1.

    Example:
        >>> from diffq_fx import prepare
        >>> from diffq_fx.methods import LC
        >>> prepared = prepare(nn.Linear(16, 16), torch.zeros(1, 16), LC(entries=4))
        >>> turns = iterated_direct_compression(prepared, lambda model, step: None, iterations=2)  # your training in place of None
        >>> [turn.distance for turn in turns]
        [0.0, 0.0]
    """
    if iterations < 1:
        raise ValueError(f"iterated_direct_compression: iterations must be at least 1, got {iterations}.")
    direct_compression(model)
    history = []
    for index in range(iterations):
        began = time.monotonic()
        with torch.no_grad():
            for quantizer in lc_weights(model, "iterated_direct_compression"):
                quantizer.weight.copy_(quantizer.compressed)
        step = LStep(index, 0.0, lambda: lc_penalty(model))
        train_or_go_back(model, partial(train, model, step), f"iterated_direct_compression: step {index}", "Lower the learning rate.")
        history.append(LCProgress(index, 0.0, direct_compression(model), time.monotonic() - began))
    return history


def counted_ratio(model: nn.Module) -> float:
    """Compression ratio as the paper counts it: ``(P1 + P0) b / (P1 ceil(log2 K) + (P0 + K) b)`` (arXiv:1707.04319).

    P1 weights are quantized, P0 parameters are not; K counts the learned entries of every codebook once; b is 32.

    Args:
        model: prepared with :class:`~diffq_fx.methods.LC` alone.

    Returns:
        How many times smaller the model is.

    Example:
        >>> from diffq_fx import prepare
        >>> from diffq_fx.methods import LC
        >>> layers = [torch.nn.Linear(784, 300), torch.nn.Tanh(), torch.nn.Linear(300, 100), torch.nn.Tanh(), torch.nn.Linear(100, 10)]
        >>> model = prepare(torch.nn.Sequential(*layers), torch.zeros(1, 784), LC(entries=2))
        >>> round(counted_ratio(model), 1)  # LeNet300: 30.5 in the paper
        30.5
    """
    compression = require_compression(model, "counted_ratio")
    weights = lc_weights(model, "counted_ratio")
    if len(weights) < len(compression.quantizers):
        raise PreparationError(f"counted_ratio: the paper counts LC weights alone; the model was prepared with {compression.method.name}.")
    quantized = sum(quantizer.spec.numel for quantizer in weights)
    codes = sum(sum(q.footprint().histogram.keys()) * q.spec.numel for q in weights)
    learned = sum(group[0].config.learned_floats for group in shared_groups(weights))
    rest = compression.rest_numel
    return (quantized + rest) * _FLOAT_BITS / (codes + (rest + learned) * _FLOAT_BITS)
