"""torch.compile without a graph break, forward and backward, in train mode; and one graph that computes what eager computes."""

import copy
import shutil

import pytest
import torch

from diffq_fx import freeze_bits, prepare_diffq
from zoo.checks import loss_of, prepared, run, tensors_in, trained
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
    found, expected = run(compiled, entry, "train", seed=4), run(model, entry, "train", seed=4)
    for each, wanted in zip(tensors_in(found), tensors_in(expected), strict=True):  # eager makes range, step and noise in one kernel
        torch.testing.assert_close(each, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("phase", ["noise", "rounding"])
def test_both_phases_train_compiled_as_they_do_eagerly(backend: str, phase: str):
    if backend == "inductor" and shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    torch.manual_seed(0)
    model = prepare_diffq(torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)), torch.zeros(2, 24))
    if phase == "rounding":
        freeze_bits(model)
    twin = copy.deepcopy(model)
    x = torch.randn(5, 24)
    for each, run_it in ((model, torch.compile(model, fullgraph=True, backend=backend)), (twin, twin)):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        torch.manual_seed(1)
        for _ in range(3):
            optimizer.zero_grad()
            run_it(x).square().sum().backward()
            optimizer.step()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
