"""The benchmark without training: what is put back lies on so many levels, its size is counted to the bit, the table says which is which."""

import copy
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("onnxruntime")

from benchmarks.frontier.__main__ import main
from benchmarks.frontier.job import Job, NotApplicableError
from benchmarks.frontier.points import read_points
from benchmarks.frontier.post_training import POST_TRAINING
from benchmarks.frontier.post_training.matrices import Setting, measured, mib_of, nearest, replace_matrices
from benchmarks.frontier.post_training.ours import _bits_with_embedding
from benchmarks.frontier.post_training.quantizers import _ort_default, _ort_hqq, _ort_k_quant, _torchao_hqq, _torchao_rtn
from benchmarks.frontier.report import report_task
from benchmarks.frontier.tasks import TASKS, Task
from benchmarks.frontier.training import silent

HALF = 16


class Correlated(Task):
    """A linear model of inputs that hang together."""

    name, score_name, files, higher_is_better = "correlated", "output error", (), False
    steps, rate = 1, 1e-3

    def load(self, folder):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(256, 4, generator=generator) @ torch.randn(4, 64, generator=generator)
        self.x += 0.1 * torch.randn(256, 64, generator=generator)

    def make_float_model(self, folder, tell):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 32))

    def batches(self, seed):
        while True:
            yield (self.x,), self.float_model(self.x).detach()

    def criterion(self, output, target):
        return (output - target).square().mean()

    def test_batches(self):
        yield from [next(self.batches(0))]

    def summarize(self, outputs, targets):
        return {"score": float(self.criterion(outputs[0], targets[0]))}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer, self.head = nn.Embedding(50, 64), nn.Linear(64, 64), nn.Linear(64, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.layer(self.embedding(ids)))


@pytest.mark.parametrize("quantize", [_ort_default, _ort_hqq, _ort_k_quant, _torchao_rtn, _torchao_hqq])
@pytest.mark.parametrize("bits", [4, 2])
def test_rounded_values_lie_on_the_levels_that_are_counted(quantize, bits):
    if "torchao" in quantize.__name__ and importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    rows = torch.randn(12, 96, generator=torch.Generator().manual_seed(0))
    values, size = quantize(rows, Setting(bits, 32, HALF + bits))
    assert values.shape == rows.shape
    assert size == 12 * 96 * bits + 12 * 3 * (HALF + bits)
    for block in values.reshape(-1, 32):
        assert 2 <= len(block.unique()) <= 2**bits
    step = (rows.view(-1, 32).amax(1) - rows.view(-1, 32).amin(1)).max() / (2**bits - 1)
    assert (values - rows).square().mean().sqrt() < step / 2


def test_a_short_last_block_has_a_scale_of_its_own():
    rows = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    for quantize in (_ort_default, _ort_k_quant):
        values, size = quantize(rows, Setting(4, 32, HALF + 4))
        assert values.shape == rows.shape
        assert size == 3 * 40 * 4 + 3 * 2 * (HALF + 4)


def test_a_tied_embedding_is_rounded_once_and_has_8_bits_where_it_is_left_out():
    seen, model = [], Tied()
    given = model.embedding.weight.detach().clone()

    def to_zero(name, rows):
        seen.append(name)
        return torch.zeros_like(rows), 7.0

    assert replace_matrices(model, to_zero, embedding=False) == 50 * 64 * 8 + 50 * 32 + 7
    assert seen == ["layer.weight"]
    assert not model.layer.weight.any()
    assert 0 < (model.head.weight - given).abs().max() <= given.abs().max() / 127 / 2 + 1e-6
    assert replace_matrices(model, to_zero, embedding=True) == 14
    assert mib_of(model, 14) == (14 + 64 * 32) / 8 / 2**20


def test_compress_gets_the_size_of_an_embedding_at_8_bits_and_the_rest_at_the_budget():
    job = SimpleNamespace(bits=3.0, task=SimpleNamespace(float_model=Tied()))
    assert _bits_with_embedding(job) == (50 * 64 * 8 + 50 * 32 + 64 * 64 * 3) / (50 * 64 + 64 * 64)


def test_the_setting_next_to_the_budget_is_taken_or_refused():
    settings = [Setting(4, 64, 20), Setting(2, 64, 18)]
    assert nearest(settings, 4.25).bits == 4
    assert nearest(settings, 2.5).bits == 2
    with pytest.raises(NotApplicableError, match="takes 2.28 bits a weight, 3.2 are asked for"):
        nearest(settings, 3.2)


def test_memory_is_that_of_what_is_within():
    with measured() as found:
        torch.ones(64 * 2**18).sum()  # more than the C library ever keeps for later (32 MiB), so that it takes memory anew
    if "peak_mib" in found:
        assert found["peak_mib"] >= 55


@pytest.mark.filterwarnings("ignore:convert. the bits never moved")
def test_systems_of_one_width_have_it_everywhere_and_differ_in_ranges_and_rounding_alone():
    task, points = Correlated(None), {}
    for name in ("untrained", "untrained-span", "untrained-compress", "untrained-span-g64"):
        points[name] = POST_TRAINING[name].run(
            SimpleNamespace(task=task, whole_bits=3, copy_of_float=lambda: copy.deepcopy(task.float_model))
        )
    assert {round(point["bits_a_weight"], 4) for point in points.values()} == {round(3 + 36 / 64 + 8 / 2048, 4)}  # and the width
    assert points["untrained-compress"]["score"] < 0.5 * points["untrained-span"]["score"]
    assert points["untrained-span-g64"]["score"] == points["untrained-span"]["score"]


@pytest.mark.parametrize("name", ["compress-own-e8", "compress-blocks-e8"])
def test_what_needs_a_decoder_says_so(name):
    with pytest.raises(NotApplicableError, match="decoders"):
        POST_TRAINING[name].run(SimpleNamespace(task=Correlated(None)))


def test_gptq_is_nearer_in_the_output_than_rounding_to_nearest():
    pytest.importorskip("llmcompressor")
    task = Correlated(None)
    points = {}
    for name in ("gptq-e8", "ort-rtn-e8"):
        job = Job(task=task, bits=2.5, seed=0, steps=0, rate=0.0, penalty=None, bits_rate=0.0, through_onnx=False, tell=silent)
        points[name] = POST_TRAINING[name].run(job)
    assert points["gptq-e8"]["score"] < 0.5 * points["ort-rtn-e8"]["score"]
    assert points["gptq-e8"]["bits_a_weight"] == pytest.approx(2 + 18 / 32)


def test_the_report_has_a_table_of_its_own_with_the_best_first(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "correlated", Correlated)
    main(["run", "correlated", "--data", ".", "--results", str(tmp_path), "--systems", "ste,rtn,ort-rtn,compress", "--bits", "2.5"])
    points = {point["system"]: point for point in read_points(tmp_path, "correlated")}
    assert points["compress"]["bits_a_weight"] <= 2.5
    assert points["rtn"]["bits_a_weight"] == pytest.approx(2 + 34 / 64 + 8 / 2048)  # and the width
    text = report_task(tmp_path, Correlated).read_text()
    table = [line.split(" | ") for line in text[text.index("Without training") :].splitlines() if line.startswith("| 2.5")]
    assert [float(row[4]) for row in table] == sorted(float(row[4]) for row in table)
    assert {row[1] for row in table} == {"rtn", "ort-rtn", "compress"}
    assert "| ste |" in text
