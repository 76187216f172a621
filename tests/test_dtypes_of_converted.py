"""A converted model that goes to another type: the stored weight gives that type, and what is stored stays as exact as it is."""

import pytest
import torch
from torch import nn

from diffq_fx import bits_report, convert, prepare
from diffq_fx.export import export_onnx, load_packed, save_packed
from diffq_fx.methods import STE, ProductQuantization

X = torch.randn(4, 32)
TYPES = (torch.float16, torch.bfloat16, torch.float64)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(32, 32, batch_first=True), nn.Linear(32, 8)

    def forward(self, x):
        return self.head(self.rnn(x[:, None])[0][:, -1])


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)), STE(bits=4), "model"),
    "layers": (lambda: nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)), STE(bits=4), "module"),
    "recurrent": (Recurrent, STE(bits=4), "auto"),
    "codebook": (lambda: nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 8)), ProductQuantization(entries=16), "model"),
}


def converted(kind):
    make, method, scope = MODELS[kind]
    return convert(prepare(make(), X, method, scope=scope).eval())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", MODELS)
def test_outputs_and_weights_are_of_the_type_that_is_asked_for(kind, dtype):
    model = converted(kind)
    expected = model(X)
    stored = {name: buffer.clone() for name, buffer in model.named_buffers()}
    moved = model.to(dtype)
    found = moved(X.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
    assert all(torch.equal(buffer, stored[name]) and buffer.dtype == stored[name].dtype for name, buffer in moved.named_buffers())
    assert torch.equal(moved.float()(X), expected) == (dtype == torch.float64 or not any(True for _ in moved.parameters()))


def test_the_ways_that_torch_has():
    for change, dtype in (
        (lambda m: m.half(), torch.float16),
        (lambda m: m.bfloat16(), torch.bfloat16),
        (lambda m: m.double(), torch.float64),
        (lambda m: m.to(X.double()), torch.float64),
        (lambda m: m.to("cpu"), torch.float32),
        (lambda m: m.type(torch.float64), torch.float64),
        (lambda m: m.share_memory(), torch.float32),
        (lambda m: m.to("meta"), torch.float32),
    ):
        stored = change(converted("linear")).get_submodule("0.weight_quantized")
        assert stored().dtype == dtype
        assert {each.device for each in stored.buffers()} == {stored.float_like.device}


def test_files_of_a_moved_model(tmp_path):
    model = converted("linear").half()
    found = load_packed(save_packed(model, tmp_path / "m.safetensors"))
    assert {value.dtype for value in found.values()} == {torch.float16}
    assert torch.equal(found["0.weight"], model.get_submodule("0").weight_quantized())
    assert export_onnx(model, X.half(), tmp_path / "m.onnx").max_relative_error < 5e-3
    assert bits_report(model).weights[0].average_bits == 4


@pytest.mark.parametrize("method", [STE(bits=4), ProductQuantization(entries=16)], ids=["integers", "codebook"])
@pytest.mark.parametrize("scope", ["model", "module"])
def test_a_model_whose_every_parameter_is_quantized_still_says_its_type_and_device(method, scope):
    """By the idiom that every library has, of the whole and of a layer; and there is nothing to train."""
    model = nn.Sequential(nn.Linear(32, 64, bias=False), nn.ReLU(), nn.Linear(64, 8, bias=False))
    made = convert(prepare(model, X, method, scope=scope)).half()
    for part in (made, made.get_submodule("2")):
        found = next(part.parameters())
        assert (found.dtype, found.device, found.numel(), found.requires_grad) == (torch.float16, X.device, 0, False)
    assert next(made.to("meta").parameters()).is_meta


def test_a_model_that_was_cast_after_prepare_says_its_type():
    prepared = prepare(nn.Linear(32, 8, bias=False), X, STE(bits=4)).bfloat16()
    made = convert(prepared)
    assert next(made.parameters()).dtype == made.weight_quantized().dtype == torch.bfloat16


def test_packed_files_hold_nothing_of_it(tmp_path):
    model = nn.Linear(32, 8, bias=False)
    assert load_packed(save_packed(convert(prepare(model, X, STE(bits=4))), tmp_path / "m.safetensors")).keys() == {"weight"}
