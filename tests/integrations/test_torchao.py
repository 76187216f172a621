"""TorchAO at both ends: training by its quantize_, and its integer tensors."""

import shutil

import pytest
import torch
from torch import nn

pytest.importorskip("torchao")

from torchao.quantization import FqnToConfig, IntxUnpackedToInt8Tensor, IntxWeightOnlyConfig, qat, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup

from diffq_fx import ConversionError, DiffQConfig, DiffQWarning, PreparationError, bits_report, convert, functional, prepare
from diffq_fx.integrations.torchao import QATConfig, TorchAOWeight, to_torchao, whole_model
from diffq_fx.methods import LC, LSQ, STE, ProductQuantization
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


def linears():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))


def train(model, x, steps=3):
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(x).square().mean().backward()
        optimizer.step()
    return model.eval()


def test_two_steps_around_the_training_of_a_whole_model():
    net = Net()
    mapping = {"mix.weight": STE(bits=8), "*": DiffQConfig(target_bits=6)}
    with pytest.warns(DiffQWarning, match=r"will stay as diffq_fx stores them\. rnn\.weight_ih_l0: read by"):
        quantize_(net, QATConfig(mapping, IDS, step="prepare"), whole_model)
    assert {q.spec.names for q in net.compression.learned} >= {("embed.weight", "head.weight")}, "tied weights stay tied"
    before = train(net, IDS)(IDS).detach()
    with pytest.warns(DiffQWarning, match=r"stay as diffq_fx stores them.*rnn\.weight_ih_l0: read by"):
        quantize_(net, QATConfig(step="convert"), whole_model)
    torch.testing.assert_close(net(IDS), before, rtol=1e-4, atol=1e-5)
    assert isinstance(net.mix.weight, IntxUnpackedToInt8Tensor)
    assert net.head.weight is net.embed.weight
    assert [type(module) for module in (net, net.mix, net.conv)] == [Net, nn.Linear, nn.Conv2d]


def test_torchaos_own_filter_prepares_each_linear_layer_by_itself():
    net = linears()
    quantize_(net, QATConfig(DiffQConfig(target_bits=5), step="prepare"))
    assert [net[i].compression.budget_bits() for i in (0, 2)] == [5 * 32 * 32, 5 * 32 * 8]
    before = train(net, X)(X).detach()
    quantize_(net, QATConfig(step="convert"))
    torch.testing.assert_close(net(X), before, rtol=1e-4, atol=1e-5)
    assert type(net[0]) is nn.Linear
    assert net.state_dict().keys() == linears().state_dict().keys()


def test_fqn_to_config_prepares_parts():
    net = linears()
    quantize_(net, FqnToConfig({"0": QATConfig(LSQ(bits=2)), "2": QATConfig(STE())}), filter_fn=None)
    assert [type(net[i].compression.quantizers[0]).__name__ for i in (0, 2)] == ["LSQWeight", "FixedBitsQuantizer"]


def test_a_convolution_needs_an_example():
    net = Net()
    with pytest.raises(PreparationError, match="a Conv2d needs example_inputs"):
        quantize_(net, QATConfig(STE()), lambda module, name: name == "conv")
    assert type(net.conv) is nn.Conv2d


def test_convert_of_what_was_not_prepared_with_this_filter():
    net = linears()
    with pytest.raises(ConversionError, match="never prepared"):
        quantize_(net, QATConfig(step="convert"))
    quantize_(net, QATConfig(STE(), X), whole_model)
    with pytest.raises(ConversionError, match="is a part of a prepared model"):
        quantize_(net, QATConfig(step="convert"))
    quantize_(net, QATConfig(step="convert"), whole_model)


def test_settings_that_are_none():
    with pytest.raises(TypeError, match="QATConfig"):
        QATConfig(STE)
    with pytest.raises(TypeError, match="QATConfig"):
        QATConfig(step="prepare")
    with pytest.raises(ValueError, match='step must be "prepare" or "convert"'):
        QATConfig(STE(), step="train")
    with pytest.raises(ValueError, match='activations must be "float" or "int8"'):
        QATConfig(STE(), activations="int4")


@pytest.mark.parametrize("scope", ["model", "module"])
@pytest.mark.parametrize("state", ["prepared", "converted"])
def test_torchaos_own_configs_on_our_models_are_refused_in_a_sentence(scope, state):
    model = prepare(linears(), X, STE(bits=4), scope=scope)
    model = convert(model) if state == "converted" else model
    expected = model.eval()(X)
    with pytest.raises(PreparationError, match=f"its weight is {state} by diffq_fx and cannot become a IntxUnpackedToInt8Tensor"):
        quantize_(model, IntxWeightOnlyConfig(torch.int4, PerAxis(0)))
    assert torch.equal(model(X), expected)
    if state == "prepared":
        model[0].weight = nn.Parameter(model[0].weight.detach().clone())  # a weight of the same kind is no quantizer's


@pytest.mark.parametrize("scope", ["model", "module"])
@pytest.mark.parametrize("state", ["prepared", "converted"])
@pytest.mark.parametrize("step", ["prepare", "convert"])
def test_torchaos_own_fake_quantization_on_our_models_is_refused_before_anything_is_replaced(step, scope, state):
    net = nn.Sequential(nn.Embedding(16, 32), *linears())
    ids = torch.zeros(2, 3, dtype=torch.int64) + 5
    model = prepare(net, ids, STE(bits=4), scope=scope)
    model = convert(model) if state == "converted" else model
    expected, layers = model.eval()(ids), [*model.modules()]
    for kind, name in ((nn.Linear, "Linear"), (nn.Embedding, "Embedding")):
        with pytest.raises(
            PreparationError, match=f"{name}: its weight is {state} by diffq_fx and cannot become a weight of torchao's QAT"
        ):
            quantize_(
                model, qat.QATConfig(IntxWeightOnlyConfig(torch.int4), step=step), lambda each, path, kind=kind: isinstance(each, kind)
            )
    assert all(one is other for one, other in zip(layers, model.modules(), strict=True))
    assert torch.equal(model(ids), expected)


def test_torchaos_fake_quantization_of_other_models_is_as_it_was():
    prepare(linears(), X, STE())
    other = linears()
    quantize_(other, qat.QATConfig(IntxWeightOnlyConfig(torch.int4), step="prepare"))
    assert {type(layer) for layer in other if isinstance(layer, nn.Linear)} == {qat.FakeQuantizedLinear}


# 8-bit activations


ON_EXECUTORCH = {
    "4 bits": STE(bits=4, grid="symmetric"),
    "3 bits in blocks": STE(bits=3, group_size=32, grid="symmetric"),
    "2 bits, one scale": STE(bits=2, group_size="tensor", grid="symmetric"),
    "6 bits": STE(bits=6, grid="symmetric"),
    "learned": DiffQConfig(target_bits=3.5, max_bits=4, grid="symmetric"),
}


def with_int8(method):
    net = linears()
    quantize_(net, QATConfig(method, X, step="prepare"), whole_model)
    before = train(net, X)(X).detach()
    quantize_(net, QATConfig(step="convert", activations="int8"), whole_model)
    return net, before


@pytest.mark.parametrize("name", ON_EXECUTORCH)
def test_int8_activations_are_the_form_that_xnnpack_reads(name):
    net, before = with_int8(ON_EXECUTORCH[name])
    for layer in (net[0], net[2]):
        weight = layer.weight
        assert weight.target_dtype == (torch.int8 if name == "6 bits" else torch.int4)
        assert weight.block_size == (1, 32)
        assert not weight.zero_point.any()
        assert weight.activation_quantization == "int8_asym_per_token"
    apart = (net(X) - before).detach().abs().max()
    assert 0 < apart < 0.05 * before.abs().max()


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (STE(bits=4), r'0\.weight: a grid with zero points of its own \("affine"\), which XNNPACK ignores'),
        (STE(bits=2, grid="half"), r'\("half"\), which XNNPACK ignores'),
        (STE(bits=6, group_size=16, grid="symmetric"), "blocks of 6 bits; XNNPACK has them up to 4"),
        (STE(bits=4, group_size=16, grid="symmetric"), "blocks of 16; XNNPACK has multiples of 32"),
    ],
    ids=str,
)
def test_what_xnnpack_cannot_multiply_is_refused_by_name(method, reason):
    net = linears()
    quantize_(net, QATConfig(method, X), whole_model)
    expected = net.eval()(X)
    with pytest.raises(ConversionError, match=reason):
        quantize_(net, QATConfig(step="convert", activations="int8"), whole_model)
    assert torch.equal(net(X), expected), "a call that fails changes nothing"


@pytest.mark.parametrize("name", ON_EXECUTORCH)
def test_executorch_computes_what_torchao_computes(name):
    pytest.importorskip("executorch")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    net, _ = with_int8(ON_EXECUTORCH[name])
    lowered = to_edge_transform_and_lower(torch.export.export(net, (X,)), partitioner=[XnnpackPartitioner()])
    assert "aten" not in str([node.target for node in lowered.exported_program().graph.nodes]), "XNNPACK takes all of it"
    (found,) = Runtime.get().load_program(lowered.to_executorch().buffer).load_method("forward").execute((X,))
    expected = net(X)
    assert float((found - expected).abs().max()) < 0.02 * float(expected.abs().max())


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
    "STE symmetric": STE(bits=3, grid="symmetric"),
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
    params = functional.quant_params(*functional.grid_range(*spec.range_layout.aminmax(weight), "half"), widths, "half")
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


@pytest.mark.parametrize(("group_size", "granularity"), [("channel", PerAxis(0)), (32, PerGroup(32))])
def test_symmetric_ste_has_torchaos_levels(group_size, granularity):
    """But where a largest weight lies half-way between two levels, as it does by the choice of the scale: rounding decides."""
    net = nn.Linear(64, 32, bias=False)
    ours = convert(prepare(net, torch.zeros(1, 64), STE(bits=4, group_size=group_size, grid="symmetric"))).weight_quantized()
    theirs = nn.Sequential(nn.Linear(64, 32, bias=False))
    theirs[0].load_state_dict(net.state_dict())
    quantize_(theirs, IntxWeightOnlyConfig(torch.int4, granularity))
    groups = net.weight.detach().abs().reshape(-1, 32 if group_size == 32 else 64)
    largest = (groups == groups.amax(1, keepdim=True)).reshape(32, 64)
    torch.testing.assert_close(ours[~largest], theirs[0].weight.dequantize()[~largest])
