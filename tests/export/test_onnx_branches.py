"""A forward that branches on a size: its file is right at every size that it takes."""

import numpy as np
import onnxruntime
import pytest
import torch
from stored_models import Linear, run_exact
from torch import nn

from diffq_fx import DiffQWarning, ExportError
from diffq_fx.export import export_onnx

Dim = torch.export.Dim

BRANCHES = {
    "one": lambda x: x.shape[0] == 1,
    "more than four": lambda x: x.shape[0] > 4,
    "three or more": lambda x: x.shape[0] >= 3,
    "even": lambda x: x.shape[0] % 2 == 0,
    "longer than six": lambda x: x.shape[1] > 6,
    "not seven": lambda x: x.shape[0] != 7,
    "of some lengths": lambda x: x.shape[1] in (3, 900),
    "length of one": lambda x: x.shape[1] == 1,
    "square": lambda x: x.shape[0] == x.shape[1],
    "so many values": lambda x: x.shape[0] * x.shape[1] == 28,
}


class Branches(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer, self.doubles = Linear(16, 16, 4), BRANCHES[kind]

    def forward(self, x):
        y = self.layer(x)
        return y * 2 if self.doubles(x) else y


class Places(nn.Module):
    """As long as its table of positions at most."""

    def __init__(self):
        super().__init__()
        self.layer, self.places = Linear(16, 16, 4), nn.Parameter(torch.randn(9, 16))

    def forward(self, x):
        return self.layer(x) + self.places[: x.shape[1]]


def sizes_of(path):
    return onnxruntime.InferenceSession(path).get_inputs()[0].shape


@pytest.mark.parametrize(
    ("kind", "batch", "says"),
    [
        ("one", 4, r"is static \(4\): at batch=1 output '.*' differs"),
        ("one", 1, r"is static \(1\): at batch=1 output '.*' differs"),
        ("more than four", 4, r"is static \(4\): the forward branches on size 0 of input 0, and the traced branch holds from 2 to 4 alone"),
        ("more than four", 6, r"is static \(6\): at batch=4 output '.*' differs"),
        ("three or more", 2, r"is static \(2\): the model's own code fixes it"),
        ("even", 4, r"is static \(4\): at batch=5 output '.*' differs"),
        ("not seven", 4, r"is static \(4\): at batch=7 output '.*' differs"),
    ],
)
def test_a_branch_on_the_batch_makes_it_static(kind, batch, says, path):
    model, x = Branches(kind).eval(), torch.randn(batch, 5, 16)
    with pytest.warns(DiffQWarning, match=says):
        export_onnx(model, x, path)
    assert sizes_of(path)[0] == batch
    np.testing.assert_allclose(run_exact(path, x), model(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "shapes", "says"),
    [
        ("longer than six", ({1: Dim.AUTO},), "the forward branches on size 1 of input 0, .* from 2 to 6 alone.*Leave this size static"),
        ("longer than six", ({1: Dim.DYNAMIC},), "the forward branches on size 1 of input 0"),
        ("more than four", ({0: Dim.AUTO, 1: Dim.AUTO},), "the forward branches on size 0 of input 0"),
        ("one", ({0: Dim.DYNAMIC},), "at batch=1 output '.*' differs"),
        ("not seven", ({0: Dim.AUTO, 1: Dim.AUTO},), "at batch=7, x_1=5 output '.*' differs"),
        ("of some lengths", ({1: Dim.DYNAMIC},), "at x_1=3 output '.*' differs.*Leave this size static"),
        ("length of one", ({0: Dim.AUTO, 1: Dim.AUTO},), "at batch=4, x_1=1 output '.*' differs"),
        ("length of one", ({1: Dim("length")},), "at x_1=1 output '.*' differs"),
        ("square", ({0: Dim.AUTO, 1: Dim.AUTO},), "at batch=4, x_1=4 output '.*' differs"),
        ("so many values", ({0: Dim.AUTO, 1: Dim.AUTO},), "at batch=4, x_1=7 output '.*' differs"),
    ],
)
def test_a_branch_on_a_size_that_is_asked_for_is_refused(kind, shapes, says, path, recwarn):
    with pytest.raises(ExportError, match=says):
        export_onnx(Branches(kind).eval(), torch.randn(4, 5, 16), path, dynamic_shapes=shapes)
    assert not path.exists()


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("longer than six", ({1: Dim("length", min=2, max=6)},)),
        ("longer than six", ({1: Dim.AUTO(max=6)},)),
        ("length of one", ({1: Dim("length", min=2)},)),
        ("length of one", ({1: Dim.AUTO(min=2)},)),
        ("of some lengths", ({1: Dim.AUTO(min=4, max=899)},)),
    ],
)
def test_limits_that_are_stated_are_kept(kind, shapes, path, recwarn):
    export_onnx(Branches(kind).eval(), torch.randn(4, 5, 16), path, dynamic_shapes=shapes)
    assert isinstance(sizes_of(path)[1], str)


SAME = {
    "contiguous from eight on": lambda x: x.contiguous() if x.shape[0] >= 8 else x,
    "in parts if long": lambda x: torch.cat(x.split(3, 1), 1) if x.shape[1] > 6 else x,
    "a copy up to five": lambda x: x.clone() if x.shape[0] <= 5 else x,
}


@pytest.mark.parametrize("kind", SAME)
def test_a_branch_whose_sides_compute_the_same_leaves_every_size_dynamic(kind, path, recwarn):
    model = nn.Sequential(Linear(16, 16, 4), Calls(SAME[kind])).eval()
    export_onnx(model, torch.randn(4, 5, 16), path)
    assert all(isinstance(size, str) for size in sizes_of(path)[:2])
    x = torch.randn(9, 8, 16)
    np.testing.assert_allclose(run_exact(path, x), model(x).detach(), rtol=1e-4, atol=1e-5)


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_a_limit_of_the_model_is_no_branch(path, recwarn):
    model = Places().eval()
    export_onnx(model, torch.randn(4, 5, 16), path, dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
    x = torch.randn(1, 9, 16)
    np.testing.assert_allclose(run_exact(path, x), model(x).detach(), rtol=1e-4, atol=1e-5)
