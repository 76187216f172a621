"""Models that cannot be prepared, or not any more be converted: one sentence, before anything is changed."""

import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from diffq_fx import ConversionError, DiffQConfig, PreparationError, convert, prepare, prepare_diffq
from diffq_fx.methods import STE

CONFIG = DiffQConfig(penalty=1.0)
X = torch.randn(4, 16)
scopes = pytest.mark.parametrize("scope", ["auto", "module"])


def net():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def pruned():
    model = net()
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def pruned_twice():
    model = pruned()
    prune.random_unstructured(model[0], "weight", 0.5)
    return model


def with_attribute(name, value):
    model = net()
    if isinstance(value, torch.Tensor):
        model[2].register_buffer(name, value)
    else:
        setattr(model[2], name, value)
    return model


def made_in_inference_mode():
    with torch.inference_mode():
        return net()


def for_several_processes():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        return nn.parallel.DistributedDataParallel(net())
    finally:
        torch.distributed.destroy_process_group()


UNFIT = {
    "several processes": (for_several_processes, "the model is a DistributedDataParallel. Prepare the module inside first, and wrap"),
    "part of several processes": (lambda: nn.Sequential(for_several_processes()), "0 is a DistributedDataParallel. Prepare the module"),
    "several devices": (lambda: nn.DataParallel(net()), "the model is a DataParallel. Prepare the module inside first"),
    "compiled": (lambda: torch.compile(net(), backend="eager"), "the model is compiled by torch.compile. Prepare the module inside"),
    "compiled part": (lambda: nn.Sequential(torch.compile(net(), backend="eager"), nn.Linear(8, 8)), "0 is compiled by torch.compile"),
    "scripted": (lambda: torch.jit.script(net()), "the model is a RecursiveScriptModule of torch.jit"),
    "traced": (lambda: torch.jit.trace(net(), X), "the model is a TopLevelTracedModule of torch.jit"),
    "scripted part": (lambda: nn.Sequential(torch.jit.script(net()), nn.Linear(8, 8)), "0 is a RecursiveScriptModule"),
    "pruned": (pruned, r"0 makes its weight in a hook of torch.nn.utils.prune, .*\n.*prune.remove"),
    "pruned twice": (pruned_twice, "0 makes its weight in a hook of torch.nn.utils.prune"),
    "quantizer": (lambda: with_attribute("weight_quantizer", nn.Identity()), r"an attribute '2\.weight_quantizer' of its own"),
    "stored": (lambda: with_attribute("weight_quantized", torch.ones(())), r"an attribute '2\.weight_quantized' of its own"),
    "plain": (lambda: with_attribute("weight_quantized", 3), r"an attribute '2\.weight_quantized' of its own"),
    "inference": (made_in_inference_mode, r"'0\.weight' was made under torch.inference_mode"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@scopes
@pytest.mark.parametrize("name", UNFIT)
def test_an_unfit_model_is_refused_in_a_sentence(name, scope):
    make, says = UNFIT[name]
    model = make()
    before = {key: type(module) for key, module in model.named_modules()}
    with pytest.raises(PreparationError, match=says):
        prepare_diffq(model, X, CONFIG, scope=scope)
    assert {key: type(module) for key, module in model.named_modules()} == before


def test_an_attribute_of_the_users_is_fine_beside_a_weight_that_stays_in_float():
    model = prepare_diffq(with_attribute("weight_quantizer", nn.Identity()), X, DiffQConfig(penalty=1.0, exclude=("2.weight",)))
    assert type(model[2].weight_quantizer) is nn.Identity


def test_a_nested_tensor_is_no_example():
    nested = torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(5, 16)])
    with pytest.raises(ValueError, match="nested tensor"):
        prepare_diffq(net(), (nested,), CONFIG)


def test_a_model_that_is_compiled_in_place():
    model = net()
    model.compile(backend="eager")
    assert prepare_diffq(model, X, CONFIG).compression.scope == "model"


@pytest.mark.parametrize("name", ["class", "lambda", "None"])
def test_a_child_named_like_a_keyword(name):
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleDict({name: nn.Linear(16, 8), "box": nn.Linear(16, 4)})

        def forward(self, x):
            return self.heads[name](x), self.heads["box"](x)

    model = prepare_diffq(Heads(), X, CONFIG).eval()
    assert model.compression.scope == "module"
    assert "keyword of Python" in model.compression.scope_reason
    assert all(torch.equal(a, b) for a, b in zip(converted(model)(X), model(X), strict=True))


def test_a_parameter_named_like_a_keyword():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_parameter("in", nn.Parameter(torch.randn(16, 8)))

        def forward(self, x):
            return x @ getattr(self, "in")

    model = prepare_diffq(Bare(), X, CONFIG).eval()
    assert torch.equal(converted(model)(X), model(X))


# Layers that are moved or replaced after prepare


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x):
        return self.head(self.body(x))


class Lora(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base_layer, self.a, self.b = base, nn.Linear(16, 4, bias=False), nn.Linear(4, 32, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.b(self.a(x))


def converted(model):
    with warnings.catch_warnings(action="ignore"), torch.no_grad():
        return convert(model)


@scopes
def test_a_layer_that_was_moved_is_converted_where_it_is(scope):
    model = prepare_diffq(Net(), X, CONFIG, scope=scope)
    model.body = Lora(model.body)
    model.train()(X).sum().backward()
    assert model.body.a.weight.grad is not None
    assert model.body.base_layer.weight_quantizer.logits.grad is not None
    with torch.no_grad():
        result = converted(model.eval())
        assert torch.equal(result(X), model(X))
    assert result.body.base_layer.weight_quantized.spec.name == "body.base_layer.weight"
    assert "body.base_layer.weight" not in dict(result.named_parameters())


@scopes
def test_a_model_inside_another_is_converted(scope):
    model = nn.Sequential(prepare_diffq(Net(), X, CONFIG, scope=scope), nn.Identity())
    with torch.no_grad():
        assert torch.equal(converted(model.eval())(X), model(X))


def new_head(model):
    model.head = nn.Linear(32, 5)


def resized(model):
    model.head.weight, model.head.bias = nn.Parameter(torch.randn(10, 32)), nn.Parameter(torch.zeros(10))


def parametrized(model):
    nn.utils.parametrizations.weight_norm(model.head)


def removed(model):
    model.head = nn.Identity()


CHANGES = {
    new_head: "weight 'head.weight' is gone: the layer that held it was replaced",
    removed: "weight 'head.weight' is gone",
    resized: r"weight 'head.weight' had shape \(8, 32\) and has \(10, 32\) now",
    parametrized: "weight 'head.weight' is no parameter any more",
}


@scopes
@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_was_replaced_is_named_by_convert(change, scope):
    model = prepare_diffq(Net(), X, CONFIG, scope=scope)
    body = model.body.weight.clone()
    change(model)
    if change in (new_head, removed):  # what can work, works
        assert model(X).shape[0] == 4
        assert model.eval()(X).shape[0] == 4
    elif change is resized:
        for mode in (True, False):
            with pytest.raises(PreparationError, match=r"'head.weight' was prepared with shape \(8, 32\) and has \(10, 32\) now"):
                model.train(mode)(X)
    with pytest.raises(ConversionError, match=CHANGES[change]):
        converted(model)
    assert torch.equal(model.body.weight, body)
    assert re.search("weight_quantizer", str(model))


# Weights that are tied after prepare


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.norm, self.head, self.other = nn.Embedding(16, 32), nn.LayerNorm(32), nn.Linear(32, 16), nn.Linear(16, 16)

    def forward(self, ids):
        return self.other(self.head(self.norm(self.emb(ids))))


def tie(model):
    model.head.weight = model.emb.weight


def tie_by_registry(model):
    model.emb._parameters["weight"] = model.head.weight


def tie_again(model):
    model.head.register_parameter("weight", model.emb.weight)


in_float = DiffQConfig(penalty=1.0, exclude=("emb.weight",))


@scopes
@pytest.mark.parametrize(
    ("how", "method"), [(tie, CONFIG), (tie, STE(bits=4)), (tie_by_registry, CONFIG), (tie_by_registry, in_float), (tie_again, in_float)]
)
def test_weights_that_are_tied_after_prepare_are_named(how, method, scope):
    ids = torch.arange(4)
    model = prepare(Language(), ids, method, scope=scope)
    model(ids).sum().backward()
    how(model)
    says = r"weights 'emb\.weight' and 'head\.weight' are one Parameter now, and were not when the model was prepared"
    with pytest.raises(ConversionError, match=rf"convert: {says}"):
        converted(model)
    with pytest.raises(PreparationError, match=says):
        model(ids)
    with pytest.raises(ConversionError, match=says):
        converted(nn.Sequential(model.eval()))


@scopes
def test_weights_that_were_tied_before_may_be_tied_again(scope):
    original = Language()
    tie(original)
    ids = torch.arange(4)
    model = prepare_diffq(original, ids, CONFIG, scope=scope)
    tie(model)
    model.emb.weight = model.head.weight = nn.Parameter(model.emb.weight.detach() * 2)
    model(ids).sum().backward()
    assert torch.equal(converted(model.eval())(ids), model(ids))
