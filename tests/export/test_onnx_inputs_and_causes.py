"""What an export is checked with, what it says where it fails, and what it does where only a part of torch.onnx fails."""

import logging
import math
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from stored_models import Linear, assert_same, run_exact
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from diffq_fx import DiffQWarning, ExportError
from diffq_fx.export import export_onnx
from diffq_fx.export.onnx import tracing, translation
from diffq_fx.export.onnx.examples import ExportExample
from diffq_fx.export.onnx.tracing import Tracer


class Attention(nn.Module):
    """A causal decoder whose mask may come in every form that models take."""

    def __init__(self):
        super().__init__()
        self.qkv = Linear(16, 48, 4)

    def forward(self, x, mask):
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        if mask.is_floating_point():
            return scaled_dot_product_attention(q, k, v, attn_mask=mask)[:, 0]
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        return scaled_dot_product_attention(q, k, v, attn_mask=causal & mask[:, None, None, :].bool())[:, 0]


def right_padded():
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, -3:] = 0
    return mask


def additive(hides):
    causal = torch.full((7, 7), hides).triu(1)
    return causal.expand(2, 1, 7, 7).contiguous()


@pytest.mark.parametrize("shape", [(2, 9), (1, 7), (3,)])
def test_a_wrong_example_is_one_sentence_and_nothing_is_logged(path, monkeypatch, shape):
    logged, handler = [], logging.Handler()
    monkeypatch.setattr(handler, "emit", logged.append)
    loggers = [logging.getLogger(name) for name in ("torch", "torch._subclasses.fake_tensor")]  # the second is deaf to the first
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with pytest.raises(ExportError, match=r"does not run on example_inputs \(torch.float32\): RuntimeError: .*shape"):
            export_onnx(Linear(8, 8, 4), torch.randn(shape), path)
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert not logged


MASKS = {
    "integers": right_padded(),
    "booleans": right_padded().bool(),
    "added": additive(-1e5),
    "added, infinite": additive(-math.inf),
    "added, the least float": additive(torch.finfo(torch.float32).min),
}


@pytest.mark.parametrize("kind", ["integers", "booleans", "added, infinite"])
def test_masks_of_every_form(kind, path):
    model, mask = Attention().eval(), MASKS[kind]
    result = export_onnx(model, (torch.randn(2, 7, 16), mask), path)
    assert result.max_relative_error < 1e-4
    assert result.remarks == ()


def test_what_a_mask_hides_is_no_difference_and_is_said(path):
    """Padding on the left: the first rows of a causal model see nothing, which torch and onnxruntime fill differently."""
    model, mask = Attention().eval(), right_padded().flip(1)
    with pytest.warns(DiffQWarning, match="differ where it hides one"):
        result = export_onnx(model, (torch.randn(2, 7, 16), mask), path)
    assert result.max_relative_error < 1e-4

    class Wrong(Attention):
        def forward(self, x, mask):
            return super().forward(x, mask) * (1 if torch.compiler.is_exporting() else 1.01)

    with pytest.raises(ExportError, match="differs from PyTorch"):  # also where the mask shows a place
        export_onnx(Wrong().eval(), (torch.randn(2, 7, 16), mask), path)


def blind(form):
    """A mask whose second row sees nothing."""
    mask = right_padded()
    mask[1] = 0
    return {"integers": mask, "booleans": mask.bool(), "added": (1.0 - mask[:, None, None]).expand(2, 1, 7, 7) * -1e38 * 10}[form]


@pytest.mark.parametrize("form", ["integers", "booleans", "added"])
@pytest.mark.parametrize("pool", [lambda y: y, lambda y: y.mean(1), lambda y: y[:, 0, 0], lambda y: {"y": y, "pooled": y.amax(1)}])
def test_a_row_that_sees_nothing_is_named(form, pool, path):
    class Pooled(Attention):
        def forward(self, x, mask):
            return pool(super().forward(x, mask))

    with pytest.warns(DiffQWarning, match=r"row 1 of input 'mask' sees nothing.*Give every row of example_inputs a place that it sees"):
        result = export_onnx(Pooled().eval(), (torch.randn(2, 7, 16), blind(form)), path)
    assert result.max_relative_error < 1e-4


@pytest.mark.parametrize("form", ["integers", "added"])
def test_a_difference_that_a_row_without_sight_may_explain_is_refused_with_its_name(form, path):
    class Summed(Attention):
        def forward(self, x, mask):
            return super().forward(x, mask).sum(0)

    says = r"differs from PyTorch by .*\. Row 1 of input 'mask' sees nothing.*Give every row of example_inputs a place that it sees"
    with pytest.raises(ExportError, match=says) as caught:
        export_onnx(Summed().eval(), (torch.randn(2, 7, 16), blind(form)), path)
    assert "report" not in str(caught.value)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("change", [-1, 0, 1])
def test_no_row_of_a_redrawn_mask_is_all_hidden(kind, change):
    mask = MASKS[kind]
    for example in (mask, mask.flip(-1)):
        sizes = tuple(size + change * (axis in (0, mask.dim() - 1)) for axis, size in enumerate(mask.shape))
        (drawn,) = ExportExample((example,), {}).redrawn(torch.Generator().manual_seed(3), [sizes]).tensors
        assert drawn.shape == sizes
        rows = drawn.double().flatten(0, -2)
        assert bool((rows.amax(-1) == example.double().max()).all()), "a row sees nothing"
        assert set(drawn.unique().tolist()) <= set(example.unique().tolist())


def test_a_size_that_is_a_sum_stays_one():
    sizes = {"batch": 2, "ids_1": 3, "mask_0": 2, "mask_1": 8, "past_2": 5}
    assert tracing._other_sizes(sizes, {}) == {"batch": 3, "ids_1": 4, "mask_0": 3, "mask_1": 10, "past_2": 6}
    assert tracing._other_sizes(sizes, {"mask_1": 8})["mask_1"] == 7  # no room


def test_values_that_make_nothing_finite_are_not_used(path):
    """A mask of ones in float may be any float: what the model makes of random ones is not finite."""

    class Scored(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Linear(16, 7, 4)

        def forward(self, x, mask):
            return (self.layer(x) + (1 - mask) * torch.finfo(torch.float32).min * 2).softmax(-1)

    assert export_onnx(Scored().eval(), (torch.randn(3, 16), torch.ones(3, 7)), path).max_relative_error < 1e-4


def test_one_tensor_for_two_inputs(path):
    class Difference(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Linear(16, 8, 4)

        def forward(self, a, b):
            return self.layer(a) - 2 * self.layer(b)

    model, x, y = Difference().eval(), torch.randn(3, 16), torch.randn(3, 16)
    for example in ((x, x), {"a": x, "b": x[:]}):
        export_onnx(model, example, path)
        assert len(onnx.load(path).graph.input) == 2
    assert_same(run_exact(path, x, y), model(x, y))


def test_outputs_that_no_input_decides(path):
    class Constants(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Linear(64, 64, 4)
            self.scale, self.plain = nn.Parameter(torch.tensor(2.6)), nn.Parameter(torch.randn(100))
            self.register_buffer("positions", torch.arange(300))

        def forward(self, x):
            return self.layer(x), self.scale.exp(), self.plain, self.positions, x, self.plain

    model, x = Constants().eval(), torch.randn(3, 64)
    for rest in (None, torch.float16):
        model.rest_dtype = rest
        export_onnx(model, torch.randn(2, 64), path)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        for ours, theirs in zip(found[1:], model(x)[1:], strict=True):
            np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-3)


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = Linear(32, 96, 4)

    def forward(self, x):
        return scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))


class Untranslated(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Linear(8, 8, 4)

    def forward(self, x):
        return torch.linalg.svdvals(self.layer(x))


class WithCache(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Linear(8, 8, 4)

    def forward(self, x):
        class DynamicCache:
            pass

        return self.layer(x), DynamicCache()


class Keyword(nn.Module):
    """A Sequential whose first layer is called by a keyword of Python."""

    def __init__(self, name):
        super().__init__()
        self.add_module(name, Linear(8, 8, 4))
        self.layer = Linear(8, 8, 4)

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


class Holder(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *inputs):
        return self.inner(*inputs)


@pytest.mark.parametrize(
    ("model", "shape", "says"),
    [
        (Holder(Three()), (2, 9, 32), r"scaled_dot_product_attention\.default in 'inner' \(Three\): AssertionError: only 4D query"),
        (Holder(Untranslated()), (2, 8, 8), r"_linalg_svd\.default in 'inner' \(Untranslated\) has no translation to ONNX"),
        (WithCache(), (2, 8), r"cannot trace the WithCache: it returns a cache of keys and values\. Add use_cache=False .* cache=True"),
        (Keyword("class"), (2, 8), r"the name 'class\.[\w.]+' holds a keyword of Python, which torch\.onnx cannot write\. Rename"),
        (Holder(Keyword("None")), (2, 8), r"the name 'inner\.None\.[\w.]+' holds a keyword of Python"),
    ],
)
def test_the_cause_is_named(model, shape, says, path):
    with pytest.raises(ExportError, match=says) as caught:
        export_onnx(model.eval(), torch.randn(shape), path)
    assert "\x1b" not in str(caught.value)
    assert "Next steps" not in str(caught.value)


@pytest.mark.parametrize(
    ("function", "line"),
    [
        (lambda x: x * int(x[0, 0]) if x.sum() > 0 else x, r"lambda x: x \* int"),
        (lambda x: sum(x[:, : int(i)].sum() for i in torch.nonzero(x[:, 0] > 0)), r"for i in torch\.nonzero"),
        (lambda x: x + len(3), r"x \+ len\(3\)"),
    ],
)
def test_the_line_of_the_forward_at_which_tracing_ends_is_named(function, line, path):
    with pytest.raises(ExportError, match=rf"(?s)cannot trace the Then: .*\n  at export/test_onnx_inputs_and_causes\.py:\d+: .*{line}"):
        Tracer(Then(function).eval(), ExportExample.of(torch.ones(3, 16))).trace()


class MakesNoMask(Keyword):
    def __init__(self):
        super().__init__("first")

    def forward(self, x, mask=None, labels=None, scale=1.0):
        if mask is None and not torch.compiler.is_compiling():
            mask = torch.ones_like(x)
        return self.layer(x) * mask[:, :]


@pytest.mark.parametrize(("kwargs", "says"), [({}, "mask, labels"), ({"labels": torch.ones(2, 8)}, "mask")])
def test_the_arguments_that_an_example_leaves_out_are_named_where_nothing_took_their_place(kwargs, says):
    with pytest.raises(ExportError, match=rf"example leaves out {says}, one of which may be needed while torch\.export traces"):
        Tracer(MakesNoMask().eval(), ExportExample.of({"x": torch.ones(2, 8), **kwargs})).trace()


class Then(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layer, self.function = Linear(16, 16, 4), function

    def forward(self, x):
        return self.function(self.layer(x))


class Cache:
    """What a forward adds to."""

    def __init__(self):
        self.seen = 0


class WithCacheGiven(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Linear(8, 8, 4)

    def forward(self, x, cache):
        cache.seen += 1
        return self.layer(x) * cache.seen


class Counts(WithCacheGiven):
    def forward(self, x):
        self.seen = getattr(self, "seen", 0) + 1
        return self.layer(x) * self.seen


def test_a_forward_that_keeps_something_draws_no_random_numbers(path):
    with pytest.raises(ExportError, match="a cache of keys and values is no tensor. Leave it out .* else export a wrapper"):
        export_onnx(WithCacheGiven().eval(), (torch.randn(2, 8), Cache()), path)
    with pytest.raises(ExportError, match="its forward keeps something that the next one reads"):
        export_onnx(Counts().eval(), torch.randn(2, 8), path)


@pytest.mark.parametrize(
    ("function", "dtypes", "says"),
    [
        (lambda y: (y, 3), (torch.float32, torch.float32), "output 1 of the Then is 3, no tensor. Export a wrapper"),
        (lambda y: {"y": y, "name": "linear"}, (torch.float32, torch.float32), "output 1 of the Then is 'linear', no tensor"),
        (lambda y: y, (torch.bfloat16, torch.bfloat16), r"is in bfloat16, for which onnxruntime has no kernels here. Call .float\(\)"),
        (lambda y: y, (torch.float64, torch.float32), r"parameters: torch.float64\) does not run on example_inputs \(torch.float32\)"),
        (lambda y: y + torch.rand(4, 16), (torch.float32, torch.float32), "its forward draws random numbers"),
        (torch.nn.functional.dropout, (torch.float32, torch.float32), "its forward draws random numbers"),
    ],
)
def test_a_cause_in_the_model_is_named(function, dtypes, says, path):
    of_model, of_example = dtypes
    with pytest.raises(ExportError, match=says) as caught:
        export_onnx(Then(function).eval().to(of_model), torch.randn(4, 16).to(of_example), path)
    assert str(path.parent) not in str(caught.value)


@pytest.mark.parametrize(("value", "trained"), [(math.nan, True), (math.nan, False), (math.inf, True)])
def test_parameters_that_are_not_finite_are_named(value, trained, path):
    model = Holder(Linear(16, 16, 4)).eval()
    model.inner.bias.data[3] = value
    model.inner.bias.requires_grad_(trained)
    with pytest.raises(
        ExportError, match=r"parameter 'inner\.bias' is not finite in 1 of 16 places, first at \(3,\): its training diverged"
    ):
        export_onnx(model, torch.randn(4, 16), path)
    assert not path.exists()


class GroupsOfTheBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.style = nn.Parameter(torch.randn(1, 8, 4, 3, 3)), Linear(6, 4, 4)

    def forward(self, x, z):
        b = x.shape[0]
        w = (self.weight * self.style(z).view(b, 1, 4, 1, 1)).view(b * 8, 4, 3, 3)
        return nn.functional.conv2d(x.reshape(1, -1, 8, 8), w, padding=1, groups=b).view(b, 8, 8, 8)


class Chunks(nn.Module):
    """The encoder of optical flow: both images in one batch, then split."""

    def __init__(self):
        super().__init__()
        self.encoder = Linear(64, 64, 4)

    def forward(self, a, b):
        x, y = torch.chunk(self.encoder(torch.cat([a, b])), 2)
        return x * y


def test_a_static_batch_where_a_dynamic_one_cannot_be_translated(path):
    example = (torch.randn(2, 4, 8, 8), torch.randn(2, 6))
    with pytest.warns(DiffQWarning, match=r"is static \(2, 2\): with a dynamic one .*aten\.conv2d\.default: .*Give dynamic_shapes"):
        export_onnx(GroupsOfTheBatch().eval(), example, path)


def test_without_the_optimizer_where_that_fails(path, monkeypatch):
    """As it does where a chunk's size hangs on the batch; which graphs it fails on is another matter in every version."""
    to_onnx = translation._to_onnx

    def without(program, *, optimize):
        if optimize:
            raise RuntimeError("the optimizer fails")
        return to_onnx(program, optimize=False)

    monkeypatch.setattr(translation, "_to_onnx", without)
    model, (a, b) = Chunks().eval(), torch.randn(2, 5, 64)
    with pytest.warns(DiffQWarning, match=r"not optimized by torch\.onnx, which fails on it \(RuntimeError: the optimizer fails\)"):
        export_onnx(model, (a[:2], b[:2]), path)
    assert_same(run_exact(path, a, b), model(a, b))


def test_a_mask_that_is_learned(path):
    """With gradients on torch takes attention apart into other operators, whose layout the reshape does not fit."""

    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.slopes = Linear(64, 192, 4), nn.Parameter(torch.randn(4))

        def forward(self, x):
            b, n, c = x.shape
            q, k, v = self.qkv(x).reshape(b, n, 3, 4, 16).permute(2, 0, 3, 1, 4).unbind(0)
            bias = self.slopes[:, None, None] * torch.arange(n, dtype=x.dtype)
            y = scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(1, 4, n, n).contiguous())
            return y.transpose(1, 2).reshape(b, n, c)

    assert export_onnx(Biased().eval(), torch.randn(2, 9, 64), path).max_relative_error < 1e-4


class Biased(nn.Module):
    """Attention with relative positions, as in Swin: a table of indices in every layer."""

    def __init__(self, shift=0):
        super().__init__()
        self.linear, self.table = Linear(16, 16, 4), nn.Parameter(torch.randn(300, 1))
        self.register_buffer("index", (torch.arange(120)[:, None] - torch.arange(120) + 119 + shift))

    def forward(self, x):
        return self.linear(torch.softmax(self.table[self.index].squeeze(-1), -1) @ x)


def test_equal_tables_of_indices_are_stored_once_and_small(path):
    model, x = nn.Sequential(*(Biased() for _ in range(3)), Biased(shift=1)).eval(), torch.randn(2, 120, 16)
    for index, layer in enumerate(model):
        layer.linear.weight.spec = replace(layer.linear.weight.spec, name=f"{index}.weight")
    result = export_onnx(model, x, path)
    tables = [t for t in onnx.load(path).graph.initializer if list(t.dims) == [120, 120]]
    assert [t.data_type for t in tables] == [onnx.TensorProto.UINT8] * 2
    assert "Cast" not in result.operators  # done when the file is loaded
    assert_same(run_exact(path, x), model(x))


def test_outputs_are_called_by_their_keys(path):
    class Keyed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Linear(16, 8, 4)

        def forward(self, x):
            y = self.layer(x)
            return {"logits": y, "hidden": (y.relu(), y.tanh()), "x": x * 2}, y.exp()

    export_onnx(Keyed().eval(), torch.randn(2, 16), path)
    names = [output.name for output in onnx.load(path).graph.output]
    assert names[:3] == ["logits", "hidden_0", "hidden_1"]
    assert len(set(names)) == 5
    x = torch.randn(3, 16)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(["hidden_1"], {session.get_inputs()[0].name: x.numpy()})
    assert found.shape == (3, 8)


class Sorting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Linear(16, 16, 4)

    def forward(self, x):
        y = self.layer(x)
        order = (1e4 + y.sum(-1)).argsort(-1)  # of scores that are equal but for their last digits
        return y.gather(1, order[..., None].expand_as(y))


def test_a_model_that_makes_much_of_the_last_digits_is_called_so(path):
    told = r"differs from PyTorch by .*; where the inputs change in their last digits PyTorch's own outputs change by \d"
    with pytest.raises(ExportError, match=f"{told}.*verify=False writes it without a comparison"):
        export_onnx(Sorting().eval(), torch.randn(2, 300, 16), path)
