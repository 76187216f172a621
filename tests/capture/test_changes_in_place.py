"""What a forward reads and Python changes in place, on a class or for all modules counts, as it does in the original model."""

import copy
import functools
import pickle
import re
import types
import warnings
from collections import deque

import pytest
import torch
from torch import nn

from diffq_fx import DiffQConfig, convert, prepare_diffq
from diffq_fx.capture import contents, watch
from diffq_fx.errors import PreparationError

CONFIG = DiffQConfig(penalty=1.0)
X = torch.randn(4, 16)


class Held:
    """An object with state behind a method."""

    kind = 1.0

    def __init__(self):
        self.gain = 1.0

    def value(self):
        return self.gain * self.kind


class Slotted:
    __slots__ = ("gain",)

    def __init__(self):
        self.gain = 1.0


class Inner(nn.Module):
    def __init__(self, shared):
        super().__init__()
        self.linear, self.shared = nn.Linear(16, 16), shared

    def forward(self, x):
        return self.linear(x) * self.shared["inner"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.settings = {"gain": 1.0, "inner": 1.0, "deep": [{"gain": 1.0}]}
        self.inner, self.head = Inner(self.settings), nn.Linear(16, 8)
        self.items, self.last, self.flags = [1.0], deque([1.0]), set()
        self.space, self.held, self.slotted = types.SimpleNamespace(gain=1.0), Held(), Slotted()
        self.pair = (1.0, [1.0])

    def forward(self, x):
        gain = self.settings["gain"] * self.settings["deep"][0]["gain"] * self.items[0] * self.last[-1] * self.pair[1][0]
        gain = gain * self.space.gain * self.held.value() * self.slotted.gain * (2.0 if "on" in self.flags else 1.0)
        return self.head(self.inner(x)) * gain


CHANGES = {
    "dict": lambda model: model.settings.update(gain=2.0),
    "dict of a child": lambda model: model.inner.shared.update(gain=2.0),
    "nested": lambda model: model.settings["deep"][0].update(gain=2.0),
    "list": lambda model: model.items.__setitem__(0, 2.0),
    "deque": lambda model: model.last.append(2.0),
    "set": lambda model: model.flags.add("on"),
    "list in a tuple": lambda model: model.pair[1].__setitem__(0, 2.0),
    "namespace": lambda model: setattr(model.space, "gain", 2.0),
    "object": lambda model: setattr(model.held, "gain", 2.0),
    "slots": lambda model: setattr(model.slotted, "gain", 2.0),
}
changes = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


def prepared(model, scope="model"):
    model = prepare_diffq(model, X, CONFIG).eval()
    assert model.compression.scope == scope, model.compression.scope_reason
    return model


def converted(model):
    with warnings.catch_warnings(action="ignore"):
        return convert(model)


@changes
@torch.no_grad()
def test_a_change_in_place_is_followed(change):
    model = prepared(Net())
    before = model(X)
    others = [converted(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    change(model)
    assert torch.equal(converted(model)(X), before * 2), "before the prepared model has run"
    assert torch.equal(model(X), before * 2)
    for other in others:
        assert torch.equal(other(X), before), "copies have objects of their own"
        assert other.uses_graph
        change(other)
        assert torch.equal(other(X), before * 2)


class Tells(nn.Module):
    """No weight is in it: a graph calls it."""

    def __init__(self, kept):
        super().__init__()
        self.kept, self.positive = kept, False

    def forward(self, x):
        self.positive = self.kept[0] = bool(x.detach().sum() > 0)
        return x * 1


class ReadsWhatIsTold(nn.Module):
    def __init__(self, read):
        super().__init__()
        self.linear, self.kept, self.read = nn.Linear(16, 8), [False], read
        self.tells = Tells(self.kept)

    def forward(self, x):
        y = self.linear(self.tells(x))
        return y if self.read(self) else -y


@pytest.mark.parametrize("read", [lambda model: model.tells.positive, lambda model: model.kept[0]], ids=["attribute", "list"])
def test_what_a_module_within_the_graph_tells_the_forward_after_it(read):
    """In the example nothing changes; where it does, the graph had taken the other branch."""
    x = -X.abs()
    model = prepare_diffq(ReadsWhatIsTold(read), x, CONFIG).eval()
    assert model.compression.scope == "model"
    weight = model.linear.weight_quantizer(model.linear.weight)
    for inputs, sign in ((x, -1), (-x, 1), (x, -1)):
        torch.testing.assert_close(model(inputs), sign * nn.functional.linear(inputs, weight, model.linear.bias))
    other = prepare_diffq(ReadsWhatIsTold(read), -x, CONFIG)
    assert re.search("(positive was set|kept was changed in place) by a module that the graph calls", other.compression.scope_reason)


def test_the_reason_why_a_graph_is_not_used_any_more():
    model = prepared(Net())
    model.settings["gain"] = 2.0
    assert not model.uses_graph
    assert "settings was changed in place" in model.graph_use.ended_by


class Reads(nn.Module):
    def __init__(self, kept, read):
        super().__init__()
        self.linear, self.kept, self.read = nn.Linear(16, 8), kept, read

    def forward(self, x):
        return self.linear(x) * type(self).call(self)

    def call(self):
        return float(self.read(self.kept))


@pytest.mark.parametrize(
    ("kept", "what"),
    [
        (torch.Generator(), "a Generator"),
        ({"in a dict": bytearray(1)}, "a bytearray"),
        (list(range(contents.MOST_VALUES + 1)), "more than 1000 values"),
    ],
    ids=["generator", "bytearray", "large"],
)
def test_an_object_whose_changes_cannot_be_seen(kept, what):
    model = prepared(Reads(kept, read_nothing), "module")
    assert f"the forward reads kept, which holds {what}" in model.compression.scope_reason


def read_nothing(kept):
    return 2.0


def scaled(by, kept):
    return by["gain"]


def test_a_list_of_as_many_values_as_are_compared():
    assert prepared(Reads([1.0] * (contents.MOST_VALUES - 2), lambda kept: kept[-1])).compression.scope == "model"


def test_functions_with_state_are_looked_into():
    for make in (counter, lambda state: functools.partial(scaled, state), lambda state: types.MethodType(scaled, state)):
        state = {"gain": 1.0}
        model = prepared(Reads(None, make(state)))
        before = model(X)
        mine = model.read.__closure__[0].cell_contents if make is counter else getattr(model.read, "__self__", None) or model.read.args[0]
        mine["gain"] = 2.0
        assert torch.equal(model(X), before * 2)


def counter(state):
    return lambda kept: state["gain"]


def with_default(state):
    def read(kept, *, state=state):
        return state["gain"]

    return read


def product(reads):
    result = 1.0
    for read in reads:
        result = result * read(None)
    return result


@pytest.mark.parametrize("which", range(4))
def test_every_one_of_several_functions_is_looked_into(which):
    states = [{"gain": 1.0} for _ in range(4)]
    reads = [make(state) for make, state in zip((counter, counter, with_default, with_default), states, strict=True)]
    model = prepared(Reads(reads, product))
    before = model(X)
    read = model.kept[which]
    mine = (read.__kwdefaults__ or {}).get("state") or read.__closure__[0].cell_contents
    mine["gain"] = 2.0
    assert torch.equal(model(X), before * 2)


def test_objects_that_hold_each_other_or_the_model():
    net = Net()
    net.space.back, net.space.model, net.settings["space"] = net.space, net, net.space
    model = prepared(net)
    before = model(X)
    model.space.gain = 2.0
    assert torch.equal(model(X), before * 2)


class OfClass(nn.Module):
    gain, table, names = 1.0, {"gain": 1.0}, ("a",)

    def __init__(self):
        super().__init__()
        self.block, self.head = OfBlock(), nn.Linear(16, 8)

    @property
    def factor(self):
        return self.gain * self.table["gain"] * len(self.names)

    def forward(self, x):
        return self.scaled(self.head(self.block(x)))

    def scaled(self, x):
        return x * self.factor


class OfBlock(nn.Module):
    gain = 1.0

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        return self.linear(x) * self.gain


ON_CLASSES = {
    "number": lambda patch: patch.setattr(OfClass, "gain", 2.0),
    "number of a child": lambda patch: patch.setattr(OfBlock, "gain", 2.0),
    "tuple": lambda patch: patch.setattr(OfClass, "names", ("a", "b")),
    "dict": lambda patch: patch.setitem(OfClass.table, "gain", 2.0),
    "method": lambda patch: patch.setattr(OfClass, "scaled", lambda self, x: 2 * x),
    "property": lambda patch: patch.setattr(OfClass, "factor", property(lambda self: 2.0)),
    "forward": lambda patch: patch.setattr(OfClass, "forward", lambda self, x: 2 * self.head(self.block(x))),
    "forward of a child": lambda patch: patch.setattr(OfBlock, "forward", lambda self, x: 2 * self.linear(x)),
    "forward of torch's": lambda patch: patch.setattr(nn.Linear, "forward", lambda self, x: x @ self.weight.T + self.bias),
}


def without_bias(model):
    """So that a factor anywhere is a factor of the result."""
    with torch.no_grad():
        model.head.bias.zero_()
    return model


@pytest.mark.parametrize("change", ON_CLASSES.values(), ids=ON_CLASSES)
@torch.no_grad()
def test_a_change_of_a_class_is_followed(monkeypatch, change):
    model = prepared(without_bias(OfClass()))
    others = [model, converted(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    before = model(X)
    assert all(torch.equal(other(X), before) and other.uses_graph for other in others)
    change(monkeypatch)
    for other in [*others, converted(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))]:
        after = other(X)
        assert not other.uses_graph
        torch.testing.assert_close(after, before * (1 if "Linear" in other.graph_use.ended_by else 2))


def test_a_graph_is_used_until_a_class_changes_what_it_read(monkeypatch):
    model = prepared(OfClass())
    monkeypatch.setattr(OfClass, "other", 1.0, raising=False)
    assert model.uses_graph


class OwnsItsWeight(nn.Module):
    power = 1.0

    def __init__(self):
        super().__init__()
        self.weight, self.settings, self.gain = nn.Parameter(torch.randn(16, 16)), {"gain": 1.0}, 1.0

    def forward(self, x):
        return nn.functional.linear(x, self.weight) * self.settings["gain"] * self.gain * self.power


@pytest.mark.parametrize("change", ["gain", "settings", "power"])
@torch.no_grad()
def test_a_layer_in_module_scope_follows_what_it_reads(monkeypatch, change):
    original = nn.Sequential(OwnsItsWeight(), nn.Unflatten(1, (1, 16)), nn.Conv1d(1, 1, 4, bias=False))
    model = prepare_diffq(original, X, CONFIG, scope="module").eval()
    models = [model, converted(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    before = model(X)
    monkeypatch.setattr(OwnsItsWeight, "power", 2.0 if change == "power" else 1.0)
    for each in models:
        if change == "gain":
            each[0].gain = 2.0
        elif change == "settings":
            each[0].settings["gain"] = 2.0
        torch.testing.assert_close(each(X), 2 * before)


def test_a_model_without_changeable_attributes_compares_settings_and_a_few_names_of_classes(monkeypatch):
    model = prepared(nn.Sequential(*(nn.Linear(16, 16) for _ in range(8))))
    assert model.graph_use.changeable == []
    assert model.graph_use.on_classes.keys() == {(nn.Linear, "forward"), (nn.Sequential, "forward")}
    checks, stands = [], watch.GraphUse.stands
    monkeypatch.setattr(watch.GraphUse, "stands", lambda use: checks.append(use) or stands(use))
    monkeypatch.setattr(watch, "is_unchanged", lambda *_: pytest.fail("nothing is walked through"))
    model(X)
    assert len(checks) == 1


class WeightsInAList(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.factor = nn.Linear(16, 16), nn.Linear(16, 16), 1.0
        self.weights = [self.first.weight, self.second.weight]

    def forward(self, x):
        for weight in self.weights:
            x = nn.functional.linear(x, weight)
        return x * self.factor


@pytest.mark.filterwarnings("ignore:.*bits never moved")
@pytest.mark.parametrize("is_converted", [False, True])
def test_weights_in_a_list_are_read_by_the_graph_alone(is_converted):
    """The original forward would find float weights in the list, and those of a converted model are gone."""
    x = torch.randn(2, 16)
    model = prepare_diffq(WeightsInAList(), x, DiffQConfig(penalty=1.0), scope="model").eval()
    model = convert(model) if is_converted else model
    before = model(x)
    model.weights = list(model.weights)  # another list of the same
    assert torch.equal(model(x), before)
    model.factor = 2.0
    with pytest.raises(
        PreparationError, match="factor was set, which the graph of the model cannot follow, and its own forward reads weights"
    ):
        model(x)


class CountsItsBiases(WeightsInAList):
    def __init__(self):
        super().__init__()
        self.weights = [self.first.bias, self.second.bias]

    def forward(self, x):
        return self.second(self.first(x)) * self.factor * len(self.weights)


def test_what_is_not_quantized_may_stand_in_a_list():
    x = torch.randn(2, 16)
    model = prepare_diffq(CountsItsBiases(), x, DiffQConfig(penalty=1.0), scope="model").eval()
    first = model(x)
    model.factor = 2.0
    torch.testing.assert_close(model(x), 2 * first)
