"""What a file says about each of its weights: the form that was taken, and why."""

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from diffq_fx.export.onnx.layout.convolution import form_of_filters
from diffq_fx.export.onnx.layout.cost import FLOAT
from diffq_fx.export.onnx.layout.plan import WeightPlan
from diffq_fx.export.onnx.layout.products import EXACT_LEVEL, Form, choose_form, is_rounded_anew
from diffq_fx.export.onnx.layout.stored import StoredTable
from diffq_fx.export.onnx.metadata import WeightRecord
from diffq_fx.storage import StoredWeight
from diffq_fx.storage.codebook import CodebookWeight

_TAKEN = {
    "rows": "rows picked as integers, made float at every run: the table stays as small as integers are",
    "int8": "integer convolution",
    "fold": "float, made once when the file is loaded",
    "codebook": "float, looked up once when the file is loaded",
    "qdq": 'one DequantizeLinear: layout "qdq" has it for every weight',
}
"""Rule -> what it does; the rules of products say which kernel they are for."""


def record_of(plan: WeightPlan, stored: StoredTable, rules: Sequence[str], weight: StoredWeight) -> WeightRecord:
    """The record of a weight of integers, or of a codebook that is a grid: what was decided and written for it, and by which rules."""
    reasons = [*(choice.reason for choice in plan.products if choice.kernel == FLOAT), *plan.reasons]
    in_float = _float_readers(plan) if "qdq" not in rules else []
    if in_float:
        reasons.append(f"read by {', '.join(in_float)}, which onnxruntime does not fuse with integers")
    if "ConvTranspose" in in_float:
        reasons.append("onnxruntime has no integer kernel for ConvTranspose")
    kernels = [choice.reason for choice in plan.products if choice.kernel != FLOAT]
    return _record(
        weight,
        grid=plan.table.spec.grid,
        containers={width: len(rows) * plan.table.spec.columns for width, rows in stored.storage.parts.items()},
        rule="+".join(rules),
        choice=_joined([*kernels, *(_TAKEN[rule] for rule in rules if rule in _TAKEN)]),
        reason=_joined(reasons),
        products=tuple(form.dtype.name.lower() for form in _product_forms(plan)),
        remarks=_remarks(plan, stored),
        initializers=tuple(str(part.name) for part in stored.parts.values()),
    )


def record_of_codebook(weight: CodebookWeight, codes: ir.Value, container: int) -> WeightRecord:
    """The record of a weight whose ``codes`` are looked up."""
    return _record(
        weight,
        grid="codebook",
        containers={container: weight.num_codes},
        rule="codebook",
        choice=_TAKEN["codebook"],
        reason="a codebook: onnxruntime has no kernel for its entries",
        initializers=(str(codes.name),),
    )


def _record(weight: StoredWeight, **fields: Any) -> WeightRecord:
    spec, bits = weight.spec, weight.footprint().histogram
    return WeightRecord(name=spec.name, aliases=spec.aliases, shape=spec.shape, axis=spec.axis, bits=bits, **fields)


def _joined(texts: Sequence[str]) -> str | None:
    return "; ".join(dict.fromkeys(text for text in texts if text)) or None


def _product_forms(plan: WeightPlan) -> list[Form]:
    """The forms in which integer kernels multiply a weight."""
    forms = [form_of_filters(plan.table, plan.convolutions)] if plan.convolutions else []
    forms += [choose_form(plan.table) for choice in plan.products if choice.kernel.is_dynamic]
    return list(dict.fromkeys(forms))


def _float_readers(plan: WeightPlan) -> list[str]:
    gathers = [] if plan.picks_rows else [node.op_type for node in plan.uses.gathers]
    convolutions = [node.op_type for node in plan.uses.convolutions if node not in plan.convolutions and not plan.reasons]
    return list(dict.fromkeys((*gathers, *convolutions, *plan.uses.others)))


def _remarks(plan: WeightPlan, stored: StoredTable) -> tuple[str, ...]:
    remarks = []
    if stored.storage.width is None:
        remarks.append("channels are grouped by container; onnxruntime joins them when it loads the file")
    if stored.storage.factor is not None:
        native = [choice.kernel.block > 0 and choice.kernel.bits < 8 for choice in plan.products]
        if any(native):
            remarks.append("half-integer zero points: products round them down and subtract half a scale times the sum of the inputs")
        if not native or not all(native):
            remarks.append("levels with half-integer zero points are doubled when the file is loaded, to be integers about an integer")
    if stored.storage.widest > plan.table.container_bits:
        remarks.append("4 bits for 2: onnxruntime transposes no 2-bit weights, and their products are wrong unless N is a multiple of 4")
    for form in _product_forms(plan):
        if form.dtype == ir.DataType.UINT8:
            remarks.append(
                f"multiplied as uint8: int8 products of levels beyond +-{EXACT_LEVEL} saturate on x86 without VNNI, and up to 7 bits fit"
            )
        if is_rounded_anew(plan.table, form):
            uneven, widest = int((plan.table.int8_stretch > 1).sum()), plan.table.int8_stretch.max()
            remarks.append(
                f"levels of {uneven} channels lie unevenly about zero and are rounded anew when the file is loaded, to steps up to "
                f'{widest:.2f} times as wide: onnxruntime is fast here for one zero point; grid="symmetric" avoids it'
            )
    return tuple(remarks)
