"""The size of the entropy-coded packed file, for targets that hold that: measured now and then, since it needs all levels."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffq_fx.training.allocation import allocate_widths
from diffq_fx.training.entropy import bits_saved, rest_in_file

if TYPE_CHECKING:
    from diffq_fx.training.compression import Compression

Place = tuple[dict[str, Any], str]
"""Where a module keeps a parameter or a buffer, and its name there. Not the tensor: moving a model makes new buffers, and
load_state_dict(assign=True) new parameters. Not the module: in a pickle it would come before what it is made of."""

_ROUNDS = 8
_CLOSE_ENOUGH = 2e-3
_LARGEST_STRETCH = 0.1
"""Bits a weight that the steps of all weights may gain or lose at once."""


class CodedSize:
    """What a model of ``size="entropy"`` takes in a file; for one of another size every method says that coding changes nothing."""

    def __init__(self, compression: "Compression") -> None:
        self.compression = compression

    @property
    def is_held(self) -> bool:
        """Whether this is the size that the target holds."""
        return bool(self.compression.learned) and self.compression.config.size == "entropy"

    def saved_at(self, width_T: Tensor) -> int:
        """Bits that entropy coding takes off these widths with the weights as they are."""
        return bits_saved(self.compression.learned, self.compression.groups().split(width_T)) if self.is_held else 0

    def rest_bits(self) -> int:
        """Bits of what is not quantized: it changes in training too, and so does what it takes in a file.

        Ranks gather statistics of their own in buffers. They must hold the same size, so in a process group buffers count as uncoded.
        """
        compression = self.compression
        if not self.is_held:
            return compression.rest_bits
        tensors = [each for registry, name in compression.rest if (each := registry.get(name)) is not None]
        parameters, buffers = ([each for each in tensors if isinstance(each, nn.Parameter) == kind] for kind in (True, False))
        halves = compression.method.rest_dtype == "float16"
        kept = [each.half() if halves and each.dtype == torch.float32 else each for each in parameters]
        if _is_one_of_several():
            return rest_in_file(kept) + sum(8 * buffer.nbytes for buffer in buffers)
        return rest_in_file([*kept, *buffers])

    @torch.no_grad()
    def measure(self) -> None:
        """Find what coding saves at the bits of this moment."""
        if not self.is_held:
            return
        compression = self.compression
        compression.find_weights()
        bits_T, values_T = compression.bits_T(), compression.groups().values_T
        below_T = bits_T.floor().clamp(min=1)
        share = torch.dot(values_T, bits_T - below_T) / values_T.sum()  # bits are fractional: between those below and those above
        below, above = (self.saved_at(width_T.to(torch.int32)) for width_T in (below_T, below_T + 1))
        compression.note(bits_saved=round(below + float(share) * (above - below)), rest_bits=self.rest_bits())

    @torch.no_grad()
    def hold(self) -> None:
        """Stretch all ranges so that final widths take the target again: steps that are 1 % longer save 0.014 bits a weight."""
        compression = self.compression
        if not self.is_held:
            return
        compression.note(rest_bits=self.rest_bits())
        budget = compression.budget_bits()
        if budget is None:
            return
        groups, width_T = compression.groups(), compression.width_T()
        excess = compression.measure.exact_bits(groups, width_T) - self.saved_at(width_T) - (budget - compression.known.bits_saved)
        bits_a_weight = min(max(excess / groups.num_weights, -_LARGEST_STRETCH), _LARGEST_STRETCH)
        compression.stretch.mul_(2**bits_a_weight)

    def fitted(self, width_T: Tensor, bits_T: Tensor, budget: int) -> Tensor:
        """Widths within the budget, from those within it before coding: what coding saves depends on them, and the other way round."""
        compression, groups = self.compression, self.compression.groups()
        target = budget - compression.known.bits_saved
        for _ in range(_ROUNDS if self.is_held else 0):
            saved = self.saved_at(width_T)
            if 0 <= target + saved - compression.measure.exact_bits(groups, width_T) <= _CLOSE_ENOUGH * target:
                break
            width_T = allocate_widths(groups, bits_T, target + saved, compression.measure)
        return width_T


def _is_one_of_several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
