"""Product quantization: blocks of weights share the entries of a codebook (iPQ and its noise, Quant-Noise, arXiv:2004.07320).

This file is the method's side: the noise, the codebook of one weight, its rounding. The driver that quantizes layer group by layer
group is :class:`diffq_fx.training.ipq.IPQ`.

Shape legend: O rows (output channels), I columns, D weights in a block, C = ceil(I / D) blocks in a row, K entries.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffq_fx.arguments import check_whole
from diffq_fx.errors import PreparationError
from diffq_fx.functional import Grid
from diffq_fx.functional.clustering import cluster_vectors, nearest_vectors
from diffq_fx.functional.groups import GroupSize
from diffq_fx.methods.base import Method, WeightQuantizer, count_forward, straight_through
from diffq_fx.methods.fixed import check_rate
from diffq_fx.methods.quant_noise import noised_blocks
from diffq_fx.storage.codebook import CodebookWeight, codebook_footprint, codebook_values, look_up_rows, to_blocks
from diffq_fx.storage.footprint import Footprint
from diffq_fx.weights import WeightSpec, refuse_not_finite

_MOST_ENTRIES = 65536
_WARM_ITERATIONS = 4
_LINEAR_BLOCK = 8
_POINTWISE_BLOCK = 4


@dataclass(frozen=True, kw_only=True)
class ProductQuantization(Method):
    """Product quantization of each weight's rows, with Quant-Noise in training (arXiv:2004.07320).

    Until its codes are assigned, a weight trains in float under noise and eval() clusters it as it is. :class:`~diffq_fx.training.ipq.IPQ`
    assigns the codes; from then on the entries of the codebook train in place of the weight. Without the driver, ``convert`` clusters the
    weights as they are then.

    The noise turns each block ``w_i`` with probability p (``rate``) into: "exact", ``c_k`` with ``k = argmin_k ||w_i - c_k||``, the nearest
    entry of the codebook; "mean", ``(1/n) sum_j w_j`` over the n blocks of the weight; "proxy", 0, while the other blocks become
    ``w_i / (1 - p)``. The gradient passes straight through; the weights themselves are never written.

    Differs from the paper: k-means starts at blocks spread evenly over all in order of their norms, and an entry that loses all its blocks
    goes to the block with the largest error; so nothing is drawn and a run repeats.

    Raises:
        ValueError: a setting is out of its range, with the value found.

    Example:
        >>> ProductQuantization(entries=64, block_size=4, noise="proxy", rate=0.1).entries
        64
        >>> ProductQuantization(rate=2)
        Traceback (most recent call last):
        ...
        ValueError: ProductQuantization: rate must be from 0 to 1, got 2.
    """

    entries: int = 256
    """K: entries of the codebook of each weight."""
    block_size: int | Literal["auto"] = "auto"
    """D: weights along the inputs that one code stands for; a short last block of a row is filled up with zeros. "auto": one kernel for
    convolutions (9 for 3x3), 4 for pointwise ones, 8 for all others; the paper's code has 4 for attention."""
    noise: Literal["exact", "mean", "proxy"] = "exact"
    """What a noised block becomes, see above: its nearest entry, the mean of all blocks, or zero."""
    rate: float = 0.1
    """Probability that a block is noised in a forward; 0 trains in float."""
    update_every: int = 200
    """Forwards in training after which the entries of the "exact" noise follow the weights."""
    entry_dtype: Literal["float32", "float16", "int8"] = "float32"
    """How entries are stored; int8 with one scale for each codebook (the paper's iPQ + int8)."""
    iterations: int = 25
    """Iterations of k-means."""

    def __post_init__(self) -> None:
        """Refuse what cannot work, naming the setting and the value."""
        name = "ProductQuantization"
        check_rate(name, self.rate)
        check_whole(name, "entries", self.entries, 1, _MOST_ENTRIES)
        if self.block_size != "auto":
            check_whole(name, 'block_size (or "auto")', self.block_size, 1)
        for setting in ("update_every", "iterations"):
            check_whole(name, setting, getattr(self, setting), 1)
        self.check_common()
        self.refuse_idle("update_every", 'noise="exact"', is_used=self.noise == "exact")

    @property
    def layout(self) -> tuple[GroupSize, GroupSize, Grid]:
        """A codebook has no groups: one for the whole weight."""
        return "tensor", "tensor", "symmetric"

    def block_of(self, spec: WeightSpec) -> int:
        """D for one weight."""
        kernel = math.prod(spec.shape[2:])
        usual = _LINEAR_BLOCK if len(spec.shape) <= 2 else kernel if kernel > 1 else _POINTWISE_BLOCK
        return usual if self.block_size == "auto" else self.block_size

    def make_quantizer(self, spec: WeightSpec, weight: Tensor) -> "ProductWeight":
        """Make the quantizer of one weight; its codebook starts from the weight.

        Raises:
            PreparationError: the codebook has more entries than the weight has blocks.
        """
        block = self.block_of(spec)
        blocks = spec.rows * -(-spec.columns // block)
        if self.entries > blocks:
            raise PreparationError(
                f"prepare: weight {spec.name!r} of shape {spec.shape} has {blocks} blocks of {block}, fewer than the {self.entries} "
                f"entries of its codebook. Give at most {blocks} entries or a smaller block_size, or leave it out with exclude."
            )
        return ProductWeight(spec, self, block, weight)


class ProductWeight(WeightQuantizer):
    """One weight under product quantization.

    Parameters:
        centroids: float32, shape (K, D); trainable once the codes are assigned.

    Extra state of the state_dict:
        codes: int32, shape (O, C): the assigned codes, -1 before. No buffer, since an average of codes is nonsense: an average over a
            training (AveragedModel) that begins once they are assigned has them; one that begins earlier clusters its own weight.
    """

    centroids: nn.Parameter
    codes: Tensor

    def __init__(self, spec: WeightSpec, config: ProductQuantization, block_size: int, weight: Tensor) -> None:
        super().__init__(spec)
        self.config = config
        self.block_size = block_size
        blocks = -(-spec.columns // block_size)
        points = to_blocks(weight.detach(), spec.axis, block_size).float()
        centroids, _ = cluster_vectors(points, config.entries, iterations=config.iterations)
        self.centroids = nn.Parameter(centroids, requires_grad=False)
        self.codes = torch.full((spec.rows, blocks), -1, dtype=torch.int32, device=weight.device)
        self.is_assigned = False  # a forward asks for it, and must not wait for a device
        self.register_buffer("forwards", torch.zeros((), device=weight.device) if config.noise == "exact" else None)

    def get_extra_state(self) -> Tensor:
        """The codes."""
        return self.codes

    def set_extra_state(self, state: Tensor) -> None:
        """Undo :meth:`get_extra_state`."""
        if state.shape != self.codes.shape:
            shapes = f"{tuple(state.shape)}, expected {tuple(self.codes.shape)}"
            raise RuntimeError(f"weight {self.spec.name!r}: the codes of the state_dict have shape {shapes}: it is of another model.")
        self.codes = state.to(self.centroids.device, torch.int32, copy=True)
        self.is_assigned, self._kept = bool((state >= 0).all()), None
        self.centroids.requires_grad_(self.is_assigned)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ProductWeight":
        """Take the codes along to another device."""
        self.codes = fn(self.codes).to(self.codes.dtype)
        super()._apply(fn, recurse)
        return self

    def state_tensors(self) -> tuple[Tensor, ...]:
        """The codebook and the codes."""
        return self.centroids, self.codes

    @property
    def can_make_again(self) -> bool:
        """Noise of the nearest entries moves the codebook every some forwards; without noise it is the weight itself."""
        return self.is_assigned or (self.config.rate > 0 and self.config.noise != "exact")

    def training_weight(self, weight: Tensor) -> Tensor:
        """The weight with some blocks noised, straight-through; the codebook's own weight once its codes are assigned."""
        spec = self.spec
        if self.is_assigned:
            return _LookUp.apply(self.centroids, self.codes, self.config.entry_dtype, spec).to(weight.dtype)
        if self.config.rate == 0:
            return weight
        source = weight.detach()
        noised = noised_blocks(spec, self.block_size, self.config.rate, weight.device)
        if self.config.noise == "proxy":
            kept = source / (1 - self.config.rate) if self.config.rate < 1 else source
            return straight_through(weight, torch.where(noised, 0.0, kept))
        return straight_through(weight, torch.where(noised, self._noise_value(source), source))

    def _noise_value(self, weight: Tensor) -> Tensor:
        """What the weight would be if all its blocks were noised."""
        points = to_blocks(weight, self.spec.axis, self.block_size).float()
        if self.config.noise == "mean":
            return self._weight_of(torch.zeros_like(self.codes), points.mean(0, keepdim=True), weight.dtype)
        _follow(points, self.centroids, *self.counts, self.config.update_every)
        codes, _ = nearest_vectors(points, self.centroids.detach())
        return self._weight_of(codes.view_as(self.codes), self.centroids.detach(), weight.dtype)

    def _weight_of(self, codes: Tensor, values_KD: Tensor, dtype: torch.dtype) -> Tensor:
        return look_up_rows(codes, values_KD, self.spec.shape, self.spec.axis).to(dtype)

    @torch.no_grad()
    def assign(self, weight: Tensor) -> float:
        """Cluster the weight, fix the codes, and let the entries train in its place from now on.

        Returns:
            Relative error, ``||w - codebook[codes]|| / ||w||``.

        Raises:
            DivergenceError: the weight is not finite; nothing has changed.
        """
        refuse_not_finite([(f"weight {self.spec.name!r}", weight)])
        entries, codes = self._clustered(weight)
        self.centroids.copy_(entries)
        self.codes.copy_(codes)
        self.is_assigned, self._kept = True, None
        self.centroids.requires_grad_(True)
        difference = weight.float() - self.rounded_weight(weight).float()
        return float(difference.norm() / weight.float().norm().clamp(min=torch.finfo(torch.float32).tiny))

    def _clustered(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        points = to_blocks(weight.detach(), self.spec.axis, self.block_size).float()
        entries, _ = cluster_vectors(points, self.config.entries, start=self.centroids.detach(), iterations=self.config.iterations)
        codes, _ = nearest_vectors(points, codebook_values(*stored_entries(entries, self.config.entry_dtype)))
        return entries, codes.reshape(self.codes.shape).to(torch.int32)

    def _stored(self, weight: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Codebook, its scale and codes as the converted model has them."""
        entries, codes = (self.centroids.detach(), self.codes) if self.is_assigned else self._clustered(weight)
        return *stored_entries(entries, self.config.entry_dtype), codes

    def rounded_weight(self, weight: Tensor) -> Tensor:
        """The entries that the codes name, as they are stored."""
        codebook, scale, codes = self._stored(weight)
        return self._weight_of(codes, codebook_values(codebook, scale), weight.dtype)

    def store(self, weight: Tensor) -> CodebookWeight:
        """The codebook and the codes."""
        codebook, scale, codes = self._stored(weight)
        return CodebookWeight(self.spec, codes, codebook.clone(), scale)

    def footprint(self) -> Footprint:
        """The parts of the weight's sizes: ``ceil(log2 K) / D`` bits a weight, K D numbers of the codebook."""
        return codebook_footprint(self.codes.numel(), *stored_entries(self.centroids.detach(), self.config.entry_dtype))


@torch.library.custom_op("diffq_fx::follow_blocks", mutates_args=("entries_KD", "forwards", "saved"))
def _follow(points_ND: Tensor, entries_KD: Tensor, forwards: Tensor, saved: Tensor, every: int) -> None:
    """Let the entries follow the blocks once in so many forwards; one node of a compiled graph, since k-means looks at values."""
    before = count_forward(forwards, saved)
    if before and before % every == 0:
        entries_KD.copy_(cluster_vectors(points_ND, len(entries_KD), start=entries_KD, iterations=_WARM_ITERATIONS)[0])


@_follow.register_fake
def _(points_ND: Tensor, entries_KD: Tensor, forwards: Tensor, saved: Tensor, every: int) -> None:
    pass


def stored_entries(entries_KD: Tensor, entry_dtype: str) -> tuple[Tensor, Tensor | None]:
    """Entries as they are stored, and the scale of int8 ones, 0-d.

    Example:
        >>> codebook, scale = stored_entries(torch.tensor([[1.0], [-2.54]]), "int8")
        >>> codebook.tolist(), round(float(scale), 4)
        ([[50], [-127]], 0.02)
    """
    if entry_dtype == "float32":
        return entries_KD, None
    if entry_dtype == "float16":
        return entries_KD.half(), None
    scale = (entries_KD.abs().max() / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.round(entries_KD / scale).to(torch.int8), scale


class _LookUp(torch.autograd.Function):
    """The weight of its codes, of entries as they are stored; each entry gets the mean of the gradients of its blocks, and not the sum."""

    @staticmethod
    def forward(ctx: Any, entries_KD: Tensor, codes_OC: Tensor, entry_dtype: str, spec: WeightSpec) -> Tensor:
        ctx.save_for_backward(codes_OC)
        ctx.spec, ctx.shape_KD = spec, entries_KD.shape
        return look_up_rows(codes_OC, codebook_values(*stored_entries(entries_KD, entry_dtype)), spec.shape, spec.axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        entries, block = ctx.shape_KD
        codes = ctx.saved_tensors[0].flatten().long()
        sums = grad.new_zeros(ctx.shape_KD).index_add_(0, codes, to_blocks(grad, ctx.spec.axis, block).to(grad.dtype))
        return sums / torch.bincount(codes, minlength=entries).clamp(min=1).unsqueeze(1), None, None, None
