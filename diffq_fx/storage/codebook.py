"""A weight stored as a codebook and one code for each weight, or for each block of weights (product quantization).

The operator ``diffq_fx::look_up`` is one node in every graph (eager, torch.export, ONNX), as ``diffq_fx::dequantize`` is for integers.

Shape legend: O rows (output channels), I columns, D weights in a block, C = ceil(I / D) blocks in a row, K entries.
"""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from diffq_fx.functional import QuantParams
from diffq_fx.functional.groups import from_rows, to_rows
from diffq_fx.storage.footprint import Footprint
from diffq_fx.storage.integers import IntegerWeight
from diffq_fx.storage.packing import container_for, pack_levels, unpack_rows
from diffq_fx.storage.stored_weight import StoredWeight
from diffq_fx.weights import WeightSpec


@torch.library.custom_op(
    "diffq_fx::look_up",
    mutates_args=(),
    schema="(Tensor codes, Tensor codebook, Tensor? scale, SymInt container_bits, SymInt[] shape, SymInt axis, ScalarType dtype) -> Tensor",
)
def look_up_op(
    codes: Tensor, codebook: Tensor, scale: Tensor | None, container_bits: int, shape: list[int], axis: int, dtype: torch.dtype
) -> Tensor:
    """Make the float weight of packed codes."""
    rows = shape[axis]
    columns = torch.Size(shape).numel() // rows
    blocks = -(-columns // codebook.shape[1])
    codes_OC = unpack_rows(codes, container_bits, blocks, slice(0, rows))
    return look_up_rows(codes_OC, codebook_values(codebook, scale), tuple(shape), axis).to(dtype)


@look_up_op.register_fake
def _(codes, codebook, scale, container_bits, shape, axis, dtype) -> Tensor:  # noqa: ANN001
    return codes.new_empty(shape, dtype=dtype)


def codebook_values(codebook_KD: Tensor, scale: Tensor | None) -> Tensor:
    """The entries in float: themselves, or int8 times a scale."""
    values = codebook_KD.to(torch.promote_types(codebook_KD.dtype, torch.float32))
    return values if scale is None else values * scale


def look_up_rows(codes_OC: Tensor, values_KD: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    """The weight of its codes; what the last block of a row has beyond the row is cut off.

    Example:
        >>> look_up_rows(torch.tensor([[1, 0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), (1, 3), 0)
        tensor([[3., 4., 1.]])
    """
    rows = shape[axis]
    columns = torch.Size(shape).numel() // rows
    rows_OI = values_KD[codes_OC.long()].reshape(rows, -1)[:, :columns]
    return from_rows(rows_OI, shape, axis).contiguous()


def to_blocks(weight: Tensor, axis: int, block_size: int) -> Tensor:
    """The blocks of a weight's rows, a short last one filled up with zeros: float32 or better, shape (O C, D).

    Example:
        >>> to_blocks(torch.tensor([[1.0, 2.0, 3.0]]), 0, 2)
        tensor([[1., 2.],
                [3., 0.]])
    """
    rows_OI = to_rows(weight, axis).to(torch.promote_types(weight.dtype, torch.float32))
    return torch.nn.functional.pad(rows_OI, (0, -rows_OI.shape[1] % block_size)).reshape(-1, block_size)


def code_bits(entries: int) -> int:
    """Bits of a code: ``ceil(log2 K)``.

    Example:
        >>> [code_bits(k) for k in (1, 2, 3, 256)]
        [0, 1, 2, 8]
    """
    return (entries - 1).bit_length()


def codebook_footprint(num_codes: int, codebook_KD: Tensor, scale: Tensor | None) -> Footprint:
    """What a codebook and its codes take: ``ceil(log2 K)`` bits a code, the entries in their own type, an int8 codebook's scale.

    Example:
        >>> codebook_footprint(100, torch.zeros(4, 8), None).packed_bits  # 100 codes of 2 bits, 32 floats
        1224
    """
    bits = code_bits(len(codebook_KD))
    beside = codebook_KD.numel() * codebook_KD.element_size() * 8 + (0 if scale is None else 32)
    container = container_for(bits)
    return Footprint(grid="codebook", histogram={bits: num_codes}, scale_bits=beside, container_bits=container, container_scale_bits=beside)


class CodebookWeight(StoredWeight):
    """Codes and the codebook that they index: ``w = codebook[codes]``.

    Buffers:
        codes: uint8, packed codes of the blocks of the weight's rows, row by row.
        codebook: float32, float16 or int8, shape (K, D).
        scale: float32, 0-d; an int8 codebook alone.
    """

    packed_buffer: ClassVar[str] = "codes"

    codes: Tensor
    codebook: Tensor
    scale: Tensor | None

    def __init__(self, spec: WeightSpec, codes: Tensor, codebook_KD: Tensor, scale: Tensor | None = None) -> None:
        super().__init__(spec, codes.device)
        self.container_bits = container_for(code_bits(len(codebook_KD)))
        self.register_buffer("codes", pack_levels(codes.to(torch.int32), self.container_bits))
        self.register_buffer("codebook", codebook_KD)
        self.register_buffer("scale", scale)

    @property
    def block_size(self) -> int:
        """Weights that one code stands for."""
        return self.codebook.shape[1]

    @property
    def num_codes(self) -> int:
        """Number of codes."""
        return self.spec.rows * -(-self.spec.columns // self.block_size)

    def forward(self) -> Tensor:
        """The float weight: ``codebook[codes]``."""
        spec = self.spec
        return torch.ops.diffq_fx.look_up(
            self.codes, self.codebook, self.scale, self.container_bits, list(spec.shape), spec.axis, spec.dtype
        )

    def codes_OC(self) -> Tensor:
        """The unpacked codes, int32, shape (O, C), each in ``[0, K - 1]``."""
        return unpack_rows(self.codes, self.container_bits, self.num_codes // self.spec.rows, slice(0, self.spec.rows))

    def footprint(self) -> Footprint:
        """The parts of its sizes."""
        return codebook_footprint(self.num_codes, self.codebook, self.scale)

    def as_integers(self) -> IntegerWeight | None:
        """The same weight as integers times one scale, where that is exact and needs no wider container: binary, ternary, powers of two.

        Returns:
            A weight that computes the same bit by bit; None where there is none.
        """
        if self.block_size > 1 or self.codebook.dtype != torch.float32:
            return None
        values = self.codebook.flatten()
        sizes = values.abs()
        if not bool((sizes > 0).any()):
            return None
        step = sizes[sizes > 0].min()
        integers = torch.round(values / step)
        half = 2 ** (self.container_bits - 1)
        if not torch.equal(integers * step, values) or bool((integers < -half).any() | (integers > half - 1).any()):
            return None
        levels = (integers.to(torch.int32) + half)[self.codes_OC().long()]
        params = QuantParams(step.reshape(1, 1), torch.full((1, 1), half, dtype=torch.int32, device=step.device), None)
        spec = replace(self.spec, grid="symmetric", group_size="tensor", range_size="tensor")
        return IntegerWeight(spec, levels, params, torch.full((1, 1), self.container_bits, device=step.device))

    def extra_repr(self) -> str:
        """Name, shape and codebook for ``print(model)``."""
        return f"{self.spec.name!r}, shape={self.spec.shape}, codebook={tuple(self.codebook.shape)}"
