"""What is worth quantizing, and what lies beside the weights in files and reports."""

import pytest
import torch
from torch import nn

from diffq_fx import DiffQConfig, bits_report, convert, prepare
from diffq_fx.export import load_packed, save_packed
from diffq_fx.methods import STE


class Scaled(nn.Conv2d):
    def __init__(self, *args, gain=(64, 1, 1, 1), **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(gain))

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight * self.gain, self.bias, groups=self.groups)


@pytest.mark.parametrize("method", [STE(bits=4), DiffQConfig(target_bits=4, group_size=1), DiffQConfig(group_size="tensor")])
def test_a_gain_of_each_channel_stays_float(method):
    prepared = prepare(Scaled(64, 64, 1), torch.randn(2, 64, 4, 4), method)
    reasons = {skipped.name: skipped.reason for skipped in prepared.compression.skipped}
    assert reasons["gain"] == "shaped (64, 1, 1, 1): a range for each weight takes more than its float"
    assert [q.spec.name for q in prepared.compression.quantizers] == ["weight"]


def test_filters_of_one_weight_stay_float_and_a_row_of_weights_does_not():
    """Depthwise 1x1 filters are gains; one row of many weights has one range."""
    net = nn.Sequential(nn.Conv2d(64, 64, 1, groups=64), nn.Flatten(), nn.Linear(64, 1), nn.Linear(1, 64))
    prepared = prepare(net, torch.randn(2, 64, 1, 1), STE(bits=4))
    assert [q.spec.name for q in prepared.compression.quantizers] == ["2.weight"]


def test_one_range_for_a_whole_gain_is_worth_it():
    prepared = prepare(Scaled(64, 64, 1), torch.randn(2, 64, 4, 4), STE(bits=4, group_size="tensor"))
    assert [q.spec.name for q in prepared.compression.quantizers] == ["weight", "gain"]


class Biased(nn.Module):
    def __init__(self, low):
        super().__init__()
        self.linear, self.table = nn.Linear(16, 16), nn.Parameter(torch.randn(200))
        self.register_buffer("index", torch.arange(100)[:, None] - torch.arange(100) + 99 + low)
        self.register_buffer("signed", torch.arange(-40, 40))

    def forward(self, x):
        return self.linear(self.table[self.index] @ x)


def test_equal_tables_are_packed_once_and_small_and_reported(tmp_path):
    model, x = nn.Sequential(Biased(0), Biased(0), Biased(1)), torch.randn(2, 100, 16)
    converted = convert(prepare(model, x, STE(bits=4)))
    path = save_packed(converted, tmp_path / "m.safetensors")
    assert path.stat().st_size < 3 * 100 * 100  # two tables of a byte for each index; as they are they take 240,000
    found = load_packed(path)
    for name, buffer in model.named_buffers():
        assert found[name].dtype == torch.int64
        assert torch.equal(found[name], buffer)
    other = convert(prepare(nn.Sequential(Biased(0), Biased(1), Biased(0)), x, STE(bits=4)))
    load_packed(other, path)  # a model whose tables differ otherwise
    assert torch.equal(other(x), converted(x))
    report = bits_report(converted)
    assert report.buffer_bits == 8 * (2 * 100 * 100 + 80)
    assert "buffers: 0.01915 MiB beside the parameters" in str(report)
    assert report.buffer_bits == bits_report(prepare(model, x, STE(bits=4))).buffer_bits
