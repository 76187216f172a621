"""The numbers of a weight as the layout rules read them: levels, zero points, scales, their storage, and what is said about it."""

import re
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from stored_models import graph_of, store

from diffq_fx.errors import ExportError
from diffq_fx.export.onnx.layout.consumers import LinearUse, Uses
from diffq_fx.export.onnx.layout.cost import FLOAT, Choice, Kernel
from diffq_fx.export.onnx.layout.emitter import Emitter, make_node
from diffq_fx.export.onnx.layout.linear import refusal
from diffq_fx.export.onnx.layout.plan import WeightPlan, plan_for_onnxruntime
from diffq_fx.export.onnx.layout.products import Form, choose_form, is_rounded_anew
from diffq_fx.export.onnx.layout.records import record_of
from diffq_fx.export.onnx.layout.request import LayoutRequest
from diffq_fx.export.onnx.layout.stored import StoredTable
from diffq_fx.export.onnx.layout.table import Storage, one_container, read_table


def test_half_integer_zero_points_are_doubled_away():
    weight = torch.tensor([[-1.0, 1.0, -1.0, 1.0], [-1.0, 0.0, 1.0, 2.0]])
    stored = store(weight, torch.tensor([[1], [2]]), grid="half")
    table = read_table(stored)
    doubled = (table.levels - table.zero_point) * table.scale
    np.testing.assert_array_equal(doubled, stored().numpy())
    learned, is_half = table.learned_zero_point
    np.testing.assert_array_equal(learned + is_half / 2, stored.zero_point.numpy())
    np.testing.assert_array_equal(table.learned_levels, stored.levels_OI().numpy())
    assert table.factor.ravel().tolist() == [2, 1]
    assert "doubled for half-integer zero points" in table.widest
    assert table.most_bits == 2
    alike = read_table(store(weight, 1, grid="half"))
    assert alike.factor.tolist() == [[2]]
    plain = read_table(store(weight, 4, grid="affine"))
    assert plain.factor is None
    assert plain.learned_levels is plain.levels
    stored.bits[0], stored.levels = 15, stored.levels * 0
    assert read_table(stored).zero_point.ravel().tolist() == [1, 2], "half a level at the widest channel: all are doubled"
    stored.bits[0] = 16
    with pytest.raises(ExportError, match="half-integer zero point at 16 bits, .* up to 15 are possible"):
        read_table(stored)


def test_the_middle_of_the_levels_moves_where_it_would_be_no_zero_point():
    """A kernel that is fast for zero points other than 0 gets some."""
    table = read_table(store(torch.randn(2, 128), 8))
    table = replace(table, levels=np.tile(np.arange(1, 129, dtype=np.int32), (2, 1)), zero_point=np.full((2, 1), 64, np.int32))
    assert choose_form(table, "moved") == Form(ir.DataType.INT8, centred=False, offset=65)
    assert choose_form(table, "any") == Form(ir.DataType.INT8, centred=True, offset=0)


def test_scales_of_float16_stay_so_where_that_is_exact():
    table = read_table(store(torch.randn(3, 8), 4))
    for dtype, scale, held in (
        (torch.float32, [[0.5], [1.0], [2.0]], np.float32),
        (torch.float16, [[0.5], [1.0], [2.0]], np.float16),
        (torch.float16, [[0.5], [0.1], [2.0]], np.float32),
    ):
        halves = replace(table, spec=replace(table.spec, scale_dtype=dtype), scale=np.float32(scale))
        emitter = Emitter(graph_of("(float[2] x) => (float[2] y)", "y = Relu (x)"))
        value = StoredTable(emitter, one_container(halves, "weight")).scale
        assert value.dtype == ir.DataType.FLOAT
        assert emitter.graph.initializers["weight.scale"].const_value.numpy().dtype == held


@pytest.mark.parametrize("form", ["weight", "transposed"])
def test_scales_are_repeated_for_the_blocks_of_a_kernel(form):
    table = read_table(store(torch.randn(4, 100), 4, group=48, ranges=48))
    stored = StoredTable(Emitter(graph_of("(float[2] x) => (float[2] y)", "y = Relu (x)")), one_container(table, form))
    repeated, graph = stored.along_inputs(stored.scale, block=16, length=7), stored.emit.graph
    stored.emit.flush()
    graph.outputs.append(repeated)
    _, found = ReferenceEvaluator(ir.to_proto(ir.Model(graph, ir_version=10))).run(None, {"x": np.zeros(2, np.float32)})
    expected = table.scale.repeat(3, axis=1)[:, :7]  # 48 inputs are 3 blocks; the last ones are those of the short one
    np.testing.assert_array_equal(found, expected if form == "weight" else expected.T)
    alone = StoredTable(stored.emit, one_container(read_table(store(torch.randn(4, 100), 4)), form))
    assert alone.along_inputs(alone.scale, block=128, length=1) is alone.scale


def test_blocks_need_the_opset_that_has_them():
    assert [LayoutRequest(machines=None, opset=opset).has_blocks for opset in (None, 20, 21, 22)] == [True, False, True, True]


def test_what_a_storage_takes():
    table = read_table(store(torch.randn(10, 33), torch.tensor([[2]] * 3 + [[4]] * 5 + [[8]] * 2)))
    whole = one_container(table, "weight")
    assert (whole.width, whole.widest, whole.file_bytes, whole.part_bits) == (8, 8, 330, 8)
    parts = type(whole)(table, "weight", table.widths)
    assert (parts.width, parts.widest, parts.part_bits) == (None, 8, 2)
    assert parts.part_of_row.tolist() == [0] * 3 + [1] * 5 + [2] * 2
    assert parts.file_bytes == 25 + 83 + 66 + 500 + 10 * 2 // 8 + 2 * 150
    assert {width: rows.tolist() for width, rows in parts.parts.items()} == {2: [0, 1, 2], 4: [3, 4, 5, 6, 7], 8: [8, 9]}


def remarks(weight, *kernels, wider=1):
    table = read_table(weight)
    storage = Storage(table, "weight", table.widths * wider)
    plan = WeightPlan(Uses((), (), (), (), frozenset()), storage, tuple(Choice(kernel, "") for kernel in kernels))
    stored = StoredTable(Emitter(graph_of("(float[2] x) => (float[2] y)", "y = Relu (x)")), storage)
    return [remark.partition(":")[0].partition(";")[0] for remark in record_of(plan, stored, ["linear"], weight).remarks]


def test_what_is_remarked_about_a_weight():
    half, native, in_bytes = store(torch.randn(8, 64), 2, grid="half"), Kernel("fused 2", 64), Kernel("fused 8", 64)
    rounded, doubled = (
        "half-integer zero points",
        "levels with half-integer zero points are doubled when the file is loaded, to be integers about an integer",
    )
    assert remarks(half, native, native) == [rounded]
    assert remarks(half, native, in_bytes) == [rounded, doubled]
    assert remarks(half, in_bytes) == remarks(half, FLOAT) == remarks(half) == [doubled]
    assert remarks(store(torch.randn(2, 64), torch.tensor([[2], [8]]))) == ["channels are grouped by container"]
    assert remarks(store(torch.randn(2, 64), 2), native) == []
    assert remarks(store(torch.randn(2, 64), 2), native, wider=2) == ["4 bits for 2"]


def test_rows_are_picked_of_a_table_that_no_reader_needs_in_float(monkeypatch):
    monkeypatch.setattr("diffq_fx.export.onnx.layout.rows._MIN_WEIGHTS", 256)
    (node,) = graph_of("(float[2] x) => (float[2] y)", "y = Relu (x)")
    uses, native = Uses((), (node,), (), (), frozenset()), Kernel("fused 4", 64)

    def is_picked(kernel, uses=uses, rows=4, taken=()):
        storage = one_container(read_table(store(torch.randn(rows, 64), 4)), "weight")
        return WeightPlan(uses, storage, (Choice(native, ""), Choice(kernel, "")), taken).picks_rows

    convolved = replace(uses, convolutions=(node,))
    assert is_picked(native)
    assert is_picked(native, convolved, taken=(node,))
    for case in (
        (FLOAT,),
        (native, convolved),
        (native, uses, 3),
        (native, replace(uses, gathers=())),
        (native, replace(uses, others=("output",))),
    ):
        assert not is_picked(*case)


@pytest.mark.parametrize(("slowness", "width"), [(1.14, None), (1.16, 8)])
def test_a_smaller_file_may_cost_15_percent_of_the_time(slowness, width, monkeypatch):
    def choose(storage, *_, shared):
        return Choice(Kernel("fused 4", 64), "", slowness if storage.width is None else 1.0)

    monkeypatch.setattr("diffq_fx.export.onnx.layout.plan.choose_kernel", choose)
    use = LinearUse(make_node("MatMul", [ir.val("x"), ir.val("w")], "y"), None, None, False, None)
    table = read_table(store(torch.randn(64, 64), torch.tensor([[2], [8]]).repeat(32, 1)))
    found = plan_for_onnxruntime(table, Uses((use,), (), (), (), frozenset()), LayoutRequest(machines=None))
    assert found.storage.width == width


def test_levels_that_do_not_fit_int8_stretch_their_scale():
    table = read_table(store(torch.tensor([[0.0, 3.0, 1.0], [-1.0, 1.0, 0.5]]), 8))
    assert table.int8_stretch.ravel().tolist() == pytest.approx([255 / 127, 128 / 127], rel=0.01)
    even, uneven = (read_table(store(weight, bits)) for weight, bits in ((torch.randn(2, 9), 7), (torch.tensor([[-1.0, 2.0, 0.5]]), 8)))
    assert even.int8_stretch.ravel().tolist() == [1.0, 1.0]
    common = Form(ir.DataType.UINT8, centred=True, offset=-128)
    assert is_rounded_anew(uneven, common)
    assert not is_rounded_anew(even, common)
    assert not is_rounded_anew(uneven, common._replace(dtype=ir.DataType.INT8))


@pytest.mark.parametrize(
    ("bits", "settings", "transposed", "reason"),
    [
        (8, {}, True, None),
        (9, {}, True, "onnxruntime fuses up to 8 bits, the widest channel has 9"),
        (4, {}, False, r"scales lie along the inputs of this MatMul \(axis=0\), not along its outputs"),
        (4, {"group": "tensor", "ranges": "tensor"}, False, None),
        (4, {"group": 16, "ranges": 16}, True, None),
        (4, {"group": 48, "ranges": 48}, True, None),
        (4, {"group": 24, "ranges": 24}, True, "blocks of 24 inputs: onnxruntime fuses multiples of 16"),
    ],
)
def test_weights_that_no_product_can_be_fused_with(bits, settings, transposed, reason):
    table = read_table(store(torch.randn(6, 96), bits, **settings))
    use = LinearUse(make_node("MatMul", [ir.val("x"), ir.val("w")], "y"), None, None, transposed, None)
    found = refusal(table, use)
    assert (found is None) == (reason is None)
    assert reason is None or re.fullmatch(reason, found)
