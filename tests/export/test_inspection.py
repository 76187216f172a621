"""The report on ONNX files: ours, those of others, and those that are no ONNX files."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from stored_models import Conv, Linear
from torch import nn

from diffq_fx.errors import DiffQError, ExportError
from diffq_fx.export import export_onnx
from diffq_fx.export.onnx.inspection import OnnxInspection, TensorReport, inspect_onnx
from diffq_fx.export.onnx.metadata import ExportMetadata, WeightRecord, to_props

X = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)


def save(path, nodes, initializers=(), *, inputs=(X,), outputs=(Y,), opset=21, props=None, **graph_fields):
    graph = helper.make_graph(nodes, "graph", list(inputs), list(outputs), list(initializers), **graph_fields)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    helper.set_model_props(model, props or {})
    onnx.save(model, path)
    return path


def floats(name, *shape):
    return numpy_helper.from_array(np.ones(shape, np.float32), name)


def levels(name, shape, data_type=TensorProto.INT4, container_bits=4):
    size = -(-int(np.prod(shape)) * container_bits // 8)
    return helper.make_tensor(name, data_type, shape, b"\x11" * size, raw=True)


def matmul(weight="w"):
    return helper.make_node("MatMul", ["x", weight], ["y"])


def by_name(inspection: OnnxInspection) -> dict[str, TensorReport]:
    return {tensor.name: tensor for tensor in inspection.tensors}


def test_a_float_matmul_is_one_float_tensor(tmp_path):
    path = save(tmp_path / "model.onnx", [matmul()], [floats("w", 8, 4)])
    inspection = inspect_onnx(path)
    (weight,) = inspection.tensors
    assert (weight.role, weight.dtype, weight.container_bits, weight.shape) == ("float", "float", 32, (8, 4))
    assert (weight.readers, weight.values, weight.payload_bytes) == (("MatMul",), 32, 128)
    assert weight.learned_bits is None
    assert inspection.of_role("float") == (weight,)
    assert inspection.opsets[""] == 21
    assert inspection.file_bytes == path.stat().st_size
    assert inspection.to_dict()["totals"]["graph_bytes"] + weight.file_bytes == inspection.file_bytes
    assert weight.file_share == weight.file_bytes / inspection.file_bytes
    assert 128 < weight.file_bytes < 160


@pytest.mark.parametrize(
    ("data_type", "name", "bits", "opset"),
    [
        (TensorProto.INT2, "int2", 2, 25),
        (TensorProto.UINT2, "uint2", 2, 25),
        (TensorProto.INT4, "int4", 4, 21),
        (TensorProto.UINT4, "uint4", 4, 21),
        (TensorProto.INT8, "int8", 8, 21),
        (TensorProto.UINT16, "uint16", 16, 21),
    ],
)
def test_dequantized_weights_know_their_container_scales_and_zero_points(tmp_path, data_type, name, bits, opset):
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["w"], axis=0, block_size=4),
        helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]),
        matmul("wt"),
    ]
    tensors = [levels("q", [7, 8], data_type, bits), floats("scale", 2, 8), levels("zero", [2, 8], data_type, bits)]
    inspection = inspect_onnx(save(tmp_path / "model.onnx", nodes, tensors, opset=opset))
    weight, scale, zero_point = inspection.tensors
    assert (weight.role, scale.role, zero_point.role) == ("quantized", "scale", "zero_point")
    assert (weight.dtype, weight.container_bits, weight.values) == (name, bits, 56)
    assert weight.payload_bytes == 56 * bits // 8
    assert (weight.scale_bytes, weight.zero_point_bytes) == (64, 16 * bits // 8)
    assert weight.readers == ("DequantizeLinear > Transpose > MatMul",)
    assert inspection.of_role("float") == ()
    assert inspection.payload_bytes() == weight.payload_bytes + 64 + zero_point.payload_bytes


def test_an_odd_number_of_sub_byte_values_rounds_up_to_bytes(tmp_path):
    node = helper.make_node("DequantizeLinear", ["q", "scale"], ["y"])
    (weight, _) = inspect_onnx(save(tmp_path / "m.onnx", [node], [levels("q", [3, 5]), floats("scale")])).tensors
    assert weight.payload_bytes == 8
    assert weight.readers == ("DequantizeLinear > graph output",)


def test_wasteful_encoding_shows_in_the_file_bytes_and_not_in_the_payload(tmp_path):
    wasteful = helper.make_tensor("q", TensorProto.INT4, [64, 8], [-8] * 512)
    node = helper.make_node("DequantizeLinear", ["q", "scale"], ["y"])
    (weight, _) = inspect_onnx(save(tmp_path / "m.onnx", [node], [wasteful, floats("scale")])).tensors
    assert weight.payload_bytes == 256
    assert weight.file_bytes > 1.5 * 256


def test_rows_that_are_gathered_and_then_dequantized_keep_their_scales(tmp_path):
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch"])
    nodes = [
        helper.make_node("Gather", ["q", "ids"], ["rows"]),
        helper.make_node("Gather", ["scale", "ids"], ["row_scale"]),
        helper.make_node("Cast", ["rows"], ["row_floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["row_floats", "row_scale"], ["embedded"]),
        helper.make_node("Add", ["embedded", "bias"], ["y"]),
    ]
    tensors = [levels("q", [10, 4], TensorProto.INT8, 8), floats("scale", 10, 1), floats("bias", 4)]
    found = by_name(inspect_onnx(save(tmp_path / "m.onnx", nodes, tensors, inputs=[ids])))
    assert found["q"].readers == ("Gather > Mul",)
    assert (found["q"].role, found["q"].scale_bytes) == ("quantized", 40)
    assert (found["scale"].role, found["bias"].role) == ("scale", "float")


def test_cast_sub_mul_is_a_dequantization(tmp_path):
    nodes = [
        helper.make_node("Cast", ["q"], ["qf"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["zero"], ["zf"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["qf", "zf"], ["centred"]),
        helper.make_node("Mul", ["scale", "centred"], ["w"]),
        helper.make_node("Mul", ["w", "gain"], ["w2"]),
        matmul("w2"),
    ]
    tensors = [levels("q", [8, 4]), levels("zero", [4]), floats("scale", 4), floats("gain", 4)]
    found = by_name(inspect_onnx(save(tmp_path / "m.onnx", nodes, tensors)))
    assert [found[name].role for name in ("q", "zero", "scale", "gain")] == [
        "quantized",
        "zero_point",
        "scale",
        "float",
    ]
    assert (found["q"].scale_bytes, found["q"].zero_point_bytes) == (16, 2)
    assert found["q"].readers == ("Cast > Sub > Mul > Mul",)


def test_index_arithmetic_is_not_taken_for_a_dequantization(tmp_path):
    nodes = [
        helper.make_node("Cast", ["positions"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "step"], ["y"]),
    ]
    tensors = [numpy_helper.from_array(np.arange(4), "positions"), floats("step", 1)]
    found = by_name(inspect_onnx(save(tmp_path / "m.onnx", nodes, tensors)))
    assert (found["positions"].role, found["step"].role) == ("other", "float")


def test_a_weight_split_into_columns_and_joined_again_keeps_every_reader(tmp_path):
    nodes = [
        helper.make_node("DequantizeLinear", ["q4", "s4"], ["w4"], axis=1),
        helper.make_node("DequantizeLinear", ["q8", "s8"], ["w8"], axis=1),
        helper.make_node("Concat", ["w4", "w8"], ["w"], axis=1),
        helper.make_node("Gather", ["w", "order"], ["w_ordered"], axis=1),
        matmul("w_ordered"),
    ]
    order = numpy_helper.from_array(np.arange(4), "order")
    tensors = [levels("q4", [8, 2]), floats("s4", 2), levels("q8", [8, 2], TensorProto.INT8, 8), floats("s8", 2), order]
    found = by_name(inspect_onnx(save(tmp_path / "m.onnx", nodes, tensors)))
    assert found["q4"].readers == found["q8"].readers == ("DequantizeLinear > Concat > Gather > MatMul",)
    assert found["order"].readers == ("Gather",)


def test_matmul_nbits_of_others_counts_the_values_inside_its_bytes(tmp_path):
    node = helper.make_node("MatMulNBits", ["x", "q", "scale"], ["y"], domain="com.microsoft", K=40, N=6, bits=4, block_size=32)
    packed = levels("q", [6, 2, 16], TensorProto.UINT8, 8)
    weight, scale = inspect_onnx(save(tmp_path / "m.onnx", [node], [packed, floats("scale", 12)])).tensors
    assert (weight.is_packed, weight.container_bits, weight.values, weight.payload_bytes) == (True, 4, 240, 192)
    assert (weight.role, weight.scale_bytes, scale.role) == ("quantized", 48, "scale")


def test_scales_of_activations_are_scales_without_an_owner(tmp_path):
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["y"]),
    ]
    found = inspect_onnx(save(tmp_path / "m.onnx", nodes, [floats("scale"), levels("zero", [], TensorProto.UINT8, 8)]))
    assert [tensor.role for tensor in found.tensors] == ["scale", "zero_point"]


def test_constants_inner_graphs_functions_sparse_and_unused_tensors_count(tmp_path):
    inner = helper.make_graph(
        [helper.make_node("Add", ["shared", "inside"], ["out"])],
        "branch",
        [],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [floats("inside", 3)],
    )
    condition = helper.make_tensor_value_info("condition", TensorProto.BOOL, [])
    nodes = [
        helper.make_node("Constant", [], ["constant"], value=floats("ignored", 5)),
        helper.make_node("If", ["condition"], ["picked"], name="choice", then_branch=inner, else_branch=inner),
        helper.make_node("Twice", ["picked"], ["z"], domain="local"),
        helper.make_node("Add", ["z", "constant"], ["y"]),
    ]
    sparse = helper.make_sparse_tensor(floats("sparse", 2), helper.make_tensor("places", TensorProto.INT64, [2], [0, 9]), [100])
    path = save(
        tmp_path / "m.onnx",
        nodes,
        [floats("shared", 3), floats("unused", 2)],
        inputs=[condition],
        sparse_initializer=[sparse],
    )
    model = onnx.load(path)
    twice = [
        helper.make_node("Constant", [], ["two"], value=floats("t", 1)),
        helper.make_node("Mul", ["a", "two"], ["b"]),
    ]
    model.functions.append(helper.make_function("local", "Twice", ["a"], ["b"], twice, [helper.make_opsetid("", 21)]))
    onnx.save(model, path)
    found = by_name(inspect_onnx(path))
    assert found["shared"].readers == ("Add",)
    assert found["unused"].readers == ()
    assert found["constant"].readers == ("Add",)
    assert found["choice/then_branch/inside"].readers == ("Add",)
    assert "choice/else_branch/inside" in found
    assert found["Twice/two"].readers == ("Mul",)
    assert (found["sparse"].shape, found["sparse"].values, found["sparse"].payload_bytes) == ((100,), 2, 8 + 16)


def test_text_has_no_width_but_a_size(tmp_path):
    words = helper.make_tensor("words", TensorProto.STRING, [2], [b"abc", b"de"])
    (tensor,) = inspect_onnx(save(tmp_path / "m.onnx", [helper.make_node("Identity", ["words"], ["y"])], [words])).tensors
    assert (tensor.container_bits, tensor.values, tensor.payload_bytes, tensor.role) == (0, 2, 5, "other")


def test_external_data_is_measured_where_it_lies(tmp_path):
    path = save(tmp_path / "model.onnx", [matmul()], [floats("w", 8, 512), floats("b", 8, 512)])
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin")
    inspection = inspect_onnx(path)
    assert inspection.file_bytes == path.stat().st_size + (tmp_path / "weights.bin").stat().st_size
    for tensor in inspection.tensors:
        assert (tensor.external, tensor.payload_bytes) == ("weights.bin", 8 * 512 * 4)
        assert 16384 < tensor.file_bytes < 16384 + 200
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"weights\.bin', which is missing"):
        inspect_onnx(path)


def record(name, bits, containers, initializers):
    return WeightRecord(
        name=name,
        shape=(4, 8),
        axis=0,
        grid="affine",
        bits=bits,
        containers=containers,
        rule="linear",
        initializers=initializers,
    )


def test_files_of_ours_tell_the_learned_bits_also_of_split_weights(tmp_path):
    nodes = [helper.make_node("DequantizeLinear", [f"{name}_q", f"{name}_scale"], [name]) for name in ("whole", "low", "high")]
    tensors = [
        levels("whole_q", [8, 4]),
        levels("low_q", [8, 3]),
        levels("high_q", [8, 1], TensorProto.INT8, 8),
        *(floats(f"{name}_scale") for name in ("whole", "low", "high")),
    ]
    metadata = ExportMetadata(
        layout="onnxruntime",
        weights=(
            record("layer.weight", {2: 8, 3: 24}, {4: 32}, ("whole_q",)),
            record("other.weight", {3: 16, 4: 8, 6: 8}, {4: 24, 8: 8}, ("low_q", "high_q")),
        ),
    )
    inspection = inspect_onnx(save(tmp_path / "m.onnx", nodes, tensors, props=to_props(metadata)))
    found = by_name(inspection)
    assert found["whole_q"].learned_bits == {2: 8, 3: 24}
    assert found["whole_q"].learned_payload_bytes == (16 + 72) // 8
    assert found["low_q"].learned_bits == {3: 16, 4: 8}
    assert found["high_q"].learned_bits == {6: 8}
    assert inspection.to_dict()["totals"]["learned_payload_bytes"] == (16 + 72 + 48 + 32 + 48) // 8
    assert inspection.metadata == metadata


MIXED = torch.tensor([2, 4, 8])[torch.arange(512) % 3][:, None]


@pytest.mark.parametrize(("bits", "grid"), [(4, "affine"), (4, "symmetric"), (8, "affine"), (MIXED, "affine"), (MIXED, "symmetric")])
def test_weights_of_dynamic_products_are_quantized_and_have_their_scales(bits, grid, tmp_path):
    """Their scale is multiplied with that of the activations, behind the integer product."""
    model = Linear(384, 512, bits, grid=grid).eval()
    (weight,) = export_onnx(model, torch.randn(32, 384), tmp_path / "m.onnx", activations="dynamic").weights
    assert weight.rule == "dynamic"
    found = by_name(inspection := inspect_onnx(tmp_path / "m.onnx"))
    parts = [found[name] for name in weight.initializers]
    assert len(parts) == (1 if isinstance(bits, int) else 3)
    assert {part.role for part in parts} == {"quantized"}
    assert all(part.readers == ("DynamicQuantizeMatMul",) for part in parts)
    assert sum(part.scale_bytes for part in parts) == 4 * 512
    assert found["weight.scale"].role == "scale"
    assert [tensor.name for tensor in inspection.of_role("float")] == ["bias"]
    assert inspection.payload_bytes("quantized") == -(-weight.container_payload_bits // 8)


def test_weights_that_are_rounded_anew_have_both_their_scales(tmp_path):
    model = Conv(lambda x, w: nn.functional.conv2d(x, w, groups=32), (32, 1, 3, 3), 8).eval()
    x = torch.randn(2, 32, 9, 9)
    export_onnx(model, x, tmp_path / "m.onnx", activations="int8", calibration=[x])
    found = by_name(inspect_onnx(tmp_path / "m.onnx"))
    assert found["weight.levels"].readers == ("DequantizeLinear > Conv",)
    assert found["weight.levels"].scale_bytes == 2 * 32 * 4
    assert (found["weight.scale"].role, found["weight.stretch"].role) == ("scale", "scale")


def test_a_product_of_others_has_its_scale_too(tmp_path):
    """As quantize_dynamic of onnxruntime writes it; a float that is multiplied with activations alone is none."""
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
        helper.make_node("MatMulInteger", ["xq", "q", "xz"], ["product"]),
        helper.make_node("Cast", ["product"], ["in_float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["xs", "q_scale"], ["scale"]),
        helper.make_node("Mul", ["in_float", "scale"], ["scaled"]),
        helper.make_node("Mul", ["scaled", "gain"], ["y"]),
    ]
    tensors = [levels("q", [8, 4], TensorProto.INT8, 8), floats("q_scale", 4), floats("gain", 4)]
    found = by_name(inspect_onnx(save(tmp_path / "m.onnx", nodes, tensors)))
    assert (found["q"].role, found["q_scale"].role, found["gain"].role) == ("quantized", "scale", "float")
    assert found["q"].readers == ("MatMulInteger",)


def test_a_newer_schema_is_refused(tmp_path):
    path = save(tmp_path / "m.onnx", [matmul()], [floats("w", 8, 4)], props={"diffq_fx.schema": "999"})
    with pytest.raises(ExportError, match="schema 999"):
        inspect_onnx(path)


def test_the_report_is_json(tmp_path):
    inspection = inspect_onnx(save(tmp_path / "m.onnx", [matmul()], [floats("w", 8, 4)]))
    entries = json.loads(json.dumps(inspection.to_dict()))
    assert entries["tensors"][0]["payload_bytes"] == 128
    assert entries["totals"]["float_payload_bytes"] == 128
    assert entries["totals"]["float_tensors"] == ["w"]


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    path = save(tmp_path / "model.onnx", [matmul()], [floats("w", 8, 4)])
    content = path.read_bytes()
    last_opset = content.rindex(b"com.microsoft")  # the file ends with this entry and is whole without it
    for length in range(last_opset - 10):
        path.write_bytes(content[:length])
        with pytest.raises(DiffQError, match="is not an ONNX file, or was cut short" if length else "is empty"):
            inspect_onnx(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty: it has 0 bytes; an ONNX file is wanted"),
        (b"garbage", "is not an ONNX file, or was cut short"),
        (b"\x00" * 64, "is not an ONNX file, or was cut short"),
        (b"{}", "is not an ONNX file, or was cut short"),
        (b"PK\x03\x04 a zip file", "is a zip archive that was cut short"),
    ],
)
def test_garbage_is_refused(tmp_path, content, says):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(DiffQError, match=says):
        inspect_onnx(tmp_path / "model.onnx")


def test_a_tensor_with_too_few_bytes_is_refused(tmp_path):
    damaged = helper.make_tensor("w", TensorProto.FLOAT, [8, 4], b"\x00" * 128, raw=True)
    damaged.raw_data = b"\x00" * 100
    path = save(tmp_path / "model.onnx", [matmul()], [damaged])
    with pytest.raises(DiffQError, match=r"'w' of shape \[8, 4\] and type float holds 100 bytes instead of 128"):
        inspect_onnx(path)
