"""TorchAO at both ends: marking by its quantize_, and its integer tensors."""

import shutil

import pytest
import torch
from torch import nn

pytest.importorskip("torchao")

from torchao.quantization import FqnToConfig, IntxUnpackedToInt8Tensor, quantize_

from diffq_fx import ConversionError, DiffQConfig, PreparationError, bits_report, convert, functional, prepare
from diffq_fx.integrations.torchao import PrepareConfig, TorchAOWeight, prepare_marked, to_torchao
from diffq_fx.methods import LC, LSQ, STE, ProductQuantization, QuantNoise
from diffq_fx.storage import IntegerWeight
from diffq_fx.weights import WeightSpec


class Net(nn.Module):
    """Embedding tied to the head, a convolution, linear layers, a GRU."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(24, 16)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.mix = nn.Linear(64, 16)
        self.rnn = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 24)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        y = torch.relu(self.conv(x.unsqueeze(1))).permute(0, 2, 1, 3).flatten(2)
        return self.head(self.rnn(self.mix(y))[0])


IDS = torch.randint(24, (2, 5), generator=torch.Generator().manual_seed(0))
X = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))


# Way in


def test_quantize_marks_and_prepare_marked_prepares_what_is_marked():
    net = Net()
    quantize_(net, PrepareConfig(LSQ(bits=4)))  # torchao's default filter: linear layers
    model = prepare_marked(net, IDS)
    by_name = {q.spec.names: type(q).__name__ for q in model.compression.quantizers}
    assert by_name == {("embed.weight", "head.weight"): "LSQWeight", ("mix.weight",): "LSQWeight"}, "tied weights stay tied"
    assert not any("_diffq_fx_method" in vars(m) for m in [*net.modules(), *model.modules()])
    model(IDS).sum().backward()
    assert torch.equal(convert(model)(IDS), model.eval()(IDS))


def test_filters_and_several_methods():
    net = Net()
    quantize_(net, PrepareConfig(STE(bits=8)), lambda module, name: isinstance(module, nn.Embedding))
    quantize_(net, PrepareConfig(QuantNoise(bits=4)), lambda module, name: isinstance(module, nn.Conv2d))
    model = prepare_marked(net, IDS)
    assert {q.spec.name: type(q).__name__ for q in model.compression.quantizers} == {
        "embed.weight": "STEWeight",
        "conv.weight": "QuantNoiseWeight",
    }


def test_fqn_to_config():
    net = Net()
    quantize_(net, FqnToConfig({"mix": PrepareConfig(LSQ(bits=2)), "rnn": PrepareConfig(STE())}), filter_fn=None)
    model = prepare_marked(net, IDS)
    assert {q.spec.name for q in model.compression.quantizers} == {"mix.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0"}


def test_a_size_target_is_for_the_whole_model():
    net = Net()
    quantize_(net, PrepareConfig(DiffQConfig(target_bits=6)))
    model = prepare_marked(net, IDS)
    assert model.compression.budget_bits() == 6 * (24 * 16 + 64 * 16)


def test_nothing_marked_is_an_error():
    net = Net()
    quantize_(net, PrepareConfig(STE()), lambda module, name: False)
    with pytest.raises(PreparationError, match="prepare_marked: no module is marked"):
        prepare_marked(net, IDS)


def test_a_marked_module_without_a_weight_is_named_and_keeps_its_mark():
    net = nn.Sequential(nn.Linear(32, 8), nn.LayerNorm(8))
    quantize_(net, PrepareConfig(STE()), lambda module, name: name == "1")
    for _ in range(2):
        with pytest.raises(PreparationError, match=r"1\.weight.*1-d"):
            prepare_marked(net, X)


def test_what_is_no_method():
    with pytest.raises(TypeError, match="expected a method of diffq_fx.methods"):
        PrepareConfig(STE)


# Way out


METHODS = {
    "STE channel": STE(bits=4),
    "STE tensor": STE(bits=8, group_size="tensor"),
    "STE blocks": STE(bits=3, group_size=8),
    "STE float grid": STE(bits=5, grid="float"),
    "STE 1 bit": STE(bits=1),
    "STE half": STE(bits=2, grid="half"),
    "LSQ": LSQ(bits=2),
    "LSQ blocks": LSQ(bits=4, group_size=8),
    "binary": LC(codebook="scaled_binary"),
    "ternary": LC(codebook="scaled_ternary"),
}


@pytest.mark.parametrize("scope", ["model", "module"])
@pytest.mark.parametrize("name", METHODS)
def test_torchao_computes_the_same(name, scope):
    converted = convert(prepare(Net(), IDS, METHODS[name], scope=scope))
    before = converted(IDS)
    result = to_torchao(converted)
    assert torch.equal(converted(IDS), before), "the converted model is not changed"
    torch.testing.assert_close(result.model(IDS), before, rtol=1e-4, atol=1e-5)
    expected = {"embed.weight", "conv.weight", "mix.weight"}
    if "blocks" in name:
        expected.remove("conv.weight")
        assert "torchao's blocks lie along one axis of a matrix" in result.kept["conv.weight"]
    assert set(result.mapped) == expected
    assert "read by GRU" in result.kept["rnn.weight_ih_l0"] or "own code" in result.kept["rnn.weight_ih_l0"]
    tensors = {id(p): p for p in result.model.parameters() if isinstance(p, IntxUnpackedToInt8Tensor)}
    assert len(tensors) == len(expected), "a tied weight is one tensor"
    assert bits_report(result.model).packed_size == bits_report(converted).packed_size


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("group", ["channel", "tensor", 8])
def test_half_integer_zero_points_are_float_ones(bits, group):
    weight = nn.Linear(32, 16).weight.detach()
    spec = WeightSpec(name="w", shape=(16, 32), axis=0, group_size=group, range_size=group, grid="half", consumer="linear")
    widths = torch.full(spec.bits_layout.shape, bits)
    params = functional.quant_params(*functional.weight_range(weight, spec.range_layout, "half"), widths, "half")
    params = params._replace(zero_point=params.zero_point.floor() + 0.5)
    stored = IntegerWeight(spec, functional.quantize(weight, params, widths, spec.scale_layout), params, widths)
    for whole in (False, True):
        if whole:
            stored.zero_point = stored.zero_point.floor()
        tensor = TorchAOWeight(stored, stored).weight
        assert tensor.zero_point.dtype == (torch.int8 if whole else torch.float32)
        assert torch.equal(tensor.dequantize(), stored())


def test_learned_bits_of_diffq():
    net = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))
    model = prepare(net, X, DiffQConfig(target_bits=5))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    converted = convert(model)
    assert len({int(b) for q in model.compression.quantizers for b in q.width.flatten()}) > 1
    torch.testing.assert_close(to_torchao(converted).model(X), converted(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_inference(dtype, backend):
    if backend == "inductor" and shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)).to(dtype)
    x = X.to(dtype)
    mapping = {"0": STE(bits=8, group_size="tensor"), "2": STE(bits=4), "4": LSQ(bits=3, group_size=8)}
    converted = convert(prepare(net, x, mapping))
    result = to_torchao(converted)
    assert result.mapped == ("0.weight", "2.weight", "4.weight")
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    with torch.no_grad():
        compiled = torch.compile(result.model, backend=backend, fullgraph=True)
        for model in (result.model, compiled):
            torch.testing.assert_close(model(x), converted(x), rtol=tolerance, atol=tolerance)
    torch._dynamo.reset()


def test_a_wrong_scale_would_be_seen():
    converted = convert(prepare(nn.Linear(32, 8), X, STE(bits=4)))
    result = to_torchao(converted)
    with torch.no_grad():
        result.model.weight_quantized.weight.scale.mul_(1.01)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(result.model(X), converted(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (STE(bits=12), "12 bits; torchao's integer tensor has 1 to 8"),
        (STE(bits=4, group_size=5), "blocks of 5 do not divide its 32 inputs"),
        (LC(entries=4), "a codebook that is not integers times one scale"),
        (ProductQuantization(entries=4), "a codebook that is not integers times one scale"),
    ],
    ids=str,
)
def test_what_cannot_be_mapped_is_named(method, reason):
    net = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 8))
    converted = convert(prepare(net, X, {"0": method, "1": STE()}))
    result = to_torchao(converted)
    assert result.mapped == ("1.weight",)
    assert reason in result.kept["0.weight"]
    torch.testing.assert_close(result.model(X), converted(X), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConversionError, match="torchao has a form for none of the weights"):
        to_torchao(convert(prepare(net[:1], X, method)))


def test_a_model_that_is_not_converted():
    with pytest.raises(ConversionError, match="the Linear holds no stored weight"):
        to_torchao(nn.Linear(4, 4))
