"""One model with several prepared parts, or with a head of its own: every function works on all of it."""

import copy

import onnx
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from diffq_fx import (
    ConversionError,
    DiffQConfig,
    PreparationError,
    bits_report,
    convert,
    freeze_bits,
    model_size,
    prepare,
    setup_optimizer,
)
from diffq_fx.export import export_onnx, load_packed, save_packed
from diffq_fx.methods import STE

X = torch.randn(6, 32)


FIXED = (STE(bits=4), STE(bits=3))


class Pair(nn.Module):
    """Two prepared parts, something of its own between them, and a float head."""

    def __init__(self, scopes=("model", "module"), methods=FIXED):
        super().__init__()
        layers = (nn.Sequential(nn.Linear(32, 64), nn.ReLU()), nn.Sequential(nn.Linear(64, 64), nn.Tanh()))
        self.encoder, self.decoder = (
            prepare(layer, torch.randn(6, layer[0].in_features), method, scope=scope)
            for layer, method, scope in zip(layers, methods, scopes, strict=True)
        )
        self.head = nn.Linear(64, 8)
        self.register_buffer("shift", torch.ones(64))
        self.by_name = {"decoder": self.decoder}

    def forward(self, x):
        return self.head(self.by_name["decoder"](self.encoder(x) + self.shift))


def learning():
    return Pair(methods=(DiffQConfig(target_bits=4), DiffQConfig(target_bits=5, group_size="tensor", min_bits=2)))


def test_convert_keeps_everything():
    model = Pair().eval()
    converted = convert(model)
    assert torch.equal(converted(X), model(X))
    assert type(converted) is Pair
    floats = sorted(name for name, parameter in converted.named_parameters() if parameter.numel())
    assert floats == ["decoder.0.bias", "encoder.0.bias", "head.bias", "head.weight"]
    assert converted.head.weight is not model.head.weight
    assert converted.by_name["decoder"] is converted.decoder  # wherever the wrapper keeps it


def test_a_wrapper_that_computes_nothing_is_taken_off_and_any_other_kept():
    prepared = prepare(nn.Linear(32, 8), X, STE(bits=4)).eval()
    for wrapper in (nn.DataParallel(prepared), AveragedModel(prepared), torch.compile(prepared, backend="eager")):
        assert isinstance(convert(wrapper), torch.fx.GraphModule)

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = prepared

        def forward(self, x):
            return 2 * self.net(x)

    assert torch.equal(convert(Scaled())(X), 2 * prepared(X))


def test_a_converted_part_beside_a_prepared_one():
    model = Pair().eval()
    expected = model(X)
    model.encoder = convert(model.encoder)
    assert torch.equal(convert(model)(X), expected)
    assert {row.name for row in bits_report(model).weights} == {"encoder.0.weight", "decoder.0.weight"}


def test_sizes_and_reports_are_sums():
    model = learning()
    own = 4 * (8 * 64 + 8) / 2**20
    for exact in (True, False):
        parts = [float(model_size(part, exact=exact)) for part in (model.encoder, model.decoder)]
        assert float(model_size(model, exact=exact)) == pytest.approx(sum(parts) + own)
    report = bits_report(model)
    assert report.packed_size.total_mib == pytest.approx(model_size(model, exact=True))
    assert [row.name for row in report.weights] == ["encoder.0.weight", "decoder.0.weight"]
    assert ("head.weight", "in no prepared part") in {(s.name, s.reason) for s in report.skipped}
    assert "target of decoder: 5 bits per quantized weight" in str(report)
    for converted in (convert(Pair().eval()), nn.Sequential(convert(Pair().eval()))):
        rows = bits_report(converted).weights
        assert [row.average_bits for row in rows] == [4, 3]


def test_the_size_of_all_parts_is_a_loss():
    model = learning()
    model_size(model).backward()
    assert all(q.logits.grad is not None for part in (model.encoder, model.decoder) for q in part.compression.quantizers)
    assert model.encoder.compression.penalized
    assert model.decoder.compression.penalized


def test_bits_of_all_parts_are_trained_and_frozen():
    model = learning()
    optimizer = setup_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, bits_lr=0.5)
    assert len(optimizer.param_groups[1]["params"]) == 2
    freeze_bits(model)
    assert model.encoder.compression.frozen
    assert model.decoder.compression.frozen
    fixed = Pair(methods=(STE(bits=4), DiffQConfig()))
    freeze_bits(fixed)
    assert fixed.decoder.compression.frozen
    with pytest.raises(PreparationError, match="no weight of this model has trainable bits"):
        freeze_bits(Pair())


def test_packed_files_and_onnx_hold_all_parts(tmp_path):
    """Both parts call their weight ``0.weight``."""
    model = convert(Pair().eval())
    found = load_packed(save_packed(model, tmp_path / "m.safetensors"))
    assert torch.equal(found["encoder.0.weight"], model.encoder.get_submodule("0").weight_quantized())
    assert torch.equal(found["decoder.0.weight"], model.decoder[0].weight)
    assert torch.equal(found["head.weight"], model.head.weight)
    other = convert(Pair().eval())
    load_packed(other, tmp_path / "m.safetensors")
    assert torch.equal(other(X), model(X))
    assert torch.equal(convert_again(other.encoder)(X), model.encoder(X))
    result = export_onnx(model, X, tmp_path / "m.onnx")
    assert [record.name for record in result.weights] == ["encoder.0.weight", "decoder.0.weight"]
    assert result.max_relative_error < 1e-4
    assert len({name for record in result.weights for name in record.initializers}) == 2
    assert onnx.load(tmp_path / "m.onnx").graph.output


def convert_again(part):
    """A part that was filled is still one that can be copied."""
    return copy.deepcopy(part)


def test_the_rest_of_one_part_may_be_in_half_precision(tmp_path):
    model = convert(Pair(methods=(STE(bits=4, rest_dtype="float16"), STE(bits=3))).eval())
    assert export_onnx(model, X, tmp_path / "m.onnx").max_relative_error < 1e-4
    halves = {t.name for t in onnx.load(tmp_path / "m.onnx").graph.initializer if t.name.endswith(".float16")}
    assert halves == {"encoder.0.bias.float16"}


def test_one_part_shared_by_two_names(tmp_path):
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.left = prepare(nn.Linear(32, 32), X, STE(bits=4))
            self.right = self.left

        def forward(self, x):
            return self.left(x) - 2 * self.right(x + 1)

    model = Siamese().eval()
    converted = convert(model)
    assert converted.left is converted.right
    assert len(bits_report(converted).weights) == 1
    found = load_packed(save_packed(converted, tmp_path / "m.safetensors"))
    assert {"left.weight", "right.weight"} <= set(found)
    plain = nn.Module()
    plain.left = plain.right = nn.Linear(32, 32)
    load_packed(plain, tmp_path / "m.safetensors")


def test_a_piece_of_a_prepared_model_is_refused():
    prepared = prepare(nn.Sequential(nn.Sequential(nn.Linear(32, 8), nn.ReLU()), nn.Tanh()), X, STE(bits=4), scope="module")
    with pytest.raises(ConversionError, match="is a part of a prepared model. Give the whole"):
        convert(prepared[0])


def test_a_wrapper_that_cannot_be_copied_names_its_parts():
    model = Pair().eval()
    model.results = (x for x in range(3))
    with pytest.raises(
        ConversionError, match=r"(?s)the Pair cannot be copied: TypeError.*Convert its prepared parts.*: encoder, decoder\."
    ):
        convert(model)
