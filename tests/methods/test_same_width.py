"""Weights that share one width: in training, when bits are rounded, in compress, and what cannot share is refused."""

import copy
import math

import pytest
import torch
from torch import nn

from diffq_fx import DiffQConfig, PreparationError, bits_report, compress, convert, model_size, prepare
from diffq_fx.budget.allocation import allocate_widths
from diffq_fx.budget.flat_groups import FlatGroups
from diffq_fx.budget.sensitivity import bits_within
from diffq_fx.integrations.method_json import choice_of_json, choice_to_json
from diffq_fx.methods import STE
from diffq_fx.methods.mapping import MethodChoice, captured
from diffq_fx.parts import stored_weights
from diffq_fx.weights import WeightSpec

IDS = torch.randint(60, (4, 6), generator=torch.Generator().manual_seed(0))
SETTINGS = {"group_size": "tensor", "range_per": 16, "grid": "affine", "widths": (2, 3, 4, 6, 8), "target_bits": 5}
PATTERNS = (("*.q_proj", "*.k_proj", "*.v_proj"), ("*.gate_proj", "*.up_proj"))


class Layer(nn.Module):
    def __init__(self, size=32):
        super().__init__()
        self.norm, self.norm_2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(size, size), nn.Linear(size, size // 2), nn.Linear(size, size // 2)
        self.o_proj = nn.Linear(size, size)
        self.gate_proj, self.up_proj = nn.Linear(size, 2 * size, bias=False), nn.Linear(size, 2 * size, bias=False)
        self.down_proj = nn.Linear(2 * size, size, bias=False)

    def forward(self, x):
        y = self.norm(x)
        q, k, v = self.q_proj(y).unflatten(-1, (4, -1)), self.k_proj(y).unflatten(-1, (2, -1)), self.v_proj(y).unflatten(-1, (2, -1))
        k, v = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
        heads = nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        x = x + self.o_proj(heads.transpose(1, 2).flatten(2))
        y = self.norm_2(x)
        return x + self.down_proj(nn.functional.silu(self.gate_proj(y)) * self.up_proj(y))


class Decoder(nn.Module):
    def __init__(self, tied=True):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(60, 32)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(32, 60, bias=False)
        with torch.no_grad():  # weights whose sensitivity differs, so that their widths would
            self.layers[0].v_proj.weight.mul_(8)
            self.layers[1].q_proj.weight.mul_(0.1)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def trained(method, steps=8, optimizers=1, scope="auto"):
    model = prepare(Decoder(), IDS, method, scope=scope)
    own = list(model.parameters())
    optimizers = [torch.optim.Adam(own[i::optimizers], lr=1e-2) for i in range(optimizers)]
    for _ in range(steps):
        model.zero_grad()
        nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
    return model


ONE_GROUP = {"group_size": "tensor", "range_size": "tensor", "grid": "symmetric"}


def sets_of(model):
    found = {}
    for quantizer in model.compression.learned:
        if quantizer.spec.width_set is not None:
            found.setdefault(quantizer.spec.width_set, []).append(quantizer)
    return sorted(found.values(), key=lambda own: own[0].spec.name)


LAYERS_SETS = [{f"layers.{i}.{name}_proj.weight" for name in names} for i in range(2) for names in (("gate", "up"), ("q", "k", "v"))]


@pytest.mark.parametrize("scope", ["model", "module"])
@pytest.mark.parametrize("asked", [PATTERNS, "same_input"], ids=["patterns", "same input"])
def test_the_sets(asked, scope):
    model = prepare(Decoder(), IDS, DiffQConfig(same_width=asked, **SETTINGS), scope=scope)
    assert [{quantizer.spec.name for quantizer in own} for own in sets_of(model)] == LAYERS_SETS


@pytest.mark.parametrize(
    ("settings", "optimizers"),
    [
        (dict(), 1),
        (dict(training_steps=8), 1),
        (dict(), 2),
        (dict(target_bits=None, penalty=50.0), 1),
        (dict(target_bits=None), 1),
        (dict(target_bits=None, target_mib=0.018, size_of="onnx_file", widths=(2, 4, 8)), 1),
        (dict(target_bits=None, target_mib=0.018, size_of="packed_file"), 1),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:convert")
def test_they_train_and_are_rounded_as_one(settings, optimizers):
    model = trained(DiffQConfig(**(SETTINGS | {"same_width": "same_input"} | settings)), optimizers=optimizers)
    logits = [torch.cat([quantizer.logits.detach() for quantizer in own]) for own in sets_of(model)]
    assert all(torch.equal(each, each[:1].expand_as(each)) for each in logits)
    assert model.compression.frozen or len({float(each[0]) for each in logits}) > 1  # each set moved its own way
    converted = convert(model)
    widths = {weight.spec.name: int(weight.bits) for _, weight in stored_weights(converted)}
    assert all(len({widths[name] for name in own}) == 1 for own in LAYERS_SETS)
    budget = model.compression.budget_bits(measured=True)
    assert (
        budget is None
        or 0.8 * budget < model.compression.exact_bits() - model.compression.rest_bits_now() + model.compression.known.bits_saved <= budget
    )


def test_without_it_the_widths_differ():
    model = trained(DiffQConfig(training_steps=8, **SETTINGS))
    widths = {quantizer.spec.name: int(quantizer.width) for quantizer in model.compression.learned}
    assert any(len({widths[name] for name in own}) > 1 for own in LAYERS_SETS)


def test_a_set_asks_for_the_bits_that_the_loss_of_all_its_weights_asks_for():
    """``4^b`` is what a bit more takes off the loss: its mean, by the number of weights."""
    sets, sizes, asked = (0, 0, 1, None), (10, 30, 10, 10), torch.tensor([2.0, 5.0, 1.0, 3.0])
    specs = [
        WeightSpec(name=str(i), shape=(n, 10), axis=0, width_set=own, **ONE_GROUP)
        for i, (n, own) in enumerate(zip(sizes, sets, strict=True))
    ]
    groups = FlatGroups(specs, torch.device("cpu"))
    first, second, third, fourth = bits_within(groups, asked, groups.fixed_bits + 5 * 600).tolist()
    together = math.log2((10 * 4**2 + 30 * 4**5) / 40) / 2
    assert first == second == pytest.approx(third + together - 1) == pytest.approx(fourth + together - 3)


def test_a_copy_and_a_checkpoint_go_on_as_one():
    model = trained(DiffQConfig(same_width=PATTERNS, **SETTINGS))
    other = copy.deepcopy(model)
    fresh = prepare(Decoder(), IDS, DiffQConfig(same_width=PATTERNS, **SETTINGS))
    fresh.load_state_dict(model.state_dict())
    for each in (other, fresh):
        assert torch.equal(each.eval()(IDS), model.eval()(IDS))
        assert [len(own) for own in sets_of(each)] == [2, 3, 2, 3]


def test_compress_keeps_them_together():
    batches = [torch.randint(60, (4, 6), generator=torch.Generator().manual_seed(i)) for i in range(6)]
    config = DiffQConfig(same_width="same_input", **(SETTINGS | {"target_bits": 6}))
    converted = compress(Decoder(), batches, config, steps=2, progress=False)
    widths = {weight.spec.name: int(weight.bits) for _, weight in stored_weights(converted)}
    assert all(len({widths[name] for name in own}) == 1 for own in LAYERS_SETS)
    assert len(set(widths.values())) > 1
    assert bits_report(converted).average_bits_in_all <= 6


def test_a_tied_embedding_with_limits_of_its_own_and_the_size_of_all():
    both = {"target_mib": 0.013, "range_per": 16, "group_size": "tensor", "grid": "affine", "scale_dtype": "float16"}
    mapping = {
        "head": DiffQConfig(widths=(6, 8), **both),  # the tied weight goes by this name as well
        "*": DiffQConfig(widths=(2, 3, 4), same_width="same_input", **both),
    }
    model = trained(mapping)
    assert [{quantizer.spec.name for quantizer in own} for own in sets_of(model)] == LAYERS_SETS
    converted = convert(model)
    widths = {weight.spec.name: int(weight.bits) for _, weight in stored_weights(converted)}
    assert widths.pop("embed.weight") in (6, 8)
    assert set(widths.values()) <= {2, 3, 4}
    assert converted.embed.weight_quantized is converted.head.weight_quantized
    assert 0.012 < model_size(model, exact=True) <= 0.013


def test_a_set_is_raised_as_a_whole_or_not_at_all():
    """Three weights of 100 and one of 90 values: 250 bits more are too few for the set and enough for the one."""
    specs = [WeightSpec(name=str(i), shape=(10, 10), axis=0, width_set=0, **ONE_GROUP) for i in range(3)]
    groups = FlatGroups(
        [*specs, WeightSpec(name="3", shape=(9, 10), axis=0, **ONE_GROUP)],
        torch.device("cpu"),
    )
    bits = torch.tensor([4.9, 4.9, 4.9, 4.1])
    for room, expected in ((250, [4, 4, 4, 5]), (300, [5, 5, 5, 4]), (395, [5, 5, 5, 5]), (80, [4, 4, 4, 4])):
        assert allocate_widths(groups, bits, groups.fixed_bits + 4 * 390 + room).tolist() == expected


def test_what_wildcards_stand_for():
    assert captured("model.layers.3.q_proj.weight", "*.q_proj") == ("model.layers.3",)
    assert captured("layers.3.q.weight", "layers.?.q.weight") == ("3",)
    assert captured("layers.a.q", "layers.[!b].q") == ("a",)
    assert captured("layers.b.q", "layers.[!b].q") is None
    assert captured("head.weight", "head") == ()
    assert captured("heads.weight", "head") is None
    assert captured("a+b.q.weight", "a+b.*") == ("q.weight",)


def test_the_setting_survives_a_file():
    choice = MethodChoice.of({"head": STE(bits=8), "*": DiffQConfig(same_width=[["*.a", "*.b"]], **SETTINGS)}, "prepare")
    assert choice_of_json(choice_to_json(choice)) == choice


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ("same", TypeError, 'same_width must be "same_input" or sets of patterns'),
        (("*.q_proj", "*.k_proj"), TypeError, 'same_width must be "same_input" or sets of patterns such as'),
        (((),), TypeError, "same_width must be"),
        (((1, 2),), TypeError, "same_width must be"),
    ],
)
def test_settings_that_are_none(asked, error, message):
    with pytest.raises(error, match=message):
        DiffQConfig(same_width=asked, **SETTINGS)


def test_channels_of_several_widths_share_none():
    with pytest.raises(ValueError, match="same_width needs group_size=\"tensor\", one width a weight, got group_size='channel'"):
        DiffQConfig(same_width="same_input")


OWN = DiffQConfig(same_width=PATTERNS, **SETTINGS)


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        (DiffQConfig(same_width=(("*.q_prj", "*.k_proj"),), **SETTINGS), ValueError, "same_width pattern '\\*.q_prj' matches no parameter"),
        (
            DiffQConfig(same_width=(("*.q_proj",),), **SETTINGS),
            ValueError,
            "leaves no two weights to share a width; it matches layers.0.q_proj.weight, layers.1",
        ),
        (DiffQConfig(same_width=(("*.0.q_proj", "*.1.q_proj.weight", "*.norm"),), **SETTINGS), None, ""),
        (DiffQConfig(same_width=(("*.norm", "*.norm_2"),), **SETTINGS), ValueError, "it matches weights that stay in float alone"),
        (
            {"*.v_proj": STE(bits=8), "*": OWN},
            PreparationError,
            "'layers.0.q_proj.weight' and 'layers.0.v_proj.weight' are to share one width",
        ),
        (
            {"*.v_proj": DiffQConfig(**SETTINGS), "*": DiffQConfig(same_width="same_input", **SETTINGS)},
            PreparationError,
            "their configs differ",
        ),
        ({"*.v_proj": OWN, "*": OWN}, None, ""),
    ],
    ids=str,
)
def test_sets_that_cannot_share_are_refused_before_anything_is_changed(method, error, message):
    model = Decoder()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if error is None:
        assert sets_of(prepare(model, IDS, method))
        return
    with pytest.raises(error, match=message):
        prepare(model, IDS, method)
    assert not hasattr(model, "compression")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
