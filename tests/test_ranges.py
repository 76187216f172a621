"""Ranges that suit the rounding error, and learned ones."""

import math
from unittest import mock

import pytest
import torch
from torch import nn

from diffq_fx import DiffQConfig, convert_diffq, freeze_bits, functional, prepare_diffq
from diffq_fx.functional.groups import GroupLayout
from diffq_fx.kernels import RoundInRange, extension, learned_factor, least_error_range, native, normal_range
from diffq_fx.kernels.draws import SPAN_OF_NORMAL

pytestmark = pytest.mark.filterwarnings("ignore:convert. the bits never moved")
GRIDS = ["affine", "symmetric", "float"]


def squared_error(rows, low, high, bits, layout, grid):
    params = functional.quant_params(low, high, bits, grid)
    rounded = functional.dequantize(functional.quantize(rows, params, bits, layout), params, layout)
    return (rounded - rows).square()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_the_span_for_normal_weights_has_the_least_error(bits):
    """By integration over a fine grid of quantiles: no span 4 % longer or shorter is better."""
    quantiles = torch.erfinv(torch.linspace(-1, 1, 200_001, dtype=torch.float64)[1:-1]) * math.sqrt(2)
    layout, width = GroupLayout.of(1, len(quantiles), "channel"), torch.tensor([[bits]])

    def error(span):
        low = torch.tensor([[-span / 2]], dtype=torch.float64)
        return float(squared_error(quantiles.view(1, -1), low, -low, width, layout, "float").mean())

    best = error(SPAN_OF_NORMAL[bits - 1])
    assert best < error(SPAN_OF_NORMAL[bits - 1] * 1.04)
    assert best < error(SPAN_OF_NORMAL[bits - 1] * 0.96)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("range_size", "group_size"), [("channel", "channel"), ("tensor", "channel"), ("channel", 8), (30, 30)])
def test_the_kernel_finds_the_range_that_torch_finds(grid, range_size, group_size, monkeypatch):
    rows = torch.randn(240, 100, generator=torch.Generator().manual_seed(0)).square()
    layout, groups = GroupLayout.of(240, 100, range_size), GroupLayout.of(240, 100, group_size)
    bits = torch.randint(1, 6, groups.shape, generator=torch.Generator().manual_seed(0))
    found = least_error_range(rows, layout, bits, groups, grid)
    usual = normal_range(rows, layout, torch.full(layout.shape, 2.4), grid)[:2]
    monkeypatch.setattr(native, "takes_rows", lambda *_: False)
    torch.testing.assert_close(found, least_error_range(rows, layout, bits, groups, grid))
    torch.testing.assert_close(usual, normal_range(rows, layout, torch.full(layout.shape, 2.4), grid)[:2])
    widest = functional.weight_range(rows, layout, grid)
    assert float(squared_error(rows, *found, bits, groups, grid).sum()) < float(squared_error(rows, *widest, bits, groups, grid).sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype):
    rows, layout = torch.randn(3, 40).to(dtype), GroupLayout.of(3, 40, "channel")
    low, high = least_error_range(rows, layout, torch.tensor([[2]]), layout, "affine")
    assert low.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert bool((low <= 0).all() and (high >= 0).all() and (low < high).all())


@pytest.mark.parametrize("by", ["kernel", "torch"])
def test_the_gradient_of_a_learned_range(by, monkeypatch):
    """Against the derivative of the rounded weights with the levels inside held, which is what LSQ's estimator says."""
    if by == "torch":
        monkeypatch.setattr(native, "takes_rows", lambda *_: False)
    torch.manual_seed(0)
    columns = 3000  # enough that the kernel is worth its call
    weight, grad = torch.randn(6, columns, requires_grad=True), torch.randn(6, columns)
    assert native.takes_rows(weight, grad) == (by == "kernel" and extension.kernels() is not None)
    layout, clip, bits = GroupLayout.of(6, columns, "channel"), torch.zeros(6, 1, requires_grad=True), torch.full((6, 1), 2)
    low, high = torch.full((6, 1), -1.2), torch.full((6, 1), 1.0)
    params = functional.quant_params(low, high, bits, "affine")
    rounded = functional.dequantize(functional.quantize(weight.detach(), params, bits, layout), params, layout)
    out = RoundInRange(axis=0, groups=layout, ranges=layout)(weight, rounded, torch.zeros(6, 1), clip, params.scale, high - low)
    out.backward(grad)
    assert torch.equal(weight.grad, grad)
    scale, zero = params.scale, params.zero_point
    inside = ((weight / scale).round() + zero >= 0) & ((weight / scale).round() + zero <= 3)
    # rounded = (round(w/s)) s inside: d/ds = round(w/s) - w/s by the straight-through estimator; the end level beyond.
    slope_of_step = torch.where(inside, rounded / scale - weight / scale, rounded / scale)
    by_hand = (grad * slope_of_step).sum(1, keepdim=True) / math.sqrt(columns * 3) / scale / 10
    torch.testing.assert_close(clip.grad, by_hand.detach(), rtol=1e-3, atol=1e-4)


def test_a_row_of_zeros_has_no_gradient_that_is_not_a_number():
    net = nn.Linear(40, 3)
    nn.init.zeros_(net.weight[1])
    model = prepare_diffq(net, torch.zeros(1, 40), DiffQConfig(target_bits=None, init_bits=3))
    freeze_bits(model)
    model(torch.randn(5, 40)).square().sum().backward()
    (quantizer,) = model.compression.learned
    assert bool(quantizer.clip.grad.isfinite().all())
    assert float(quantizer.clip.grad[1]) == 0


def test_a_learned_range_wanders_to_less_error():
    """The loss is the squared error of the weights themselves: their own best range is close, a start twice as long is not."""
    torch.manual_seed(0)
    net = nn.Linear(400, 8, bias=False)
    wanted = net.weight.detach().clone()
    model = prepare_diffq(net, torch.zeros(1, 400), DiffQConfig(target_bits=None, init_bits=3))
    freeze_bits(model)
    (quantizer,) = model.compression.learned
    quantizer.range_low *= 2
    quantizer.range_high *= 2
    optimizer = torch.optim.Adam([quantizer.clip], lr=1e-2)
    eye = torch.eye(400)

    def error():
        return (model(eye).T - wanted).square().mean()

    first = float(error())
    for _ in range(100):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    assert float(error()) < first / 3
    assert bool((learned_factor(quantizer.clip.detach()) < 0.8).all())
    converted = convert_diffq(model)
    torch.testing.assert_close(converted(eye), model.eval()(eye), rtol=0, atol=0)


@pytest.mark.parametrize("clips", [True, False])
def test_the_range_is_kept_once_the_bits_are_final(clips):
    torch.manual_seed(0)
    model = prepare_diffq(nn.Linear(64, 8), torch.zeros(1, 64), DiffQConfig(clip_ranges=clips))
    freeze_bits(model)
    x = torch.randn(4, 64)
    before = model(x)
    with torch.no_grad():
        model.weight[:, 0] = 5.0  # an outlier
    moved = model(x)
    (quantizer,) = model.compression.learned
    largest = float(quantizer.rounded_weight(model.weight.detach()).max())
    assert (largest > 4) == (not clips)
    assert not torch.equal(before, moved)
    again = prepare_diffq(nn.Linear(64, 8), torch.zeros(1, 64), DiffQConfig(clip_ranges=clips))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), moved)
    assert torch.equal(convert_diffq(again)(x), moved)


@pytest.mark.parametrize("settings", [{}, {"grid": "symmetric"}, {"group_size": 8, "target_bits": 6}], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_convert_searches_the_range_of_each_weight_once(settings):
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    model = prepare_diffq(net, torch.zeros(1, 64), DiffQConfig(**settings))
    with mock.patch("diffq_fx.methods.diffq.least_error_range", wraps=least_error_range) as search:
        converted = convert_diffq(model)
    assert search.call_count == 2
    x = torch.randn(3, 64)
    assert torch.equal(converted(x), model.eval()(x))
