"""The expected length of the code of the levels, and what its gradient does to weights."""

import math
import re

import pytest
import torch
from torch import nn

from diffq_fx import DiffQConfig, convert_diffq, model_size, prepare_diffq
from diffq_fx.budget.code_length import expected_code_length, laplace_entropy
from diffq_fx.export.packed import save_packed


@pytest.mark.parametrize("step", [0.05, 0.7, 2.0, 9.0])
def test_entropy_of_a_rounded_laplace_density(step):
    density = torch.distributions.Laplace(torch.tensor(0.0).double(), torch.tensor(1.0).double())
    level = torch.arange(-2000, 2001).double()
    share = density.cdf((level + 0.5) * step) - density.cdf((level - 0.5) * step)
    summed = -torch.special.xlogy(share, share).sum() / math.log(2)
    assert laplace_entropy(torch.tensor(step).double()).item() == pytest.approx(summed.item(), abs=1e-6)


def laplace_weights(**settings):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64))
    with torch.no_grad():
        for layer in net[::2]:
            layer.weight.copy_(torch.distributions.Laplace(0.0, 0.05).sample(layer.weight.shape))
    return prepare_diffq(net, torch.zeros(2, 256), DiffQConfig(size_of="packed_file", **settings))


def of(learned):
    return [(quantizer.spec, quantizer.weight, quantizer.step_in_training()) for quantizer in learned]


def measured_bits(compression):
    """What the packed size counts for the levels, at the widths nearest to the trained bits."""
    compression.allocate()
    widths = [quantizer.width.double() for quantizer in compression.learned]
    packed = sum(float((w * q.spec.bits_layout.counts()).sum()) for q, w in zip(compression.learned, widths, strict=True))
    return packed - compression.saved_at(torch.cat([w.flatten() for w in widths]).int())


@pytest.mark.parametrize("bits", [3, 5])
def test_the_expected_length_is_near_the_measured_one(bits):
    compression = laplace_weights(target_bits=None, widths=(bits - 1, bits), init_bits=bits, max_bits=bits).compression
    with torch.no_grad():
        for logits in compression.logits:
            logits.fill_(10)
    assert expected_code_length(of(compression.learned)).item() == pytest.approx(measured_bits(compression), rel=0.06)


@pytest.mark.parametrize(
    "layout", [dict(), dict(group_size=16), dict(range_per="tensor", group_size="tensor"), dict(group_size=16, range_per="group")]
)
def test_its_gradient_is_the_difference_quotient_at_given_steps(layout):
    (quantizer, *_) = learned = laplace_weights(target_bits=4, **layout).compression.learned
    weight = quantizer.weight
    (grad,) = torch.autograd.grad(expected_code_length(of(learned)), weight)
    with torch.no_grad():
        layout = quantizer.spec.range_layout
        low, high = (layout.expand(end) for end in layout.aminmax(weight))
        towards = (
            torch.rand_like(weight) * ((weight > low) & (weight < high)) * weight.sign()
        )  # the extreme weights, and so the steps, stay
        lengths = []
        for move in (-1e-4, 1e-4):
            weight.add_(towards, alpha=move)
            lengths.append(expected_code_length(of(learned)).item())
            weight.sub_(towards, alpha=move)
    assert (lengths[1] - lengths[0]) / 2e-4 == pytest.approx(float((grad * towards).sum()), rel=0.03)


def test_weights_that_follow_the_gradient_take_a_smaller_file(tmp_path):
    model = laplace_weights(target_bits=None, init_bits=5)
    weights = [quantizer.weight for quantizer in model.compression.learned]
    model.compression.steps += 1  # or convert would warn that the bits never moved, and they need not here
    model_size(model)
    save_packed(convert_diffq(model), tmp_path / "before")
    before = measured_bits(model.compression)
    optimizer = torch.optim.Adam(weights, lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        model_size(model).backward()
        optimizer.step()
    assert measured_bits(model.compression) < 0.93 * before
    save_packed(convert_diffq(model), tmp_path / "after")
    assert (tmp_path / "after").stat().st_size < 0.93 * (tmp_path / "before").stat().st_size


@pytest.mark.parametrize("aim", [dict(penalty=5.0), dict(target_bits=3)])
def test_the_pressure_reaches_the_weights(aim):
    """With a loss that no weight changes, all that a weight's gradient holds is the length of the code."""
    model = laplace_weights(**aim)
    weights = [quantizer.weight for quantizer in model.compression.learned]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for weight, logits in zip(weights, model.compression.logits, strict=True):
        weight.grad, logits.grad = torch.zeros_like(weight), torch.full_like(logits, -1.0)  # more bits would help
    slopes = torch.autograd.grad(expected_code_length(of(model.compression.learned)), weights)
    optimizer.step()
    worth = 5 / 2**23 if "penalty" in aim else float(model.compression.lambda_per_bit)
    assert worth > 0
    for weight, slope in zip(weights, slopes, strict=True):
        torch.testing.assert_close(weight.grad, slope * worth)


@pytest.mark.parametrize("weights_first", [True, False])
@pytest.mark.parametrize("grad_scale", [None, 1024.0])
def test_weights_of_another_optimizer_get_it_when_that_one_steps(weights_first, grad_scale):
    model = laplace_weights(penalty=5.0)
    weights = [quantizer.weight for quantizer in model.compression.learned]
    before = [weight.detach().clone() for weight in weights]
    slopes = torch.autograd.grad(expected_code_length(of(model.compression.learned)), weights)
    fused = grad_scale is not None
    optimizers = [torch.optim.SGD(weights, lr=1.0, fused=fused), torch.optim.SGD(model.compression.logits, lr=1e-3)]
    if fused:  # as GradScaler tells a fused optimizer, which divides by it
        optimizers[0].grad_scale, optimizers[0].found_inf = torch.tensor(grad_scale), torch.tensor(0.0)
    for weight, logits in zip(weights, model.compression.logits, strict=True):
        weight.grad, logits.grad = torch.zeros_like(weight), torch.full_like(logits, -1.0)
    for optimizer in optimizers if weights_first else optimizers[::-1]:
        optimizer.step()
    for weight, old, slope in zip(weights, before, slopes, strict=True):
        torch.testing.assert_close(old - weight.detach(), slope * (5 / 2**23), rtol=1e-2, atol=1e-7)


def test_a_step_that_says_more_bits_do_harm_does_not_lengthen_the_code():
    model = laplace_weights(target_bits=3)
    weights = [quantizer.weight for quantizer in model.compression.learned]
    for weight, logits in zip(weights, model.compression.logits, strict=True):
        weight.grad, logits.grad = torch.zeros_like(weight), torch.ones_like(logits)
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert float(model.compression.lambda_per_bit) < 0
    assert not any(weight.grad.any() for weight in weights)


def test_a_weight_that_does_not_train_any_more_is_left_alone():
    model = laplace_weights(penalty=5.0)
    first, second = (quantizer.weight for quantizer in model.compression.learned)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    first.requires_grad_(False)
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert not first.grad.any()
    assert second.grad.any()


def test_a_penalty_presses_on_the_measured_size():
    model = laplace_weights(penalty=5.0)
    assert model.compression.known.bits_saved > 0
    assert float(model_size(model).detach()) == pytest.approx(model_size(model, exact=True), rel=0.02)


def test_a_constant_channel_takes_no_code():
    model = laplace_weights(target_bits=4)
    weight = model.compression.learned[0].weight
    with torch.no_grad():
        weight[3] = 0.25
        weight[4] = 0
    (grad,) = torch.autograd.grad(expected_code_length(of(model.compression.learned)), weight)
    assert bool(torch.isfinite(grad).all())
    assert not grad[3:5].any()


def test_a_target_out_of_reach_is_refused_with_what_coded_levels_take():
    model = nn.Linear(256, 256, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.distributions.Laplace(0.0, 1.0).sample((256, 256)))
    most = {}
    for size_of in ("widths", "packed_file"):
        with pytest.raises(ValueError, match="target_bits=9 cannot be reached") as caught:
            prepare_diffq(model, torch.zeros(1, 256), DiffQConfig(target_bits=9, size_of=size_of))
        most[size_of] = float(re.search(r"to ([0-9.]+) bits a weight", str(caught.value))[1])
    assert most["packed_file"] < most["widths"] - 0.5
    with pytest.raises(ValueError, match="cannot be reached"):  # within reach before coding, not after it
        prepare_diffq(model, torch.zeros(1, 256), DiffQConfig(target_bits=most["packed_file"] + 0.1, size_of="packed_file"))
    held = prepare_diffq(model, torch.zeros(1, 256), DiffQConfig(target_bits=most["packed_file"] - 0.1, size_of="packed_file")).eval()
    found = model_size(held, exact=True) * 2**23 - held.compression.rest_bits
    assert found / 256**2 == pytest.approx(most["packed_file"] - 0.1, rel=0.01)
