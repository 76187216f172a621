"""The zoo's own instruments see what they are for: each of them fails on a fault planted for it."""

import dataclasses
import functools
from collections import OrderedDict

import pytest
import torch
from torch import nn

from zoo.checks import assert_same, assert_unchanged, reachable_tensors, snapshot
from zoo.control_flow import Point, Result
from zoo.entry import randn

X = randn(3, 4)


@dataclasses.dataclass
class Other:
    logits: torch.Tensor
    hidden: torch.Tensor


@pytest.mark.parametrize(
    "value", [X, (X, X), [X], {"a": X}, Point(X, X), Result(X, X), OrderedDict(a=X), (X, 3, None, "b"), {"a": [X, (X,)]}]
)
def test_equal_outputs_are_the_same(value):
    assert_same(value, value)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (torch.zeros(3, 4), X),
        (X * 1.01, X),
        (torch.nextafter(X, X + 1), X),
        (X.double(), X),
        (X[None], X),
        (X, X + float("nan")),
        ((X, X), [X, X]),
        ({"a": X}, OrderedDict(a=X)),
        ((X, X), Point(X, X)),
        (Result(X, X), Other(X, X)),
        (Result(X, X), Result(X, X + 1e-6)),
        ({"a": X}, {"b": X}),
        ([X], [X, X]),
        ((X, 3), (X, 4)),
        ((X, None), (X, X)),
    ],
)
def test_other_outputs_are_not(found, expected):
    for a, b in ((found, expected), (expected, found)):
        with pytest.raises(AssertionError):
            assert_same(a, b)


def _fill(model):
    with torch.no_grad():
        model[0].weight[0, 0] += 1


@pytest.mark.parametrize(
    "change",
    [
        _fill,
        lambda model: model.eval(),
        lambda model: model[1].eval(),
        lambda model: setattr(model, "note", 1),
        lambda model: model.add_module("more", nn.ReLU()),
        lambda model: model[1].running_mean.add_(1),
        lambda model: model[0].weight.requires_grad_(False),
        lambda model: setattr(model[0], "weight", nn.Parameter(model[0].weight.detach())),
        lambda model: model(X).sum().backward(),
    ],
)
def test_a_snapshot_sees_a_change(change):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = snapshot(model)
    assert_unchanged(before, snapshot(model))
    change(model)
    with pytest.raises(AssertionError):
        assert_unchanged(before, snapshot(model))


class Plain:
    pass


def _in_object(model, tensor):
    model.held = Plain()
    model.held.inner = {"a": [tensor]}


def _in_closure(model, tensor):
    model.held = lambda: tensor


def _in_class(model, tensor):
    model.__class__ = type("Sub", (type(model),), {"held": tensor})


def _in_default(model, tensor):
    def function(x=tensor):
        return x

    model.held = function


def _in_partial(model, tensor):
    model.held = functools.partial(torch.add, tensor)


def _in_method(model, tensor):
    model.held = tensor.clone
    model.held_too = nn.Identity()
    model.held_too.__dict__["deep"] = (tensor,)


@pytest.mark.parametrize("hide", [_in_object, _in_closure, _in_class, _in_default, _in_partial, _in_method])
def test_a_hidden_tensor_is_found(hide):
    model, tensor = nn.Sequential(nn.Linear(2, 2)), torch.randn(5)
    assert all(found is not tensor for _, found in reachable_tensors(model))
    hide(model, tensor)
    assert any(found is tensor for _, found in reachable_tensors(model))
