"""prepare runs the model on copies: the user's values, gradients and modes are as they were, whatever the forward does to its weights."""

import contextlib
import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffq_fx import CaptureError, DiffQConfig, DiffQError, prepare_diffq

CONFIG = DiffQConfig(penalty=1.0)
X = torch.randn(4, 16)


class MaxNorm(nn.Module):
    """The embedding rewrites its rows at every call."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 16, max_norm=0.5), nn.Linear(16, 4)

    def forward(self, ids):
        return self.head(self.embedding(ids))


class Renormalizes(nn.Module):
    """Weight renormalization in the forward, as older generators have it."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        with torch.no_grad():
            self.body.weight.div_(self.body.weight.norm())
        return self.head(self.body(x))


class Clips(Renormalizes):
    """The same through ``.data``, which no version counts."""

    def forward(self, x):
        self.body.weight.data.clamp_(-0.1, 0.1)
        return self.head(self.body(x))


class Replaces(Renormalizes):
    def forward(self, x):
        self.body.weight.data = self.body.weight.data * 0.5
        return self.head(self.body(x))


def values(model):
    return {name: each.detach().clone() for name, each in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("scope", ["auto", "model", "module"])
@pytest.mark.parametrize(("model_class", "x"), [(MaxNorm, torch.arange(12)), (Renormalizes, X), (Clips, X), (Replaces, X)])
def test_the_original_is_as_it_was_prepared_or_refused(model_class, x, scope):
    model = model_class()
    before, places = values(model), [parameter.data_ptr() for parameter in model.parameters()]
    try:
        prepare_diffq(model, x, CONFIG, scope=scope)
    except CaptureError:
        assert model_class is not MaxNorm or scope == "model"
    for name, each in values(model).items():
        assert torch.equal(each, before[name]), name
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("scope", ["auto", "module"])
def test_gradients_of_the_user_are_as_they_were(scope):
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    model(X).sum().backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    x = X.clone().requires_grad_()
    prepared = prepare_diffq(model, x, CONFIG, scope=scope)
    assert all(torch.equal(p.grad, wanted) for p, wanted in zip(model.parameters(), before, strict=True))
    assert x.grad is None
    assert all(mine is own for mine, own in zip(list(prepared.parameters())[:1], list(model.parameters())[:1], strict=True))


def test_a_weight_is_never_unreadable_for_another_reader():
    """While the gate runs, somebody else may read the weights: they are never NaN."""

    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(16, 4)

        def forward(self, x):
            assert bool(torch.isfinite(values).all())
            return self.body(x)

    model = Looks()
    values = model.body.weight.data
    prepare_diffq(model, X, CONFIG, scope="module")


@pytest.mark.parametrize("how", ["resize_", "assign", "data"])
@pytest.mark.parametrize("scope", ["auto", "module"])
def test_a_buffer_that_the_forward_resizes(how, scope):
    class Cache(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(16, 4)
            self.register_buffer("seen", torch.zeros(0))

        def forward(self, x):
            if how == "resize_":
                self.seen.resize_(x.shape[0]).fill_(1.0)
            elif how == "data":
                self.seen.data = torch.ones(x.shape[0])
            else:
                self.seen = torch.cat([self.seen, torch.ones(1)])
            return self.body(x)

    model = Cache()
    prepared = prepare_diffq(model, X, CONFIG, scope=scope)
    assert (model.seen.numel(), prepared.seen.numel()) == (0, 0)
    prepared(X)
    assert prepared.seen.numel() == (1 if how == "assign" else 4)


def test_prepare_works_wherever_it_is_called():
    for context in (torch.no_grad, torch.inference_mode):
        model = nn.Linear(16, 4)
        with context():
            prepared = prepare_diffq(model, X.detach(), CONFIG)
        prepared(X).sum().backward()
        assert prepared.weight_quantizer.logits.grad is not None


def test_a_function_that_reads_the_weight_of_the_original_is_refused():
    layer = nn.Linear(16, 16)

    class Past(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale = layer, nn.Linear(16, 16)
            self.read = lambda x: F.linear(x, layer.weight)

        def forward(self, x):
            return self.scale(self.read(x) if x.sum() < 1e9 else self.layer(x))

    with pytest.raises(CaptureError, match=r"weight 'layer\.weight' is read from the model that was given"):
        prepare_diffq(Past(), X, CONFIG)


@pytest.mark.parametrize("scope", ["model", "module"])
def test_no_copy_of_the_weights_is_left_to_the_garbage_collector(scope):
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    gc.collect()
    gc.disable()
    try:
        prepared = prepare_diffq(model, X, CONFIG, scope=scope)
        held = {each.untyped_storage().data_ptr() for each in (*prepared.parameters(), *prepared.buffers())}
        shapes = {each.shape for each in model.parameters()}
        left = [each for each in gc.get_objects() if isinstance(each, nn.Parameter) and each.shape in shapes]
        assert [each.shape for each in left if each.untyped_storage().data_ptr() not in held] == []
    finally:
        gc.enable()


class Frozen(nn.Linear):
    """A part that all copies of a model share."""

    def __deepcopy__(self, memo):
        return self


class Thin(nn.Linear):
    """A copy that has its original's tables of tensors."""

    def __deepcopy__(self, memo):
        return copy.copy(self)


@pytest.mark.parametrize("part", [Frozen, Thin])
@pytest.mark.parametrize("scope", ["model", "module"])
def test_parts_that_copies_share_keep_their_weights(part, scope):
    model = nn.Sequential(part(16, 16), nn.ReLU(), nn.Linear(16, 4))
    before = model.state_dict()
    with contextlib.suppress(DiffQError):
        prepare_diffq(model, X, CONFIG, scope=scope)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
