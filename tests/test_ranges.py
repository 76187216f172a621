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
GRIDS = ["affine", "half", "symmetric", "float"]


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


@pytest.mark.parametrize("important", ["all alike", "some columns", "large weights"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("range_size", "group_size"), [("channel", "channel"), ("tensor", "channel"), ("channel", 8), (30, 30)])
def test_the_kernel_finds_the_range_that_torch_finds(grid, range_size, group_size, important, monkeypatch):
    rows = torch.randn(240, 100, generator=torch.Generator().manual_seed(0)).square()
    layout, groups = GroupLayout.of(240, 100, range_size), GroupLayout.of(240, 100, group_size)
    bits = torch.randint(1, 4 if important == "large weights" else 6, groups.shape, generator=torch.Generator().manual_seed(0))
    columns = torch.rand(100, generator=torch.Generator().manual_seed(1)).square()
    importance = {"all alike": None, "some columns": columns, "large weights": torch.zeros(100)}[important]
    how = {"steps": torch.zeros(()) if important == "large weights" else None}
    found = least_error_range(rows, layout, bits, groups, grid, importance, **how)
    usual = normal_range(rows, layout, torch.full(layout.shape, 2.4), grid)[:2]
    monkeypatch.setattr(native, "takes_rows", lambda *_, **__: False)
    torch.testing.assert_close(found, least_error_range(rows, layout, bits, groups, grid, importance, **how))
    torch.testing.assert_close(usual, normal_range(rows, layout, torch.full(layout.shape, 2.4), grid)[:2])
    widest = functional.grid_range(*layout.aminmax(rows), grid)
    counts = {"all alike": 1, "some columns": columns, "large weights": rows.abs()}[important]
    weighted = [squared_error(rows, *each, bits, groups, grid) * counts for each in (found, widest)]
    assert float(weighted[0].sum()) < float(weighted[1].sum())


@pytest.mark.skipif(extension.kernels() is None, reason="the kernels are not built")
def test_the_kernel_finds_the_range_of_small_weights_too(monkeypatch):
    kernel, seen = native.rounding_errors, []
    monkeypatch.setattr(native, "rounding_errors", lambda rows, *others: seen.append(rows.numel()) or kernel(rows, *others))
    layout = GroupLayout.of(4, 9, "channel")
    least_error_range(torch.randn(4, 9), layout, torch.tensor([[2]]), layout, "affine")
    assert set(seen) == {36}


@pytest.mark.parametrize("by", ["kernel", "torch"])
@pytest.mark.parametrize("grid", GRIDS)
def test_an_important_column_is_not_clipped(grid, by, monkeypatch):
    if by == "torch":
        monkeypatch.setattr(native, "takes_rows", lambda *_, **__: False)
    rows = torch.randn(200, 100, generator=torch.Generator().manual_seed(0))
    rows[:, 7] = 9
    layout, bits, importance = GroupLayout.of(200, 100, "channel"), torch.tensor([[2]]), torch.ones(100)
    plain = least_error_range(rows, layout, bits, layout, grid, None)
    assert bool((plain[1] < 7).any())
    for alike in (importance, 1e-30 * importance):
        torch.testing.assert_close(least_error_range(rows, layout, bits, layout, grid, alike), plain)
    importance[7] = 1e4
    low, high = least_error_range(rows, layout, bits, layout, grid, importance)
    assert float(squared_error(rows, low, high, bits, layout, grid)[:, 7].amax()) <= (0.1 if grid in ("half", "float") else 9.001)
    assert float(squared_error(rows, *plain, bits, layout, grid)[:, 7].amax()) > 15
    unimportant = importance.clone()
    unimportant[7] = 0
    assert bool((least_error_range(rows, layout, bits, layout, grid, unimportant)[1] < 4).all())


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("unknown", [0.0, float("nan")])
def test_without_known_importance_the_large_weights_of_a_row_count_most(grid, unknown):
    """They meet the inputs with outliers: clipping as least error does makes SmolLM2's perplexity 71 of 25, where no clipping has 37."""
    rows = torch.distributions.StudentT(3.0).sample((64, 500))
    layout, bits = GroupLayout.of(64, 500, "channel"), torch.tensor([[3]])
    importance = torch.full((500,), unknown)
    plain, found = (
        least_error_range(rows, layout, bits, layout, grid, importance, steps=each) for each in (torch.tensor(3.0), torch.tensor(0.0))
    )
    torch.testing.assert_close(plain, least_error_range(rows, layout, bits, layout, grid))
    widest = functional.grid_range(*layout.aminmax(rows), grid)
    lengths = [float((high - low).mean()) for low, high in (plain, found, widest)]
    assert lengths == sorted(lengths)
    of_large = [float((squared_error(rows, *each, bits, layout, grid) * rows.abs()).sum()) for each in (found, plain, widest)]
    assert of_large[0] < 0.95 * min(of_large[1:])


@pytest.mark.parametrize("grid", GRIDS)
def test_from_4_bits_on_nothing_is_clipped_where_nothing_is_known_and_nothing_trains(grid):
    rows, groups = torch.distributions.StudentT(3.0).sample((64, 500)), GroupLayout.of(64, 500, 50)
    layout, bits = GroupLayout.of(64, 500, "channel"), torch.randint(4, 9, groups.shape)
    bits[:8, 3] = 3  # the fewest of a range decide
    low, high = least_error_range(rows, layout, bits, groups, grid, steps=torch.zeros(()))
    widest = functional.grid_range(*layout.aminmax(rows), grid)
    assert torch.equal(low[8:], widest[0][8:])
    assert torch.equal(high[8:], widest[1][8:])
    assert bool((high - low < widest[1] - widest[0])[:8].any())
    clipped = least_error_range(rows, layout, bits, groups, grid)
    assert bool((clipped[1] - clipped[0] < widest[1] - widest[0])[8:].any())


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("density", ["normal", "laplace"])
def test_half_integer_zero_points_take_off_what_they_should(bits, density):
    """Of the squared error over the variance, against whole zero points: the least possible for normal weights is 0.363, 0.119."""
    torch.manual_seed(0)
    rows = torch.randn(64, 512) if density == "normal" else torch.distributions.Laplace(0.0, 1.0).sample((64, 512))
    layout, width = GroupLayout.of(64, 512, "channel"), torch.tensor([[bits]])

    def error(grid):
        return float(squared_error(rows, *least_error_range(rows, layout, width, layout, grid), width, layout, grid).mean() / rows.var())

    whole, half = error("affine"), error("half")
    at_most = {"normal": (0.37, 0.121), "laplace": (0.52, 0.195)}[density][bits - 1]
    assert half < min(whole, at_most)


@pytest.mark.parametrize("factor", [0.3, 0.9, 1.0, 1.7])
@pytest.mark.parametrize("bits", [1, 2, 3, 5])
def test_a_range_that_is_kept_holds_its_zero_point_whatever_it_is_multiplied_with(bits, factor):
    rows = torch.randn(300, 64, generator=torch.Generator().manual_seed(0)) + 0.3
    layout, width = GroupLayout.of(300, 64, "channel"), torch.tensor([[bits]])
    low, high = least_error_range(rows, layout, width, layout, "half")
    first, moved = (functional.quant_params(low * e, high * e, width, "half") for e in (1.0, factor))
    assert torch.equal(first.zero_point, moved.zero_point)
    exact = -low / first.scale
    torch.testing.assert_close(exact, first.zero_point, rtol=1e-5, atol=1e-5)
    halves = int((first.zero_point % 1 == 0.5).sum())
    assert halves > 100 if bits <= functional.WIDEST_HALF else halves == 0


@pytest.mark.parametrize("by", ["kernel", "torch"])
def test_weights_of_one_bit_are_two_levels_about_zero(by, monkeypatch):
    if by == "torch":
        monkeypatch.setattr(extension, "kernels", lambda: None)
    torch.manual_seed(0)
    net = nn.Linear(400, 50, bias=False)
    nn.init.normal_(net.weight)
    model = prepare_diffq(net, torch.zeros(1, 400), DiffQConfig(target_bits=None, init_bits=2, grid="half"))
    (quantizer,) = model.compression.learned
    quantizer.logits.data.fill_(-100)
    freeze_bits(model)
    assert bool((quantizer.width == 1).all())
    rounded = quantizer(model.weight)
    assert all(low == -high < 0 for low, high in (row.unique().tolist() for row in rounded))
    torch.testing.assert_close(rounded.abs().mean(1), net.weight.abs().mean(1), rtol=0.1, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype):
    rows, layout = torch.randn(3, 40).to(dtype), GroupLayout.of(3, 40, "channel")
    low, high = least_error_range(rows, layout, torch.tensor([[2]]), layout, "affine")
    assert low.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert bool((low <= 0).all() and (high >= 0).all() and (low < high).all())


@pytest.mark.parametrize("grid", ["affine", "half"])
@pytest.mark.parametrize("by", ["kernel", "torch"])
def test_the_gradient_of_a_learned_range(by, grid, monkeypatch):
    """Against the derivative of the rounded weights with the levels inside held, which is what LSQ's estimator says."""
    if by == "torch":
        monkeypatch.setattr(native, "takes_rows", lambda *_, **__: False)
    torch.manual_seed(0)
    columns = 3000  # enough that the kernel is worth its call
    weight, grad = torch.randn(6, columns, requires_grad=True), torch.randn(6, columns)
    assert native.takes_rows(weight, grad) == (by == "kernel" and extension.kernels() is not None)
    layout, clip, bits = GroupLayout.of(6, columns, "channel"), torch.zeros(6, 1, requires_grad=True), torch.full((6, 1), 2)
    low, high = torch.full((6, 1), -1.2), torch.full((6, 1), 1.0)
    params = functional.quant_params(low, high, bits, grid)
    rounded = functional.dequantize(functional.quantize(weight.detach(), params, bits, layout), params, layout)
    out = RoundInRange(axis=0, groups=layout, ranges=layout, grid=grid)(weight, torch.zeros(6, 1), clip, low, high, bits.float())
    assert torch.equal(out, rounded)
    out.backward(grad)
    assert torch.equal(weight.grad, grad)
    scale, zero = params.scale, params.zero_point
    inside = ((weight / scale + zero).round() >= 0) & ((weight / scale + zero).round() <= 3)
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


@pytest.mark.parametrize(
    "settings", [{}, {"grid": "symmetric"}, {"grid": "half", "target_bits": 2}, {"group_size": 8, "target_bits": 6}], ids=str
)
@pytest.mark.filterwarnings("ignore")
def test_convert_searches_the_range_of_each_weight_once(settings):
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    model = prepare_diffq(net, torch.zeros(1, 64), DiffQConfig(**settings))
    with mock.patch("diffq_fx.methods.diffq.least_error_range", wraps=least_error_range) as search:
        converted = convert_diffq(model)
    assert search.call_count == 2
    x = torch.randn(3, 64)
    assert torch.equal(converted(x), model.eval()(x))
