"""Replaces every placeholder of a captured model by ONNX, and reports what was done to each weight."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from diffq_fx.codebook_weight import CodebookWeight
from diffq_fx.errors import ExportError
from diffq_fx.export.onnx.layout.codebook import emit_looked_up
from diffq_fx.export.onnx.layout.consumers import find_uses
from diffq_fx.export.onnx.layout.emitter import Emitter
from diffq_fx.export.onnx.layout.fold import emit_folded
from diffq_fx.export.onnx.layout.linear import emit_fused
from diffq_fx.export.onnx.layout.plan import Layout, WeightPlan, plan_for_onnxruntime, plan_for_qdq
from diffq_fx.export.onnx.layout.qdq import emit_dequantized, emit_qdq_product
from diffq_fx.export.onnx.layout.stored import StoredTable
from diffq_fx.export.onnx.layout.table import read_table
from diffq_fx.export.onnx.metadata import WeightRecord
from diffq_fx.storage import IntegerWeight, StoredWeight

PLACEHOLDER_DOMAIN = "diffq_fx"
"""Domain of the nodes that stand for ``diffq_fx::dequantize`` until a rule replaces them."""


@dataclass(frozen=True, eq=False)
class _Placed:
    """A weight, and the one node that stands for it."""

    weight: StoredWeight
    node: ir.Node


def apply_layout(
    model: ir.Model,
    weights: Mapping[str, StoredWeight],
    layout: Layout,
    sizes: dict[str, int],
    refused: Mapping[str, str] = MappingProxyType({}),
) -> tuple[WeightRecord, ...]:
    """Replace the placeholders in place.

    Args:
        model: captured, one placeholder node for each call of a stored weight.
        weights: name of the initializer that a placeholder reads -> the weight.
        layout: "onnxruntime" for the rules ``linear`` and ``fold``, "qdq" for DequantizeLinear everywhere.
        sizes: symbolic sizes of the graph at the example inputs.
        refused: name of a weight -> why nothing shall be fused with it.

    Returns:
        What became of each weight, in the order of their first use.

    Raises:
        ExportError: A weight has no ONNX form.
    """
    placed_weights = _merge_placeholders(model, weights)
    emitter = Emitter(model.graph)
    records = []
    for placed in placed_weights:
        integers = placed.weight
        if isinstance(integers, CodebookWeight):
            integers = integers.as_integers()
        if isinstance(integers, IntegerWeight):
            record = _lay_out_integers(emitter, integers, placed.node, layout, sizes, refused)
            records.append(replace(record, bits=placed.weight.footprint().histogram))
        elif isinstance(placed.weight, CodebookWeight):
            looked_up, record = emit_looked_up(emitter, placed.weight)
            _take_over(placed.node.outputs[0], looked_up)
            records.append(record)
        else:
            raise ExportError(f"weight {placed.weight.spec.name!r} is a {type(placed.weight).__name__}, which has no ONNX form yet.")
    emitter.flush()
    RemoveUnusedNodesPass()(model)
    model.opset_imports.pop(PLACEHOLDER_DOMAIN, None)
    return tuple(records)


def _lay_out_integers(
    emitter: Emitter, weight: IntegerWeight, placeholder: ir.Node, layout: Layout, sizes: dict[str, int], refused: Mapping[str, str]
) -> WeightRecord:
    table = read_table(weight)
    uses = find_uses(placeholder.outputs[0], table.spec.axis, emitter.graph)
    if layout == "qdq":
        plan, emit = plan_for_qdq(table, uses), _emit_qdq
    else:
        plan, emit = plan_for_onnxruntime(table, uses, sizes, refused.get(table.spec.name)), _emit_onnxruntime
    stored = StoredTable(emitter, table, plan.storage)
    return _record(plan, stored, emit(plan, stored, placeholder))


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


def _emit_onnxruntime(plan: WeightPlan, stored: StoredTable, placeholder: ir.Node) -> str:
    rules = []
    for use, fusion in zip(plan.uses.linear, plan.fusions, strict=True):
        if fusion.mode != "float":
            emit_fused(stored, use, fusion, copy=len(rules))
            rules.append("linear")
    if _is_read(placeholder.outputs[0]):
        _take_over(placeholder.outputs[0], emit_folded(stored))
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
    reasons = [fusion.reason for fusion in plan.fusions if fusion.reason is not None]
    if plan.uses.others and rule != "qdq":
        reasons.append(f"read by {', '.join(plan.uses.others)}, which onnxruntime does not fuse with integers")
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
        reason="; ".join(dict.fromkeys(reasons)) or None,
        remarks=_remarks(plan, stored),
        initializers=tuple(str(part.name) for part in stored.parts.values()),
    )


def _remarks(plan: WeightPlan, stored: StoredTable) -> tuple[str, ...]:
    remarks = []
    if stored.storage.width is None:
        remarks.append("channels are grouped by container; onnxruntime joins them when it loads the file")
    if stored.storage.widest > plan.table.container_bits:
        remarks.append("4 bits for 2: onnxruntime computes a wrong product for 2-bit weights unless N is a multiple of 4")
    widths = sorted({fusion.bits for fusion in plan.fusions if fusion.mode == "bytes" and fusion.bits > plan.storage.widest})
    if widths:
        remarks.append(f"computed with {widths[0]} bits: predicted to be the fastest at the example's size")
    return tuple(remarks)
