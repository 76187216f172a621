"""Levels for onnxruntime's integer products, in a form that is exact on every processor and for any activations.

onnxruntime (1.31) multiplies uint8 activations with int8 or uint8 weights. Its kernels for x86 without VNNI add two neighbouring
uint8 x int8 products in int16, which saturates (vpmaddubsw); its kernels for Arm without dot products add two int8 x int8 products in
int16, which overflows (smull, smlal). Both are exact for levels within +-64: ``2 * 255 * 64 = 32640`` fits int16. uint8 weights are
widened to int16 before they are multiplied, and summed in int32: any level is exact, but on x86 that takes longer.

So levels of up to 7 bits are moved to the middle of int8, their zero points alike, and levels of 8 bits are multiplied as uint8.
"""

from typing import Literal, NamedTuple

import numpy as np
import onnx_ir as ir

from diffq_fx.export.onnx.layout.stored import StoredTable
from diffq_fx.export.onnx.layout.table import WeightTable

EXACT_LEVEL = 64
"""int8 levels up to this size are multiplied without loss everywhere."""
MAX_INPUTS = (2**31 - 1) // 255**2
"""Inputs of one output up to which its int32 sum holds the products of any levels and activations of 8 bits."""
_MIDDLE_OF_UINT8 = 128

ZeroPoints = Literal["any", "equal", "moved"]
"""What a kernel is fast for: any zero points; one for all channels, at best 0; at least one that is not 0."""


class Factor(NamedTuple):
    """A weight as an integer kernel multiplies it."""

    levels: ir.Value
    """int8 or uint8, in the form of the storage."""
    zero_point: ir.Value | None
    """Of the levels' type and the scales' shape; None for zeros."""
    scale: ir.Value


class Form(NamedTuple):
    """How stored levels become those of a :class:`Factor`: ``levels - zero_point (if centred) - offset``, the zero points alike."""

    dtype: ir.DataType
    centred: bool
    offset: int


def is_exact(levels: np.ndarray) -> bool:
    """Whether products of these levels, int8 or uint8, with any activations of 8 bits do not saturate, whatever the processor.

    Their sums fit int32 up to ``MAX_INPUTS`` inputs.

    Example:
        >>> is_exact(np.array([-64, 64], np.int8)), is_exact(np.array([65], np.int8)), is_exact(np.array([255], np.uint8))
        (True, False, True)
    """
    return levels.dtype == np.uint8 or (levels.dtype == np.int8 and _fit(levels))


def _fit(levels: np.ndarray) -> bool:
    return bool(levels.size == 0 or (levels.min() >= -EXACT_LEVEL and levels.max() <= EXACT_LEVEL))


def choose_form(table: WeightTable, zero_points: ZeroPoints = "any") -> Form:
    """Choose the fastest exact form of a weight of up to 8 bits that has one zero point per row or one in all."""
    learned = np.zeros(1, np.int32) if table.zero_point is None else table.zero_point
    if zero_points != "moved" and _fit(table.levels - learned):
        return Form(ir.DataType.INT8, centred=True, offset=0)
    if zero_points == "equal" and (learned != learned.flat[0]).any():
        return Form(ir.DataType.UINT8, centred=True, offset=-_MIDDLE_OF_UINT8)
    middle = 0 if table.signed else EXACT_LEVEL
    for offset in (middle, middle - 1, middle + 1):
        if _fit(table.levels - offset) and (learned != offset).any():
            return Form(ir.DataType.INT8, centred=table.signed, offset=offset)
    return Form(ir.DataType.UINT8, centred=table.signed, offset=-_MIDDLE_OF_UINT8 if table.signed else 0)


def is_rounded_anew(table: WeightTable, form: Form) -> bool:
    """Whether a common zero point costs wider steps: in uint8, where the levels of a channel lie too unevenly about their own one."""
    return not table.signed and form.centred and form.dtype == ir.DataType.UINT8 and bool((table.int8_stretch > 1).any())


def emit_factor(stored: StoredTable, form: Form) -> Factor:
    """Write the nodes that make the levels of an integer product; onnxruntime computes them when it loads the file."""
    emit, scale, zero_point = stored.emit, stored.scale, stored.zero_point
    if zero_point is None or not form.centred:
        levels = stored.levels_as(ir.DataType.INT16 if form.offset else form.dtype)
    elif is_rounded_anew(stored.table, form):
        levels, scale = _rounded_anew(stored, zero_point)
    else:
        levels = stored.levels_as(ir.DataType.INT16)
        levels = emit.op("Sub", [levels, emit.cast(zero_point, ir.DataType.INT16)])
    levels = _moved(stored, levels, form)
    if zero_point is not None and not form.centred:
        return Factor(levels, _moved(stored, zero_point, form), scale)
    if form.offset == 0:
        return Factor(levels, None, scale)
    moved = stored.storage.groups(np.full(stored.table.scale.shape, -form.offset, form.dtype.numpy()))
    return Factor(levels, emit.initializer(f"{stored.name}.zero_point.moved", moved), scale)


def _moved(stored: StoredTable, values: ir.Value, form: Form) -> ir.Value:
    """Levels or zero points less the offset, in the type of the product."""
    if form.offset:
        offset = stored.emit.initializer(f"{stored.name}.offset", np.array(form.offset, dtype=np.int16))
        values = stored.emit.op("Sub", [stored.emit.cast(values, ir.DataType.INT16), offset])
    return stored.emit.cast(values, form.dtype)


def _rounded_anew(stored: StoredTable, zero_point: ir.Value) -> tuple[ir.Value, ir.Value]:
    """All levels about 0, and their scales: rounded to a wider step in the rows that do not fit."""
    emit = stored.emit
    stretch = emit.initializer(f"{stored.name}.stretch", stored.storage.groups(stored.table.int8_stretch))
    middle = emit.cast(zero_point, ir.DataType.FLOAT)
    centred = emit.op("Sub", [stored.levels_as(ir.DataType.FLOAT), middle])
    rounded = emit.op("Round", [emit.op("Div", [centred, stretch])])
    return emit.cast(rounded, ir.DataType.INT16), emit.op("Mul", [stored.scale, stretch])
