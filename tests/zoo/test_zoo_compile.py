"""torch.compile without a graph break, forward and backward, in train mode; and one graph that computes what eager computes."""

import copy

import pytest
import torch

from zoo.checks import assert_same, loss_of, prepared, run, tensors_in, trained
from zoo.models import BY_NAME


@pytest.fixture(autouse=True)
def _dynamo():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):  # without it RNNs break the graph, those of the float model too
        yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scope"),
    [
        ("resnet20_cifar", "model"),
        ("tied", "model"),
        ("tied", "module"),
        ("mha", "model"),
        ("mha", "module"),
        ("lstm_lm", "model"),
        ("bert", "module"),
    ],
)
def test_compiles_without_a_break_and_trains(name: str, scope: str):
    entry = BY_NAME[name]
    model = prepared(entry, scope=scope)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    first, second = (tensors_in(run(compiled, entry, "train", seed=seed)) for seed in (1, 2))
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    loss_of(run(compiled, entry, "train")).backward()
    for quantizer in model.compression.quantizers:
        for parameter in (model.get_parameter(quantizer.spec.name), quantizer.logits):
            assert parameter.grad is not None, quantizer.spec.name
            assert bool(parameter.grad.any()), quantizer.spec.name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tied", "mha", "lstm_lm", "bert"])
def test_compiled_eval_computes_what_eager_computes(name: str):
    entry = BY_NAME[name]
    for model in trained(entry):
        compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
        found, expected = (tensors_in(run(each, entry, "eval without grad")) for each in (compiled, model))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_same_seed_draws_the_same_noise_compiled():
    entry = BY_NAME["tied"]
    model = prepared(entry)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, entry, "train", seed=4), run(model, entry, "train", seed=4))
