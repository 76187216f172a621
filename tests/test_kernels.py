"""The kernels in C against torch's own operations and a float64 reference; where they must not be taken."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffq_fx import DiffQConfig, functional
from diffq_fx.functional.groups import GroupLayout
from diffq_fx.kernels import (
    extension,
    extremes,
    moments,
    native,
    normal_range,
    size_of_logits,
    slope_of_size,
    statistics,
)
from diffq_fx.weights import WeightSpec

ROWS, COLUMNS, GROUPS = 50, 1000, 40_000  # enough for the kernels to be taken and to work in several parts
BITS = {"min_bits": 2, "max_bits": 8, "gain": 3.0}


@pytest.mark.parametrize("group_size", ["tensor", "channel", 7, 64, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_statistics(backend, group_size, dtype):
    rows = (torch.randn(ROWS, COLUMNS) + 0.5).to(dtype)
    layout = GroupLayout.of(ROWS, COLUMNS, group_size)
    assert native.takes_rows(rows) == (backend == "native" and dtype == torch.float32)
    exact = rows.double()
    low, high, total, square = statistics(rows, layout)
    torch.testing.assert_close((low.double(), high.double()), layout.aminmax(exact), rtol=0, atol=0)
    torch.testing.assert_close(total.double(), layout.sum(exact), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(square.double(), layout.sum(exact.square()), rtol=1e-5, atol=1e-4)
    assert all(torch.equal(a.double(), b.double()) for a, b in zip(extremes(rows, layout), (low, high), strict=True))


@pytest.mark.parametrize("place", [(0, 0), (3, 500), (49, 999)])
@pytest.mark.parametrize("group_size", ["tensor", "channel", 64])
def test_a_weight_that_is_nan_makes_the_range_of_its_group_nan(backend, place, group_size):
    rows = torch.randn(ROWS, COLUMNS)
    rows[place] = float("nan")
    layout = GroupLayout.of(ROWS, COLUMNS, group_size)
    expected = layout.aminmax(rows)
    assert int(expected[0].isnan().sum()) == 1
    for found, wanted in zip(extremes(rows, layout), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("grid", ["affine", "half", "symmetric", "float"])
@pytest.mark.parametrize("group_size", ["tensor", "channel", 64])
@pytest.mark.parametrize("mean", [0.0, 0.5, -3.0])
def test_normal_range_against_float64(backend, grid, group_size, mean):
    rows, layout = torch.randn(ROWS, COLUMNS) + mean, GroupLayout.of(ROWS, COLUMNS, group_size)
    bits = torch.rand(layout.shape) * 15 + 1
    found, expected = (normal_range(each, layout, bits.to(each.dtype), grid)[:2] for each in (rows, rows.double()))
    torch.testing.assert_close([each.double() for each in found], list(expected), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("as_many", [True, False])
def test_size_of_logits_against_float64(backend, as_many):
    logits = torch.randn(GROUPS)
    values = torch.tensor([9.0]).expand(GROUPS) if as_many else torch.randint(1, 10, (GROUPS,)).float()
    assert native.takes_size(values, logits) == (backend == "native")
    exact = logits.double().requires_grad_()
    expected = (values.double() * functional.bits_from_logits(exact, 2, 8, 3.0)).sum()
    (slope,) = torch.autograd.grad(expected, exact)
    size, growth, low, high = size_of_logits(values, logits, **BITS)
    assert (low.item(), high.item()) == (logits.min().item(), logits.max().item())
    assert size.item() == pytest.approx(expected.item(), rel=1e-6)
    assert growth.item() == pytest.approx(slope.sum().item(), rel=1e-5)
    torch.testing.assert_close(slope_of_size(values, logits, **BITS).double(), slope, rtol=1e-5, atol=4e-5)


@pytest.mark.parametrize("scale", [1.0, 1e-25])
def test_moments_against_float64(backend, scale):
    g, n = torch.randn(GROUPS) * scale, torch.rand(GROUPS)
    a, b = g.double(), n.double()
    expected = torch.stack([a.sum(), b.sum(), a @ a, a @ b, b @ b])
    torch.testing.assert_close(moments(g, n), expected, rtol=1e-9, atol=0)


def test_sums_do_not_depend_on_the_threads(backend):
    logits, values, grad = torch.randn(GROUPS), torch.rand(GROUPS), torch.randn(GROUPS)
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(torch.cat([torch.stack(size_of_logits(values, logits, **BITS)), moments(grad, values)]))
    torch.set_num_threads(threads)
    if backend == "native":
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("group_size", ["channel", 1, 3, 4, 8, 16, 64, 700, 3000])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"grid": "half"},
        {"grid": "symmetric", "noise": "gaussian"},
        {"grid": "float", "range_per": "group"},
        {"clip_ranges": False, "max_bits": 9},
    ],
)
@pytest.mark.parametrize("columns", [5000, 4090, 12])
def test_one_pass_is_what_its_parts_give(group_size, settings, columns, monkeypatch):
    if extension.kernels() is None:
        pytest.skip("the kernels are not built")
    if group_size == 1 and settings.get("range_per") == "group":
        pytest.skip("no such setting")
    weight, upstream = torch.randn(5, columns, requires_grad=True), torch.randn(5, columns)
    config = DiffQConfig(group_size=group_size, **settings)
    quantizer = config.make_quantizer(_spec(config, 5, columns), weight).train()
    torch.nn.init.normal_(quantizer.logits, std=0.1)
    assert quantizer.noise.in_one_pass(weight, quantizer.logits)

    def noisy_and_gradients():
        torch.manual_seed(1)
        noisy = quantizer(weight)
        return [noisy, *torch.autograd.grad(noisy, [weight, quantizer.logits], upstream)]

    found = noisy_and_gradients()
    monkeypatch.setattr(native, "takes_logits", lambda logits: False)
    monkeypatch.setattr(type(quantizer.noise), "in_one_pass", lambda *tensors: None)
    expected = noisy_and_gradients()
    assert (expected[0] - weight).abs().max() > 1e-3
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(found[1], upstream)
    torch.testing.assert_close(found[2], expected[2], rtol=1e-4, atol=1e-4 * expected[2].abs().max().item())


def _spec(config, rows, columns):
    group_size, range_size, grid = config.layout
    return WeightSpec(name="w", shape=(rows, columns), axis=0, group_size=group_size, range_size=range_size, grid=grid)


def test_one_pass_leaves_alone_what_it_cannot_do():
    if extension.kernels() is None:
        pytest.skip("the kernels are not built")
    config = DiffQConfig()
    weight = torch.randn(4, 8)
    quantizer = config.make_quantizer(_spec(config, 4, 8), weight)
    takes = quantizer.noise.in_one_pass
    assert takes(weight, quantizer.logits)
    assert not takes(weight.double(), quantizer.logits)
    assert not takes(weight.t().contiguous().t(), quantizer.logits)
    assert not takes(weight[:2], quantizer.logits)
    assert not takes(weight, quantizer.logits[:2])
    tensor_wide = DiffQConfig(range_per="tensor")
    other = tensor_wide.make_quantizer(_spec(tensor_wide, 4, 8), weight)
    assert not other.noise.in_one_pass(weight, other.logits)


@pytest.mark.parametrize("group_size", ["channel", 8])
def test_the_gradient_of_the_weight_is_not_copied_and_little_is_kept(group_size):
    if extension.kernels() is None:
        pytest.skip("the kernels are not built")
    weight, kept = torch.randn(256, 512, requires_grad=True), []
    config = DiffQConfig(group_size=group_size)
    quantizer = config.make_quantizer(_spec(config, 256, 512), weight).train()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        noisy = quantizer(weight)
    seed_and_ranges = 8 + 2 * 256 * 4
    assert sum(tensor.nbytes for tensor in kept) - quantizer.logits.nbytes == seed_and_ranges
    upstream = torch.randn(256, 512)
    grad, _ = torch.autograd.grad(noisy, [weight, quantizer.logits], upstream)
    assert grad.data_ptr() == upstream.data_ptr()


class Elsewhere(torch.Tensor):
    """A subclass whose memory need not hold what it stands for."""


def test_kernels_leave_alone_what_is_not_a_plain_tensor_in_memory():
    rows = torch.randn(ROWS, COLUMNS)
    if extension.kernels() is None:
        pytest.skip("the kernels are not built")
    assert native.takes_rows(rows)
    assert not native.takes_rows(rows.as_subclass(Elsewhere))
    assert not native.takes_rows(rows.double())
    assert not native.takes_rows(rows.t())
    assert not native.takes_rows(rows.to("meta"))
    with FakeTensorMode():
        assert not native.takes_rows(torch.empty(ROWS, COLUMNS))
    seen = []
    torch.func.grad(lambda x: (seen.append(native.takes_rows(x)), x.sum())[1])(rows)
    assert seen == [False]
