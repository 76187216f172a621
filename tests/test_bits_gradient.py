"""The gradient of the bits is that of the noise's expected error, the range that grows with the bits included."""

import pytest
import torch
from torch import nn

from diffq_fx import DiffQConfig, prepare_diffq
from diffq_fx.kernels import native
from diffq_fx.kernels.draws import SPAN_OF_NORMAL

LAYOUTS = {
    "channel": {},
    "block in channel": {"group_size": 16},
    "block with own range": {"group_size": 16, "range_per": "group"},
    "block in tensor": {"group_size": 16, "range_per": "tensor"},
    "tensor": {"group_size": "tensor", "range_per": "tensor"},
    "blocks in a tensor": {"group_size": "tensor", "range_per": 12},
    "tensor over channels": {"group_size": "tensor"},
    "channel in tensor": {"range_per": "tensor"},
    "unclipped": {"clip_ranges": False},
    "ragged": {"group_size": 20},
}


def quantizer_of(grid, equal, **settings):
    torch.manual_seed(0)
    layer = nn.Linear(64, 6, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(6, 64) + torch.tensor([0.0, 0.2, -0.4, 2.5, 0.0, 0.0]).view(6, 1))  # a row without negative weights
        layer.weight[5] = 0.25
    (quantizer,) = prepare_diffq(layer, torch.zeros(1, 64), DiffQConfig(target_bits=None, grid=grid, **settings)).compression.learned
    with torch.no_grad():
        spread = 0 if equal else torch.linspace(-1, 1, quantizer.logits.numel()).view_as(quantizer.logits).sin()
        quantizer.logits.copy_(0.05 + 0.1 * spread - 0.1 * equal)
    return quantizer


def error(quantizer, logits):
    """Sum of the squared noise, from the same draw each time."""
    torch.manual_seed(3)
    with torch.no_grad():
        quantizer.logits.copy_(logits)
    return (quantizer(quantizer.weight) - quantizer.weight.detach()).square().sum()


@pytest.mark.parametrize("body", ["C", "torch"])
@pytest.mark.parametrize("grid", ["affine", "half", "symmetric"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_the_difference_quotient_of_the_error(layout, grid, body, monkeypatch):
    if body == "torch":
        monkeypatch.setattr(native, "takes", lambda weight, axis: False)
    quantizer = quantizer_of(grid, equal=False, **LAYOUTS[layout])
    start, towards = quantizer.logits.detach().clone(), torch.randn_like(quantizer.logits)
    (gradient,) = torch.autograd.grad(error(quantizer, start), quantizer.logits)
    ahead, behind = (float(error(quantizer, start + h * towards).detach()) for h in (1e-4, -1e-4))
    assert float((gradient * towards).sum()) == pytest.approx((ahead - behind) / 2e-4, rel=0.03)


@pytest.mark.parametrize("body", ["C", "torch"])
@pytest.mark.parametrize("layout", ["block in channel", "channel in tensor"])
def test_of_groups_that_are_equally_wide_each_gets_its_share(layout, body, monkeypatch):
    if body == "torch":
        monkeypatch.setattr(native, "takes", lambda weight, axis: False)
    quantizer = quantizer_of("symmetric", equal=True, **LAYOUTS[layout])
    start = quantizer.logits.detach().clone()
    (gradient,) = torch.autograd.grad(error(quantizer, start), quantizer.logits)
    ahead, behind = (float(error(quantizer, start + h).detach()) for h in (1e-4, -1e-4))  # all together: they stay equal
    assert float(gradient.sum()) == pytest.approx((ahead - behind) / 2e-4, rel=0.03)


@pytest.mark.parametrize("bits", [1.5, 2.5, 3.5, 4.5])
def test_the_expected_error_falls_with_the_bits_as_the_gradient_says(bits):
    """``E = span(b)^2 / (2^b - 1)^2 / 12`` for normal weights: less per bit than the 2.4 to 4 bits of log2 that a constant range would say."""
    torch.manual_seed(0)
    layer = nn.Linear(200_000, 1, bias=False)
    nn.init.normal_(layer.weight)
    config = DiffQConfig(target_bits=None, grid="symmetric", init_bits=bits)
    (quantizer,) = prepare_diffq(layer, torch.zeros(1, 200_000), config).compression.learned
    loss = error(quantizer, quantizer.logits.detach().clone())
    (gradient,) = torch.autograd.grad(loss, quantizer.logits)
    (slope,) = torch.autograd.grad(quantizer.bits().sum(), quantizer.logits)
    per_bit = float(gradient / slope / loss.detach()) / 0.6931

    def expected(at):
        table = SPAN_OF_NORMAL
        span = table[int(at) - 1] + (at - int(at)) * (table[int(at)] - table[int(at) - 1])
        return 2 * torch.log2(torch.tensor(span / (2**at - 1))).item()

    assert per_bit == pytest.approx((expected(bits + 0.01) - expected(bits - 0.01)) / 0.02, rel=0.01)
