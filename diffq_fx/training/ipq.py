"""iPQ: product quantization of one group of layers after another, each followed by finetuning (Quant-Noise, arXiv:2004.07320).

After the weights of a group are clustered, its codebooks and all that is not quantized yet are finetuned, so that later layers
make up for the error of earlier ones.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffq_fx.compression import require_compression
from diffq_fx.errors import PreparationError
from diffq_fx.methods.mapping import matches
from diffq_fx.methods.product_quantization import ProductWeight
from diffq_fx.training.distillation import Distillation
from diffq_fx.training.safety import train_or_go_back


@dataclass(frozen=True)
class IPQStage:
    """One group of layers, as its finetuning and the progress see it."""

    index: int
    patterns: tuple[str, ...]
    weights: tuple[str, ...]
    """Names of the weights that this stage has quantized."""
    error: float
    """Largest ``||w - codebook[codes]|| / ||w||`` among them, before the finetuning."""
    seconds: float = 0.0
    """With the finetuning; 0 while it runs."""


Finetune = Callable[[nn.Module, IPQStage], None]


class IPQ:
    """Quantizes the layer groups of a model in turn and has the rest finetuned after each.

    The finetuning may use any optimizer over ``model.parameters()``, an old one too: the float weights of quantized layers no longer ask
    for gradients, their codebooks do. The driver may be interrupted at any time and go on from :meth:`state_dict`.

    Args:
        model: prepared with :class:`~diffq_fx.methods.ProductQuantization` (other methods may have other weights); trained.
        groups: for each stage the patterns of its weights, as in ``prepare``. The paper quantizes feed-forward layers, then embeddings,
            then attention.
        finetune: trains the model after each stage; :class:`FollowTeacher` is one.
        progress: called after each stage.

    Raises:
        PreparationError: the model has no product-quantized weight.
        ValueError: a pattern matches no product-quantized weight, or a weight is in no group.

    Example:
        >>> from diffq_fx import prepare
        >>> from diffq_fx.methods import ProductQuantization
        >>> net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> model = prepare(net, torch.zeros(1, 16), ProductQuantization(entries=8, block_size=4))
        >>> [stage.weights for stage in IPQ(model, [["0"], ["2"]], lambda model, stage: None).run()]
        [('0.weight',), ('2.weight',)]
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Sequence[str]],
        finetune: Finetune,
        *,
        progress: Callable[[IPQStage], None] | None = None,
    ) -> None:
        compression = require_compression(model, "IPQ")
        self.model, self.finetune, self.progress = model, finetune, progress
        self._groups = _assign_to_groups([q for q in compression.quantizers if isinstance(q, ProductWeight)], groups)
        self.history: list[IPQStage] = []

    @property
    def finished(self) -> bool:
        """Whether all groups are quantized."""
        return len(self.history) == len(self._groups)

    def run(self) -> list[IPQStage]:
        """Run to the end, from where the driver stands.

        Returns:
            All stages, those before an interruption included.

        Raises:
            DivergenceError: a finetuning left values that are not finite; the model is as it was right after the stage's clustering.
        """
        while not self.finished:
            index = len(self.history)
            patterns, quantizers = self._groups[index]
            began = time.monotonic()
            errors = [0.0]
            for quantizer in quantizers:
                if not quantizer.is_assigned:  # an interrupted finetuning goes on with the codes that it had
                    errors.append(quantizer.assign(quantizer.weight))
                quantizer.weight.requires_grad_(False).grad = None
            stage = IPQStage(index, patterns, tuple(q.spec.name for q in quantizers), max(errors))
            who, advice = f"IPQ: the finetuning of stage {index}", "Lower its learning rate and call run() again."
            train_or_go_back(self.model, partial(self.finetune, self.model, stage), who, advice)
            self.history.append(replace(stage, seconds=time.monotonic() - began))
            if self.progress is not None:
                self.progress(self.history[-1])
        return self.history

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on: the model with its codebooks and codes, and the stages so far; not your optimizer."""
        return {"model": self.model.state_dict(), "history": [asdict(stage) for stage in self.history]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict` of a driver over the same model and groups."""
        self.model.load_state_dict(state["model"])
        lists = ("patterns", "weights")
        self.history = [IPQStage(**stage | {name: tuple(stage[name]) for name in lists}) for stage in state["history"]]
        for _, quantizers in self._groups:
            for quantizer in quantizers:
                quantizer.weight.requires_grad_(not quantizer.is_assigned and quantizer.weight.requires_grad)


def _assign_to_groups(
    quantizers: Sequence[ProductWeight], groups: Sequence[Sequence[str]]
) -> list[tuple[tuple[str, ...], list[ProductWeight]]]:
    """Each weight goes into the first group with a pattern that matches one of its names."""
    if not quantizers:
        raise PreparationError("IPQ: no weight of the model is product-quantized. Prepare it with ProductQuantization.")
    names = ", ".join(q.spec.name for q in quantizers)
    found: list[tuple[tuple[str, ...], list[ProductWeight]]] = []
    left = list(quantizers)
    for patterns in groups:
        if isinstance(patterns, str):
            raise TypeError(f"IPQ: groups is a list of lists of patterns, got the string {patterns!r} as a group: write [{patterns!r}].")
        for pattern in patterns:
            if not any(matches(name, pattern) for q in quantizers for name in q.spec.names):
                raise ValueError(f"IPQ: pattern {pattern!r} matches no product-quantized weight. The model has {names}.")
        own = [q for q in left if any(matches(name, pattern) for pattern in patterns for name in q.spec.names)]
        if not own:
            raise ValueError(f"IPQ: group {list(patterns)} has no weight that is not in an earlier group.")
        left = [q for q in left if q not in own]
        found.append((tuple(patterns), own))
    if left:
        raise ValueError(f'IPQ: {", ".join(q.spec.name for q in left)} are in no group. Add a last group ["*"].')
    return found


class FollowTeacher:
    """A finetuning for :class:`IPQ` that needs no labels: the model follows a teacher.

    Args:
        distillation: of the prepared model.
        batches: gives the inputs of one epoch anew at each call.
        lr: learning rate of the SGD with momentum.
        epochs: epochs after each stage.

    Example:
        >>> from diffq_fx import Distillation, prepare
        >>> from diffq_fx.methods import ProductQuantization
        >>> net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> model = prepare(net, torch.zeros(1, 16), ProductQuantization(entries=4, block_size=4))
        >>> follow = FollowTeacher(Distillation(model, kind="scores"), lambda: [torch.randn(8, 16)], lr=1e-2)
        >>> [stage.weights for stage in IPQ(model, [["0"], ["2"]], follow).run()]
        [('0.weight',), ('2.weight',)]
    """

    def __init__(self, distillation: Distillation, batches: Callable[[], Iterable[Tensor]], *, lr: float, epochs: int = 1) -> None:
        self.distillation, self.batches, self.lr, self.epochs = distillation, batches, lr, epochs

    def __call__(self, model: nn.Module, stage: IPQStage) -> None:
        """Finetune after one stage."""
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=self.lr, momentum=0.9)
        model.train()
        for _ in range(self.epochs):
            for inputs in self.batches():
                optimizer.zero_grad()
                self.distillation(inputs, model(inputs)).backward()
                optimizer.step()
