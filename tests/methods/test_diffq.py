"""DiffQ in all its settings, from prepare to convert."""

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from torch import nn

from diffq_fx import DiffQConfig, convert_diffq, model_size, prepare_diffq


class Consumers(nn.Module):
    """One of each kind of weight; 10 and 9 inputs, so that no block size divides all rows."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 10)
        self.conv1 = nn.Conv1d(10, 6, 3, padding=1)
        self.up = nn.ConvTranspose1d(6, 9, 3, padding=1)
        self.rnn = nn.GRU(9, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.bare = nn.Parameter(torch.randn(8, 5))
        self.head = nn.Linear(5, 4)

    def forward(self, ids):
        x = torch.relu(self.conv1(self.embed(ids).transpose(1, 2)))
        x, _ = self.rnn(self.up(x).transpose(1, 2))
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.head(x @ self.bare)


IDS = torch.randint(12, (3, 7), generator=torch.Generator().manual_seed(0))
WEIGHTS = 9  # embed, conv1, up, two of the GRU, in_proj and out_proj, bare, head


def train_a_little(model, *inputs, steps=3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(*inputs).square().mean().backward()
        assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())
        optimizer.step()


GROUPS = (
    ("channel", "channel"),
    ("channel", "tensor"),
    ("tensor", "tensor"),
    ("tensor", "channel"),
    ("tensor", 4),
    (4, "channel"),
    (4, "group"),
    (1, "tensor"),
    (8, "tensor"),
)
EVIDENCE = [pytest.mark.evidence]
SETTINGS = [
    pytest.param(
        *groups, grid, noise, scope, marks=[] if (number + turn) % 4 == 2 * (noise == "uniform") + (scope == "model") else EVIDENCE
    )
    for number, groups in enumerate(GROUPS)
    for turn, grid in enumerate(("affine", "half", "symmetric", "float"))
    for noise in ("uniform", "gaussian")
    for scope in ("model", "module")
]
"""All of them; the gate has each grid with all groups, and with each noise and scope in turns."""


@pytest.mark.parametrize(("group_size", "range_per", "grid", "noise", "scope"), SETTINGS)
def test_every_setting_trains_and_converts(group_size, range_per, grid, noise, scope):
    config = DiffQConfig(target_bits=None, group_size=group_size, range_per=range_per, grid=grid, noise=noise)
    model = prepare_diffq(Consumers(), IDS, config, scope=scope)
    assert len(model.compression.quantizers) == WEIGHTS
    assert not torch.equal(model(IDS), model(IDS))
    train_a_little(model, IDS)
    (model(IDS).sum() + model_size(model)).backward()
    with torch.no_grad():  # some kernels of torch differ in the last bit where a gradient is asked for
        expected = model.eval()(IDS)
        assert torch.equal(model(IDS), expected)
    for quantizer in model.compression.quantizers:
        assert quantizer.logits.shape == quantizer.spec.bits_layout.shape
    converted = convert_diffq(model)
    with torch.no_grad():
        assert torch.equal(converted(IDS), expected)
    assert not any(p.ndim > 1 for p in converted.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)
    x = torch.randn(2, 8, dtype=dtype)
    model = prepare_diffq(net, x, DiffQConfig(target_bits=None))
    train_a_little(model, x)
    assert model(x).dtype == dtype
    (model_size(model) + model(x).sum()).backward()
    assert torch.equal(convert_diffq(model)(x), model.eval()(x))


def test_half_precision_keeps_the_bits_in_float32():
    model = prepare_diffq(nn.Linear(8, 16), torch.zeros(1, 8), DiffQConfig(target_bits=None))
    logits = model.compression.quantizers[0].logits
    before = logits.clone()
    model.to(torch.bfloat16)
    assert model.weight.dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    assert torch.equal(logits, before)
    assert model(torch.zeros(1, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_noise_has_the_step_of_the_bits():
    model = prepare_diffq(
        nn.Linear(1000, 4, bias=False), torch.zeros(1, 1000), DiffQConfig(target_bits=None, min_bits=2, clip_ranges=False)
    )
    (quantizer,) = model.compression.quantizers
    weight = model.weight.detach()
    with torch.no_grad():
        quantizer.logits.copy_(torch.tensor([[-0.3], [-0.1], [0.1], [0.3]]))
        bits = quantizer.bits()
        difference = quantizer(weight) - weight
    step = (weight.amax(1) - weight.amin(1)) / (2 ** bits[:, 0] - 1)
    assert bool((difference.abs().amax(1) <= step / 2).all())
    torch.testing.assert_close(difference.std(1) * 12**0.5, step, rtol=0.1, atol=0)


def test_the_papers_preset():
    config = DiffQConfig.paper(penalty=1.0)
    model = prepare_diffq(nn.Linear(64, 64), torch.zeros(1, 64), config)
    (quantizer,) = model.compression.quantizers
    assert quantizer.logits.shape == (64, 8)
    assert quantizer.spec.range_layout.shape == (1, 1)
    assert quantizer.bits().flatten()[0].item() == pytest.approx(8)
    train_a_little(model, torch.randn(4, 64))
    assert torch.equal(convert_diffq(model)(torch.ones(1, 64)), model.eval()(torch.ones(1, 64)))


def test_eval_passes_the_gradient_straight_through():
    model = prepare_diffq(nn.Linear(8, 4), torch.zeros(1, 8), DiffQConfig(target_bits=None)).eval()
    x = torch.randn(3, 8)
    model(x).sum().backward()
    torch.testing.assert_close(model.weight.grad, x.sum(0).expand(4, 8))


def test_min_size_skips_with_its_reason():
    net = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    model = prepare_diffq(net, torch.zeros(1, 8), DiffQConfig(target_bits=None, min_size=100))
    assert [q.spec.name for q in model.compression.quantizers] == ["0.weight"]
    assert ("1.weight", "64 weights, fewer than min_size=100") in [(s.name, s.reason) for s in model.compression.skipped]


def test_float16_rest_is_exact_in_half():
    net = nn.Linear(8, 16)
    model = prepare_diffq(net, torch.zeros(1, 8), DiffQConfig(target_bits=None, rest_dtype="float16"))
    train_a_little(model, torch.randn(2, 8))
    model_size(model).backward()
    converted = convert_diffq(model)
    assert torch.equal(converted.bias, converted.bias.half().float())
    assert not torch.equal(model.bias, model.bias.half().float())


def test_a_manual_update_without_an_optimizer_still_converts_at_the_target():
    model = prepare_diffq(nn.Linear(64, 64), torch.zeros(1, 64), DiffQConfig(target_bits=4))
    for _ in range(5):
        model(torch.randn(8, 64)).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 10 * parameter.grad
                parameter.grad = None
    budget = (model.compression.budget_bits() + model.compression.rest_bits) / 8 / 2**20
    assert model_size(model, exact=True) == pytest.approx(budget, rel=0.01)


@pytest.mark.parametrize(
    "settings", [{"max_bits": 4, "target_bits": 3}, {"min_bits": 6, "target_bits": 7.5}, {"max_bits": 2, "target_bits": None}]
)
def test_a_start_that_nobody_asked_for_refuses_no_limits(settings):
    config = DiffQConfig(**settings)
    assert config.min_bits < config.start_bits <= config.max_bits
    model = prepare_diffq(nn.Linear(64, 32), torch.zeros(1, 64), config)
    train_a_little(model, torch.randn(4, 64))


@pytest.mark.parametrize("aim", ["target_bits", "target_mib", "penalty"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0, "4", True])
def test_an_aim_is_a_finite_number(aim, value):
    kind = TypeError if isinstance(value, str | bool) else ValueError
    with pytest.raises(kind, match=f"DiffQConfig: {aim} must be .*, got {value!r}"):
        DiffQConfig(**{aim: value})


@pytest.mark.parametrize("widths", [4, "248", (2, 4.5), (2, "4")])
def test_widths_are_whole_numbers(widths):
    with pytest.raises(TypeError, match=r"DiffQConfig: widths must be a tuple of whole numbers like \(2, 4, 8\), got"):
        DiffQConfig(widths=widths)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config)), dataclasses.replace])
@pytest.mark.parametrize("settings", [{}, {"penalty": 2.0}, {"target_mib": 1.0}, {"target_bits": None}])
def test_a_copied_config_has_the_same_aim(settings, way):
    config = DiffQConfig(**settings)
    assert way(config) == config
    assert config.target_bits == (None if settings else 4)


def test_an_untrained_model_clips_no_weight_from_4_bits_on():
    torch.manual_seed(0)
    net = nn.Linear(256, 16, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.distributions.StudentT(3.0).sample((16, 256)))
    model = prepare_diffq(net, torch.zeros(1, 256), DiffQConfig(target_bits=4.3, min_bits=4)).eval()
    (quantizer,) = model.compression.learned

    def clipped():
        weight = quantizer.weight.detach()
        return bool(((quantizer(weight) - weight).abs() > weight.abs().amax(1, keepdim=True) / 10).any())

    assert not clipped()
    model.compression.note(steps=1)
    assert clipped()  # now a training makes up for it, and the least error counts
    model.compression.note(steps=0)
    assert not clipped()


def test_the_papers_settings_with_some_of_ones_own():
    config = DiffQConfig.paper(10, 16, min_bits=1, max_bits=10, min_size=0)
    assert config == dataclasses.replace(DiffQConfig.paper(10, 16), min_bits=1, max_bits=10, min_size=0)
    assert DiffQConfig.paper(None, target_bits=3).has_target


@pytest.mark.parametrize(("name", "value"), [("min_bits", True), ("max_bits", None), ("init_bits", "four"), ("min_bits", (3,))])
def test_limits_that_are_no_numbers(name, value):
    with pytest.raises(TypeError, match=f"DiffQConfig: {name} must be a number, got"):
        DiffQConfig(**{name: value})
