"""STE, LSQ and scalar Quant-Noise: their formulas, their gradients, and the whole road on real digits."""

import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffq_fx import (
    DiffQConfig,
    PreparationError,
    bits_report,
    convert,
    functional,
    model_size,
    prepare,
    prepare_diffq,
    setup_optimizer,
)
from diffq_fx.functional.groups import GroupLayout
from diffq_fx.kernels import least_error_range
from diffq_fx.methods import LC, LSQ, STE, ProductQuantization, QuantNoise
from diffq_fx.methods.lsq import learned_step, least_error_step, mean_step

METHODS = {
    "STE": STE(bits=3),
    "STE symmetric blocks": STE(bits=4, grid="symmetric", group_size=4),
    "STE tensor": STE(bits=2, group_size="tensor"),
    "STE 1 bit": STE(bits=1),
    "STE half": STE(bits=2, grid="half"),
    "STE float grid": STE(bits=5, grid="float"),
    "STE float16 scales": STE(bits=5, group_size=4, grid="float", scale_dtype="float16"),
    "LSQ": LSQ(bits=2),
    "LSQ tensor": LSQ(bits=3, group_size="tensor"),
    "LSQ blocks": LSQ(bits=4, group_size=4),
    "LSQ of the paper": LSQ(bits=3, start="mean", learned="step"),
    "QuantNoise": QuantNoise(bits=4, rate=0.5),
    "QuantNoise histogram": QuantNoise(bits=3, rate=0.3, range="least_error", group_size="tensor"),
    "QuantNoise histogram channel": QuantNoise(bits=3, rate=0.3, range="least_error", block_size=3, grid="symmetric"),
    "QuantNoise histogram blocks": QuantNoise(bits=3, rate=0.3, range="least_error", group_size=4),
}


class Consumers(nn.Module):
    """One of each kind of weight; 10 and 9 inputs, so that no block size divides all rows; the embedding is tied to the head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 10)
        self.conv1 = nn.Conv1d(10, 6, 3, padding=1)
        self.up = nn.ConvTranspose1d(6, 9, 3, padding=1)
        self.rnn = nn.GRU(9, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.bare = nn.Parameter(torch.randn(8, 10))
        self.head = nn.Linear(10, 12)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = torch.relu(self.conv1(self.embed(ids).transpose(1, 2)))
        x, _ = self.rnn(self.up(x).transpose(1, 2))
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.head(x @ self.bare)


IDS = torch.randint(12, (3, 7), generator=torch.Generator().manual_seed(0))
WEIGHTS = 8  # embed (tied), conv1, up, two of the GRU, in_proj and out_proj, bare


@pytest.mark.parametrize("scope", ["model", "module"])
@pytest.mark.parametrize("name", METHODS)
def test_every_setting_trains_and_converts(name, scope):
    model = prepare(Consumers(), IDS, METHODS[name], scope=scope)
    assert len(model.compression.quantizers) == WEIGHTS
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(IDS).square().mean().backward()
        assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())
        optimizer.step()
    with torch.no_grad():
        expected = model.eval()(IDS)
        converted = convert(model)
        assert torch.equal(converted(IDS), expected)
    assert not any(p.ndim > 1 for p in converted.parameters())
    assert model_size(model, exact=True) == pytest.approx(float(model_size(model)))
    before, after = bits_report(model).as_dict(), bits_report(converted).as_dict()
    assert before["sizes"] == after["sizes"]
    assert before["sizes"]["bit_packed"]["total_mib"] == pytest.approx(model_size(model, exact=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", [STE(), LSQ(), QuantNoise(), QuantNoise(range="least_error")], ids=str)
def test_other_dtypes(method, dtype):
    x = torch.randn(2, 8, dtype=dtype)
    model = prepare(nn.Linear(8, 16).to(dtype), x, method)
    assert model(x).dtype == dtype
    model(x).sum().backward()
    assert torch.equal(convert(model)(x), model.eval()(x))


# STE


def test_ste_rounds_in_training_as_in_eval_and_passes_the_gradient():
    model = prepare(nn.Linear(8, 4, bias=False), torch.zeros(1, 8), STE(bits=2))
    x = torch.randn(3, 8)
    trained = model(x)
    trained.sum().backward()
    torch.testing.assert_close(model.weight.grad, x.sum(0).expand(4, 8))
    assert torch.equal(trained, model.eval()(x))
    for row in convert(model).weight_quantized():
        assert row.unique().numel() <= 4
        assert 0 in row


# LSQ


@pytest.mark.parametrize(("group_size", "shape"), [("tensor", (1, 1)), ("channel", (5, 1)), (4, (5, 3))])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_lsq_gradients_are_those_of_its_definition(group_size, shape, bits):
    """Against autograd through the textbook composition, in float64."""
    layout = GroupLayout.of(5, 10, group_size)
    rows = torch.randn(5, 10, dtype=torch.float64, requires_grad=True)
    step = (torch.rand(shape, dtype=torch.float64) * 0.5 + 0.2).requires_grad_()
    upstream = torch.randn(5, 10, dtype=torch.float64)
    rounded = learned_step(rows, step, layout, bits)
    found = torch.autograd.grad(rounded, (rows, step), upstream)

    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = 1 / (layout.counts() * high).sqrt()
    scaled_step = layout.expand((step * scale) + (step - step * scale).detach())
    clipped = (rows / scaled_step).clamp(low, high)
    expected = (clipped + (clipped.round() - clipped).detach()) * scaled_step
    torch.testing.assert_close(rounded, expected)
    for a, b in zip(found, torch.autograd.grad(expected, (rows, step), upstream), strict=True):
        torch.testing.assert_close(a, b)
    clipped_away = (rows / layout.expand(step) <= low) | (rows / layout.expand(step) >= high)
    assert bits > 3 or clipped_away.any()


def test_lsq_step_gradient_by_finite_differences():
    """Where every weight is clipped the rounding is constant, and the true derivative exists."""
    layout = GroupLayout.of(1, 4, "tensor")
    rows = torch.tensor([[9.0, 8.0, -7.0, -9.0]], dtype=torch.float64)
    step = torch.tensor([[1.0]], dtype=torch.float64, requires_grad=True)
    upstream = torch.tensor([[1.0, 2.0, 3.0, 0.5]], dtype=torch.float64)
    (found,) = torch.autograd.grad(learned_step(rows, step, layout, 3), step, upstream)
    moved = [(learned_step(rows, step.detach() + d, layout, 3) * upstream).sum() for d in (1e-4, -1e-4)]
    expected = (moved[0] - moved[1]) / 2e-4 / math.sqrt(4 * 3)
    torch.testing.assert_close(found.squeeze(), expected)


def test_lsq_starts_from_the_papers_step_where_it_is_asked_to():
    rows = torch.randn(6, 11)
    step = mean_step(rows, GroupLayout.of(6, 11, 4), 3)
    assert step.shape == (6, 3)
    torch.testing.assert_close(step[2, 2], 2 * rows[2, 8:].abs().mean() / math.sqrt(3))
    model = prepare(nn.Linear(11, 6), torch.zeros(1, 11), LSQ(bits=4, group_size="tensor", start="mean"))
    torch.testing.assert_close(model.weight_quantizer.step(), 2 * model.weight.abs().mean().reshape(1, 1) / math.sqrt(7))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", ["tensor", "channel", 32])
def test_lsq_starts_where_the_rounding_error_is_least(group_size, bits):
    rows = torch.distributions.Laplace(0, 0.02).sample((6, 64))
    layout = GroupLayout.of(6, 64, group_size)

    def error(step):
        step_OI, half = layout.expand(step), 2 ** (bits - 1)
        rounded = (rows / step_OI).round().clamp(-half, half - 1) * step_OI
        return layout.sum((rounded - rows).square())

    found = error(least_error_step(rows, layout, bits))
    largest = rows.abs().max() / (2 ** (bits - 1) - 1)
    best = torch.stack([error(torch.full(layout.shape, float(step))) for step in torch.linspace(0.01, 1, 400) * largest]).amin(0)
    assert float(found.sum()) <= 1.08 * float(best.sum())
    assert float(found.sum()) < float(error(mean_step(rows, layout, bits)).sum())


@pytest.mark.parametrize("learned", ["logarithm", "step"])
def test_lsq_step_trains_whatever_its_sign(learned):
    model = prepare(nn.Linear(16, 8), torch.zeros(1, 16), LSQ(bits=3, learned=learned))
    quantizer = model.weight_quantizer
    assert any(quantizer.moved is p for p in model.parameters())
    x = torch.randn(4, 16)
    expected = model(x)
    assert torch.equal(model.eval()(x), expected)
    with torch.no_grad():
        quantizer.moved.fill_(math.log(2) / 10) if learned == "logarithm" else quantizer.moved.copy_(-3 * quantizer.start)
    torch.testing.assert_close(quantizer.step(), 2 * quantizer.start)
    assert not torch.equal(model(x), expected), "eval() kept the weight of the old step"


def test_lsq_by_its_logarithm_changes_all_steps_alike_under_adam():
    def moved(optimizer, learned, rate, size):
        torch.manual_seed(0)
        net = nn.Linear(16, 8)
        net.weight.data.mul_(size)
        x = torch.randn(4, 16)
        model = prepare(net, x, LSQ(bits=3, learned=learned))
        optimizer = optimizer(model.parameters(), lr=rate)
        model(x).square().sum().backward()
        optimizer.step()
        return model.weight_quantizer.step().detach() / model.weight_quantizer.start - 1

    for size in (1.0, 0.01):
        assert float(moved(torch.optim.Adam, "logarithm", 1e-3, size).abs().max()) == pytest.approx(1e-2, rel=0.02)
    assert float(moved(torch.optim.Adam, "step", 1e-3, 0.01).abs().max()) > 0.3


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("bits", [2, 4])
def test_lsq_trains_under_plain_gradient_descent(rate, bits):
    torch.manual_seed(0)
    x, y = torch.randn(256, 64), torch.randn(256, 4)
    model = prepare(nn.Linear(64, 4), x[:1], LSQ(bits=bits))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.85 * losses[0]


@pytest.mark.parametrize("moved", [-50.0, 50.0])
def test_a_step_of_lsq_stays_finite_wherever_training_takes_it(moved):
    model = prepare(nn.Linear(16, 8), torch.randn(4, 16), LSQ(bits=2))
    with torch.no_grad():
        model.weight_quantizer.moved.fill_(moved)
    step = model.weight_quantizer.step()
    assert bool(torch.isfinite(step).all())
    assert bool((step > 0).all())


def test_lsq_goes_on_from_its_state():
    x = torch.randn(4, 16)
    trained, fresh = (prepare(nn.Linear(16, 8), x, LSQ(bits=2)) for _ in range(2))
    optimizer = torch.optim.Adam(trained.parameters(), lr=0.1)
    trained(x).square().sum().backward()
    optimizer.step()
    before = fresh.eval()(x)
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(x), trained.eval()(x))
    assert not torch.equal(fresh(x), before)


def test_lsq_of_a_zero_weight():
    net = nn.Linear(4, 4, bias=False)
    nn.init.zeros_(net.weight)
    model = prepare(net, torch.zeros(1, 4), LSQ(bits=2))
    model(torch.ones(1, 4)).sum().backward()
    assert torch.isfinite(model.weight_quantizer.moved.grad).all()
    assert not convert(model)(torch.ones(1, 4)).any()


# Quant-Noise


@pytest.mark.parametrize("group_size", ["tensor", "channel", 4])
@pytest.mark.parametrize("grid", ["affine", "symmetric"])
def test_quant_noise_at_rate_one_is_ste_and_at_zero_float(group_size, grid):
    net, x = nn.Linear(10, 6), torch.randn(3, 10)
    ste = prepare(net, x, STE(bits=3, group_size=group_size, grid=grid))
    for rate, same_as in ((1, ste), (0, net)):
        noisy = prepare(net, x, QuantNoise(bits=3, rate=rate, group_size=group_size, grid=grid, block_size=2))
        assert torch.equal(noisy(x), same_as(x))
        gradients = []
        for model in (noisy, same_as):
            net.zero_grad()
            model(x).square().sum().backward()
            gradients.append(net.weight.grad.clone())
        assert torch.equal(*gradients)
    assert torch.equal(convert(noisy)(x), convert(ste)(x))


def test_quant_noise_noises_blocks_at_its_rate():
    net = nn.Linear(1000, 50)
    model = prepare(net, torch.zeros(1, 1000), QuantNoise(bits=2, rate=0.3, block_size=8, group_size="tensor"))
    weight = net.weight.detach()
    changed = (model.weight_quantizer(weight) != weight).reshape(50, 125, 8)
    assert bool((changed.all(-1) == changed.any(-1)).all()), "a block is noised whole or not at all"
    assert float(changed.float().mean()) == pytest.approx(0.3, abs=0.02)
    assert not torch.equal(model.weight_quantizer(weight), model.weight_quantizer(weight))


@pytest.mark.parametrize("method", [QuantNoise(rate=0.1), QuantNoise(rate=0.1, bits=2, range="least_error", range_every=7)], ids=str)
def test_forwards_leave_every_weight_as_it_was(method):
    net = Consumers()
    before = {name: (p.detach().clone(), p._version) for name, p in net.named_parameters()}
    model = prepare(net, IDS, method)
    for _ in range(30):
        model(IDS)
    for name, parameter in net.named_parameters():
        value, version = before[name]
        assert torch.equal(parameter, value), name
        assert parameter._version == version


@pytest.mark.parametrize("grid", ["affine", "symmetric"])
@pytest.mark.parametrize("group_size", ["tensor", "channel", 50])
def test_the_least_error_range_beats_the_extremes(grid, group_size):
    rows = torch.distributions.Laplace(0, 1).sample((3, 120))
    layout = GroupLayout.of(3, 120, group_size)

    def error(low, high):
        params = functional.quant_params(low, high, torch.tensor(3), grid)
        levels = functional.quantize(rows, params, torch.tensor(3), layout)
        return layout.sum((functional.dequantize(levels, params, layout) - rows).square())

    low, high = least_error_range(rows, layout, torch.tensor([[3]]), layout, grid)
    widest = functional.grid_range(*layout.aminmax(rows), grid)
    assert bool((low >= widest[0]).all() and (high <= widest[1]).all())
    assert float(error(low, high).sum()) < 0.9 * float(error(*widest).sum())


def test_the_least_error_range_of_a_constant_weight():
    layout = GroupLayout.of(2, 8, "channel")
    low, high = least_error_range(torch.full((2, 8), 0.25), layout, torch.tensor([[4]]), layout, "affine")
    assert low.tolist() == [[0], [0]]
    assert float(high.min()) > 0


@pytest.mark.parametrize(
    "method",
    [STE(), LSQ(), QuantNoise(range="least_error", range_every=2), LC(entries=4), ProductQuantization(entries=4, update_every=2)],
    ids=lambda m: type(m).__name__,
)
def test_compiles_without_a_break(method):
    torch._dynamo.reset()
    x = torch.randn(3, 16)
    model = prepare(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), x, method)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(torch._dynamo.config.cache_size_limit + 2):  # a range or a codebook is made anew within a compiled forward too
        compiled(x).square().sum().backward()
    assert bool(model.get_parameter("0.weight").grad.any())
    if not isinstance(method, QuantNoise | ProductQuantization):
        torch.testing.assert_close(compiled(x), model(x))
    torch._dynamo.reset()


# Several methods in one model


class Named(nn.Sequential):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.hidden = nn.Linear(16, 32)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 8)


TOKENS = torch.zeros(1, 3, dtype=torch.long)


def test_a_mapping_gives_each_weight_the_first_method_that_matches():
    mapping = {"*embedding*": STE(bits=8), "hidden": LSQ(bits=2), "h*": QuantNoise(bits=3)}
    model = prepare(Named(), TOKENS, mapping)
    kinds = {q.spec.name: type(q).__name__ for q in model.compression.quantizers}
    assert kinds == {"embedding.weight": "FixedBitsQuantizer", "hidden.weight": "LSQWeight", "head.weight": "QuantNoiseWeight"}
    report = bits_report(convert(model))
    assert {w.name: w.histogram for w in report.weights} == {
        "embedding.weight": {8: 512},
        "hidden.weight": {2: 512},
        "head.weight": {3: 256},
    }
    assert report.method == "STE + LSQ + QuantNoise"


def test_what_no_pattern_matches_stays_in_float():
    model = prepare(Named(), TOKENS, {"head": STE()})
    reasons = {s.name: s.reason for s in model.compression.skipped}
    assert reasons["hidden.weight"] == "no pattern of the mapping matches it"
    assert [q.spec.name for q in model.compression.quantizers] == ["head.weight"]


def test_a_tied_weight_is_matched_by_any_of_its_names():
    model = prepare(Consumers(), IDS, {"head": STE(bits=8), "*": LSQ()})
    by_name = {q.spec.name: type(q).__name__ for q in model.compression.quantizers}
    assert by_name["embed.weight"] == "FixedBitsQuantizer"


def test_the_size_target_counts_what_other_methods_take():
    mapping = {"embedding": STE(bits=8), "*": DiffQConfig(target_mib=0.0017)}
    model = prepare(Named(), TOKENS, mapping)
    assert model_size(model, exact=True) == pytest.approx(0.0017, rel=0.02)
    assert model_size(model, exact=True) <= 0.0017
    embedding = model.compression.quantizers[0].footprint().packed_bits
    assert embedding == 512 * 8 + 32 * 8 + 32 * 32 + 8
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(3):
        model(TOKENS).square().sum().backward()
        optimizer.step()
    report = bits_report(convert(model))
    assert report.packed_size.total_mib == pytest.approx(model_size(model, exact=True))
    assert report.target_mib == 0.0017


# Bad input


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: STE(bits=0), "STE: bits must be a whole number from 1 to 16, got 0"),
        (lambda: STE(bits=2.5), "STE: bits must be a whole number from 1 to 16, got 2.5"),
        (lambda: LSQ(bits=1), "LSQ: bits must be a whole number from 2 to 16, got 1"),
        (lambda: LSQ(group_size=1), "LSQ: group_size=1 would store a scale for every weight"),
        (lambda: LSQ(start="max"), "LSQ: start must be one of"),
        (lambda: LSQ(learned="log"), "LSQ: learned must be one of"),
        (lambda: STE(group_size="row"), 'STE: group_size must be "tensor", "channel" or a number'),
        (lambda: STE(grid="log"), "STE: grid must be one of"),
        (lambda: STE(rest_dtype="int8"), "STE: rest_dtype must be one of"),
        (lambda: STE(min_size=-1), "STE: min_size must be a whole number of at least 0, got -1"),
        (lambda: STE(min_size=1.5), "STE: min_size must be a whole number of at least 0, got 1.5"),
        (lambda: STE(group_size=32.5), "STE: group_size must be a whole number of at least 1, got 32.5"),
        (lambda: LSQ(group_size=True), "LSQ: group_size must be a whole number of at least 1, got True"),
        (lambda: QuantNoise(rate=1.01), "QuantNoise: rate must be from 0 to 1, got 1.01"),
        (lambda: QuantNoise(rate=-0.1), "QuantNoise: rate must be from 0 to 1, got -0.1"),
        (lambda: QuantNoise(rate=float("nan")), "QuantNoise: rate must be from 0 to 1, got nan"),
        (lambda: QuantNoise(range="max"), "QuantNoise: range must be one of"),
        (lambda: QuantNoise(grid="float"), "QuantNoise: grid must be one of"),
        (lambda: QuantNoise(block_size=0), "QuantNoise: block_size must be a whole number of at least 1, got 0"),
        (lambda: QuantNoise(rate="half"), "QuantNoise: rate must be from 0 to 1, got 'half'"),
        (lambda: QuantNoise(range_every=2.5), "QuantNoise: range_every must be a whole number of at least 1, got 2.5"),
        (lambda: STE(bits=True), "STE: bits must be a whole number from 1 to 16, got True"),
    ],
)
def test_settings_out_of_range(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    ("mapping", "error", "match"),
    [
        ({}, ValueError, "the mapping of name patterns to methods is empty"),
        ({"decoder*": STE()}, ValueError, r"prepare: pattern 'decoder\*' matches no parameter\. The model has embedding\.weight"),
        ({"norm": STE(), "*": LSQ()}, PreparationError, r"pattern 'norm' asks for STE where nothing can be quantized \(norm\.weight: 1-d"),
        ({"*": "STE"}, TypeError, r"expected a method .* got '\*': 'STE'"),
        ({"head": STE, "*": LSQ()}, TypeError, "expected a method"),
        ({"head": STE(rest_dtype="float16"), "*": LSQ()}, ValueError, "all methods of a mapping need the same rest_dtype"),
        (
            {"head": DiffQConfig(target_bits=3), "*": DiffQConfig()},
            ValueError,
            r"target_bits concerns the whole model: give each DiffQConfig of the mapping the same, got \{'head': 3, '\*': 4\.0\}",
        ),
        (
            {"head": DiffQConfig(training_steps=10), "norm": STE(), "*": DiffQConfig(training_steps=20)},
            ValueError,
            r"training_steps concerns the whole model: .* got \{'head': 10, '\*': 20\}",
        ),
    ],
)
def test_mappings_that_cannot_work(mapping, error, match):
    net = Named()
    before = set(dir(net))
    with pytest.raises(error, match=match):
        prepare(net, TOKENS, mapping)
    assert set(dir(net)) == before


@pytest.mark.parametrize("method", [STE(bits=4, group_size=4), LSQ(bits=4, group_size=4), QuantNoise(bits=4, group_size=4)], ids=str)
def test_a_group_size_that_does_not_divide_has_a_short_last_group_and_its_scale_is_counted(method):
    model = prepare(nn.Linear(10, 6, bias=False), torch.zeros(1, 10), method)
    (weight,) = bits_report(model).weights
    scales, zero_points = 6 * 3, 6 * 3 * 4 * (model.weight_quantizer.spec.grid == "affine")
    assert model_size(model, exact=True) * 8 * 2**20 == pytest.approx(60 * 4 + scales * 32 + zero_points + 8)
    assert weight.payload_bits == 60 * 4


@pytest.mark.parametrize("method", [STE(bits=3), LSQ(bits=3), QuantNoise(bits=3), QuantNoise(bits=3, range="least_error")], ids=str)
def test_a_constant_weight(method):
    net = nn.Linear(8, 4, bias=False)
    nn.init.constant_(net.weight, 0.25)
    model = prepare(net, torch.zeros(1, 8), method)
    model(torch.ones(1, 8)).sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    torch.testing.assert_close(convert(model)(torch.ones(1, 8)), net(torch.ones(1, 8)), rtol=0.05, atol=0)


def test_settings_that_are_lists():
    mapping = {"embedding": LC(codebook=[-1.0, 1.0], exclude=["norm"], shared=True), "*": DiffQConfig(widths=[2, 4, 8], exclude=["norm"])}
    model = prepare(Named(), TOKENS, mapping)
    assert [type(q).__name__ for q in model.compression.quantizers] == ["LCWeight", "DiffQWeight", "DiffQWeight"]
    assert bits_report(model).method == "LC + DiffQConfig"


def test_no_method_at_all():
    with pytest.raises(TypeError, match="expected a method"):
        prepare(Named(), TOKENS, None)


def test_setup_optimizer_needs_trainable_bits():
    model = prepare(Named(), TOKENS, LSQ())
    with pytest.raises(ValueError, match="no weight has trainable bits: the model was prepared with LSQ"):
        setup_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LC(codebook="binary", entries=4), 'LC: entries=4 has no effect: it is for codebook="adaptive".'),
        (lambda: LC(smallest_power=3), 'LC: smallest_power=3 has no effect: it is for codebook="powers_of_two".'),
        (lambda: LC(codebook="binary", learn_scale=True), "LC: learn_scale=True has no effect: it is for entries of your own."),
        (lambda: QuantNoise(range_every=5), 'QuantNoise: range_every=5 has no effect: it is for range="least_error".'),
        (
            lambda: ProductQuantization(noise="mean", update_every=5),
            'ProductQuantization: update_every=5 has no effect: it is for noise="exact".',
        ),
    ],
)
def test_settings_that_have_no_effect(make, message):
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        make()


# The whole road, on real digits


@pytest.fixture(scope="module")
def digits():
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return (x[order[:1400]], y[order[:1400]]), (x[order[1400:]], y[order[1400:]])


def train(model, data, epochs, lr=3e-3):
    x, y = data
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model, data):
    return float((model.eval()(data[0]).argmax(1) == data[1]).float().mean())


@pytest.fixture(scope="module")
def trained(digits):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))
    train(net, digits[0], 15)
    return net


def compressed(trained, digits, method, epochs=8):
    net = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))
    net.load_state_dict(trained.state_dict())
    model = prepare(net, digits[0][0][:2], method)
    train(model, digits[0], epochs)
    return model


@pytest.mark.parametrize("method", [STE(bits=8), LSQ(bits=8), QuantNoise(bits=8)], ids=str)
def test_eight_bits_keep_the_accuracy_of_float(method, trained, digits):
    expected = accuracy(trained, digits[1])
    assert expected > 0.95
    assert accuracy(compressed(trained, digits, method), digits[1]) >= expected - 0.0051  # two of 397 images


@pytest.mark.parametrize("method", [STE(bits=4), LSQ(bits=3), QuantNoise(bits=4, rate=0.5)], ids=str)
def test_the_road_to_onnx(method, trained, digits, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    from diffq_fx.export import export_onnx

    model = compressed(trained, digits, method)
    found = accuracy(model, digits[1])
    assert found > 0.93
    converted = convert(model)
    assert accuracy(converted, digits[1]) == found
    result = export_onnx(converted, digits[0][0][:4], tmp_path / "digits.onnx")
    assert {width for w in result.weights for width in w.bits} == {method.bits}
    session = onnxruntime.InferenceSession(result.path)
    (name,) = [i.name for i in session.get_inputs()]
    (scores,) = session.run(None, {name: digits[1][0].numpy()})
    exact = float((torch.tensor(scores).argmax(1) == digits[1][1]).float().mean())
    assert exact == pytest.approx(found, abs=0.01)


def test_prepare_diffq_is_the_diffq_case():
    torch.manual_seed(3)
    first = prepare_diffq(Named(), TOKENS)
    torch.manual_seed(3)
    second = prepare(Named(), TOKENS, DiffQConfig())
    assert str(first) == str(second)
