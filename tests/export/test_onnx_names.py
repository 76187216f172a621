"""What inputs, outputs and their sizes are called: by default, and by the user."""

from collections import namedtuple

import onnx
import pytest
import torch
from stored_models import Linear, assert_same
from torch import nn

from diffq_fx import ExportError
from diffq_fx.export import export_onnx
from diffq_fx.export.onnx.sessions import open_session

Pair = namedtuple("Pair", ["mean", "log_variance"])


class Returns(nn.Module):
    """``forward(tokens)`` that returns what a function makes of a linear layer's result and its input."""

    def __init__(self, function):
        super().__init__()
        self.layer, self.function = Linear(16, 16, 4), function

    def forward(self, tokens):
        return self.function(self.layer(tokens), tokens)


def names_in(path):
    graph = onnx.load(path).graph
    return [value.name for value in graph.input], [value.name for value in graph.output]


@pytest.mark.parametrize(
    ("function", "outputs"),
    [
        (lambda y, x: y, ["output"]),
        (lambda y, x: (y, y.relu()), ["output_0", "output_1"]),
        (lambda y, x: Pair(y, (y, y.exp())), ["mean", "log_variance_0", "log_variance_1"]),
        (lambda y, x: {"logits": y, "tokens": x}, ["logits", "tokens_out"]),
        (lambda y, x: [{"y": y}, x, x, y], ["y", "output_1", "output_2", "output_3"]),
    ],
)
def test_default_names(function, outputs, path):
    model, x = Returns(function).eval(), torch.randn(3, 5, 16)
    export_onnx(model, torch.randn(2, 5, 16), path)
    assert names_in(path) == (["tokens"], outputs)
    found = open_session(path, 1, {"session.qdq_matmulnbits_accuracy_level": "1"}).run(outputs, {"tokens": x.numpy()})
    for ours, theirs in zip(found, torch.utils._pytree.tree_leaves(model(x)), strict=True):
        assert_same(torch.from_numpy(ours), theirs)


def test_names_of_the_user(path):
    """The names of nodes and sizes make way: "mul" is a value in the middle of this graph."""
    model = Returns(lambda y, x: (y * 2, (y * 2).exp() + 1)).eval()
    example = torch.randn(2, 5, 16)
    export_onnx(model, example, path, input_names=["mul"], output_names={"output_1": "exp"})
    assert names_in(path) == (["mul"], ["output_0", "exp"])
    (given,) = onnx.load(path).graph.input
    assert [size.dim_param or size.dim_value for size in given.type.tensor_type.shape.dim] == ["batch", "mul_1", 16]
    result = export_onnx(model, example, path, input_names={"tokens": "frames"}, output_names=["a", "b"])
    assert names_in(path) == (["frames"], ["a", "b"])
    assert dict(result.sizes) == {"batch": 2, "frames_1": 5}


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"input_names": "x"}, TypeError, "input_names must be a list of names, or a dict from the default name to another, got 'x'"),
        ({"output_names": [1, 2]}, TypeError, "output_names must be a list of names"),
        ({"input_names": ["a", "b"]}, ValueError, r"input_names has 2 names \['a', 'b'\] for 1 inputs"),
        ({"output_names": ["a", "a"]}, ValueError, "output_names must be names that differ, got 'a'"),
        ({"output_names": ["a", ""]}, ValueError, "must be names that differ, got ''"),
        ({"output_names": ["a"]}, ExportError, r"output_names has 1 names \['a'\], the model 2: \['output_0', 'output_1'\]"),
        ({"output_names": {"y": "a"}}, ExportError, "output_names renames 'y', which there is not: the default names are"),
        ({"input_names": ["a"], "output_names": ["a", "b"]}, ExportError, "the name 'a' is that of two inputs, outputs or parameters"),
        ({"output_names": ["a", "layer.bias"]}, ExportError, "the name 'layer.bias' is that of two"),
    ],
)
def test_names_that_cannot_be(options, error, says, old_file):
    with pytest.raises(error, match=says):
        export_onnx(Returns(lambda y, x: (y, y.exp())).eval(), torch.randn(2, 16), old_file, **options)
