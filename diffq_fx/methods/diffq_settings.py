"""The settings of DiffQ, what they are checked for, and what follows from them."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from diffq_fx.arguments import check_whole
from diffq_fx.budget.flat_groups import WidthLimits
from diffq_fx.functional import Grid
from diffq_fx.functional.groups import GroupSize
from diffq_fx.methods.base import Method, check_group
from diffq_fx.runtimes import refuse_settings
from diffq_fx.storage.packing import CONTAINER_BITS

_DEFAULT_TARGET_BITS = 4.0
_USUAL_START = 6.0
_ROUNDING_SHARE = 0.9
"""The part of a training with final bits and true rounding; the first step always has noise."""
_NOISE_STEPS = 200
"""Where nothing says how long the training is."""
SENSITIVITY_STEPS = 20
"""After which the bits move, all at once, to where the gradients so far want them: more say nothing new (docs/accuracy.md)."""


class _NotGiven(float):
    """Four bits where there is no other aim; a 4 that the user wrote does not yield to another."""


@dataclass(frozen=True, kw_only=True)
class DiffQSettings(Method):
    """What :class:`~diffq_fx.DiffQConfig` is made of."""

    target_bits: float | None = _NotGiven(_DEFAULT_TARGET_BITS)
    """Exact size of the quantized weights in bits per weight: levels, scales, zero points and the coding of the widths. By default 4."""
    target_mib: float | None = None
    """Exact size of the whole model in MiB, what is not quantized included. Takes the place of ``target_bits``."""
    penalty: float | None = None
    """The paper's lambda: loss per MiB of model size. Takes the place of ``target_bits``."""
    size_of: Literal["widths", "onnx_file", "packed_file"] = "widths"
    """What the size counts: "widths" has every level at its width (the paper), "onnx_file" has the containers that ONNX stores levels in,
    "packed_file" the entropy-coded file of ``save_packed`` (no range is clipped then: rare levels cost next to nothing)."""
    group_size: GroupSize = "channel"
    """Weights that share a number of bits: "tensor", "channel" (one output channel), or a block of this many inputs (1: each weight)."""
    range_per: GroupSize | Literal["group"] = "channel"
    """Weights that share a range, and so a scale: "tensor", "channel", a block of this many inputs, or "group", the group that shares a
    number of bits. Runtimes of language models want ``group_size="tensor", range_per=32``: one width a weight, a scale for each block."""
    scale_dtype: Literal["float32", "float16"] = "float32"
    """Type of scales (and of the float grid's offsets). With "float16" they have such values from training on, take 16 bits each, and
    are stored so."""
    clip_ranges: bool = True
    """Whether ranges may leave weights outside: they start with the least squared error and are trained. Else they span all weights."""
    grid: Grid | None = None
    """"half" (zero points are multiples of 1/2 up to 2 bits, so that levels may lie centred about zero), "affine" (integer zero_point),
    "symmetric", or "float" (the paper's float minimum, which ONNX cannot hold). None: "half", or "affine" where the size is that of a file:
    entropy coding wants zero to be a level, and ONNX has no half-integers."""
    noise: Literal["uniform", "gaussian"] = "uniform"
    """Uniform noise has the variance of real rounding, Gaussian (the paper's choice) three times as much."""
    min_bits: float = 1
    """Smallest width, 1 to 16; that of ``widths`` or of ONNX containers where these are asked for."""
    max_bits: float = 8
    """Largest width, 1 to 16."""
    widths: tuple[int, ...] | None = None
    """Widths that rounding may choose; None for every whole number from ``min_bits`` to ``max_bits``. With (2, 4, 8) no bit of an ONNX
    container is wasted."""
    same_width: Literal["same_input"] | tuple[tuple[str, ...], ...] | None = None
    """Weights that get one width together, as runtimes that fuse layers want it: sets of patterns, such as
    ``(("*.q_proj", "*.k_proj", "*.v_proj"), ("*.gate_proj", "*.up_proj"))``, in which weights share a width where the wildcards stand for
    the same text (in each layer its own); or "same_input", the weights of matrix products with the same input. Needs
    ``group_size="tensor"``."""
    runtime: str | None = None
    """The runtime that has to hold the weights as they are learned; see :meth:`~diffq_fx.DiffQConfig.for_runtime`."""
    init_bits: float | None = None
    """Width at the start where no target says it, above ``min_bits`` and at most ``max_bits``; None for 6 or the nearest between them."""
    training_steps: int | None = None
    """Optimizer steps that the whole training will make: the first tenth has noise, then the bits are final and training rounds truly.
    None: 200 steps of noise with a target, noise to the end (or to :func:`~diffq_fx.freeze_bits`) without one."""

    whole_model: ClassVar[tuple[str, ...]] = ("target_bits", "target_mib", "penalty", "size_of", "training_steps")

    def __post_init__(self) -> None:
        """Refuse what cannot work, naming the setting and the value."""
        self._check_aims()
        if self.widths is not None and not (isinstance(self.widths, list | tuple) and all(type(width) is int for width in self.widths)):
            raise TypeError(f"DiffQConfig: widths must be a tuple of whole numbers like (2, 4, 8), got {self.widths!r}.")
        self.check_common()
        self._check_limits()
        self._check_groups()
        self._check_same_width()
        if self.runtime is not None:
            _, ranges, grid = self.layout
            limits = ("min_bits", self.min_bits, (1, self._least_bits)), ("max_bits", self.max_bits, (8,))  # and what nobody gave
            refuse_settings(
                self.runtime,
                grid=grid,
                widths=self.limits.widths,
                limits={limit: bits for limit, bits, own in limits if bits not in own},
                group_size=self.group_size,
                range_size=ranges,
                scale_dtype=self.scale_dtype,
                size_of=self.size_of,
            )
        if self.training_steps is not None:
            check_whole("DiffQConfig", "training_steps", self.training_steps, 1)
        if self.widths is not None or self.size_of == "onnx_file":  # no noise of widths that rounding cannot choose
            object.__setattr__(self, "min_bits", self._least_bits)

    def _check_aims(self) -> None:
        if isinstance(self.target_bits, _NotGiven):
            aimless = self.target_mib is None and self.penalty is None
            object.__setattr__(self, "target_bits", _DEFAULT_TARGET_BITS if aimless else None)
        aims = {k: v for k in ("target_bits", "target_mib", "penalty") if (v := getattr(self, k)) is not None}
        if len(aims) > 1:
            raise ValueError(f"DiffQConfig: give one of target_bits, target_mib and penalty, got {aims}.")
        for name, value in aims.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"DiffQConfig: {name} must be a number, got {value!r}.")
            if not 0 < value < math.inf:
                raise ValueError(f"DiffQConfig: {name} must be positive and finite, got {value}.")

    def _check_limits(self) -> None:
        given = {} if self.init_bits is None else {"init_bits": self.init_bits}
        limits = {"min_bits": self.min_bits, **given, "max_bits": self.max_bits}
        for name, bits in limits.items():
            if isinstance(bits, bool) or not isinstance(bits, int | float):
                raise TypeError(f"DiffQConfig: {name} must be a number, got {bits!r}.")
            if not 1 <= bits <= 16:
                raise ValueError(f"DiffQConfig: {name} must be from 1 to 16, got {bits}.")
        if self.min_bits >= min(self.init_bits or 16, self.max_bits) or (self.init_bits or 1) > self.max_bits:
            order = " < ".join(limits).replace("init_bits <", "init_bits <=")
            raise ValueError(f"DiffQConfig: expected {order}, got {', '.join(str(bits) for bits in limits.values())}.")
        allowed = self.limits.widths
        if len(allowed) < 2 or list(allowed) != sorted(set(allowed)):
            raise ValueError(f"DiffQConfig: widths must be two or more, rising, got {allowed}.")
        if self.size_of == "onnx_file" and not set(allowed) <= set(CONTAINER_BITS):
            raise ValueError(f'DiffQConfig: size_of="onnx_file" has widths of {CONTAINER_BITS} alone, got {allowed}.')
        if allowed[0] < self.min_bits or allowed[-1] > self.max_bits:
            raise ValueError(
                f"DiffQConfig: widths must lie within min_bits={self.min_bits:g} and max_bits={self.max_bits:g}, got {allowed}."
            )

    def _check_groups(self) -> None:
        check_group("DiffQConfig", "group_size", self.group_size)
        check_group("DiffQConfig", "range_per", self.range_per, ("tensor", "channel", "group"))
        if self.range_per != "group":
            self._check_ranges(self.range_per)
        if self.range_per == "group" and self.group_size == 1:
            raise ValueError('DiffQConfig: range_per="group" with group_size=1 would store a range for every weight; use "channel".')
        if self.size_of == "onnx_file" and not isinstance(self.group_size, str):
            raise ValueError(
                f'DiffQConfig: size_of="onnx_file" needs group_size="channel" or "tensor", got {self.group_size}: '
                "ONNX holds all blocks of a channel in one container."
            )
        if self.scale_dtype == "float16" and self.size_of == "packed_file":
            raise ValueError(
                'DiffQConfig: scale_dtype="float16" is of no use with size_of="packed_file", whose ranges are scaled: leave it out.'
            )
        if self.size_of == "packed_file" and self.grid == "float":
            raise ValueError(
                'DiffQConfig: grid="float" has no zero point that is a level, which entropy coding wants: with size_of="packed_file" '
                'use "affine" or "symmetric".'
            )

    def _check_ranges(self, size: GroupSize) -> None:
        if size == 1:
            raise ValueError("DiffQConfig: range_per=1 would store a range for every weight; use a larger block.")
        if isinstance(size, int) and isinstance(self.group_size, int) and size != self.group_size:
            raise ValueError(
                f"DiffQConfig: range_per={size} with group_size={self.group_size} would have blocks of two lengths; give both the same "
                'number, or group_size="tensor" or "channel".'
            )
        order = {"tensor": 0, "channel": 1}
        if self.scale_dtype == "float16" and order.get(str(self.group_size), 2) > order.get(str(size), 2):
            raise ValueError(
                f'DiffQConfig: scale_dtype="float16" needs one width in each range, got group_size={self.group_size!r} and '
                f'range_per={size!r}: use range_per="group".'
            )

    def _check_same_width(self) -> None:
        asked = self.same_width
        if asked is None:
            return
        if asked != "same_input":
            is_sets = isinstance(asked, list | tuple) and all(isinstance(own, list | tuple) and own for own in asked)
            if not is_sets or not all(isinstance(pattern, str) for own in asked for pattern in own):
                raise TypeError(
                    'DiffQConfig: same_width must be "same_input" or sets of patterns such as (("*.q_proj", "*.k_proj", "*.v_proj"),), '
                    f"got {asked!r}."
                )
            object.__setattr__(self, "same_width", tuple(tuple(own) for own in asked))
        if self.group_size != "tensor":
            raise ValueError(f'DiffQConfig: same_width needs group_size="tensor", one width a weight, got group_size={self.group_size!r}.')

    @property
    def _least_bits(self) -> float:
        """``min_bits`` where rounding cannot choose every width."""
        return max(self.min_bits, min(self.limits.widths[0], self.start_bits - 1))

    @property
    def start_bits(self) -> float:
        """Width at the start where no target says it."""
        if self.init_bits is not None:
            return float(self.init_bits)
        usual = min(_USUAL_START, float(self.max_bits))
        return usual if usual > self.min_bits else (self.min_bits + self.max_bits) / 2

    @property
    def has_target(self) -> bool:
        """Whether there is a size to meet."""
        return self.target_bits is not None or self.target_mib is not None

    @property
    def freeze_step(self) -> int | None:
        """The optimizer step after which the bits are final; None where nothing says when."""
        if self.training_steps is not None:
            return max(round(self.training_steps * (1 - _ROUNDING_SHARE)), 1)  # the bits move before they are final
        return _NOISE_STEPS if self.has_target else None

    @property
    def sensitivity_step(self) -> int | None:
        """The optimizer step after which the bits move, at once, to where the gradients so far want them; None for never."""
        return min(SENSITIVITY_STEPS, self.freeze_step or SENSITIVITY_STEPS) if self.has_target else None

    @property
    def limits(self) -> WidthLimits:
        """Between which widths the bits move, and which ones rounding may choose."""
        every = range(math.ceil(self.min_bits), math.floor(self.max_bits) + 1)
        possible = tuple(width for width in every if self.size_of != "onnx_file" or width in CONTAINER_BITS)
        return WidthLimits(self.min_bits, self.max_bits, possible if self.widths is None else tuple(self.widths))

    @property
    def clips(self) -> bool:
        """Whether ranges may leave weights outside."""
        return self.clip_ranges and self.size_of != "packed_file"

    @property
    def scale_type(self) -> torch.dtype:
        """Of ``scale_dtype``."""
        return getattr(torch, self.scale_dtype)

    @property
    def layout(self) -> tuple[GroupSize, GroupSize, Grid]:
        """``(group_size, range_size, grid)``."""
        grid = self.grid or ("half" if self.size_of == "widths" else "affine")
        return self.group_size, self.group_size if self.range_per == "group" else self.range_per, grid
