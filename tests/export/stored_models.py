"""Converted models made by hand, and what onnxruntime makes of their files."""

import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import nn

from diffq_fx import functional
from diffq_fx.functional.groups import to_rows
from diffq_fx.storage import IntegerWeight
from diffq_fx.weights import WeightSpec


def store(weight, bits, *, name="weight", axis=0, group="channel", ranges="channel", grid="affine"):
    """Round a weight to ``bits`` (a number, or one per group) and keep the integers."""
    weight = weight.detach()
    spec = WeightSpec(name=name, shape=tuple(weight.shape), axis=axis, dtype=weight.dtype, group_size=group, range_size=ranges, grid=grid)
    rows = to_rows(weight.float(), axis)
    bits = torch.as_tensor(bits).expand(spec.bits_layout.shape).contiguous()
    low, high = functional.grid_range(*spec.range_layout.aminmax(rows), grid)
    params = functional.quant_params(low, high, bits, grid)
    return IntegerWeight(spec, functional.quantize(rows, params, bits, spec.scale_layout), params, bits)


class Linear(nn.Module):
    def __init__(self, inputs, outputs, bits, *, bias=True, name="weight", **kwargs):
        super().__init__()
        layer = nn.Linear(inputs, outputs)
        self.weight = store(layer.weight, bits, name=name, **kwargs)
        self.bias = layer.bias if bias else None

    def forward(self, x):
        return nn.functional.linear(x, self.weight(), self.bias)


class Bare(nn.Module):
    """``x @ weight``."""

    def __init__(self, inputs, outputs, bits, **kwargs):
        super().__init__()
        self.weight = store(torch.randn(inputs, outputs), bits, **{"axis": 1, **kwargs})

    def forward(self, x):
        return x @ self.weight()


class Conv(nn.Module):
    def __init__(self, function, shape, bits, **kwargs):
        super().__init__()
        self.function = function
        self.weight = store(torch.randn(shape), bits, **kwargs)

    def forward(self, x):
        return self.function(x, self.weight())


class Tied(nn.Module):
    """An embedding whose table is the output head too."""

    def __init__(self, words, size, bits, **kwargs):
        super().__init__()
        self.table = store(torch.randn(words, size), bits, **kwargs)

    def forward(self, ids):
        return nn.functional.linear(nn.functional.embedding(ids, self.table()), self.table())


class Swapped(nn.Module):
    """A whole module called with its weights swapped in, as RNNs and attention are."""

    def __init__(self, module, bits, **call):
        super().__init__()
        self.module = module
        self.call = call
        names = [name for name, parameter in module.named_parameters() if parameter.dim() > 1]
        self.names = names
        self.stored = nn.ModuleList(store(module.get_parameter(name), bits, name=name) for name in names)

    def forward(self, *inputs):
        weights = {name: stored() for name, stored in zip(self.names, self.stored, strict=True)}
        return torch.func.functional_call(self.module, weights, inputs, self.call)[0]


class Parallel(nn.Module):
    """Several modules on the same inputs: one export tests them all, each by an output of its own."""

    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, *inputs):
        return tuple(branch(*inputs) for branch in self.branches)


_OPSET = 'ir_version: 10, opset_import: ["" : 21, "diffq_fx" : 1]'


def graph_of(signature, nodes):
    """A graph whose values all have a shape."""
    text = f"<{_OPSET}> agraph {signature} {{ {nodes} }}"
    return ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text), data_prop=True)).graph


def levels_in(path):
    """Name -> (type, shape) of the integer initializers of a file that hold levels."""
    graph = onnx.load(path).graph
    return {
        tensor.name: (onnx.TensorProto.DataType.Name(tensor.data_type), tuple(tensor.dims))
        for tensor in graph.initializer
        if ".levels" in tensor.name and tensor.data_type != onnx.TensorProto.INT64
    }


def optimized(path, tmp_path):
    """The graph that is left when onnxruntime has optimized a file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return onnx.load(options.optimized_model_filepath).graph


def optimized_ops(path, tmp_path):
    """Its operators."""
    return [node.op_type for node in optimized(path, tmp_path).node]


def run_exact(path, *inputs):
    """The outputs of a file with activations kept in float; the output itself if there is one."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {entry.name: value.numpy() for entry, value in zip(session.get_inputs(), inputs, strict=True)}
    outputs = [torch.from_numpy(output) for output in session.run(None, feeds)]
    return outputs if len(outputs) > 1 else outputs[0]


def assert_same(found, expected, tolerance=1e-4):
    """Max-abs bound relative to the largest value; nothing weaker sees a scale that is wrong by 1 %."""
    if isinstance(expected, tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other, tolerance)
        return
    expected = expected.detach()
    assert found.shape == expected.shape
    error = float((found - expected).abs().max()) / float(expected.abs().max())
    assert error <= tolerance, f"relative max-abs error {error:.3g}"
