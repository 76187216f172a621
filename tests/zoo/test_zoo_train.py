"""Train every model of the zoo: random in train(), fixed in eval(), gradients everywhere, copies and files that compute the same."""

import copy
import io

import pytest
import torch

from diffq_fx import Distillation
from diffq_fx.training.output_loss import output_loss
from zoo.checks import assert_same, loss_of, prepared, run, tensors_in, trained
from zoo.entry import Entry, each_in_one_way, parameters_of
from zoo.models import BOTH_SCOPES, MORE_OF_A_KIND

MODELS = parameters_of(BOTH_SCOPES, MORE_OF_A_KIND)
every_model = pytest.mark.parametrize("entry", MODELS)


@every_model
def test_draws_noise_in_train_and_none_in_eval(entry: Entry):
    model = trained(entry)[0]
    first, second = (tensors_in(run(model, entry, "train", seed=seed)) for seed in (1, 2))
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    twin = copy.deepcopy(model)  # a model that counts its calls has counted the same
    assert_same(run(model, entry, "eval", seed=1), run(twin, entry, "eval", seed=1 if entry.draws else 2))


@every_model
def test_every_weight_and_every_bit_gets_a_gradient_and_can_be_trained(entry: Entry):
    """In three steps of an optimizer over parameters() all of them move, with gradients that are finite; a teacher stays the float model."""
    model = prepared(entry)
    distill = Distillation(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    quantizers = [q for q in model.compression.quantizers if q.spec.name not in entry.unseen]
    trained = {f"{q.spec.name} bits": q.logits for q in quantizers}
    trained |= {q.spec.name: model.get_parameter(q.spec.name) for q in quantizers if q.spec.name not in entry.frozen}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    moved = set()
    for step in range(3):
        optimizer.zero_grad()
        loss = loss_of(run(model, entry, "train", seed=step))
        loss.backward()
        assert bool(torch.isfinite(loss))
        for name, parameter in trained.items():
            assert parameter.grad is not None, name
            assert bool(torch.isfinite(parameter.grad).all()), name
            moved |= {name} if parameter.grad.any() else set()
        optimizer.step()
    assert moved == set(trained)
    for name, parameter in trained.items():
        assert not torch.equal(parameter, before[name]), name
    for name in entry.frozen:
        assert model.get_parameter(name).grad is None
    answers = run(distill.teacher, entry, "eval")
    assert_same(answers, run(entry.make().requires_grad_(False), entry, "eval"))
    assert bool(torch.isfinite(output_loss(run(model, entry, "eval"), answers)))


@pytest.mark.parametrize(("entry", "way"), each_in_one_way(MODELS, ("deepcopy", "torch.save", "state_dict")))
def test_copies_compute_the_same(entry: Entry, way: str):
    """A copy has tensors of its own: it trains without a change to the model."""
    model = trained(entry)[0]
    if way == "torch.save" and not entry.pickles:
        with pytest.raises(RuntimeError, match="parametrized"):
            _through_file(entry.make())
        return
    if way == "state_dict" and entry.stateful:
        return
    twin = {"deepcopy": copy.deepcopy, "torch.save": _through_file, "state_dict": lambda model: _through_state(model, entry)}[way](model)
    assert type(twin).__name__ == type(model).__name__
    assert twin.state_dict().keys() == model.state_dict().keys()
    assert [name for name, _ in twin.named_parameters()] == [name for name, _ in model.named_parameters()]
    expected = run(copy.deepcopy(model), entry, "eval")
    assert_same(run(twin, entry, "eval"), expected)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    loss_of(run(twin, entry, "train")).backward()
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert_same(run(model, entry, "eval"), expected)


def _through_file(model: torch.nn.Module) -> torch.nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _through_state(model: torch.nn.Module, entry: Entry) -> torch.nn.Module:
    twin = prepared(entry)
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    return twin
