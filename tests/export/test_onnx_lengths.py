"""Sizes of inputs are dynamic where the model allows it; of the others the file says why they are fixed."""

import math
import re
import warnings

import pytest
import torch
from stored_models import Conv, Linear, assert_same, run_exact
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention

from diffq_fx import DiffQWarning
from diffq_fx.export import export_onnx, read_metadata
from diffq_fx.export.onnx import tracing
from diffq_fx.export.onnx.examples import ExportExample

FEATURES = "the model fixes it"


class Then(nn.Module):
    """A function of a linear layer's result and of the input."""

    def __init__(self, function):
        super().__init__()
        self.layer, self.function = Linear(16, 16, 4), function

    def forward(self, x):
        return self.function(self.layer(x), x)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.qkv = nn.Embedding(20, 16), Linear(16, 48, 4)
        self.places = nn.Parameter(torch.randn(12, 16))

    def forward(self, ids, mask):
        x = self.embedding(ids) + self.places[: ids.shape[1]]
        q, k, v = self.qkv(x).chunk(3, -1)
        return scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=mask[:, None, None].bool())[:, 0]


def test_tokens_and_their_mask_have_one_length(path, monkeypatch):
    compared = []
    redrawn = ExportExample.redrawn
    monkeypatch.setattr(ExportExample, "redrawn", lambda self, *args: compared.append(args[1]) or redrawn(self, *args))
    model, ids, mask = Attention().eval(), torch.randint(20, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = export_onnx(model, (ids, mask), path)
    assert (dict(result.sizes), dict(result.fixed_sizes)) == ({"batch": 2, "ids_1": 7}, {})
    assert [(3, 8), (3, 8)] in compared, "the check runs at another batch and another length too"
    for batch, length in ((1, 3), (4, 12)):
        ids, mask = torch.randint(20, (batch, length)), torch.ones(batch, length, dtype=torch.long)
        assert_same(run_exact(path, ids, mask), model(ids, mask))


@pytest.mark.parametrize(
    ("make", "shape", "fixed"),
    [
        (lambda: Then(lambda y, x: y), (2, 5, 16), {"x.2": FEATURES}),
        (lambda: Then(lambda y, x: y @ x.new_ones(16, 3) + x.new_ones(5, 3)), (2, 5, 16), {"x.1": FEATURES, "x.2": FEATURES}),
        (lambda: Then(lambda y, x: y), (2, 1, 16), {"x.1": "it is 1 in the example", "x.2": FEATURES}),
        (lambda: Conv(F.conv1d, (6, 10, 3), 3), (2, 10, 9), {"x.1": FEATURES}),  # torch limits the length to 4 and more
        (
            lambda: Then(lambda y, x: y * 2 if x.shape[1] > 3 else y),
            (2, 5, 16),
            {"x.1": "at batch=2, x_1=3 output 'output' differs from PyTorch.*", "x.2": ".*"},
        ),
        (
            lambda: Conv(F.conv2d, (6, 10, 3, 3), 3),
            (2, 10, 9, 8),
            dict.fromkeys(("x.1", "x.2", "x.3"), "an image keeps the sizes of the example.*"),
        ),
        (
            lambda: Then(lambda y, x: y * 2 if x.shape[1] > 6 else y),
            (2, 5, 16),
            {"x.1": "the forward branches on size 1 of input 0, .*", "x.2": ".*"},
        ),
        (
            lambda: Then(lambda y, x: y * (1 if torch.compiler.is_exporting() else x.shape[1] / 5)),
            (2, 5, 16),
            {"x.1": "at batch=3, x_1=6 output 'output' differs from PyTorch.*", "x.2": ".*"},
        ),
    ],
)
def test_a_fixed_size_has_its_reason(make, shape, fixed, path):
    """The batch is dynamic in all of them, and nothing is warned about."""
    model = make().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = export_onnx(model, torch.randn(shape), path)
    assert result.fixed_sizes.keys() == fixed.keys()
    for place, why in fixed.items():
        assert re.fullmatch(why, result.fixed_sizes[place]), place
    assert read_metadata(path).fixed_sizes == result.fixed_sizes
    assert read_metadata(path).sizes == result.sizes
    assert result.sizes["batch"] == 2
    x = torch.randn(5, *shape[1:])
    assert_same(run_exact(path, x), model(x))


class Around(nn.Module):
    """Takes anything, as PEFT's models do."""

    def __init__(self):
        super().__init__()
        self.base = Attention()

    def forward(self, *args, **kwargs):
        return self.base(*args, **kwargs)


class Before(Then):
    def forward(self, x):
        return self.layer(self.function(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.pad(x, (0, 0, 0, -x.shape[1] % 4)),
        lambda x: x[:, : 1 + -x.shape[1] % 3],
        lambda x: F.pad(x, (0, 0, 0, math.ceil(x.shape[1] / 4))),
    ],
)
def test_a_size_that_the_graph_cannot_write_as_an_expression(function, path):
    model, other = Before(function).eval(), torch.randn(3, 9, 16)
    export_onnx(model, torch.randn(2, 7, 16), path)
    assert_same(run_exact(path, other), model(other))


@pytest.mark.parametrize(
    "function",
    [lambda x: x.squeeze(1), lambda x: x[:, :, None].squeeze((1, 2)), lambda x: x[..., None].squeeze(-1).squeeze(-1)],
)
def test_what_is_squeezed_where_a_size_is_not_one_stays_as_it_is(function, path):
    model, x = Before(function).eval(), torch.randn(3, 5, 16)
    export_onnx(model, x[:2], path)
    assert_same(run_exact(path, x), model(x))


@pytest.mark.parametrize(
    "check",
    [
        lambda x: torch._check_tensor_all(x.isfinite()),
        lambda x: torch._assert_async(torch._is_any_true(x.isfinite())),
        lambda x: torch._assert_async(torch.linalg.svdvals(x[0, :2, :2])[0] >= 0),
    ],
)
def test_what_computes_the_condition_of_an_assertion_is_left_out_with_it(check, path):
    model, x = Before(lambda x: (check(x), x.mul_(2), x)[2]).eval(), torch.randn(3, 5, 16)
    with warnings.catch_warnings(action="ignore"):
        export_onnx(model, x[:2].clone(), path)
    assert_same(run_exact(path, x.clone()), model(x.clone()))


@pytest.mark.parametrize("scalar", [False, True])
def test_a_line_that_asserts_is_named_and_what_torch_asserts_is_not(scalar, path):
    class Asserting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Linear(16, 16, 4)

        def forward(self, x, numbers):
            torch._check(numbers.max().item() < 100) if scalar else torch._assert_async(numbers.max() < 100)
            return self.layer(x)[:, : int(numbers.min())]

    with pytest.warns(DiffQWarning, match="the file does not check what the forward asserts"):
        (remark,) = export_onnx(Asserting().eval(), (torch.randn(2, 16), torch.tensor([4, 2])), path).remarks
    assert re.search(r"asserts: export/test_onnx_lengths\.py:\d+: torch\._check\([^;]*$", remark)


def test_keywords_that_the_signature_does_not_name(path):
    model = Around().eval()
    result = export_onnx(model, {"ids": torch.randint(20, (2, 7)), "mask": torch.ones(2, 7, dtype=torch.long)}, path)
    assert result.fixed_sizes == {}
    ids, mask = torch.randint(20, (3, 5)), torch.ones(3, 5, dtype=torch.long)
    assert_same(run_exact(path, ids, mask), model(ids=ids, mask=mask))
    assert "forward" not in vars(model)


def _padded(layer, x, lengths):
    shown = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    assert torch.compiler.is_compiling() or shown.shape[1] == x.shape[1], "the longest fills the batch"
    return layer(x).masked_fill(~shown[..., None], 0)


@pytest.mark.parametrize(
    ("function", "other"),
    [
        (_padded, [(5, 6), (6, 2, 4)]),
        (lambda layer, x, graph: x.new_zeros(int(graph.max()) + 1, 16).index_add(0, graph, layer(x[:, 0])), [(1, 3), (0, 7, 0)]),
        (lambda layer, x, until: layer(x)[:, : int(until.min())], [(2, 6), (1, 1, 3)]),
    ],
)
def test_a_number_that_a_tensor_holds_stays_one_of_the_input(function, other, path, capfd):
    class Two(Then):
        def forward(self, x, numbers):
            return self.function(self.layer, x, numbers)

    model = Two(function).eval()
    result = export_onnx(model, (torch.randn(2, 4, 16), torch.tensor([4, 4])), path)
    assert result.sizes.keys() >= {"batch", "x_1"}
    assert capfd.readouterr().err == "", "torch prints the graph of a trace that fails"
    for numbers in map(torch.tensor, other):
        x = torch.randn(len(numbers), 6, 16)
        assert_same(run_exact(path, x, numbers), model(x, numbers))


def test_sizes_that_dynamic_shapes_leaves(path):
    result = export_onnx(Then(lambda y, x: y).eval(), torch.randn(2, 5, 16), path, dynamic_shapes={"x": {1: torch.export.Dim.AUTO}})
    assert dict(result.fixed_sizes) == {"x.0": "dynamic_shapes leaves it", "x.2": "dynamic_shapes leaves it"}


def test_one_trace_is_enough_for_lengths(path, monkeypatch):
    traced = []
    translate = tracing.translate
    monkeypatch.setattr(tracing, "translate", lambda *args: traced.append(args) or translate(*args))
    export_onnx(Attention().eval(), (torch.randint(20, (1, 7)), torch.ones(1, 7)), path)
    assert len(traced) == 1


class Decoder(nn.Module):
    """One layer of a decoder: new tokens after those whose keys and values are cached."""

    def __init__(self):
        super().__init__()
        self.embedding, self.qkv, self.head = nn.Embedding(20, 16), Linear(16, 48, 4), Linear(16, 20, 4, name="head")

    def forward(self, ids, attention_mask, *past):
        q, k, v = (part[:, None] for part in self.qkv(self.embedding(ids)).chunk(3, -1))
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        new, total = ids.shape[1], k.shape[2]
        causal = torch.arange(total)[None] <= torch.arange(new)[:, None] + total - new
        y = scaled_dot_product_attention(q, k, v, attn_mask=causal & attention_mask[:, None, None].bool())
        return self.head(y[:, 0]), k, v


def test_a_decoder_with_a_cache(path):
    """A mask as long as what is cached and what is new together, in the check too; names that say what is what."""
    model, auto = Decoder().eval(), torch.export.Dim.AUTO
    example = (torch.randint(20, (2, 3)), torch.ones(2, 8, dtype=torch.long), torch.randn(2, 1, 5, 16), torch.randn(2, 1, 5, 16))
    shapes = ({0: auto, 1: auto}, {0: auto, 1: auto}, ({0: auto, 2: auto}, {0: auto, 2: auto}))
    names = {"input_names": {"past_0": "past_key", "past_1": "past_value"}, "output_names": ["logits", "key", "value"]}
    result = export_onnx(model, example, path, dynamic_shapes=shapes, **names)
    assert result.max_relative_error < 1e-4
    fresh = (torch.randint(20, (3, 1)), torch.ones(3, 7, dtype=torch.long), torch.randn(3, 1, 6, 16), torch.randn(3, 1, 6, 16))
    for found, expected in zip(run_exact(path, *fresh), model(*fresh), strict=True):
        assert_same(found, expected)
