"""Replaces every placeholder of a captured model by ONNX, and reports what was done to each weight."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from diffq_fx.errors import ExportError
from diffq_fx.export.onnx.layout.consumers import Uses, find_uses, replace_product
from diffq_fx.export.onnx.layout.convolution import choose_convolutions, emit_filters, fold_batch_norm, form_of_filters
from diffq_fx.export.onnx.layout.cost import FLOAT
from diffq_fx.export.onnx.layout.emitter import Emitter, make_node, take_place
from diffq_fx.export.onnx.layout.functions import mark_weight
from diffq_fx.export.onnx.layout.linear import emit_fused
from diffq_fx.export.onnx.layout.plan import WeightPlan, plan_for_onnxruntime, plan_for_qdq, takes_stored
from diffq_fx.export.onnx.layout.products import Factor, choose_form, emit_dynamic, emit_factor
from diffq_fx.export.onnx.layout.records import record_of, record_of_codebook
from diffq_fx.export.onnx.layout.request import LayoutRequest
from diffq_fx.export.onnx.layout.rounding import RoundedValue, find_rounded, keep_in_float, round_values
from diffq_fx.export.onnx.layout.rows import emit_rows
from diffq_fx.export.onnx.layout.stored import StoredTable
from diffq_fx.export.onnx.layout.table import WeightTable, read_table
from diffq_fx.export.onnx.layout.whole import emit_dequantized, emit_folded, emit_looked_up
from diffq_fx.export.onnx.metadata import WeightRecord
from diffq_fx.storage import IntegerWeight, StoredWeight
from diffq_fx.storage.codebook import CodebookWeight
from diffq_fx.storage.packing import CONTAINER_BITS

PLACEHOLDER_DOMAIN = "diffq_fx"
"""Domain of the nodes that stand for ``diffq_fx::dequantize`` until a rule replaces them."""


@dataclass(frozen=True, eq=False)
class Applied:
    """What became of a graph."""

    records: tuple[WeightRecord, ...]
    """What became of each weight, in the order of their first use."""
    rounded: tuple[RoundedValue, ...]
    """The values that are uint8, or would be without ``twin``."""


def apply_layout(model: ir.Model, weights: Mapping[str, StoredWeight], request: LayoutRequest) -> Applied:
    """Replace the placeholders of stored weights in place, and round activations where the request asks for it.

    ``weights`` are by the name of the initializer that their placeholders read.

    Raises:
        ExportError: A weight has no ONNX form.
    """
    placed = _merge_placeholders(model, weights)
    emitter = Emitter(model.graph)
    records = []
    convolutions: set[ir.Node] = set()
    for weight, placeholder in placed:
        table = read_weight(weight, request.min_container)
        if isinstance(table, WeightTable):
            uses = find_uses(placeholder, table.spec.axis, model.graph)
            plan = plan_for_qdq(table, uses) if request.layout == "qdq" else _plan(emitter, table, uses, request)
            stored = StoredTable(emitter, plan.storage)
            rules = _emit_qdq(plan, stored, placeholder) if request.layout == "qdq" else _emit(plan, stored, placeholder, request)
            records.append(record_of(plan, stored, rules, weight))
            convolutions |= set(plan.convolutions)
        else:
            container = max(table.container_bits, request.min_container)
            looked_up, codes = emit_looked_up(emitter, table, container)
            mark_weight(looked_up, weight.spec.name)
            take_place(looked_up, placeholder, "placeholder")
            records.append(record_of_codebook(table, codes, container))
    emitter.flush()
    rounded = find_rounded(model.graph, convolutions)
    if request.ranges is not None and request.twin != "float":
        round_values(emitter, rounded, request.ranges)
        keep_in_float(emitter, convolutions)
    RemoveUnusedNodesPass()(model)
    model.opset_imports.pop(PLACEHOLDER_DOMAIN, None)
    return Applied(tuple(records), tuple(rounded))


def read_weight(weight: StoredWeight, min_container: int = CONTAINER_BITS[0]) -> WeightTable | CodebookWeight:
    """What a file holds of a weight: integers wherever they are exact, else codes and their codebook.

    Raises:
        ExportError: it has no ONNX form.
    """
    if isinstance(integers := weight.as_integers(), IntegerWeight):
        return read_table(integers, min_container)
    if isinstance(weight, CodebookWeight):
        return weight
    raise ExportError(f"weight {weight.spec.name!r} is a {type(weight).__name__}, which has no ONNX form yet")


def _merge_placeholders(model: ir.Model, weights: Mapping[str, StoredWeight]) -> list[tuple[StoredWeight, ir.Value]]:
    """Each weight and the value that stands for it: all calls of one weight get the output of the first."""
    placed: dict[int, tuple[StoredWeight, ir.Value]] = {}
    for node in list(model.graph.all_nodes()):
        if node.domain != PLACEHOLDER_DOMAIN:
            continue
        source = node.inputs[0].name if node.inputs[0] is not None else None
        if source is None or source not in weights:
            raise ExportError(
                f"node {node.name!r} dequantizes {source!r}, which is not the levels of any module of the model. "
                "Register the stored weights as submodules of the model that you export."
            )
        weight, output = weights[source], node.outputs[0]
        _, first = placed.setdefault(id(weight), (weight, output))
        if first is not output:
            output.replace_all_uses_with(first, replace_graph_outputs=True)
    for source in weights:
        model.graph.initializers.pop(source, None)  # its name is free for the levels in their ONNX container
    return list(placed.values())


def _plan(emitter: Emitter, table: WeightTable, uses: Uses, request: LayoutRequest) -> WeightPlan:
    """The plan, the convolutions included: a BatchNorm behind the only one is put into the table first."""
    if len(uses.convolutions) == 1 and not uses.linear and not uses.gathers and not uses.others and table.blocks == 1:
        table = fold_batch_norm(emitter, table, uses.convolutions[0], request.halved)
    table, refusals = choose_convolutions(table, uses, request)
    taken = tuple(node for node, reason in refusals.items() if reason is None)
    reasons = tuple(reason for reason in refusals.values() if reason is not None)
    return replace(plan_for_onnxruntime(table, uses, request), convolutions=taken, reasons=reasons)


def _emit(plan: WeightPlan, stored: StoredTable, placeholder: ir.Value, request: LayoutRequest) -> list[str]:
    """Write a weight for all its readers; gives the rules that it took."""
    rules: list[str] = []
    factor: Factor | None = None
    for use, choice in zip(plan.uses.linear, plan.products, strict=True):
        if choice.kernel.is_dynamic:
            factor = factor or emit_factor(stored, choose_form(plan.table))
            emit_dynamic(stored, factor, use, request.twin)
            rules.append("fold" if request.twin else "dynamic")
        elif choice.kernel != FLOAT:
            emit_fused(stored, use, choice.kernel, copy=rules.count("linear"))
            rules.append("linear")
    if plan.picks_rows:
        for gather in plan.uses.gathers:
            emit_rows(stored, gather)
        rules.append("rows")
    if plan.convolutions and request.twin != "float":
        filters = emit_filters(stored, form_of_filters(plan.table, plan.convolutions))
        mark_weight(filters, stored.name)
        for node in plan.convolutions:
            node.replace_input_with(1, filters)
        rules.append("int8")
    if _is_read(placeholder):
        folded = emit_folded(stored)
        mark_weight(folded, stored.name)
        take_place(folded, placeholder, "placeholder")
        rules.append("fold")
    return list(dict.fromkeys(rules))


def _emit_qdq(plan: WeightPlan, stored: StoredTable, placeholder: ir.Value) -> list[str]:
    dequantized = emit_dequantized(stored)
    for use in plan.uses.linear:
        if takes_stored(plan.storage, use):
            name = stored.emit.unique(f"{stored.name}.product")
            replace_product(use, [make_node("MatMul", [use.activation, dequantized], name)])
    if _is_read(placeholder):
        take_place(stored.restore(dequantized), placeholder, "placeholder")
    return ["qdq"]


def _is_read(value: ir.Value) -> bool:
    """Whether anything reads a value; a Transpose, Slice or Split that fused products have left behind is removed."""
    for node in dict.fromkeys(value.consumers()):
        leftover = node.op_type in ("Transpose", "Slice", "Split") and not any(_is_read(output) for output in node.outputs)
        if leftover and node.graph is not None:
            node.graph.remove(node, safe=True)
    return bool(value.uses()) or value.is_graph_output()
