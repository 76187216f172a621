"""LC quantization: learn the weights and compress them in turn, held together by a penalty (arXiv:1707.04319).

This file is the method's side: what one weight knows of its compression. The loop is :class:`diffq_fx.training.lc.LCLoop`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from diffq_fx.arguments import check_whole
from diffq_fx.errors import PreparationError
from diffq_fx.functional import Grid
from diffq_fx.functional.clustering import levels, nearest
from diffq_fx.functional.codebooks import powers_of_two, scaled, scaled_binary, scaled_ternary
from diffq_fx.functional.groups import GroupSize, to_rows
from diffq_fx.methods.base import Method, WeightQuantizer
from diffq_fx.methods.mapping import unique
from diffq_fx.storage.codebook import CodebookWeight, codebook_footprint
from diffq_fx.storage.footprint import Footprint
from diffq_fx.weights import WeightSpec

_MOST_ENTRIES = 65536

CodebookKind = Literal["adaptive", "binary", "scaled_binary", "ternary", "scaled_ternary", "powers_of_two"]


@dataclass(frozen=True, kw_only=True)
class LC(Method):
    """Learning-compression: ``min L(w) subject to w = codebook[codes]`` (Carreira-Perpiñán and Idelbayev, arXiv:1707.04319).

    In training the weights are float and free; :class:`~diffq_fx.training.lc.LCLoop`, or
    :func:`~diffq_fx.training.lc.lc_penalty` and :func:`~diffq_fx.training.lc.lc_step` in a loop of your own, draw them to their
    compressed values. In eval() and after conversion a weight is its compressed value: that of the last C step, or, before the
    first one, the nearest that its codebook can hold (direct compression).

    Raises:
        ValueError: a setting is out of its range, with the value found.

    Example:
        >>> LC(entries=4).num_entries, LC(codebook="powers_of_two", smallest_power=3).num_entries
        (4, 9)
        >>> LC(codebook=(-1.0, 0.5, 1.0), learn_scale=True).num_entries
        3
    """

    codebook: CodebookKind | tuple[float, ...] = "adaptive"
    """"adaptive" (K free entries), "binary" {-1, +1}, "scaled_binary" {-a, +a}, "ternary" {-1, 0, +1}, "scaled_ternary" {-a, 0, +a},
    "powers_of_two" {0, +-1, ..., +-2^-C}, or entries of your own."""
    entries: int = 2
    """K of an adaptive codebook."""
    smallest_power: int = 4
    """C of the powers of two."""
    learn_scale: bool = False
    """Whether entries of your own are scaled to the weights."""
    shared: bool = False
    """One codebook for all weights with this config, in place of one for each; a shared one begins at the first C step."""

    def __post_init__(self) -> None:
        """Refuse what cannot work, naming the setting and the value."""
        if isinstance(self.codebook, str):
            if self.codebook not in get_args(CodebookKind):
                raise ValueError(f"LC: codebook must be one of {get_args(CodebookKind)} or a tuple of numbers, got {self.codebook!r}.")
        else:
            self._check_own()
        check_whole("LC", "entries", self.entries, 1, _MOST_ENTRIES)
        check_whole("LC", "smallest_power", self.smallest_power, 0, 30)
        self.check_common()
        self.refuse_idle("entries", 'codebook="adaptive"', is_used=self.codebook == "adaptive")
        self.refuse_idle("smallest_power", 'codebook="powers_of_two"', is_used=self.codebook == "powers_of_two")
        self.refuse_idle("learn_scale", "entries of your own", is_used=not isinstance(self.codebook, str))

    def _check_own(self) -> None:
        own = torch.tensor(self.codebook, dtype=torch.float32)
        if own.ndim != 1 or not 1 <= len(own) <= _MOST_ENTRIES or not bool(own.isfinite().all()):
            raise ValueError(f"LC: a codebook of your own is a tuple of finite numbers, got {self.codebook!r}.")
        if len(own.unique()) < len(own):
            raise ValueError(f"LC: the entries of a codebook must differ in float32, got {self.codebook!r}.")
        if self.learn_scale and not bool(own.any()):
            raise ValueError("LC: learn_scale needs an entry that is not zero.")

    @property
    def fixed_entries(self) -> tuple[float, ...]:
        """The entries of a codebook that is not learned, before scaling; none where they are."""
        if not isinstance(self.codebook, str):
            return self.codebook
        named = {"binary": (-1.0, 1.0), "ternary": (-1.0, 0.0, 1.0), "powers_of_two": powers_of_two(self.smallest_power)}
        return named.get(self.codebook, ())

    @property
    def num_entries(self) -> int:
        """Entries of the codebook."""
        learned = {"adaptive": self.entries, "scaled_binary": 2, "scaled_ternary": 3}
        return learned[self.codebook] if isinstance(self.codebook, str) and self.codebook in learned else len(self.fixed_entries)

    @property
    def learned_floats(self) -> int:
        """Numbers of the codebook that are learned and so must be stored: what the paper's compression ratio counts."""
        if self.codebook == "adaptive":
            return self.entries
        return int(self.learn_scale or self.codebook in ("scaled_binary", "scaled_ternary"))

    @property
    def layout(self) -> tuple[GroupSize, GroupSize, Grid]:
        """A codebook has no groups: one for the whole weight."""
        return "tensor", "tensor", "symmetric"

    def make_quantizer(self, spec: WeightSpec, weight: Tensor) -> "LCWeight":
        """Make the quantizer of one weight.

        Raises:
            PreparationError: the codebook has more entries than there are weights.
        """
        if self.codebook == "adaptive" and self.entries > spec.numel:
            raise PreparationError(
                f"prepare: weight {spec.name!r} of shape {spec.shape} has {spec.numel} weights, fewer than the {self.entries} entries of "
                f"its codebook. Give LC(entries=...) of at most {spec.numel}, or leave this weight out with exclude=({spec.name!r},)."
            )
        return LCWeight(spec, self, weight.device)

    def fit(self, values_N: Tensor, start: Tensor | None = None) -> Tensor:
        """The best codebook for some weights, rising, float32 or better, shape (K,); ``start`` is the one before, for a warm start.

        Example:
            >>> LC(codebook="binary").fit(torch.tensor([0.3, -0.2]))
            tensor([-1.,  1.])
        """
        if self.codebook == "adaptive":
            return levels(values_N, self.entries, start)
        if self.codebook == "scaled_binary":
            return scaled_binary(values_N)
        if self.codebook == "scaled_ternary":
            return scaled_ternary(values_N)
        if self.learn_scale:
            return scaled(values_N, self.fixed_entries, start)
        dtype = torch.promote_types(values_N.dtype, torch.float32)
        return torch.tensor(sorted(self.fixed_entries), dtype=dtype, device=values_N.device)


class LCWeight(WeightQuantizer):
    """One weight of an LC problem: free in training, its compressed value in eval.

    Buffers, all of them numbers whose average over a training does no harm:
        entries: float32, shape (K,): the codebook of the last C step, rising; zero before the first, like ``compressed``.
        compressed: float32, shape of the weight: Delta, the weight as the last C step has compressed it. Codes are made of it.
        multipliers: float32, shape of the weight: the augmented Lagrangian's lambda.
        penalty: float32, 0-d: mu.
        started: float32, 0-d: 1 after the first C step, else 0.
    """

    entries: Tensor
    compressed: Tensor
    multipliers: Tensor
    penalty: Tensor
    started: Tensor

    def __init__(self, spec: WeightSpec, config: LC, device: torch.device) -> None:
        super().__init__(spec)
        self.config = config
        shapes = {"entries": (config.num_entries,), "compressed": spec.shape, "multipliers": spec.shape, "penalty": (), "started": ()}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32, device=device))

    def training_weight(self, weight: Tensor) -> Tensor:
        """The weight itself: what draws it to its compressed value is the penalty in the loss."""
        return weight

    def lagrangian(self) -> Tensor:
        """``-lambda^T (w - Delta) + mu/2 ||w - Delta||^2``, 0-d, differentiable in the weight."""
        difference = self.weight.to(torch.float32) - self.compressed
        return (self.penalty / 2 * difference - self.multipliers).mul(difference).sum()

    def target(self) -> Tensor:
        """What the C step compresses: ``w - lambda / mu``, the weight itself while mu is zero; float32, the weight's shape."""
        weight = self.weight.detach().to(torch.float32)
        return weight - self.multipliers / self.penalty if float(self.penalty) > 0 else weight

    @torch.no_grad()
    def take_c_step(self, entries: Tensor, *, augmented: bool) -> None:
        """Keep a codebook and the nearest values in it, and move the multipliers: ``lambda - mu (w - Delta)``."""
        self.entries.copy_(entries)
        self.compressed.copy_(self.entries[nearest(self.target(), self.entries)])
        if augmented:
            self.multipliers.sub_(self.penalty * (self.weight.to(torch.float32) - self.compressed))
        self.started.fill_(1)

    def _solution(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codebook and codes: those of the last C step, else of direct compression."""
        if float(self.started) > 0:  # an average that began before the first C step has the zeros of then in it: take them out
            return self.entries / self.started, nearest(self.compressed, self.entries)
        source = weight.detach().to(torch.float32)
        entries = self.config.fit(source.flatten(), None)
        return entries, nearest(source, entries)

    def rounded_weight(self, weight: Tensor) -> Tensor:
        """The compressed weight."""
        entries, codes = self._solution(weight)
        return entries[codes].to(weight.dtype)

    def store(self, weight: Tensor) -> CodebookWeight:
        """The codebook and the codes."""
        entries, codes = self._solution(weight)
        return CodebookWeight(self.spec, to_rows(codes, self.spec.axis), entries.unsqueeze(1))

    def state_tensors(self) -> tuple[Tensor, ...]:
        """What the last C step has left."""
        return self.entries, self.compressed, self.started

    def footprint(self) -> Footprint:
        """The parts of the weight's sizes: ``ceil(log2 K)`` bits a weight and K floats."""
        return codebook_footprint(self.spec.numel, self.entries.unsqueeze(1), None)


def shared_groups(quantizers: Sequence[WeightQuantizer]) -> list[list[LCWeight]]:
    """The LC weights of a model, those that share a codebook together."""
    own = [quantizer for quantizer in quantizers if isinstance(quantizer, LCWeight)]
    alone = [[quantizer] for quantizer in own if not quantizer.config.shared]
    configs = unique(quantizer.config for quantizer in own if quantizer.config.shared)
    return alone + [[quantizer for quantizer in own if quantizer.config == config] for config in configs]
