"""Averages of prepared models over a training, buffers included, and what they convert to; state that is not finite at convert."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diffq_fx import DiffQConfig, DivergenceError, convert, freeze_bits, prepare
from diffq_fx.methods import LC, LSQ, STE, ProductQuantization, QuantNoise
from diffq_fx.training.ipq import IPQ
from diffq_fx.training.lc import lc_step

pytestmark = pytest.mark.filterwarnings("ignore:convert. the bits never moved")
X = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
METHODS = {
    "diffq": DiffQConfig(),
    "lsq": LSQ(),
    "ste": STE(),
    "quant-noise": QuantNoise(range="least_error"),
    "adaptive": LC(entries=5),
    "many entries": LC(entries=300),
    "own": LC(codebook=(-1.0, 0.5, 1.0), learn_scale=True),
    "shared": LC(entries=4, shared=True),
    "product": ProductQuantization(entries=16, block_size=4),
    "product, int8": ProductQuantization(entries=9, block_size=5, entry_dtype="int8"),
}


def prepared(name):
    torch.manual_seed(0)
    return prepare(nn.Sequential(nn.Linear(24, 30), nn.Tanh(), nn.Linear(30, 20)), X, METHODS[name])


def compress(model):
    method = model.compression.method.methods[0]
    if isinstance(method, LC):
        lc_step(model, next_mu=0.1)
    elif isinstance(method, ProductQuantization):
        IPQ(model, [["*"]], lambda model, stage: None).run()
        with torch.no_grad():  # as finetuned
            for quantizer in model.compression.quantizers:
                quantizer.centroids.mul_(1.25)
    elif isinstance(method, DiffQConfig):
        freeze_bits(model)


@torch.no_grad()
def output(model):
    return model.eval()(X)


@pytest.mark.parametrize("name", METHODS)
def test_what_may_not_be_averaged_is_no_buffer(name):
    model = prepared(name)
    compress(model)
    assert [key for key, buffer in model.named_buffers() if not buffer.is_floating_point()] == []


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("how", ["equal", "exponential"])
def test_the_average_of_equal_states_is_that_state(name, how):
    model = prepared(name)
    compress(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7) if how == "exponential" else None, use_buffers=True)
    for _ in range(4):
        average.update_parameters(model)
    torch.testing.assert_close(output(average.module), output(model))
    torch.testing.assert_close(output(convert(average)), output(model))


@pytest.mark.parametrize("name", ["adaptive", "many entries", "own", "shared"])
def test_an_average_that_began_before_the_first_c_step(name):
    model = prepared(name)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    average.update_parameters(model)
    compress(model)
    for _ in range(3):
        average.update_parameters(model)
    torch.testing.assert_close(output(average.module), output(model), rtol=1e-4, atol=1e-5)


def test_the_average_of_different_codebooks_lies_between_them():
    model = prepared("adaptive")
    compress(model)
    average, quantizer = AveragedModel(model, use_buffers=True), model.get_submodule("0.weight_quantizer")
    average.update_parameters(model)
    first = quantizer.compressed.clone()
    with torch.no_grad():
        quantizer.weight.add_(0.02 * torch.randn(30, 24)).mul_(1.1)
    lc_step(model, next_mu=0.1)
    average.update_parameters(model)
    mean, found = (first + quantizer.compressed) / 2, convert(average).get_submodule("0").weight_quantized()
    assert found.unique().numel() <= 5
    assert float((found - mean).norm() / mean.norm()) < 0.15


def test_codes_are_in_the_state_dict_and_follow_the_model():
    model, twin = prepared("product"), prepared("product")
    assert not twin.get_submodule("0.weight_quantizer").is_assigned
    compress(model)
    state = copy.deepcopy(model.state_dict())
    twin.load_state_dict(state)
    assert torch.equal(output(twin), output(model))
    assert torch.equal(output(copy.deepcopy(model)), output(model))
    assert torch.equal(output(model.double().float()), output(twin))
    moved = copy.deepcopy(twin).to("meta")
    moved.load_state_dict(state, assign=True)
    assert torch.equal(output(moved), output(twin))
    model.load_state_dict(prepared("product").state_dict())
    assert not model.get_submodule("0.weight_quantizer").is_assigned


def test_codes_of_another_model_are_refused():
    model, state = prepared("product"), prepared("product, int8").state_dict()
    with pytest.raises(RuntimeError, match=r"weight '0\.weight': the codes of the state_dict have shape \(30, 5\), expected \(30, 6\)"):
        model.load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "tensor"), [("adaptive", "entries"), ("own", "compressed"), ("product", "centroids"), ("lsq", "moved"), ("diffq", "clip")]
)
def test_state_that_is_not_finite_is_named_at_convert(name, tensor):
    model = prepared(name)
    compress(model)
    getattr(model.get_submodule("2.weight_quantizer"), tensor).data.view(-1)[1] = float("nan")
    with pytest.raises(
        DivergenceError, match=rf"({tensor}.*'2\.weight'|'2\.weight'.*{tensor}).* is not finite in 1 of .*its training diverged"
    ):
        convert(model)


@pytest.mark.parametrize("name", ["adaptive", "shared", "own", "product"])
def test_weights_that_are_not_finite_are_not_compressed(name):
    model = prepared(name)
    with torch.no_grad():
        model.get_parameter("2.weight")[1, 2] = float("inf")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DivergenceError, match=r"weight '2\.weight' is not finite in 1 of 600 places, first at \(1, 2\)"):
        lc_step(model, next_mu=1) if isinstance(METHODS[name], LC) else model.get_submodule("2.weight_quantizer").assign(model[2].weight)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
