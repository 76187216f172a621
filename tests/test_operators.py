"""A weight in training is one registered operator forward and one backward: in a graph, and with the values of the eager functions."""

import pytest
import torch

from diffq_fx import DiffQConfig
from diffq_fx.weights import WeightSpec

SETTINGS = {
    "channels": {},
    "groups": {"group_size": 8},
    "short last groups": {"group_size": 9, "noise": "gaussian", "grid": "symmetric"},
    "half": {"grid": "half", "range_per": "tensor"},
    "own ranges": {"grid": "float", "group_size": 8, "range_per": "group"},
    "blocks in a tensor": {"group_size": "tensor", "range_per": 9, "scale_dtype": "float16"},
    "extreme ranges": {"clip_ranges": False, "group_size": "tensor"},
}
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


pytestmark = pytest.mark.usefixtures("backend")


def quantizer_and_weight(settings, axis=0, dtype=torch.float32):
    config = DiffQConfig(**settings)
    group, ranges, grid = config.layout
    weight = torch.randn(24, 32).to(dtype)
    spec = WeightSpec(name="w", shape=(24, 32), axis=axis, group_size=group, range_size=ranges, grid=grid, scale_dtype=config.scale_type)
    quantizer = config.make_quantizer(spec, weight).train()
    with torch.no_grad():
        quantizer.logits.add_(0.1 * torch.randn_like(quantizer.logits))
        if quantizer.clip is not None:
            quantizer.clip.normal_(std=0.01)
            quantizer.range_low.fill_(-1.2)
            quantizer.range_high.fill_(1.2)
    return quantizer, weight.requires_grad_()


def tensors_of_rounding(quantizer, weight):
    ends = quantizer.range_low, quantizer.range_high
    if quantizer.clip is None:
        ends = quantizer.range_of(weight, quantizer.width)
    return weight, quantizer.logits, quantizer.clip, *ends, quantizer.width


def compare(direct, registered, inputs):
    upstream = torch.randn(24, 32).to(inputs[0].dtype)
    found = []
    for compute in (direct, registered):
        torch.manual_seed(1)
        result = compute()
        found.append([result, *torch.autograd.grad(result, inputs, upstream)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("axis", "dtype"), [(0, torch.float32), (1, torch.float32), (0, torch.bfloat16), (0, torch.float64)])
def test_the_operator_of_the_noise(name, axis, dtype):
    quantizer, weight = quantizer_and_weight(SETTINGS[name], axis, dtype)
    arguments = (weight, quantizer.logits, quantizer.clip, *quantizer.noise.arguments())
    inputs = [each for each in arguments[:3] if each is not None]
    operator = torch.ops.diffq_fx.add_noise.default
    compare(lambda: quantizer.noise(*arguments[:3]), lambda: operator(*arguments)[0], inputs)
    torch.library.opcheck(operator, arguments, test_utils=CHECKS)
    kept = [weight.detach(), quantizer.logits.detach(), *operator(*arguments)[1:]]
    torch.library.opcheck(torch.ops.diffq_fx.slope_of_noise.default, (*kept, *arguments[3:]), test_utils=CHECKS)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("axis", "dtype"), [(0, torch.float32), (1, torch.float32), (0, torch.bfloat16), (0, torch.float64)])
def test_the_operator_of_the_rounding(name, axis, dtype):
    quantizer, weight = quantizer_and_weight(SETTINGS[name], axis, dtype)
    settings = quantizer.round_in_range.arguments()
    tensors = tensors_of_rounding(quantizer, weight)
    operator = torch.ops.diffq_fx.round_in_range.default
    inputs = [each for each in tensors[:3] if each is not None]
    compare(lambda: quantizer.round_in_range(*tensors), lambda: operator(*tensors, *settings), inputs)
    torch.library.opcheck(operator, (*tensors, *settings), test_utils=CHECKS)
    if quantizer.clip is not None:
        rounded = operator(*tensors, *settings).detach()
        kept = (torch.randn_like(rounded), weight.detach(), rounded, quantizer.clip.detach(), *tensors[3:])
        torch.library.opcheck(torch.ops.diffq_fx.slope_of_clip.default, (*kept, *settings), test_utils=CHECKS)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("phase", ["noise", "rounding"])
def test_a_compiler_sees_one_node_of_a_weight(name, phase):
    quantizer, weight = quantizer_and_weight(SETTINGS[name])
    compute = quantizer.noise if phase == "noise" else quantizer.round_in_range
    tensors = (weight, quantizer.logits, quantizer.clip) if phase == "noise" else tensors_of_rounding(quantizer, weight)
    graphs = []

    def backend(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    torch._dynamo.reset()
    torch.compile(lambda: compute(*tensors), backend=backend, fullgraph=True)()
    ((operator, *others),) = graphs
    assert operator == {"noise": "diffq_fx.add_noise", "rounding": "diffq_fx.round_in_range"}[phase]
    assert set(others) <= {"<built-in function getitem>"}


@pytest.mark.parametrize("noise", ["uniform", "gaussian"])
def test_the_first_call_of_a_compiled_function_draws_what_eager_draws(noise):
    quantizer, weight = quantizer_and_weight({"noise": noise})
    torch._dynamo.reset()
    compiled, draws = torch.compile(lambda: quantizer.noise(weight, quantizer.logits), backend="aot_eager", fullgraph=True), []
    for draw in (lambda: quantizer.noise(weight, quantizer.logits), compiled, compiled):
        torch.manual_seed(1)
        draws.append(draw())
    assert torch.allclose(draws[0], draws[1], rtol=1e-5, atol=1e-6)
    assert torch.equal(draws[1], draws[2])
