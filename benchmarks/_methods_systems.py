"""The systems that methods.py compares, each at its settings."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks._mnist import Mnist
from diffq_fx import DiffQConfig, model_size, prepare
from diffq_fx.methods import LC, LSQ, STE, Method, ProductQuantization, QuantNoise
from diffq_fx.training.ipq import IPQ
from diffq_fx.training.lc import LCLoop, LStep, counted_ratio, geometric_schedule, lc_penalty, lc_step, lc_weights

SLOW_LC = "LC (slow schedule)"
SLOW_STEPS, SLOW_EPOCHS = 40, 5
"""L steps and their epochs; the authors' LeNet300 has 40 of 20 epochs each."""
_SLOW_MU = 4 * 9e-5
"""Where mu starts: L steps of a quarter of the epochs have the weights move as far under four times the authors' mu."""
_SLOW_TAIL = 10
"""At most so many steps with a doubled mu at the end, until the weights meet their codebook."""
_MU_END = 30.0
_BLOCKS = ((256, 2), (64, 2), (256, 4), (256, 8))
"""Entries and block size of iPQ at 4, 3, 2 and 1 bits a weight."""
Made = tuple[nn.Module, str]
"""A prepared model after training, and a note."""


@dataclass(frozen=True)
class System:
    """One row: a method at one setting."""

    name: str
    setting: str
    make: Callable[["Start"], Made]


@dataclass(frozen=True)
class Start:
    """What a system begins with."""

    task: Mnist
    float_model: nn.Module
    mu_start: float

    def prepared(self, method: Method | dict[str, Method]) -> nn.Module:
        """A copy of the float model under a method."""
        return prepare(copy.deepcopy(self.float_model), self.task.example, method)

    def trained(self, method: Method) -> Made:
        """Prepare and train."""
        model = self.prepared(method)
        self.task.fit(model, self.task.epochs)
        return model, ""

    def diffq(self, bits: int) -> Made:
        """Learned bits at the exact size of uniform quantization with this many."""
        target = model_size(self.prepared(STE(bits=bits)), exact=True)
        return self.trained(DiffQConfig(target_mib=float(target), training_steps=self.task.steps))

    def lc(self, method: LC, *, augmented: bool = True) -> Made:
        """One epoch for each L step; mu rises to the same end whatever their number."""
        model, steps = self.prepared(method), self.task.epochs
        schedule = geometric_schedule(self.mu_start, (_MU_END / self.mu_start) ** (1 / (steps - 1)), steps)
        history = LCLoop(model, self.task.l_step(), schedule=schedule, augmented=augmented).run()
        return model, f"distance {history[-1].distance:.1e}, counted {counted_ratio(model):.1f}x"

    def slow_l_step(self) -> Callable[[nn.Module, LStep], None]:
        """The authors' L step, of fewer epochs."""
        return self.task.l_step(epochs=SLOW_EPOCHS, first_rate=0.09, decay=0.98)

    def slow_lc(self, method: LC) -> Made:
        """The authors' schedule, ``mu_k = mu_0 1.1^k``, in fewer epochs."""
        model, schedule = self.prepared(method), geometric_schedule(_SLOW_MU, 1.1, SLOW_STEPS)
        history = LCLoop(model, self.slow_l_step(), schedule=schedule + geometric_schedule(2 * schedule[-1], 2.0, _SLOW_TAIL)).run()
        epochs = SLOW_EPOCHS * len(history)
        return model, f"{epochs} epochs, distance {history[-1].distance:.1e}, counted {counted_ratio(model):.1f}x"

    def slow_float(self) -> nn.Module:
        """The float model after the same L steps without a penalty."""
        model, train = copy.deepcopy(self.float_model), self.slow_l_step()
        for index in range(SLOW_STEPS):
            train(model, LStep(index, 0.0, lambda: torch.zeros(())))
        return model

    def direct(self, method: LC) -> Made:
        """One C step."""
        model = self.prepared(method)
        lc_step(model, next_mu=0.0, augmented=False)
        return model, ""

    def iterated(self, method: LC) -> Made:
        """C steps and training from the compressed weights in turn."""
        model, _ = self.direct(method)
        train = self.task.l_step()
        for index in range(self.task.epochs):
            with torch.no_grad():
                for quantizer in lc_weights(model, "iterated"):
                    quantizer.weight.copy_(quantizer.compressed)
            train(model, LStep(index, 0.0, lambda: lc_penalty(model)))
            lc_step(model, next_mu=0.0, augmented=False)
        return model, ""

    def ipq(self, entries: int, block: int) -> Made:
        """A quarter of the epochs after each of three groups of weights, the others before under noise."""
        small = ProductQuantization(entries=16, block_size=4, entry_dtype="int8", noise="proxy", rate=0.05)
        large = ProductQuantization(entries=entries, block_size=block, entry_dtype="int8", noise="proxy", rate=0.05)
        model = self.prepared({"5": small, "*": large})  # the last layer has too few blocks for the large codebook
        epochs = max(self.task.epochs // 4, 1)
        self.task.fit(model, max(self.task.epochs - 3 * epochs, 1))
        IPQ(model, [["1"], ["3"], ["5"]], lambda model, stage: self.task.fit(model, epochs)).run()
        return model, ""


def systems() -> Iterator[System]:
    """All rows, in the table's order."""
    for bits in (8, 4, 3, 2):
        name = f"{bits} bits"
        yield System("rounding alone", name, lambda start, bits=bits: (start.prepared(STE(bits=bits)), ""))
        for title, method in (("STE", STE(bits=bits)), ("LSQ", LSQ(bits=bits)), ("Quant-Noise", QuantNoise(bits=bits))):
            yield System(title, name, lambda start, method=method: start.trained(method))
        if bits < 8:
            yield System("DiffQ", f"size of {name}", lambda start, bits=bits: start.diffq(bits))
    for bits in (3, 2):
        for title, method in (("STE", STE(bits=bits, group_size="tensor")), ("LSQ", LSQ(bits=bits, group_size="tensor"))):
            yield System(f"{title} per layer", f"{bits} bits", lambda start, method=method: start.trained(method))
    for entries in (16, 8, 4, 2):
        method = LC(entries=entries)
        yield System("LC", f"K={entries}", lambda start, method=method: start.lc(method))
        yield System("direct compression", f"K={entries}", lambda start, method=method: start.direct(method))
    for entries in (4, 2):
        yield System("iterated direct compression", f"K={entries}", lambda start, k=entries: start.iterated(LC(entries=k)))
    yield System("LC (quadratic penalty)", "K=2", lambda start: start.lc(LC(entries=2), augmented=False))
    yield System("LC", "scaled_ternary", lambda start: start.lc(LC(codebook="scaled_ternary")))
    for entries in (4, 2):
        yield System(SLOW_LC, f"K={entries}", lambda start, k=entries: start.slow_lc(LC(entries=k)))
    for entries, block in _BLOCKS:
        yield System("iPQ + int8", f"K={entries}, blocks of {block}", lambda start, k=entries, d=block: start.ipq(k, d))
