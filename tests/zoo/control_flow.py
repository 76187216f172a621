"""Models whose Python does more than compute: modes, branches, checks, random numbers, hooks, checkpointing, open signatures."""

import random
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zoo.entry import Entry, randn


class Two(nn.Module):
    """Two Linear layers; the subclasses differ in how they call them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 8)


class TestsItsMode(Two):
    """``if self.training``."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.training:
            x = x + torch.randn_like(x)
        return self.second(F.relu(x))


class FunctionalDropout(Two):
    """``F.dropout(training=self.training)``."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.dropout(F.relu(self.first(x)), 0.5, training=self.training))


class DataDependent(Two):
    """A branch on the values of the input; every call runs both layers."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.sum() > 0:
            x = x * 2
        return self.second(x)


class UnseenBranch(nn.Module):
    """A branch that the example does not take, with a weight that only it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.rare = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out = self.second(F.relu(self.first(x)))
        return self.rare(out) if x.abs().max() > 1e3 else out


class ChecksItsInput(Two):
    """isinstance(x, Tensor) is false for what fx traces with."""

    def forward(self, x: Any) -> Tensor:
        if isinstance(x, Tensor):
            x = self.first(x)
        else:
            x = self.first(x) * 2.5
        return self.second(x)


class DrawsNoise(Two):
    """torch.randn in the forward, in eval mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) + torch.randn(12))


class Checkpointed(Two):
    """Activation checkpointing, which tracing would inline away."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(checkpoint(self.run_first, x, use_reentrant=False))

    def run_first(self, x: Tensor) -> Tensor:
        return F.relu(self.first(x))


class OpenSignature(Two):
    """**kwargs, an optional mask, and a dict as the output."""

    def forward(self, x: Tensor, mask: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
        x = self.first(x)
        if mask is not None:
            x = x * mask
        return {"logits": self.second(F.relu(x)), "hidden": x}


class Point(NamedTuple):
    """An output with names."""

    logits: Tensor
    hidden: Tensor


class NamedTupleOut(Two):
    """A named tuple as the output."""

    def forward(self, x: Tensor) -> Point:
        hidden = self.first(x)
        return Point(self.second(hidden), hidden)


@dataclass
class Result:
    """An output that no container of torch knows."""

    logits: Tensor
    hidden: Tensor


class DataclassOut(Two):
    """A dataclass as the output."""

    def forward(self, x: Tensor) -> Result:
        hidden = self.first(x)
        return Result(self.second(hidden), hidden)


class OrderedDictOut(Two):
    """An OrderedDict as the output, as torchvision's detectors give it."""

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        hidden = self.first(x)
        return OrderedDict(logits=self.second(hidden), hidden=hidden)


class OptionalScale(Two):
    """An optional argument that the example gives: its value is an input, its default is gone."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.second(self.first(x) * (1.0 if scale is None else scale))


class WritesInput(Two):
    """Changes its input in place, and holds a running buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("scratch", torch.zeros(12), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        x.mul_(2)
        return self.second(self.first(x) + self.scratch) + self.seen


class Stateful(Two):
    """Counts its calls in a plain attribute, and keeps its last output there."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out = self.second(self.first(x))
        self.last = out.detach()
        return out


class DropsLayers(Two):
    """Layer drop as Hugging Face writes it: a random number that only Python looks at."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.training and torch.rand([]) < 0.1:
            return self.second(x)
        return self.second(F.relu(x))


class DropsLayersInPython(Two):
    """Layer drop by Python's own random numbers, in eval mode too."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x if random.random() < 0.1 else F.relu(x))


class MovingAverage(Two):
    """A buffer that each call in train mode changes, and that only later calls read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out = self.second(x - self.mean)
        self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return out


class TestsABuffer(Two):
    """A branch on the value of a buffer, which someone else may change."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("warm", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(F.relu(x) if self.warm else x)


class CountsInABuffer(Two):
    """Counts its calls in a buffer that it does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.second(self.first(x))


class PlainTensor(Two):
    """A moving average in a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        out = self.second(x - self.mean)
        self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return out


class AddsToItsInput(Two):
    """Changes its argument by an operator that fx traces out of place."""

    def forward(self, x: Tensor) -> Tensor:
        x += 1
        return self.second(self.first(x))


class WeightsInAList(Two):
    """Reads its children's weights from a list of its own, which no registry knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = [self.first.weight, self.second.weight]

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = F.linear(x, weight)
        return x


class SharedModule(nn.Module):
    """One block under two names, called three times: two sites, one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.again = self.block
        self.layers = nn.ModuleList([self.block, nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.again(self.block(x))


class RunsItsChildren(nn.Module):
    """Runs whatever children it has, in order, twice if the input is large."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2 if x.abs().max() > 100 else 1):
            for child in self.children():
                x = child(x)
        return x


class NestedInput(Two):
    """A dict of a list of tensors as the input."""

    def forward(self, batch: dict[str, Any]) -> Tensor:
        first, second = batch["pair"]
        return self.second(self.first(first + second))


def hooked() -> nn.Module:
    """A Linear with a forward hook that tests values."""
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
    model[0].register_forward_hook(_double_if_positive)
    return model


def hooked_activation() -> nn.Module:
    """A hook on a module without a weight, which no trace goes through."""
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
    model[1].register_forward_hook(_double_if_positive)
    return model


def _double_if_positive(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2 if output.sum() > 0 else output


def _row(variant: int) -> Tensor:
    return randn(3 + variant, 8)


ENTRIES = [
    Entry(name="tests_its_mode", build=TestsItsMode, inputs=_row, weights=2, untraceable=r"something else in train\(\) than in eval"),
    Entry(
        name="functional_dropout", build=FunctionalDropout, inputs=_row, weights=2, untraceable=r"something else in train\(\) than in eval"
    ),
    Entry(name="data_dependent", build=DataDependent, inputs=_row, weights=2, untraceable="inputs to control flow", no_onnx="control flow"),
    Entry(
        name="unseen_branch",
        build=UnseenBranch,
        inputs=_row,
        weights=3,
        untraceable="inputs to control flow",
        unseen=("rare.weight",),
        no_onnx="control flow",
    ),
    Entry(
        name="checks_its_input",
        build=ChecksItsInput,
        inputs=_row,
        weights=2,
        untraceable="with noise off, in train: 24 of 24 values of the output differ",
    ),
    Entry(
        name="draws_noise",
        build=DrawsNoise,
        inputs=_row,
        weights=2,
        untraceable="a tensor that does not depend on its inputs",
        draws=True,
        no_onnx="random",
    ),
    Entry(name="checkpointed", build=Checkpointed, inputs=_row, weights=2, untraceable="activation checkpointing"),
    Entry(name="open_signature", build=OpenSignature, inputs=_row, weights=2, untraceable=r"also takes mask, \*\*kwargs"),
    Entry(name="named_tuple_out", build=NamedTupleOut, inputs=_row, weights=2),
    Entry(name="dataclass_out", build=DataclassOut, inputs=_row, weights=2, no_onnx="output type"),
    Entry(
        name="ordered_dict_out",
        build=OrderedDictOut,
        inputs=_row,
        weights=2,
        untraceable="the output is a dict, the original's a OrderedDict",
    ),
    Entry(name="optional_scale", build=OptionalScale, inputs=lambda v: (_row(v), torch.tensor(2.0)), weights=2),
    Entry(name="writes_input", build=WritesInput, inputs=_row, weights=2, untraceable="changes seen of the module", no_onnx="state"),
    Entry(name="stateful", build=Stateful, inputs=_row, weights=2, untraceable="changes calls, last of the module"),
    Entry(name="nested_input", build=NestedInput, inputs=lambda v: {"batch": {"pair": [_row(v), _row(v)]}}, weights=2),
    Entry(name="drops_layers", build=DropsLayers, inputs=_row, weights=2, untraceable="draws random numbers"),
    Entry(
        name="drops_layers_in_python",
        build=DropsLayersInPython,
        inputs=_row,
        weights=2,
        untraceable="draws random numbers",
        no_onnx="chance",
        draws=True,
    ),
    Entry(name="moving_average", build=MovingAverage, inputs=_row, weights=2, no_onnx="state"),
    Entry(name="tests_a_buffer", build=TestsABuffer, inputs=_row, weights=2, untraceable="inputs to control flow", no_onnx="control flow"),
    Entry(name="counts_in_a_buffer", build=CountsInABuffer, inputs=_row, weights=2, untraceable="changes calls of the module"),
    Entry(
        name="plain_tensor",
        build=PlainTensor,
        inputs=_row,
        weights=2,
        untraceable="changes mean of the module",
        stateful=True,
        no_onnx="state",
    ),
    Entry(name="adds_to_its_input", build=AddsToItsInput, inputs=_row, weights=2, untraceable="values of the arguments after the call"),
    Entry(name="weights_in_a_list", build=WeightsInAList, inputs=_row, weights=2),
    Entry(name="shared_module", build=SharedModule, inputs=_row, weights=2),
    Entry(
        name="runs_its_children",
        build=RunsItsChildren,
        inputs=_row,
        weights=2,
        untraceable="inputs to control flow",
        no_onnx="control flow",
    ),
    Entry(name="hooked_activation", build=hooked_activation, inputs=_row, weights=2, no_onnx="control flow"),
    Entry(name="hooked", build=hooked, inputs=_row, weights=2, untraceable="0 has a hook", no_onnx="control flow"),
]
