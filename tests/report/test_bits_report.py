"""bits_report: hand-computed numbers, prepared against converted, every model it can be given, and its errors."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

import diffq_fx
from diffq_fx import DiffQConfig, DiffQWarning, PreparationError, bits_report, convert_diffq, model_size, prepare, prepare_diffq
from diffq_fx.budget.bit_state import GAIN
from diffq_fx.functional import logits_from_bits
from diffq_fx.methods import LC
from diffq_fx.storage import StoredWeight

MIB_BITS = 8 * 2**20


def set_bits(prepared, *per_weight):
    """Give the groups of each weight their bits, in the order of the model's parameters."""
    for quantizer, bits in zip(prepared.compression.learned, per_weight, strict=True):
        config = quantizer.config
        wanted = torch.tensor(bits, dtype=torch.float32).reshape(quantizer.logits.shape)
        with torch.no_grad():
            quantizer.logits.copy_(logits_from_bits(wanted, config.min_bits, config.max_bits, GAIN))
    return prepared


def free(**settings):
    return DiffQConfig(target_bits=None, **settings)


def convert(prepared):
    with pytest.warns(DiffQWarning, match="never moved"):
        return convert_diffq(prepared)


def tiny():
    """Two Linear of 4x8 and 2x4: 32 and 8 weights, 4 and 2 biases."""
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    return set_bits(prepare_diffq(model, torch.zeros(1, 8), free()), [2, 3, 3, 5], [4, 4])


def test_the_width_of_every_group():
    prepared = tiny().train()
    for model in (prepared, convert(prepared)):
        assert [weight.group_bits.tolist() for weight in bits_report(model).weights] == [[[2], [3], [3], [5]], [[4], [4]]]
    set_bits(prepared, [6, 3, 3, 5], [4, 7])  # in training, without a forward in eval()
    assert [weight.group_bits.flatten().tolist() for weight in bits_report(prepared).weights] == [[6, 3, 3, 5], [4, 7]]
    (codebook,) = bits_report(prepare(nn.Linear(8, 4), torch.zeros(1, 8), LC(entries=4))).weights
    assert codebook.group_bits is None


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(6, 10, bias=False)
        self.embedding = nn.Embedding(10, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.decoder(x + self.attention(x, x, x, need_weights=False)[0])


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Conv1d(2, 2, 1)
        self.first = nn.Conv1d(2, 2, 3)

    def forward(self, x):
        y = self.first(x)
        return self.last(y) if float(y.detach().sum()) > 1e9 else self.last(y) + 1


MODELS = {
    "tiny": (tiny, None, None),
    "tied": (Tied, torch.zeros(1, 3, dtype=torch.long), {}),
    "module scope": (Branching, torch.ones(1, 2, 5), {}),
    "blocks": (lambda: nn.Linear(7, 5), torch.zeros(1, 7), {"group_size": 3}),
    "tensor": (lambda: nn.Linear(7, 5), torch.zeros(1, 7), {"group_size": "tensor", "range_per": "tensor", "rest_dtype": "float16"}),
    "symmetric": (lambda: nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 5, 5), {"grid": "symmetric"}),
    "single weights, float grid": (lambda: nn.Linear(7, 5), torch.zeros(1, 7), {"group_size": 1, "grid": "float", "range_per": "tensor"}),
    "transposed": (lambda: nn.ConvTranspose1d(3, 4, 2), torch.zeros(1, 3, 5), {}),
    "bfloat16": (lambda: nn.Linear(8, 4).bfloat16(), torch.zeros(1, 8, dtype=torch.bfloat16), {}),
}


def make(name):
    model, example, settings = MODELS[name]
    if example is None:
        return model()
    prepared = prepare_diffq(model(), example, free(**settings))
    torch.manual_seed(0)
    return set_bits(prepared, *(torch.randint(2, 8, q.logits.shape).tolist() for q in prepared.compression.learned))


class TestNumbers:
    def test_one_weight_by_hand(self):
        first, second = bits_report(tiny()).weights
        assert (first.name, first.shape, first.consumer, first.numel) == ("0.weight", (4, 8), "linear", 32)
        assert first.histogram == {2: 8, 3: 16, 5: 8}
        assert (first.min_bits, first.max_bits) == (2, 5)
        assert first.payload_bits == 8 * 2 + 16 * 3 + 8 * 5
        assert first.average_bits == 104 / 32
        # 4 scales of 32 bits, 4 zero points of a bit more than their group, one byte of limits; 4 codes of ceil(log2(1 + 5 - 2)) bits
        assert first.scale_bits == 4 * 32 + (3 + 4 + 4 + 6) + 8
        assert first.coding_bits == 4 * 2
        # 5 bits sit in int8, and so do the 4 zero points
        assert (first.container_bits, first.container_payload_bits, first.container_scale_bits) == (8, 32 * 8, 4 * (32 + 8))
        assert first.float_bits == 32 * 32
        assert (second.histogram, second.coding_bits, second.container_bits) == ({4: 8}, 0, 4)
        assert second.scale_bits == 2 * 32 + 2 * 5 + 8

    def test_totals_by_hand(self):
        report = bits_report(tiny())
        levels, overhead, rest = 104 + 32, 153 + 8 + 82, 6 * 32
        assert report.numel == 40
        assert report.histogram == {2: 8, 3: 16, 4: 8, 5: 8}
        assert report.packed_size.total_bits == levels + overhead + rest
        assert report.container_size.total_bits == (256 + 160) + (32 + 2 * 36) + rest
        assert report.float_size.total_bits == 46 * 32
        assert report.average_bits == levels / 40
        assert report.average_bits_in_all == (levels + overhead) / 40
        assert report.compression_ratio == pytest.approx(46 * 32 / (levels + overhead + rest))
        assert report.packed_size.total_mib == (levels + overhead + rest) / MIB_BITS

    def test_other_grids_in_the_container(self):
        symmetric, paper = (bits_report(make(name)).weights[0] for name in ("symmetric", "single weights, float grid"))
        assert symmetric.container_scale_bits == 4 * 32  # no zero points
        assert paper.container_scale_bits == 35 * 64  # a scale and an offset for each weight
        assert any("float grid" in note for note in bits_report(make("single weights, float grid")).notes)

    def test_skipped_parameters_keep_their_reasons_and_dtypes(self):
        model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)).bfloat16()
        report = bits_report(prepare_diffq(model, torch.zeros(1, 8, dtype=torch.bfloat16), free(exclude=("1.weight",))))
        assert [(each.name, each.reason) for each in report.skipped][1:] == [
            ("1.weight", "excluded by '1.weight'"),
            ("1.bias", "1-d: a bias or a norm's scale"),
        ]
        assert report.rest_float_bits == (4 + 8 + 2) * 16
        assert report.weights[0].float_bits == 32 * 16

    def test_a_tied_weight_counts_once(self):
        report = bits_report(make("tied"))
        tied = next(weight for weight in report.weights if weight.aliases)
        assert {tied.name, *tied.aliases} == {"decoder.weight", "embedding.weight"}
        assert report.numel == 60 + 18 * 6 + 36


@pytest.mark.parametrize("name", MODELS)
class TestEveryModel:
    def test_bit_packed_is_the_exact_model_size(self, name):
        prepared = make(name)
        assert bits_report(prepared).packed_size.total_mib == model_size(prepared, exact=True)

    def test_converted_has_the_report_of_the_prepared(self, name):
        prepared = make(name)
        before, after = bits_report(prepared), bits_report(convert(prepared))
        assert after.stage == "converted"
        assert after.weights == before.weights
        assert after.skipped == before.skipped
        for size in ("packed_size", "container_size", "float_size"):
            assert getattr(after, size) == getattr(before, size)

    def test_levels_are_those_that_are_stored(self, name):
        converted = convert(make(name))
        stored = {m.spec.name: m for m in converted.modules() if isinstance(m, StoredWeight)}
        report = bits_report(converted)
        assert [weight.name for weight in report.weights] == list(dict.fromkeys(weight.name for weight in report.weights))
        assert {weight.name for weight in report.weights} == set(stored)
        for weight in report.weights:
            held = stored[weight.name]
            assert weight.payload_bits == int((held.bits.long() * held.spec.bits_layout.counts()).sum())
            assert -(-weight.container_payload_bits // 8) == held.levels.nbytes

    def test_json_round_trip(self, name):
        data = bits_report(make(name)).as_dict()
        assert json.loads(json.dumps(data, allow_nan=False)) == data


class TestWhatIsReported:
    def test_scope_and_reason(self):
        assert bits_report(tiny()).scope == "model"
        assert "faithful" in bits_report(tiny()).scope_reason
        report = bits_report(make("module scope"))
        assert report.scope == "module"
        assert report.scope_reason.startswith("model scope: ")
        asked = prepare_diffq(nn.Linear(8, 4), torch.zeros(1, 8), free(), scope="module")
        assert bits_report(asked).scope_reason == "asked for"

    def test_target_and_price_of_a_bit(self):
        linear, example = nn.Linear(32, 32), torch.zeros(1, 32)
        report = bits_report(prepare_diffq(linear, example, DiffQConfig(target_bits=5)))
        assert (report.target_bits, report.target_mib, report.penalty, report.lambda_per_bit) == (5, None, None, None)
        report = bits_report(prepare_diffq(linear, example, DiffQConfig(target_mib=0.0008)))
        assert (report.target_bits, report.target_mib) == (None, 0.0008)
        report = bits_report(prepare_diffq(linear, example, DiffQConfig(penalty=2.0)))
        assert report.penalty == report.lambda_per_mib == 2.0
        assert report.lambda_per_bit == 2.0 / MIB_BITS

    def test_a_multiplier_is_shown_where_there_is_one(self):
        prepared = tiny()
        prepared.compression.register_buffer("pressure_sums", torch.tensor([[-0.5, 1, 0, 0, 0, 1]]))  # the gradient, and that of the size
        report = bits_report(prepared)
        assert (report.lambda_per_bit, report.lambda_per_mib) == (0.5, 0.5 * MIB_BITS)
        assert "0.5 loss per bit" in str(report)

    def test_says_that_the_bits_never_moved(self):
        prepared = tiny()
        assert any("no optimizer step" in note for note in bits_report(prepared).notes)
        with pytest.warns(DiffQWarning, match="the bits never moved"):
            assert bits_report(convert_diffq(prepared)).notes == bits_report(prepared).notes
        prepared(torch.randn(2, 8)).sum().backward()
        torch.optim.SGD(prepared.parameters(), lr=0.1).step()
        assert bits_report(prepared).notes == ()

    def test_changes_nothing(self):
        prepared = tiny()
        before = {name: value.clone() for name, value in prepared.state_dict().items()}
        training = prepared.training
        bits_report(prepared)
        assert prepared.training == training
        for name, value in prepared.state_dict().items():
            assert torch.equal(value, before[name]) or name.endswith(".width")  # which follow from the bits


class TestWhatIsGiven:
    def test_distributed_data_parallel(self, tmp_path):
        prepared = tiny()
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            wrapped = nn.parallel.DistributedDataParallel(prepared)
            assert bits_report(wrapped) == bits_report(prepared)
        finally:
            torch.distributed.destroy_process_group()

    def test_wrapped_copied_and_loaded(self):
        prepared = tiny()
        converted = convert(prepared)
        expected = bits_report(converted).weights
        copies = [nn.DataParallel(converted), copy.deepcopy(converted), pickle.loads(pickle.dumps(converted)), copy.deepcopy(prepared)]
        for model in copies:
            assert bits_report(model).weights == expected

    def test_a_float_model_is_refused(self):
        with pytest.raises(PreparationError, match=r"bits_report: the Linear is neither prepared nor converted\. Call prepare_diffq"):
            bits_report(nn.Linear(4, 4))

    def test_a_part_of_a_converted_model_is_refused(self):
        stored = next(module for module in convert(tiny()).modules() if isinstance(module, StoredWeight))
        with pytest.raises(PreparationError, match=r"a part of a converted model\. Give the whole model"):
            bits_report(nn.Sequential(stored))

    def test_is_public(self):
        assert diffq_fx.bits_report is bits_report
        assert isinstance(bits_report(tiny()), diffq_fx.BitsReport)
