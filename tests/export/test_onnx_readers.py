"""What the layout rules find in a graph and predict of it, on graphs of a few nodes: readers of weights, values to round, costs."""

import re
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from stored_models import graph_of, store

from diffq_fx.export.onnx.layout import rounding
from diffq_fx.export.onnx.layout.consumers import LinearUse, find_uses
from diffq_fx.export.onnx.layout.convolution import choose_convolutions, fold_batch_norm
from diffq_fx.export.onnx.layout.cost import FLOAT, Cost, Kernel, Product, Profile
from diffq_fx.export.onnx.layout.emitter import Emitter, constant_of, make_node, only_reader
from diffq_fx.export.onnx.layout.products import MAX_INPUTS
from diffq_fx.export.onnx.layout.request import LayoutRequest
from diffq_fx.export.onnx.layout.table import read_table


def uses_of(nodes, *, weight="float[12, 6] w", x="float[N, 6] x", outputs="float[a, b] y", axis=0):
    graph = graph_of(f"({x}, {weight}) => ({outputs})", nodes)
    return find_uses(graph.inputs[1], axis, graph)


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("t = Transpose <perm = [1, 0]> (w) y = MatMul (x, t)", [(True, None)]),
        ("t = Transpose (w) y = MatMul (x, t)", [(True, None)]),
        ("t = Transpose (w) u = Transpose (t) v = Transpose (u) y = MatMul (x, v)", [(True, None)]),
        ("y = Gemm <transB = 1> (x, w)", [(True, None)]),
        ("t = Transpose (w) y = Gemm (x, t)", [(True, None)]),
        ("t = Transpose (w) u = Transpose (t) y = Gemm <transB = 1> (x, u)", [(True, None)]),
        (
            "t = Transpose (w) a, b, c = Split <axis = 1, num_outputs = 3> (t) p = MatMul (x, a) q = MatMul (x, b) y = MatMul (x, c)",
            [(True, range(4)), (True, range(4, 8)), (True, range(8, 12))],
        ),
        (
            "s = Constant <value = int64[2] {2, 10}> () t = Transpose (w) a, b = Split <axis = -1> (t, s) p = MatMul (x, a) y = MatMul (x, b)",
            [(True, range(2)), (True, range(2, 12))],
        ),
        ("a, b = Split <axis = 0, num_outputs = 2> (w) t = Transpose (b) y = MatMul (x, t)", [(True, range(6, 12))]),
        (
            "i = Constant <value = int64[1] {3}> () j = Constant <value = int64[1] {9}> () s = Slice (w, i, j) t = Transpose (s) y = MatMul (x, t)",
            [(True, range(3, 9))],
        ),
        (
            "i = Constant <value = int64[1] {-5}> () j = Constant <value = int64[1] {99}> () k = Constant <value = int64[1] {-1}> () "
            "l = Constant <value = int64[1] {1}> () t = Transpose (w) s = Slice (t, i, j, k, l) y = MatMul (x, s)",
            [(True, range(7, 12))],
        ),
    ],
)
def test_linear_readers_are_found_through_what_rearranges_the_weight(nodes, expected):
    found = uses_of(nodes)
    assert [(use.transposed, use.rows) for use in found.linear] == expected
    assert (found.gathers, found.convolutions, found.others) == ((), (), ())
    assert found.turned == {transposed for transposed, _ in expected}
    assert {use.channel_axis for use in found.linear} == {0}


@pytest.mark.parametrize(
    ("nodes", "others", "turned"),
    [
        ("t = Transpose (w) y = Gemm <alpha = 2.0> (x, t)", ["Gemm"], {True}),
        ("t = Transpose (w) y = Gemm <beta = 0.5> (x, t)", ["Gemm"], {True}),
        ("y = MatMul (w, x)", ["MatMul"], {False}),
        ("y = Add (w, w)", ["Add"], {False}),
        ("y = Identity (w) z = Relu (y)", ["Relu"], {False}),
        ("a, b = Split <axis = 1, num_outputs = 2> (w) t = Transpose (a) y = Relu (t) z = Relu (b)", ["Relu"], {False}),
        ("t = Transpose (w) a, b = Split <axis = 0, num_outputs = 2> (t) y = MatMul (x, a) z = Tanh (b)", ["MatMul", "Tanh"], {True}),
        (
            "i = Constant <value = int64[1] {0}> () j = Constant <value = int64[1] {9}> () k = Constant <value = int64[1] {0}> () "
            "l = Constant <value = int64[1] {2}> () s = Slice (w, i, j, k, l) t = Transpose (s) y = MatMul (x, t)",
            ["MatMul"],
            {False},
        ),
        (
            "a, b = Split <axis = 0, num_outputs = 2> (w) c, d = Split <axis = 0, num_outputs = 2> (a) y = Concat <axis = 0> (c, d) z = Relu (y)",
            ["Relu"],
            {False},
        ),
        (
            "a, b = Split <axis = 0, num_outputs = 2> (w) c, d = Split <axis = 0, num_outputs = 2> (a) t = Transpose (c) y = MatMul (x, t)",
            ["MatMul"],
            {False},
        ),
        ("s = Shape (x) a, b = Split <axis = 0> (w, s) t = Transpose (a) y = MatMul (x, t)", ["MatMul"], {False}),
    ],
)
def test_other_readers_are_named_by_what_they_come_to(nodes, others, turned):
    found = uses_of(nodes)
    assert found.linear == ()
    assert sorted(found.others) == others
    assert turned <= found.turned


def test_readers_that_have_a_form_of_their_own():
    picked = uses_of("y = Gather <axis = 0> (w, x)", x="int64[N, 3] x")
    assert [node.op_type for node in picked.gathers] == ["Gather"]
    assert picked.others == ()
    for nodes, axis in (("y = Gather <axis = 1> (w, x)", 0), ("y = Gather <axis = 0> (w, x)", 1)):
        assert uses_of(nodes, x="int64[N, 3] x", axis=axis).others == ("Gather",)
    filters = {"weight": "float[8, 4, 3] w", "x": "float[N, 4, 9] x", "outputs": "float[a, b, c] y"}
    assert [node.op_type for node in uses_of("y = Conv (x, w)", **filters).convolutions] == ["Conv"]
    assert uses_of("y = Conv (x, w)", **filters, axis=1).others == ("Conv",)
    assert uses_of("t = Identity (w) y = Conv (x, t)", **filters).others == ("Conv",)
    given_out = uses_of("w2 = Relu (w) y = Relu (x)", outputs="float[12, 6] w, float[a, b] y")
    assert set(given_out.others) == {"output", "Relu"}
    vector = uses_of("t = Transpose (w) y = MatMul (x, t)", x="float[6] x", outputs="float[a] y")
    assert (vector.linear, vector.others) == ((), ("MatMul",))
    squared = uses_of("y = MatMul (w, w)", weight="float[6, 6] w")
    assert (squared.linear, squared.others) == ((), ("MatMul",))
    turned = uses_of("t = Transpose (w) y = Gemm <transA = 1> (x, t)", x="float[6, N] x")
    assert (turned.linear, turned.others) == ((), ("Gemm",))
    (biased,) = uses_of("y = Gemm <transB = 1> (x, w, b)", weight="float[12, 6] w, float[12] b").linear
    assert biased.bias.name == "b"
    (plain,) = uses_of("y = MatMul (x, w)", weight="float[6, 12] w", axis=1).linear
    assert (plain.transposed, plain.channel_axis, plain.bias) == (False, 1, None)


@pytest.mark.parametrize(
    ("shape", "rows", "is_open"),
    [
        ([3, 6], 3, False),
        ([2, 5, 6], 10, False),
        (["N", 5, 6], 35, True),
        ([2, "N", 6], 14, True),
        (["M", 6], 1, True),
        (None, 1, True),
        (["2*N", 6], 14, True),
    ],
)
def test_rows_of_a_product_at_the_example(shape, rows, is_open):
    activation = ir.val("x", ir.DataType.FLOAT, shape)
    use = LinearUse(None, activation, None, True, None)
    assert (use.num_rows({"N": 7}), use.is_open) == (rows, is_open)


def test_a_product_is_named_by_what_it_reads():
    assert LinearUse(None, None, None, True, None).label("w") == "w"
    assert LinearUse(None, None, None, True, range(4, 8)).label("w") == "w.4_8"


# --- what is added to a graph


def test_names_are_unique_and_nodes_come_first():
    graph = graph_of("(float[2, 2] x, float[2, 2] w) => (float[2, 2] y)", "t = Relu (x) y = Add (t, w)")
    emitter = Emitter(graph)
    assert [emitter.unique(name) for name in ("x", "t", "y", "new", "new", "new")] == ["x_2", "t_2", "y_2", "new", "new_2", "new_3"]
    first = emitter.op("Relu", [graph.inputs[0]], "made")
    second = emitter.cast(first, ir.DataType.INT32)
    assert emitter.cast(second, ir.DataType.INT32) is second
    assert (first.dtype, second.dtype) == (ir.DataType.FLOAT, ir.DataType.INT32)
    assert emitter.op("Shape", [first], dtype=ir.DataType.INT64).dtype == ir.DataType.INT64
    sizes = emitter.sizes(3, -1)
    assert constant_of(sizes).tolist() == [3, -1]
    assert constant_of(sizes).dtype == np.int64
    assert emitter.sizes(1).name == "sizes_2"
    assert "sizes" in graph.initializers
    emitter.flush()
    emitter.flush()
    assert [node.op_type for node in graph] == ["Relu", "Cast", "Shape", "Relu", "Add"]
    assert constant_of(graph.inputs[0]) is None
    assert constant_of(None) is None


def test_missing_inputs_at_the_end_are_left_out():
    x = ir.val("x")
    assert make_node("Clip", [x, None, x], "y").inputs == (x, None, x)
    assert make_node("Clip", [x, None, None], "y").inputs == (x,)
    node = make_node("Cast", [x], "y", to=1)
    assert (node.name, node.outputs[0].name, node.attributes["to"].value) == ("y", "y", 1)


def test_the_one_reader_of_a_value():
    graph = graph_of("(float[2] x) => (float[2] y, float[2] z)", "a = Relu (x) b = Tanh (a) y = Add (b, b) z = Relu (y)")
    values = {value.name: value for node in graph for value in node.outputs}
    assert only_reader(values["a"]).op_type == "Tanh"
    assert only_reader(values["b"]).op_type == "Add"
    assert only_reader(values["y"]) is None, "the graph gives it out"
    assert only_reader(values["z"]) is None
    next(iter(values["a"].consumers())).domain = "elsewhere"
    assert only_reader(values["a"]) is None


# --- rounded values


@pytest.mark.parametrize(
    ("value_range", "scale", "zero_point"),
    [
        ((-1.0, 3.0), 4 / 255, 64),
        ((2.0, 5.1), 5.1 / 255, 0),
        ((-5.1, -2.0), 5.1 / 255, 255),
        ((0.0, 0.0), 1.0, 0),
        ((-255.0, 0.0), 1.0, 255),
    ],
)
def test_the_grid_of_a_range_holds_zero(value_range, scale, zero_point):
    found_scale, found_zero = rounding.grid(value_range)
    assert found_scale == np.float32(scale)
    assert int(found_zero) == zero_point
    assert (found_scale.dtype, found_zero.dtype) == (np.float32, np.uint8)


CONV = "c = Conv (x, w)"
BOUNDS = "zero = Constant <value = float {0.0}> () six = Constant <value = float {6.0}> () one = Constant <value = float {1.0}> () "


@pytest.mark.parametrize(
    ("behind", "limits"),
    [
        ("y = Relu (c)", "Relu"),
        ("y = Clip (c, zero, six)", "Clip"),
        ("y = Clip (c)", "Clip"),
        ('y = Clip (c, "", six)', "Clip"),
        ("y = Clip (c, one, six)", None),
        ("m = Neg (one) y = Clip (c, m, six)", None),  # computed by the graph
        ("y = Tanh (c)", None),
        ("d = Relu (c) y = Add (c, d)", None),
    ],
)
def test_limits_of_the_integers_take_the_place_of_a_relu_or_clip(behind, limits):
    graph = graph_of("(float[1, 4, 9] x, float[8, 4, 3] w) => (float[a, b, c0] y)", f"{BOUNDS} {CONV} {behind}")
    (conv,) = [node for node in graph if node.op_type == "Conv"]
    given = {entry.value.name: entry for entry in rounding.find_rounded(graph, {conv})}
    assert given["x"].readers == (conv,)
    assert given["x"].limits is None
    # the value that the convolution gives is found only where an integer kernel reads it
    graph = graph_of(
        "(float[1, 4, 9] x, float[8, 4, 3] w, float[8, 8, 1] w2) => (float[a, b, c0] z)", f"{BOUNDS} {CONV} {behind} z = Conv (y, w2)"
    )
    convolutions = {node for node in graph if node.op_type == "Conv"}
    given = {entry.value.name: entry for entry in rounding.find_rounded(graph, convolutions)}
    first = next(entry for name, entry in given.items() if name in ("c", "y"))
    if limits is not None:
        assert first.value.name == "y"
        assert first.limits.op_type == limits
        rounding.round_values(Emitter(graph), list(given.values()), dict.fromkeys((entry.source.name for entry in given.values()), (0, 6)))
        assert limits not in [node.op_type for node in graph]
        readers = [reader for node in graph for value in node.inputs if value is not None for reader in value.consumers()]
        assert all(reader.graph is graph for reader in readers), "what was taken out reads nothing any more"


def test_what_is_only_moved_shares_the_range_of_its_source():
    graph = graph_of(
        "(float[1, 4, 9] x, float[8, 4, 3] w, float[8, 8, 1] w2) => (float[a, b, c0] z, float[d, e, f] t)",
        "c = Conv (x, w) p = MaxPool <kernel_shape = [2]> (c) z = Conv (p, w2) t = Transpose <perm = [0, 2, 1]> (z)",
    )
    convolutions = {node for node in graph if node.op_type == "Conv"}
    found = {entry.value.name: entry for entry in rounding.find_rounded(graph, convolutions)}
    assert found["p"].source.name == "c"
    assert "t" not in found, "integers that are only moved are of no use to float readers"
    assert list(found) == ["x", "c", "p", "z"]
    model = ir.Model(graph, ir_version=10)
    names = rounding.watch(model, list(found.values()))
    assert set(names) == {"x", "c", "z"}
    assert [value.name for value in graph.outputs][2:] == [name for pair in names.values() for name in pair]
    assert all(value.dtype == ir.DataType.FLOAT and value.shape.rank() == 0 for value in graph.outputs[2:])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("halved", [False, True])
def test_a_batch_norm_is_put_into_scales_and_bias(bias, halved):
    generator = np.random.default_rng(0)
    numbers = {name: (generator.random(8) + 0.5).astype(np.float32) for name in ("gamma", "beta", "mean", "variance", "b")}
    inputs = "c = Conv (x, w, b)" if bias else "c = Conv (x, w)"
    given = ", ".join(f"float[8] {name}" for name in numbers)
    graph = graph_of(
        f"(float[1, 4, 9] x, float[8, 4, 3] w, {given}) => (float[1, 8, 7] y)",
        f"{inputs} y = BatchNormalization <epsilon = 0.25> (c, gamma, beta, mean, variance)",
    )
    for value in list(graph.inputs[2:]):
        value.const_value = ir.tensor(numbers[value.name], name=value.name)
        graph.inputs.remove(value)
        graph.register_initializer(value)
    table = read_table(store(torch.randn(8, 4, 3), 4))
    folded = fold_batch_norm(Emitter(graph), table, graph[0], {"gamma", "mean", "b"} if halved else set())
    rounded = {name: array.astype(np.float16) if halved and name in ("gamma", "mean", "b") else array for name, array in numbers.items()}
    gamma, beta, mean, variance, b = (each.astype(np.float64) for each in rounded.values())
    factor = gamma / np.sqrt(variance + 0.25)
    np.testing.assert_allclose(folded.scale, table.scale * factor[:, None], rtol=1e-6)
    np.testing.assert_allclose(constant_of(graph[0].inputs[2]), ((b if bias else 0) - mean) * factor + beta, rtol=1e-6)
    assert [node.op_type for node in graph] == ["Conv"]
    assert not any(value.uses() for name, value in graph.initializers.items() if name in numbers and name != "b")
    assert graph.outputs[0].name == "y"
    assert graph.outputs[0] is graph[0].outputs[0]


@pytest.mark.parametrize(
    ("shape", "groups", "bits", "reason"),
    [
        ((8, 4, 3), 1, 8, None),
        ((8, 4, 3), 1, 9, "int8 convolutions take up to 8 bits, the widest channel has 9"),
        ((1, MAX_INPUTS, 1), 1, 4, None),
        ((1, MAX_INPUTS // 2 + 1, 2), 1, 4, f"{MAX_INPUTS + 1} inputs of a filter: .*"),
        ((64, 32, 3), 2, 4, None),
        ((64, 16, 40), 4, 4, "4 groups of 16 channels: .*"),
        ((32, 64, 3), 2, 4, "2 groups of 16 channels: .*"),
        ((62, 64, 3), 2, 4, "2 groups of 31 channels: .*"),
        ((64, 1, 3), 64, 4, None),
        ((128, 1, 3), 64, 4, "64 groups of 1 channels: .*"),
    ],
)
def test_which_convolutions_can_be_integer_ones(shape, groups, bits, reason):
    outputs, inputs, _ = shape
    graph = graph_of(
        f"(float[1, {inputs * groups}, 99] x, float[{outputs}, {inputs}, {shape[2]}] w) => (float[a, b, c] y)",
        f"y = Conv <group = {groups}> (x, w)",
    )
    table = read_table(store(torch.rand(shape), bits))
    uses = find_uses(graph.inputs[1], 0, graph)
    (found,) = choose_convolutions(table, uses, LayoutRequest(machines=None, activations="int8"))[1].values()
    assert (found is None) == (reason is None)
    assert reason is None or re.fullmatch(reason, found)


@pytest.mark.parametrize(("steps", "reason"), [(2.0**29, None), (2.0**31, "the bias of channel 1 is 2.1e.09 int32 steps: .*")])
def test_a_bias_fits_int32_steps_of_the_product(steps, reason):
    graph = graph_of("(float[1, 2, 9] x, float[3, 2, 1] w, float[3] b) => (float[a, b0, c] y)", "y = Conv (x, w, b)")
    table = read_table(store(torch.randn(3, 2, 1), 4))
    bias = graph.inputs.pop()
    step, _ = rounding.grid((-1.0, 1.0))
    bias.const_value = ir.tensor(np.float32([1, steps, 1]) * step * table.scale[:, 0], name="b")
    graph.register_initializer(bias)
    request = LayoutRequest(machines=None, activations="int8", ranges={"x": (-1.0, 1.0)})
    (found,) = choose_convolutions(table, find_uses(graph.inputs[1], 0, graph), request)[1].values()
    assert (found is None) == (reason is None)
    assert reason is None or re.fullmatch(reason, found)


def test_a_channel_that_is_scaled_by_nothing_stays_zero():
    """As a BatchNorm whose gamma is 0 leaves it, with a zero point at a half-integer."""
    table = read_table(store(torch.tensor([[-1.0, 1.0], [-1.0, 2.0]])[:, :, None], 1, grid="half"))
    table = replace(table, scale=table.scale * np.float32([[0], [1]]))
    graph = graph_of("(float[1, 2, 9] x, float[2, 2, 1] w) => (float[a, b, c] y)", "y = Conv (x, w)")
    found, _ = choose_convolutions(table, find_uses(graph.inputs[1], 0, graph), LayoutRequest(machines=None, activations="int8"))
    assert (found.scale > 0).all()
    np.testing.assert_array_equal((found.levels - found.zero_point) * found.scale, (table.levels - table.zero_point) * table.scale)
    np.testing.assert_array_equal(found.zero_point % 2, [[0], table.zero_point[1] % 2])
    table = read_table(store(torch.tensor([[-1.0, 1.0], [-1.0, 2.0]])[:, :, None], 4, grid="symmetric"))
    table = replace(table, scale=table.scale * np.float32([[0], [1]]))
    found, _ = choose_convolutions(table, find_uses(graph.inputs[1], 0, graph), LayoutRequest(machines=None, activations="int8"))
    assert (found.scale > 0).all()
    np.testing.assert_array_equal(found.levels * found.scale, table.levels * table.scale)


@pytest.mark.parametrize(("between", "is_kept"), [("Relu", True), ("Clip", True), ("Flatten", True), ("Sigmoid", False)])
def test_a_float_product_is_kept_so_before_what_onnxruntime_quantizes_across(between, is_kept):
    nodes = "q = QuantizeLinear (x, s, z) a = DequantizeLinear (q, s, z) t = Transpose (a) i = Identity (t) p = MatMul (i, w) b = {} (p) "
    nodes += "y = QuantizeLinear (b, s, z)"
    graph = graph_of("(float[2, 2] x, float[2, 2] w, float s, uint8 z) => (uint8[a, b] y)", nodes.format(between))
    rounding.keep_in_float(Emitter(graph), set())
    assert ("Max" in [node.op_type for node in graph]) == is_kept


# --- what a product costs

COST = Cost(1.0, 2.0, 3.0, 5.0, 7.0, 11.0, 13.0, 17.0)


@pytest.mark.parametrize(
    ("kernel", "rows", "inputs", "outputs"),
    [
        (FLOAT, 3, 40, 10),
        (Kernel("fused 4", 32), 3, 40, 10),
        (Kernel("dynamic int8"), 2, 1000, 900),
        (Kernel("fused 8", 256), 1, 1024, 600),
    ],
)
def test_the_parts_of_a_cost(kernel, rows, inputs, outputs):
    blocks = -(-inputs // kernel.block) if kernel.block else 1
    weights = (blocks * kernel.block or inputs) * outputs
    scales = 0 if kernel == FLOAT else blocks * outputs
    nanoseconds = 2 * weights + 3 * max(0, weights - 400_000) + 5 * rows * inputs + 7 * rows * outputs + 13 * scales
    picoseconds = 11 * rows * weights + 17 * rows * scales
    expected = 1 + nanoseconds / 1e3 + picoseconds / 1e6
    assert COST.microseconds(kernel, rows, inputs, outputs) == pytest.approx(expected)
    profile = Profile(name="p", source="", margin=1.0, costs={kernel.name: COST})
    at_more = COST.microseconds(kernel, 32 * rows, inputs, outputs)
    assert profile.times(kernel, Product(rows, inputs, outputs)) == pytest.approx((expected,))
    assert profile.times(kernel, Product(rows, inputs, outputs, True)) == pytest.approx((expected, at_more))
    assert profile.times(Kernel("fused 2", 64), Product(rows, inputs, outputs)) == ()


def test_kernels_by_their_names():
    assert [kernel.title for kernel in (FLOAT, Kernel("fused 4", 32), Kernel("dynamic uint8"))] == [
        "float",
        "fused, 4 bits",
        "dynamic, uint8 weights",
    ]
    assert Kernel("fused 8", 16).bits == 8
    assert [kernel.is_dynamic for kernel in (FLOAT, Kernel("fused 4", 32), Kernel("dynamic int8"))] == [False, False, True]
