"""Layout "qdq": one plain DequantizeLinear per weight."""

import onnx
import pytest
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator
from stored_models import Bare, Conv, Linear, Parallel, Tied, assert_same, levels_in, run_exact, store
from torch import nn
from torch.nn import functional as F

from diffq_fx.export import export_onnx


def dequantize_nodes(path):
    nodes = onnx.load(path).graph.node
    return [{a.name: helper.get_attribute_value(a) for a in node.attribute} for node in nodes if node.op_type == "DequantizeLinear"]


def test_linear_weights_are_stored_transposed(path):
    groups = ("channel", "tensor", 8, 7)
    cases = [(bits, group, grid) for bits in (4, 16) for group in groups for grid in ("affine", "symmetric")]
    branches = [Linear(24, 12, b, group=g, ranges=g, grid=grid, name=f"w{i}") for i, (b, g, grid) in enumerate(cases)]
    model = Parallel(*branches).eval()
    result = export_onnx(model, torch.randn(1, 24), path, layout="qdq")
    assert {shape for _, shape in levels_in(path).values()} == {(24, 12)}
    ops = {node.op_type for node in onnx.load(path).graph.node}
    assert ops == {"DequantizeLinear", "MatMul", "Add"}
    fresh = torch.randn(5, 24)
    assert_same(run_exact(path, fresh), model(fresh))
    for attributes, (_, group, _) in zip(dequantize_nodes(path), cases, strict=True):
        if group == "channel":
            assert attributes["axis"] == 1
            assert "block_size" not in attributes
        elif group != "tensor":
            assert (attributes["axis"], attributes["block_size"]) == (0, group)
    assert all(record.rule == "qdq" and record.reason is None for record in result.weights)


def test_a_file_for_other_runtimes_runs_in_the_reference_evaluator(path):
    """A runtime that is not onnxruntime: onnx's own."""
    model = Linear(24, 12, 4).eval()
    export_onnx(model, torch.randn(1, 24), path, layout="qdq")
    fresh = torch.randn(5, 24)
    (found,) = ReferenceEvaluator(str(path)).run(None, {"x": fresh.numpy()})
    assert_same(torch.from_numpy(found), model(fresh))


def test_other_readers(path):
    groups = ("channel", "tensor", 8, 7)
    branches = [Conv(F.conv1d, (6, 10, 3), 3, group=g, ranges=g, name=f"c{g}") for g in groups]
    branches += [Conv(F.conv_transpose1d, (10, 5, 3), 3, axis=1, group=g, ranges=g, name=f"t{g}") for g in groups]
    model = Parallel(*branches).eval()
    export_onnx(model, torch.randn(1, 10, 9), path, layout="qdq")
    fresh = torch.randn(5, 10, 9)
    assert_same(run_exact(path, fresh), model(fresh))
    assert len(dequantize_nodes(path)) == len(branches)


def test_tied_table_and_bare_matmul(path):
    tied = Tied(30, 16, 5).eval()
    export_onnx(tied, torch.randint(30, (1, 3)), path, layout="qdq")
    assert list(levels_in(path).values()) == [("UINT8", (16, 30))]
    ids = torch.randint(30, (4, 3))
    assert_same(run_exact(path, ids), tied(ids))
    for axis in (0, 1):
        bare = Bare(24, 12, 4, axis=axis).eval()
        export_onnx(bare, torch.randn(1, 24), path, layout="qdq")
        assert list(levels_in(path).values()) == [("UINT4", (24, 12))]
        fresh = torch.randn(5, 24)
        assert_same(run_exact(path, fresh), bare(fresh))


def test_mixed_widths_take_the_widest_container(path):
    bits = torch.tensor([2, 4, 8])[torch.randint(3, (64, 1))]
    result = export_onnx(Linear(64, 64, bits).eval(), torch.randn(1, 64), path, layout="qdq")
    assert result.weights[0].containers == {8: 64 * 64}
    assert result.payload_bytes < result.container_payload_bytes


@pytest.mark.parametrize(("outputs", "container"), [(64, 2), (62, 4)])
def test_two_bits_where_onnxruntime_would_compute_a_wrong_product(outputs, container, path):
    model = Linear(64, outputs, 2).eval()
    result = export_onnx(model, torch.randn(1, 64), path, layout="qdq")
    assert result.weights[0].containers == {container: 64 * outputs}
    assert bool(result.weights[0].remarks) == (container == 4)
    fresh = torch.randn(5, 64)
    assert_same(run_exact(path, fresh), model(fresh))


class Read(nn.Module):
    """A weight of 2 bits under any function."""

    def __init__(self, function, shape, **kwargs):
        super().__init__()
        self.weight, self.function = store(torch.randn(shape), 2, **kwargs), function

    def forward(self, x):
        return self.function(x, self.weight())


IDS = torch.tensor([[0, 9, 3]])


@pytest.mark.parametrize(
    ("model", "example", "container"),
    [
        (Tied(32, 16, 2), IDS, 4),
        (Tied(32, 16, 2, group="tensor", ranges="tensor"), IDS, 4),
        (Tied(32, 16, 2, group=8, ranges=8), IDS, 2),  # nothing moves through blocks
        (Read(lambda i, w: F.embedding(i, w), (32, 16)), IDS, 2),
        (Read(lambda i, w: F.embedding(i, w.t()), (16, 32)), IDS, 4),
        (Read(lambda x, w: (x @ w) @ w.t(), (32, 32), axis=1), torch.randn(2, 32), 4),
        (Read(lambda x, w: (x @ w.t(), w), (16, 32)), torch.randn(2, 32), 4),
        (Read(lambda x, w: F.conv1d(x, w.permute(1, 0, 2)), (16, 32, 3)), torch.randn(2, 16, 9), 4),
        (Read(lambda x, w: tuple(x @ part.t() for part in w.chunk(3)), (96, 32)), torch.randn(2, 32), 2),
    ],
)
def test_two_bits_are_held_in_four_where_onnxruntime_would_transpose_them(model, example, container, path):
    """It moves a Transpose in front of the DequantizeLinear, and then cannot load the file: it computes no constants of 2 bits."""
    (record,) = export_onnx(model.eval(), example, path, layout="qdq").weights
    assert list(record.containers) == [container]
    assert bool(record.remarks) == (container == 4)
    assert_same(run_exact(path, example), model(example))
