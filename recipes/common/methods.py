"""The methods as settings name them: what a model is prepared with, what is added to its loss, and what its parameters train with."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffq_fx import DiffQConfig, Method
from diffq_fx.compression import require_compressions
from diffq_fx.methods import LC, LSQ, STE, ProductQuantization, QuantNoise
from diffq_fx.training.lc import geometric_schedule, lc_penalty, lc_step
from recipes.common.settings import Settings

PAPER_BITS_LR = 1e-4
"""The paper's 1e-3: this library's bits move ten times as fast at the same rate."""


def make_method(settings: Settings, steps: int) -> Method | None:
    """The method of the settings for a training of so many steps; None for float."""
    whole, group = int(settings.bits), int(settings.group) if settings.group.isdecimal() else settings.group
    common: dict[str, Any] = {"min_size": settings.min_size}
    entries = 2**whole
    match settings.method:
        case "float":
            return None
        case "diffq":
            aim = {"target_mib": settings.mib} if settings.mib is not None else {"target_bits": settings.bits}
            if settings.penalty is not None:
                aim = {"penalty": settings.penalty}
            return DiffQConfig(**aim, **common, group_size=group, training_steps=steps)
        case "diffq-paper":
            return DiffQConfig.paper(settings.penalty, group, **common)
        case "ste":
            return STE(bits=whole, group_size=group, **common)
        case "lsq":
            return LSQ(bits=whole, group_size=group, **common)
        case "quant-noise":
            return QuantNoise(bits=whole, group_size=group, rate=settings.noise_rate, **common)
        case "pq":
            return ProductQuantization(entries=entries, rate=settings.noise_rate, noise="proxy", **common)
        case "lc":
            own = {"entries": entries} if settings.codebook == "adaptive" else {}
            return LC(codebook=settings.codebook, **own, **common)


class Turns:
    """LC's side of the loop: so many times in a training codebooks follow the weights, under a penalty that grows."""

    def __init__(self, settings: Settings, model: nn.Module, steps: int) -> None:
        self.model, self.steps = model, steps
        self.turns = max(min(settings.turns, steps), 2)
        factor = (settings.mu_end / settings.mu_start) ** (1 / (self.turns - 1))
        self.schedule = geometric_schedule(settings.mu_start, factor, self.turns)
        self.largest_rate = math.inf
        """Half of 1/mu: Nesterov's momentum of 0.9 diverges beyond 1.36 over the curvature, which is mu and that of the loss."""

    def before_step(self, step: int) -> None:
        """Take a C step where a turn begins."""
        turn = step * self.turns // self.steps
        if step == 0 or turn != (step - 1) * self.turns // self.steps:
            lc_step(self.model, next_mu=self.schedule[turn])
        self.largest_rate = 0.5 / self.schedule[turn]

    def finish(self) -> float:
        """The last C step: the distance of the weights from what is stored."""
        return lc_step(self.model, next_mu=self.schedule[-1])

    def loss(self) -> Tensor:
        """What the loss gains."""
        return lc_penalty(self.model)


def _bits_and_scales(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What a prepared model trains beside its weights: the bits; learned ranges, scales and codebooks."""
    compressions = require_compressions(model, "recipes")
    bits = [quantizer.logits for compression in compressions for quantizer in compression.learned]
    known = {id(each) for each in bits}
    own = [each for compression in compressions for quantizer in compression.quantizers for each in quantizer.parameters()]
    return bits, [each for each in own if id(each) not in known]


class Optimizers:
    """One optimizer for the weights, one for what the method learns, and the rate that falls."""

    def __init__(self, settings: Settings, model: nn.Module, prepared: bool) -> None:
        self.settings = settings
        bits, scales = _bits_and_scales(model) if prepared else ([], [])
        own = {id(each) for each in (*bits, *scales)}
        self.weights = [each for each in model.parameters() if id(each) not in own]
        self.all = [self._of_weights()]
        follows_the_paper = settings.method == "diffq-paper" or settings.penalty is not None
        bits_lr = settings.bits_lr if settings.bits_lr is not None else PAPER_BITS_LR if follows_the_paper else 1e-3
        groups = [{"params": scales, "lr": settings.scales_lr, "falls": True}, {"params": bits, "lr": bits_lr, "falls": False}]
        if groups := [group for group in groups if group["params"]]:
            self.all.append(torch.optim.Adam(groups))
        for group in self._groups():
            group["first_lr"] = group["lr"]

    def _groups(self) -> Iterator[dict[str, Any]]:
        return itertools.chain.from_iterable(optimizer.param_groups for optimizer in self.all)

    def _of_weights(self) -> torch.optim.Optimizer:
        settings = self.settings
        if settings.optimizer == "sgd":
            nesterov = settings.momentum > 0
            return torch.optim.SGD(
                self.weights, settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay, nesterov=nesterov
            )
        kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
        return kind(self.weights, settings.lr, weight_decay=settings.weight_decay)

    def step(self, factor: float, most: float) -> None:
        """Clip, set the rates, of which none is larger than ``most``, step."""
        if self.settings.clip_norm:
            nn.utils.clip_grad_norm_(self.weights, self.settings.clip_norm)
        for group in self._groups():
            group["lr"] = min(group["first_lr"] * (factor if group.get("falls", True) else 1.0), most)
        for optimizer in self.all:
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self.all:
            optimizer.zero_grad()

    def state_dict(self) -> list[dict[str, Any]]:
        """Of each optimizer."""
        return [optimizer.state_dict() for optimizer in self.all]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Of each optimizer."""
        for optimizer, state in zip(self.all, states, strict=True):
            optimizer.load_state_dict(state)
