"""A prepared model answers the original's Python: hooks fire, attributes count, methods are there, extra state is kept."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from diffq_fx import ConversionError, DiffQConfig, PreparationError, convert, prepare_diffq

CONFIG = DiffQConfig(penalty=1.0)
X = torch.randn(4, 16)
scopes = pytest.mark.parametrize("scope", ["auto", "module"])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.gain = nn.Linear(16, 16), 1.0

    def forward(self, x):
        return torch.relu(self.inner(x)) * self.gain


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.body, self.head = Block(), nn.Linear(16, 32), nn.Linear(32, 8)
        self.temperature, self.epoch = 1.0, 0

    def forward(self, x):
        return self.head(self.features(x)) / self.temperature

    def features(self, x):
        return self.body(self.block(x))

    def get_extra_state(self):
        return {"epoch": self.epoch}

    def set_extra_state(self, state):
        self.epoch = state["epoch"]


def prepared(scope):
    model = prepare_diffq(Net(), X, CONFIG, scope=scope)
    assert model.compression.scope == {"auto": "model", "module": "module"}[scope]
    return model


def converted(model):
    with warnings.catch_warnings(action="ignore"):
        return convert(model)


def test_a_prepared_model_is_of_its_class_with_its_layers():
    model = prepared("auto")
    assert isinstance(model, Net)
    assert isinstance(model, torch.fx.GraphModule)
    assert sum(isinstance(module, nn.Linear) for module in model.modules()) == 3
    assert isinstance(converted(model), Net)


@scopes
@pytest.mark.parametrize("path", ["head", "body", "block", "block.inner"])
def test_a_forward_hook_fires_once_a_call(scope, path):
    model, seen = prepared(scope), []
    model.get_submodule(path).register_forward_hook(lambda module, args, output: seen.append(module))
    model(X)
    model.eval()(X)
    assert seen == [model.get_submodule(path)] * 2
    result = converted(model)
    seen.clear()
    result(X)
    assert seen == [result.get_submodule(path)]
    with torch.no_grad():
        assert torch.equal(result(X), model(X))


@scopes
def test_pre_hooks_and_backward_hooks_fire(scope):
    model, seen = prepared(scope), []
    model.body.register_forward_pre_hook(lambda module, args: (args[0] * 0,))
    model.block.register_full_backward_hook(lambda module, grads, outputs: seen.append("backward"))
    model.head.register_full_backward_pre_hook(lambda module, grads: seen.append("before"))
    out = model(X)
    assert torch.equal(out[0], out[1]), "the pre-hook has put zeros in"
    model.block.register_forward_hook(lambda module, args, output: seen.append("forward"))
    model(X.requires_grad_()).sum().backward()
    assert seen == ["forward", "before", "backward"]


def test_a_hook_on_a_converted_model_fires():
    result, seen = converted(prepared("auto")), []
    wanted = result(X)
    result.body.register_forward_hook(lambda module, args, output: seen.append(1))
    assert torch.equal(result(X), wanted)
    assert seen == [1]


GLOBAL_HOOKS = [
    torch.nn.modules.module.register_module_forward_pre_hook,
    torch.nn.modules.module.register_module_forward_hook,
    torch.nn.modules.module.register_module_full_backward_pre_hook,
    torch.nn.modules.module.register_module_full_backward_hook,
]


@pytest.mark.parametrize("is_converted", [False, True], ids=["prepared", "converted"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("register", GLOBAL_HOOKS, ids=lambda register: register.__name__)
def test_a_hook_on_all_modules_fires_on_each_layer(register, when, is_converted):
    seen = []
    hook = None if when == "after" else register(lambda module, *values: seen.append(type(module)))
    try:
        model = prepare_diffq(Net(), X, CONFIG).eval()
        model = converted(model) if is_converted else model
        hook = hook or register(lambda module, *values: seen.append(type(module)))
        seen.clear()
        with_hook = model(X.clone().requires_grad_())
        with_hook.sum().backward()
    finally:
        hook.remove()
    assert [kind.__name__ for kind in seen].count("Linear") == 3
    assert [kind.__name__ for kind in seen].count("Block") == 1
    if when == "after":
        assert model.uses_graph, "without the hook the graph runs again"
    assert torch.equal(model(X), with_hook)


def test_a_layer_that_python_calls_computes_with_the_quantized_weight():
    model = prepared("auto").eval()
    with torch.no_grad():
        torch.testing.assert_close((model.body(torch.eye(16)) - model.body.bias).T, model.body.weight_quantizer(model.body.weight))


@scopes
@pytest.mark.parametrize(("path", "name"), [("", "temperature"), ("block", "gain")])
def test_an_attribute_that_the_forward_reads_is_followed(scope, path, name):
    model = prepared(scope).eval()
    before = model(X)
    setattr(model.get_submodule(path), name, 2.0)
    after = model(X)
    assert not torch.equal(after, before)
    twin = Net()
    twin.load_state_dict({key: value for key, value in model.state_dict().items() if key in twin.state_dict()})
    setattr(twin.get_submodule(path), name, 2.0)
    assert torch.equal(after, same_settings(twin, model)(X))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), converted(model)):
        with torch.no_grad():
            assert torch.equal(copied(X), after)


def same_settings(float_model, prepared_model):
    """The float model with the rounded weights of a prepared one."""
    for quantizer in prepared_model.compression.quantizers:
        weight = prepared_model.get_parameter(quantizer.spec.name)
        float_model.get_parameter(quantizer.spec.name).data = quantizer.rounded_weight(weight.detach())
    return float_model


IMAGE = torch.randn(2, 4, 9, 9)
IDS = torch.arange(8).view(2, 4)
SETTINGS = {
    "stride": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU()), IMAGE, {"stride": (2, 2)}),
    "padding": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3)), IMAGE, {"padding": (1, 1)}),
    "dilation": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3)), IMAGE, {"dilation": (2, 2)}),
    "groups": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), IMAGE[:, :4], {"groups": 4, "stride": (3, 3)}),
    "padding_mode": (lambda: nn.Sequential(nn.Conv1d(4, 8, 3, padding=1)), IMAGE[:, :, 0], {"padding_mode": "circular"}),
    "output_padding": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 8, 3, stride=2)), IMAGE, {"output_padding": (1, 1)}),
    "padding_idx": (lambda: nn.Sequential(nn.Embedding(8, 16)), IDS, {"padding_idx": 3}),
    "scale_grad_by_freq": (lambda: nn.Sequential(nn.Embedding(8, 16)), IDS * 0, {"scale_grad_by_freq": True}),
    "bag": (lambda: nn.Sequential(nn.EmbeddingBag(8, 16)), IDS, {"mode": "sum"}),
    "eps": (lambda: nn.Sequential(nn.LayerNorm(9), nn.Linear(9, 8)), IMAGE, {"eps": 1.0}),
}


@scopes
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_torchs_own_layers_are_followed(name, scope):
    build, x, settings = SETTINGS[name]
    model = prepare_diffq(build(), x, CONFIG, scope=scope).eval()
    other = build()
    other.load_state_dict({key: value for key, value in model.state_dict().items() if key in other.state_dict()})
    same_settings(other, model)
    assert torch.equal(model(x), other(x))
    models = [model, converted(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for each in (*models, other):
        for setting, value in settings.items():
            setattr(each[0], setting, value)
    expected = other(x)
    expected.sum().backward()
    for each in (*models, converted(model)):
        assert torch.equal(each(x), expected)
    model(x).sum().backward()
    weights = [(model.get_parameter(q.spec.name), other.get_parameter(q.spec.name)) for q in model.compression.quantizers]
    assert all(torch.equal(mine.grad, wanted.grad) for mine, wanted in weights)


def test_a_graph_is_used_until_something_that_it_depends_on_changes():
    model = prepared("auto")
    model.epoch, model.new = 3, "anything"
    model.temperature = 1.0
    model.train().eval()
    model.load_state_dict(model.state_dict(), assign=True)
    assert model.uses_graph
    model.temperature = 2.0
    assert not model.uses_graph
    assert model.graph_use.ended_by == "the model: temperature was set"


def test_what_was_changed_and_put_back_before_a_forward_is_no_change():
    model = prepared("auto").eval()
    model.temperature = 2.0
    model.temperature = 1.0
    model.body.register_forward_hook(lambda module, args, output: output * 2).remove()
    body = model.body
    model.body = nn.Identity()
    model.body = body
    model(X)
    assert model.uses_graph


@pytest.mark.parametrize("change", ["append", "setitem", "replace", "delete"])
def test_a_change_of_a_container_is_followed(change):
    model = prepare_diffq(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Sequential(nn.Linear(16, 16), nn.ReLU())), X, CONFIG).eval()
    wanted = model(X)
    inner = model[2]
    if change == "append":
        inner.append(nn.Threshold(0.0, 0.0))
        wanted = nn.functional.threshold(wanted, 0.0, 0.0)
        inner.append(nn.Hardtanh(0.0, 0.1))
        wanted = nn.functional.hardtanh(wanted, 0.0, 0.1)
    elif change == "setitem":
        inner[1] = nn.Identity()
        wanted = nn.functional.linear(model[1](model[0](X)), inner[0].weight_quantizer(inner[0].weight), inner[0].bias)
    elif change == "replace":
        model[2] = nn.Identity()
        wanted = model[1](model[0](X))
    else:
        del inner[1]
        wanted = inner[0](model[1](model[0](X)))
    assert torch.equal(model(X), wanted)


@scopes
def test_a_method_computes_through_the_quantizers(scope):
    model, seen = prepared(scope).eval(), []
    features = model.features(X)
    model.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(X)
    assert torch.equal(seen[0], features)
    assert not torch.equal(model.train().features(X), model.features(X)), "in train() each call draws noise"


@scopes
def test_extra_state_is_kept(scope):
    model = prepared(scope)
    model.epoch = 7
    other = prepared(scope)
    other.load_state_dict(model.state_dict())
    assert other.epoch == 7


def test_an_override_of_train_is_kept():
    class KeepsEval(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(16, 8), nn.BatchNorm1d(8)

        def forward(self, x):
            return self.norm(self.linear(x))

        def train(self, mode=True):
            super().train(mode)
            self.norm.eval()
            return self

    model = prepare_diffq(KeepsEval(), X, CONFIG)
    assert model.compression.scope == "model"
    assert not model.train().norm.training


def test_a_model_with_a_name_of_fx():
    class Graphs(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 8)
            self.register_buffer("graph", torch.eye(4))

        def forward(self, x):
            return self.graph @ self.linear(x)

    model = prepare_diffq(Graphs(), X, CONFIG)
    assert (model.compression.scope, torch.equal(model.graph, torch.eye(4))) == ("module", True)
    assert "'graph' of its own" in model.compression.scope_reason


# A forward on the instance


def mixed_precision(model):
    """What accelerate does to a model."""
    model._original_forward = model.forward
    inner = model.forward.__func__ if hasattr(model.forward, "__func__") else model.forward

    def forward(self, *args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return inner(self, *args, **kwargs).float()

    model.forward = forward.__get__(model)


@scopes
def test_a_forward_that_is_wrapped_on_the_instance(scope):
    model = prepared(scope)
    plain = model.eval()(X)
    mixed_precision(model)
    assert not torch.equal(model(X), plain)
    model.train()(X).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = convert(model.eval())
    assert any("the forward that was set on the Net itself" in str(each.message) for each in said)
    assert torch.equal(result(X), plain)
    assert torch.equal(copy.deepcopy(result)(X), plain)


@scopes
def test_a_forward_that_is_set_on_a_layer_after_prepare(scope):
    """It is followed; a converted copy could only call the prepared model by it, so convert says to take it off."""
    model = prepared(scope).eval()
    inner = model.body.forward
    model.body.forward = lambda x: inner(x) * 0
    assert torch.equal(model(X)[0], model(X)[1])
    with pytest.raises(ConversionError, match="the forward of layer 'body' was set after prepare"):
        converted(model)
    del model.body.forward
    with torch.no_grad():
        assert torch.equal(converted(model)(X), model(X))


@pytest.mark.parametrize(("scope", "path"), [("auto", ""), ("module", ""), ("module", "body")])
def test_a_class_that_is_set_after_prepare(scope, path):
    """A copy is of the class that prepare gave."""
    model = prepared(scope).eval()
    layer = model.get_submodule(path)
    kind = type(layer)
    layer.__class__ = type("Other", (kind,), {"forward": lambda self, *args: kind.forward(self, *args)})
    with pytest.raises(ConversionError, match="convert: the class Other was set after prepare"):
        converted(model)
    for make_copy in (copy.deepcopy, pickle.dumps):
        with pytest.raises(PreparationError, match="the class Other was set after prepare"):
            make_copy(model)
    layer.__class__ = kind
    with torch.no_grad():
        assert torch.equal(converted(model)(X)[0], model(X)[0])


@pytest.mark.parametrize("path", ["", "body", "block"])
def test_a_forward_that_was_set_before_prepare(path):
    original = Net()
    module = original.get_submodule(path)
    module.forward = (
        lambda self, x: type(self).forward(self, x) * 2 if path != "body" else nn.functional.linear(x, self.weight) * 2
    ).__get__(module)
    model = prepare_diffq(original, X, CONFIG).eval()
    assert model.compression.scope == "module"
    with torch.no_grad():
        assert torch.equal(converted(model)(X), model(X))


def test_a_function_that_holds_the_original_model_is_refused():
    """A copy of the model would read the original's weight by it, past the quantizer."""
    original = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
    layer = original[0]
    original[1].forward = lambda x: nn.functional.linear(x, layer.weight)
    with pytest.raises(Exception, match=r"read from the model that was given|0\.weight"):
        prepare_diffq(original, X, CONFIG)
