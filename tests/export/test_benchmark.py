"""Two ONNX files in turns: the inputs they get, the differences that must be seen, the files that do not fit."""

import json
import math

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from diffq_fx.errors import DiffQError
from diffq_fx.export.onnx.benchmark import Quartiles, compare_latency
from diffq_fx.export.onnx.sessions import difference_of
from diffq_fx.export.onnx.signatures import TensorSignature, index_bounds, make_inputs, resolve_shapes

FAST = {"repeats": 3, "threads": 1}


def value_info(name, shape, data_type=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, data_type, shape)


def build(nodes, initializers, inputs, outputs, props=None):
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    helper.set_model_props(model, props or {})
    return model


def save(path, *args, **kwargs):
    onnx.save(build(*args, **kwargs), path)
    return path


def linear(path, weight, x="x", y="y", batch="batch", props=None):
    return save(
        path,
        [helper.make_node("MatMul", [x, "w"], [y])],
        [numpy_helper.from_array(weight.astype(np.float32), "w")],
        [value_info(x, [batch, weight.shape[0]])],
        [value_info(y, [batch, weight.shape[1]])],
        props=props,
    )


def embedding(path, rows, columns=4, data_type=TensorProto.INT64):
    return save(
        path,
        [
            helper.make_node("Identity", ["ids"], ["same_ids"]),
            helper.make_node("DequantizeLinear", ["q", "scale"], ["table"]),
            helper.make_node("Gather", ["table", "same_ids"], ["y"]),
        ],
        [
            numpy_helper.from_array(np.ones((rows, columns), np.int8), "q"),
            numpy_helper.from_array(np.float32(0.5), "scale"),
        ],
        [value_info("ids", ["batch", "length"], data_type)],
        [value_info("y", ["batch", "length", columns])],
    )


@pytest.fixture
def weight():
    return np.random.default_rng(0).standard_normal((16, 8))


def test_a_model_against_itself_differs_by_nothing(tmp_path, weight):
    path = linear(tmp_path / "a.onnx", weight)
    seen = []
    result = compare_latency(path, path, batch=3, on_progress=lambda done, total: seen.append((done, total)), **FAST)
    assert result.inputs == {"x": ("float32", (3, 16))}
    assert [(output.name, output.shape, output.max_abs) for output in result.outputs] == [("y", (3, 8), 0.0)]
    assert result.size_a_mib == result.size_b_mib == path.stat().st_size / 2**20
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for quartiles in (result.a_ms, result.b_ms, result.ratio):
        assert 0 < quartiles.q1 <= quartiles.median <= quartiles.q3
    assert json.loads(json.dumps(result.to_dict()))["worst_output"]["max_abs"] == 0


def test_a_difference_of_one_percent_is_reported_as_one(tmp_path, weight):
    a = linear(tmp_path / "a.onnx", weight)
    b = linear(tmp_path / "b.onnx", weight * 1.01)
    worst = compare_latency(a, b, **FAST).worst_output
    assert worst.max_relative == pytest.approx(0.01, rel=1e-3)
    zeros = linear(tmp_path / "zeros.onnx", weight * 0)
    assert compare_latency(a, zeros, **FAST).worst_output.max_relative == pytest.approx(1)


def test_the_same_seed_draws_the_same_inputs(tmp_path, weight):
    a = linear(tmp_path / "a.onnx", weight)
    b = linear(tmp_path / "b.onnx", weight + 0.1)
    first, again, other = (compare_latency(a, b, seed=seed, **FAST).worst_output.max_abs for seed in (1, 1, 2))
    assert first == again != other


def test_the_session_entries_of_a_file_are_honoured(tmp_path):
    generator = np.random.default_rng(0)
    levels = generator.integers(-8, 8, (64, 32))
    scale = generator.random((2, 32)).astype(np.float32)
    nibbles = (levels.astype(np.int8).view(np.uint8) & 15).reshape(-1, 2)
    packed = helper.make_tensor("q", TensorProto.INT4, [64, 32], (nibbles[:, 0] | nibbles[:, 1] << 4).astype(np.uint8).tobytes(), raw=True)
    exact = save(
        tmp_path / "exact.onnx",
        [
            helper.make_node("DequantizeLinear", ["q", "scale"], ["w"], axis=0, block_size=32),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ],
        [packed, numpy_helper.from_array(scale, "scale")],
        [value_info("x", ["batch", 64])],
        [value_info("y", ["batch", 32])],
        props={"diffq_fx.session.qdq_matmulnbits_accuracy_level": "1", "author": "somebody"},
    )
    a = linear(tmp_path / "float.onnx", levels * np.repeat(scale, 32, 0))
    result = compare_latency(a, exact, **FAST)
    assert (result.session_a, result.session_b) == ({}, {"session.qdq_matmulnbits_accuracy_level": "1"})
    assert result.worst_output.max_relative < 1e-5


def test_ids_stay_inside_the_smallest_table_they_select_from(tmp_path):
    a = embedding(tmp_path / "a.onnx", rows=50)
    b = embedding(tmp_path / "b.onnx", rows=7)
    assert index_bounds([onnx.load(a)]) == {"ids": 50}
    assert index_bounds([onnx.load(a), onnx.load(b)]) == {"ids": 7}
    result = compare_latency(a, b, batch=2, dims={"length": 300}, **FAST)
    assert result.inputs == {"ids": ("int64", (2, 300))}


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_the_bound_is_that_of_the_gathered_axis_behind_a_transpose(axis):
    nodes = [
        helper.make_node("Transpose", ["table"], ["turned"]),
        helper.make_node("Gather", ["turned", "ids"], ["y"], axis=axis),
    ]
    table = numpy_helper.from_array(np.ones((3, 11), np.float32), "table")
    model = build(nodes, [table], [value_info("ids", [4], TensorProto.INT64)], [value_info("y", None)])
    assert index_bounds([model]) == {"ids": 11 if axis == 0 else 3}


def test_a_gather_inside_an_inner_graph_bounds_too():
    inner = helper.make_graph([helper.make_node("Gather", ["table", "ids"], ["out"])], "branch", [], [value_info("out", None)])
    table = numpy_helper.from_array(np.ones((5, 2), np.float32), "table")
    node = helper.make_node("If", ["condition"], ["y"], then_branch=inner, else_branch=inner)
    inputs = [value_info("ids", [4], TensorProto.INT64), value_info("condition", [], TensorProto.BOOL)]
    assert index_bounds([build([node], [table], inputs, [value_info("y", None)])]) == {"ids": 5}


def test_inputs_are_drawn_by_type_and_bound():
    dtypes = {"float": "float32", "float16": "float16", "double": "float64", "bool": "bool"}
    kinds = [*dtypes, "int8", "uint8", "int32", "int64"]
    signature = [TensorSignature(name=kind, type=f"tensor({kind})", shape=(1000,)) for kind in kinds]
    inputs = make_inputs(signature, dict.fromkeys(kinds, (1000,)), {"int64": 30}, seed=0)
    assert {kind: str(inputs[kind].dtype) for kind in dtypes} == dtypes
    assert set(inputs["int32"].tolist()) == {0, 1}
    assert set(inputs["int64"].tolist()) == set(range(30))
    assert inputs["int8"].min() < -100
    assert inputs["uint8"].max() > 200
    assert abs(inputs["float"].std() - 1) < 0.1


def test_text_inputs_are_refused():
    text = TensorSignature(name="words", type="tensor(string)", shape=(1,))
    with pytest.raises(DiffQError, match=r"'words' tensor\(string\) \[1\]"):
        make_inputs([text], {"words": (1,)}, {}, seed=0)


def test_open_dimensions_take_the_batch_the_named_size_or_an_error():
    ids = TensorSignature(name="ids", type="tensor(int64)", shape=("batch", "length"))
    mask = TensorSignature(name="mask", type="tensor(bool)", shape=("length", "batch", None))
    assert resolve_shapes([ids, mask], 2, {"length": 5, "mask.2": 3}) == {"ids": (2, 5), "mask": (5, 2, 3)}
    assert resolve_shapes([ids], 2, {"batch": 4, "length": 5}) == {"ids": (4, 5)}
    with pytest.raises(ValueError, match="--dim length=128"):
        resolve_shapes([ids], 1)
    with pytest.raises(ValueError, match="dims names width, which no input leaves open; open dimensions: batch, "):
        resolve_shapes([ids], 1, {"width": 3})
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        resolve_shapes([ids], 1, {"length": 0})
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        resolve_shapes([ids], 0, {"length": 1})


def test_a_batch_that_no_input_can_take_is_refused(tmp_path, weight):
    path = linear(tmp_path / "a.onnx", weight, batch=1)
    with pytest.raises(ValueError, match=r"batch=4, but the first dimension of every input is fixed at \[1\]"):
        compare_latency(path, path, batch=4, **FAST)
    assert compare_latency(path, path, **FAST).inputs == {"x": ("float32", (1, 16))}


def two_of_each(path, inputs, outputs, rows=5):
    """The rows of a table that ``ids`` names, times ``scale``; and ``scale`` itself."""
    ids, scale = inputs
    rows_of, same = outputs
    nodes = [
        helper.make_node("Gather", ["table", ids], ["picked"]),
        helper.make_node("Mul", ["picked", scale], [rows_of]),
        helper.make_node("Identity", [scale], [same]),
    ]
    table = numpy_helper.from_array(np.arange(1, rows * 4 + 1, dtype=np.float32).reshape(rows, 4), "table")
    taken = {ids: value_info(ids, ["batch"], TensorProto.INT64), scale: value_info(scale, ["batch", 4])}
    given = {rows_of: value_info(rows_of, ["batch", 4]), same: value_info(same, ["batch", 4])}
    return save(path, nodes, [table], [taken[name] for name in sorted(taken)], [given[name] for name in sorted(given)])


def test_other_names_are_paired_by_their_order(tmp_path, weight):
    a = linear(tmp_path / "a.onnx", weight, x="x", y="output")
    b = linear(tmp_path / "b.onnx", weight, x="input_1", y="linear_1", batch=1)
    result = compare_latency(a, b, **FAST)
    assert [(output.name, output.max_abs) for output in result.outputs] == [("output", 0.0)]
    assert result.other_names == {"x": "input_1", "output": "linear_1"}
    assert compare_latency(a, a, **FAST).other_names == {}


def test_what_shares_a_name_is_paired_by_it_before_the_rest_by_order(tmp_path):
    a = two_of_each(tmp_path / "a.onnx", ("ids", "scale"), ("rows", "same"), rows=50)
    b = two_of_each(tmp_path / "b.onnx", ("words", "scale"), ("zzz", "same"), rows=7)
    assert [entry.name for entry in onnx.load(b).graph.input] == ["scale", "words"]
    assert [entry.name for entry in onnx.load(b).graph.output] == ["same", "zzz"]
    for one, other in ((a, b), (b, a)):
        result = compare_latency(one, other, batch=100, **FAST)  # 100 ids: beyond 7 rows if the smaller table is not seen
        assert [output.max_abs for output in result.outputs] == [0.0, 0.0]
    assert result.other_names == {"words": "ids", "zzz": "rows"}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"x": "x1", "batch": 5}, r"input 'x' tensor\(float\) \[1, 16\] of A does not fit 'x1' tensor\(float\) \[5, 16\] of B"),
        ({"batch": 5}, r"input 'x' tensor\(float\) \[1, 16\] of A does not fit 'x' tensor\(float\) \[5, 16\] of B"),
        ({"y": "z", "columns": 3}, r"output 'y' tensor\(float\) \[batch, 8\] of A does not fit 'z' tensor\(float\) \[batch, 3\] of B"),
    ],
)
def test_models_with_other_inputs_or_outputs_are_refused_in_a_sentence(tmp_path, weight, other, message):
    a = linear(tmp_path / "a.onnx", weight)
    b = linear(tmp_path / "b.onnx", weight[:, : other.pop("columns", 8)], **other)
    with pytest.raises(DiffQError, match=rf"^A '.*a\.onnx' and B '.*b\.onnx' cannot be compared: {message}\. Export both .*\.$"):
        compare_latency(a, b, **FAST)


def test_models_with_more_inputs_or_another_type_are_refused(tmp_path, weight):
    one = linear(tmp_path / "one.onnx", weight[:4, :4], x="scale", y="same")
    two = two_of_each(tmp_path / "two.onnx", ("ids", "scale"), ("rows", "same"))
    with pytest.raises(DiffQError, match=r"input 'ids' tensor\(int64\) \[batch\] is in B alone; output 'rows' .* is in B alone\."):
        compare_latency(one, two, **FAST)
    a, b = embedding(tmp_path / "a.onnx", rows=5), embedding(tmp_path / "b.onnx", rows=5, data_type=TensorProto.INT32)
    with pytest.raises(DiffQError, match=r"'ids' tensor\(int64\) \[1, 2\] of A does not fit 'ids' tensor\(int32\) \[batch, length\] of B"):
        compare_latency(a, b, dims={"length": 2}, **FAST)


def test_outputs_of_another_shape_are_refused(tmp_path):
    a = embedding(tmp_path / "a.onnx", rows=5, columns=4)
    b = embedding(tmp_path / "b.onnx", rows=5, columns=6)
    with pytest.raises(DiffQError, match=r"output 'y' has shape \[1, 2, 4\] in A and \[1, 2, 6\] in B"):
        compare_latency(a, b, dims={"length": 2}, **FAST)


def test_a_model_that_fails_on_the_inputs_is_named(tmp_path):
    table = numpy_helper.from_array(np.ones((3, 4), np.float32), "bias")
    path = save(
        tmp_path / "picky.onnx",
        [helper.make_node("Add", ["x", "bias"], ["y"])],
        [table],
        [value_info("x", ["length", 4])],
        [value_info("y", None)],
    )
    with pytest.raises(DiffQError, match=r"(?s)cannot run '.*picky\.onnx' on inputs 'x' \[7, 4\].*Other sizes"):
        compare_latency(path, path, batch=7, **FAST)


def test_files_that_cannot_be_loaded_are_named(tmp_path, weight):
    good = linear(tmp_path / "good.onnx", weight)
    with pytest.raises(FileNotFoundError, match=r"there is no file '.*missing\.onnx'"):
        compare_latency(good, tmp_path / "missing.onnx", **FAST)
    (tmp_path / "cut.onnx").write_bytes(good.read_bytes()[:200])
    with pytest.raises(DiffQError, match=r"cut\.onnx' \(200 bytes\) is not an ONNX file"):
        compare_latency(tmp_path / "cut.onnx", good, **FAST)
    unknown = save(
        tmp_path / "unknown.onnx",
        [helper.make_node("NoSuchOperator", ["x"], ["y"])],
        [],
        [value_info("x", [1])],
        [value_info("y", [1])],
    )
    with pytest.raises(DiffQError, match=r"cannot load '.*unknown\.onnx'.*NoSuchOperator"):
        compare_latency(unknown, good, **FAST)


@pytest.mark.parametrize(("field", "value"), [("repeats", 0), ("threads", -1)])
def test_impossible_settings_are_refused(tmp_path, field, value):
    with pytest.raises(ValueError, match=f"compare_latency: {field} must be a whole number of at least .*, got {value}"):
        compare_latency(tmp_path / "a", tmp_path / "b", **{field: value})


def test_size_counts_external_data(tmp_path, weight):
    path = linear(tmp_path / "a.onnx", np.tile(weight, (20, 1)))
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin")
    result = compare_latency(path, path, **FAST)
    total = path.stat().st_size + (tmp_path / "weights.bin").stat().st_size
    assert result.size_a_mib == total / 2**20


def difference(a, b):
    output = difference_of("y", np.array(a), np.array(b))
    return output.max_abs, output.max_relative


def test_differences_see_every_kind_of_disagreement():
    assert difference([1.0, -4.0], [1.0, -4.5]) == (0.5, 0.125)
    assert difference([np.nan, np.inf, 1.0], [np.nan, np.inf, 1.0]) == (0.0, 0.0)
    assert difference([np.nan, 1.0], [0.0, 1.0]) == (math.inf, math.inf)
    assert difference([1.0, 2.0], [1.0, np.inf]) == (math.inf, math.inf)
    assert difference([0.0], [0.1]) == (0.1, math.inf)
    assert difference([0.0], [0.0]) == (0.0, 0.0)
    assert difference([True, False], [True, True]) == (1.0, 1.0)
    assert difference([0, 255], np.array([0, 254], np.uint8)) == (1.0, 1 / 255)
    assert difference(["cat"], ["dog"]) == (math.inf, math.inf)
    assert difference(["cat"], ["cat"]) == (0.0, 0.0)
    assert difference(np.zeros((0, 3)), np.zeros((0, 3))) == (0.0, 0.0)


def test_quartiles_of_one_value_are_that_value():
    assert Quartiles.of([2.0]) == Quartiles(q1=2.0, median=2.0, q3=2.0)
