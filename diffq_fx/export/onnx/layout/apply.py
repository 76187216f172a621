"""Replaces every placeholder of a captured model by ONNX, and reports what was done to each weight."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from diffq_fx.errors import ExportError
from diffq_fx.export.onnx.layout.batch_norm import fold_batch_norm, per_channel
from diffq_fx.export.onnx.layout.codebook import emit_looked_up
from diffq_fx.export.onnx.layout.consumers import Uses, find_uses
from diffq_fx.export.onnx.layout.dynamic import emit_dynamic
from diffq_fx.export.onnx.layout.emitter import Emitter
from diffq_fx.export.onnx.layout.fold import emit_folded
from diffq_fx.export.onnx.layout.functions import mark_weight
from diffq_fx.export.onnx.layout.int8 import (
    RoundedValue,
    conv_refusal,
    emit_filters,
    find_rounded,
    form_of_filters,
    keep_in_float,
    round_values,
    without_empty_scales,
)
from diffq_fx.export.onnx.layout.linear import emit_fused
from diffq_fx.export.onnx.layout.plan import LayoutRequest, WeightPlan, plan_for_onnxruntime, plan_for_qdq
from diffq_fx.export.onnx.layout.products import EXACT_LEVEL, Factor, Form, choose_form, emit_factor, is_rounded_anew
from diffq_fx.export.onnx.layout.qdq import emit_dequantized, emit_qdq_product
from diffq_fx.export.onnx.layout.rows import emit_rows
from diffq_fx.export.onnx.layout.stored import StoredTable
from diffq_fx.export.onnx.layout.table import WeightTable, read_table
from diffq_fx.export.onnx.metadata import WeightRecord
from diffq_fx.storage import IntegerWeight, StoredWeight
from diffq_fx.storage.codebook import CodebookWeight

PLACEHOLDER_DOMAIN = "diffq_fx"
"""Domain of the nodes that stand for ``diffq_fx::dequantize`` until a rule replaces them."""


@dataclass(frozen=True, eq=False)
class _Placed:
    """A weight, and the one node that stands for it."""

    weight: StoredWeight
    node: ir.Node


@dataclass(frozen=True, eq=False)
class Applied:
    """What became of a graph."""

    records: tuple[WeightRecord, ...]
    """What became of each weight, in the order of their first use."""
    rounded: tuple[RoundedValue, ...]
    """The values that are uint8, or would be without ``twin``."""


def apply_layout(model: ir.Model, weights: Mapping[str, StoredWeight], request: LayoutRequest) -> Applied:
    """Replace the placeholders in place, and round activations where the request asks for it.

    Args:
        model: captured, one placeholder node for each call of a stored weight.
        weights: name of the initializer that a placeholder reads -> the weight.
        request: layout "onnxruntime" for the rules ``linear``, ``dynamic``, ``rows``, ``int8`` and ``fold``, "qdq" for DequantizeLinear
            everywhere.

    Raises:
        ExportError: A weight has no ONNX form.
    """
    placed_weights = _merge_placeholders(model, weights)
    emitter = Emitter(model.graph)
    records = []
    convolutions: set[ir.Node] = set()
    for placed in placed_weights:
        integers = placed.weight.as_integers() if isinstance(placed.weight, CodebookWeight) else placed.weight
        if isinstance(integers, IntegerWeight):
            record, plan = _lay_out_integers(emitter, integers, placed.node, request)
            records.append(replace(record, bits=placed.weight.footprint().histogram))
            convolutions |= set(plan.convolutions)
        elif isinstance(placed.weight, CodebookWeight):
            looked_up, record = emit_looked_up(emitter, placed.weight)
            mark_weight(looked_up, record.name)
            _take_over(placed.node.outputs[0], looked_up)
            records.append(record)
        else:
            raise ExportError(f"weight {placed.weight.spec.name!r} is a {type(placed.weight).__name__}, which has no ONNX form yet.")
    emitter.flush()
    rounded = find_rounded(model.graph, convolutions)
    if request.ranges is not None and not request.twin:
        round_values(emitter, rounded, request.ranges)
        keep_in_float(emitter, convolutions)
    RemoveUnusedNodesPass()(model)
    model.opset_imports.pop(PLACEHOLDER_DOMAIN, None)
    return Applied(tuple(records), tuple(rounded))


def _plan_for_onnxruntime(emitter: Emitter, table: WeightTable, uses: Uses, request: LayoutRequest) -> WeightPlan:
    """The plan, the convolutions included: a BatchNorm behind the only one is put into the table first."""
    if len(uses.convolutions) == 1 and not uses.linear and not uses.gathers and not uses.others and table.blocks == 1:
        table = fold_batch_norm(emitter, table, uses.convolutions[0], request.halved)
    if request.activations != "int8" or not uses.convolutions or table.spec.name in request.refused:
        return plan_for_onnxruntime(table, uses, request)
    if table.blocks == 1:
        table = without_empty_scales(per_channel(table))
    reasons = [conv_refusal(table, node, request.ranges) for node in uses.convolutions]
    taken = tuple(node for node, reason in zip(uses.convolutions, reasons, strict=True) if reason is None)
    plan = plan_for_onnxruntime(table, uses, request)
    return replace(plan, convolutions=taken, reasons=tuple(reason for reason in reasons if reason is not None))


def _lay_out_integers(
    emitter: Emitter, weight: IntegerWeight, placeholder: ir.Node, request: LayoutRequest
) -> tuple[WeightRecord, WeightPlan]:
    table = read_table(weight)
    uses = find_uses(placeholder.outputs[0], table.spec.axis, emitter.graph)
    plan = plan_for_qdq(table, uses) if request.layout == "qdq" else _plan_for_onnxruntime(emitter, table, uses, request)
    stored = StoredTable(emitter, plan.table, plan.storage)
    rule = _emit_qdq(plan, stored, placeholder) if request.layout == "qdq" else _emit(plan, stored, placeholder, request)
    return _record(plan, stored, rule), plan


def _merge_placeholders(model: ir.Model, weights: Mapping[str, StoredWeight]) -> list[_Placed]:
    """Give all calls of one weight the output of the first."""
    placed: dict[int, _Placed] = {}
    for node in list(model.graph.all_nodes()):
        if node.domain != PLACEHOLDER_DOMAIN:
            continue
        source = node.inputs[0].name if node.inputs[0] is not None else None
        if source is None or source not in weights:
            raise ExportError(
                f"node {node.name!r} dequantizes {source!r}, which is not the levels of any module of the model. "
                "Register the stored weights as submodules of the model that you export."
            )
        weight = weights[source]
        first = placed.setdefault(id(weight), _Placed(weight, node))
        if first.node is not node:
            node.outputs[0].replace_all_uses_with(first.node.outputs[0], replace_graph_outputs=True)
        node.replace_input_with(0, None)
    for source in weights:
        model.graph.initializers.pop(source, None)  # its name is free for the levels in their ONNX container
    return list(placed.values())


def _emit(plan: WeightPlan, stored: StoredTable, placeholder: ir.Node, request: LayoutRequest) -> str:
    rules: list[str] = []
    factor: Factor | None = None
    for use, fusion in zip(plan.uses.linear, plan.fusions, strict=True):
        if fusion.mode == "dynamic":
            factor = factor or emit_factor(stored, choose_form(plan.table))
            emit_dynamic(stored, factor, use, in_float=request.twin)
            rules.append("dynamic")
        elif fusion.mode != "float":
            emit_fused(stored, use, fusion, copy=rules.count("linear"))
            rules.append("linear")
    if plan.picks_rows:
        for gather in plan.uses.gathers:
            emit_rows(stored, gather)
        rules.append("rows")
    if plan.convolutions and not request.twin:
        filters = emit_filters(stored, form_of_filters(plan.table, plan.convolutions))
        mark_weight(filters, stored.name)
        for node in plan.convolutions:
            node.replace_input_with(1, filters)
        rules.append("int8")
    if _is_read(placeholder.outputs[0]):
        folded = emit_folded(stored)
        mark_weight(folded, stored.name)
        _take_over(placeholder.outputs[0], folded)
        rules.append("fold")
    return "+".join(dict.fromkeys(rules))


def _emit_qdq(plan: WeightPlan, stored: StoredTable, placeholder: ir.Node) -> str:
    dequantized = emit_dequantized(stored)
    for use, fusion in zip(plan.uses.linear, plan.fusions, strict=True):
        if fusion.mode != "float":
            emit_qdq_product(dequantized, stored, use)
    if _is_read(placeholder.outputs[0]):
        _take_over(placeholder.outputs[0], stored.restore(dequantized))
    return "qdq"


def _take_over(old: ir.Value, new: ir.Value) -> None:
    """Let everything that read a placeholder read the weight; an output of the graph keeps its name."""
    new.shape = old.shape
    if old.is_graph_output():
        old.name, new.name = f"{old.name}.placeholder", old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def _is_read(value: ir.Value) -> bool:
    """Whether anything reads a value; a Transpose, Slice or Split that fused products have left behind is removed."""
    for node in dict.fromkeys(value.consumers()):
        leftover = node.op_type in ("Transpose", "Slice", "Split") and not any(_is_read(output) for output in node.outputs)
        if leftover and node.graph is not None:
            node.graph.remove(node, safe=True)
    return bool(value.uses()) or value.is_graph_output()


def _record(plan: WeightPlan, stored: StoredTable, rule: str) -> WeightRecord:
    table, spec = plan.table, plan.table.spec
    reasons = [fusion.reason for fusion in plan.fusions if fusion.reason]
    reasons += plan.reasons
    in_float = _float_readers(plan)
    if in_float and rule != "qdq":
        reasons.append(f"read by {', '.join(in_float)}, which onnxruntime does not fuse with integers")
    if "ConvTranspose" in in_float and rule != "qdq":
        reasons.append("onnxruntime has no integer kernel for ConvTranspose")
    containers = {width: len(rows) * spec.columns for width, rows in stored.storage.parts.items()}
    return WeightRecord(
        name=spec.name,
        aliases=spec.aliases,
        shape=spec.shape,
        axis=spec.axis,
        grid=spec.grid,
        bits=table.bits,
        containers=containers,
        rule=rule,
        choice="; ".join(dict.fromkeys(fusion.choice.reason for fusion in plan.fusions if fusion.mode != "float")) or None,
        reason="; ".join(dict.fromkeys(reasons)) or None,
        products=tuple(form.dtype.name.lower() for form in _product_forms(plan)),
        remarks=_remarks(plan, stored),
        initializers=tuple(str(part.name) for part in stored.parts.values()),
    )


def _product_forms(plan: WeightPlan) -> list[Form]:
    """The forms in which integer kernels multiply a weight."""
    forms = [form_of_filters(plan.table, plan.convolutions)] if plan.convolutions else []
    forms += [choose_form(plan.table) for fusion in plan.fusions if fusion.mode == "dynamic"]
    return list(dict.fromkeys(forms))


def _float_readers(plan: WeightPlan) -> list[str]:
    gathers = [] if plan.picks_rows else [node.op_type for node in plan.uses.gathers]
    convolutions = [node.op_type for node in plan.uses.convolutions if node not in plan.convolutions and not plan.reasons]
    return list(dict.fromkeys((*gathers, *convolutions, *plan.uses.others)))


def _remarks(plan: WeightPlan, stored: StoredTable) -> tuple[str, ...]:
    remarks = []
    if stored.storage.width is None:
        remarks.append("channels are grouped by container; onnxruntime joins them when it loads the file")
    if stored.storage.widest > plan.table.container_bits:
        remarks.append("4 bits for 2: onnxruntime computes a wrong product for 2-bit weights unless N is a multiple of 4")
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
