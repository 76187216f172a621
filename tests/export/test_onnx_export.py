"""export_onnx as a whole: inputs, batch, opset, errors, and that a failure leaves the old file as it was."""

import os
import subprocess
import sys
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from stored_models import Bare, Conv, Linear, Parallel, assert_same, run_exact, store
from torch import nn

import diffq_fx
from diffq_fx import DiffQConfig, DiffQError, DiffQWarning, ExportError, StoredWeight, convert_diffq, prepare_diffq
from diffq_fx.export import export_onnx, read_metadata
from diffq_fx.export.onnx import parity, pipeline


def shapes(path):
    return [[d.dim_param or d.dim_value for d in entry.type.tensor_type.shape.dim] for entry in onnx.load(path).graph.input]


class Two(nn.Module):
    """Two inputs, one of them optional, and a plain number."""

    def __init__(self):
        super().__init__()
        self.layer = Linear(16, 8, 4)

    def forward(self, x, mask=None, *, factor=1):
        y = self.layer(x) * factor
        return {"y": y if mask is None else y * mask}


def test_every_form_of_example_inputs(path):
    model = Two().eval()
    x, mask = torch.randn(1, 16), torch.rand(1, 8)
    for example, given in ((x, 1), ((x, mask), 2), ({"x": x, "factor": 3}, 1), ({"mask": mask, "x": x}, 2)):
        result = export_onnx(model, example, path)
        assert len(shapes(path)) == given
        assert result.max_relative_error < 1e-5
        assert all(isinstance(first, str) for first, _ in shapes(path))
    with pytest.raises(TypeError, match="example_inputs must be a tensor, a tuple"):
        export_onnx(model, "x", path)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_batch_is_dynamic(batch, path):
    model = Linear(16, 8, 4).eval()
    result = export_onnx(model, torch.randn(batch, 16), path)
    assert result.remarks == ()
    for size in (1, 2, 7):
        fresh = torch.randn(size, 16)
        assert_same(run_exact(path, fresh), model(fresh))


def test_input_without_batch(path):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Linear(16, 8, 4)

        def forward(self, x, mask):
            return self.layer(x) + mask @ x.new_ones(3, 8)

    export_onnx(Masked().eval(), (torch.randn(1, 3, 16), torch.randn(3, 3)), path)
    assert shapes(path) == [["batch", "x_1", 16], ["x_1", 3]]


def test_an_example_that_is_a_view_of_a_larger_tensor(path):
    tokens = torch.randint(9, (3, 7))
    model = nn.Sequential(nn.Embedding(9, 16), Linear(16, 8, 4)).eval()
    result = export_onnx(model, tokens[:, :-1], path)  # what is trained on: all tokens but the last
    assert result.max_abs_error < 1e-5
    assert isinstance(shapes(path)[0][0], str)


def test_batch_that_the_model_fixes_is_reported(path):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Linear(16, 8, 4)

        def forward(self, x):
            return self.layer(x.reshape(1, 4, 16))

    with pytest.warns(DiffQWarning, match=r"size 0 of the inputs, is static \(4\)"):
        result = export_onnx(Fixed().eval(), torch.randn(4, 16), path)
    assert len(result.remarks) == 1
    assert shapes(path) == [[4, 16]]


def test_dynamic_shapes_of_the_user(path):
    model = Linear(16, 8, 4).eval()
    export_onnx(model, torch.randn(2, 3, 16), path, dynamic_shapes={"x": {1: torch.export.Dim("length")}})
    assert shapes(path) == [[2, "x_1", 16]]
    with pytest.raises(ExportError, match=r"torch\.export cannot trace"):
        export_onnx(model, torch.randn(2, 3, 16), path, dynamic_shapes={"y": {1: torch.export.Dim("length")}})


def test_model_that_changes_its_argument(path):
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Linear(16, 8, 4)

        def forward(self, x):
            return self.layer(x.add_(1))

    assert export_onnx(Adds().eval(), torch.randn(2, 16), path).max_relative_error < 1e-5


def test_integers_that_must_fit_together(path):
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = store(torch.randn(10, 4), 4)

        def forward(self, ids, offsets):
            return nn.functional.embedding_bag(ids, self.table(), offsets)

    ids, offsets = torch.randint(10, (7,)), torch.tensor([0, 2, 5])
    assert export_onnx(Bag().eval(), (ids, offsets), path).max_relative_error < 1e-5


def test_size_at_its_upper_limit(path):
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Linear(16, 8, 4)
            self.register_buffer("positions", torch.randn(6, 16))

        def forward(self, x):
            return self.layer(x + self.positions[: x.shape[1]])

    length = torch.export.Dim("length", max=6)
    result = export_onnx(Positions().eval(), torch.randn(2, 6, 16), path, dynamic_shapes={"x": {1: length}})
    assert result.max_relative_error < 1e-5


def test_integers_stay_within_the_range_of_the_example(path):
    table = nn.Embedding(10, 4)

    class Lookup(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = store(table.weight, 4)

        def forward(self, ids):
            return nn.functional.embedding(ids, self.table())

    assert export_onnx(Lookup().eval(), torch.tensor([[0, 9, 3]]), path).max_abs_error < 1e-5


@pytest.mark.parametrize(
    ("bits", "layout", "smallest", "ir_version"),
    [(8, "onnxruntime", 20, 9), (16, "onnxruntime", 20, 9), (16, "qdq", 21, 10), (4, "qdq", 21, 10), (2, "onnxruntime", 25, 13)],
)
def test_smallest_opset(bits, layout, smallest, ir_version, path):
    model = Linear(16, 8, bits).eval()
    result = export_onnx(model, torch.randn(2, 16), path, layout=layout)
    file = onnx.load(path)
    imported = {entry.domain: entry.version for entry in file.opset_import}
    assert imported.pop("") == smallest
    assert set(imported) == {function.domain for function in file.functions} <= {"diffq_fx"}
    assert (result.opset, file.ir_version) == (smallest, ir_version)
    assert export_onnx(model, torch.randn(2, 16), path, layout=layout, opset=25).opset == 25


def test_opset_that_does_not_hold_the_weights(old_file):
    for bits, opset, message in ((4, 20, "opset 20 is too low: UINT4 of 'weight.levels' needs 21"), (2, 24, "UINT2 of .* needs 25")):
        with pytest.raises(ExportError, match=message):
            export_onnx(Linear(16, 8, bits).eval(), torch.randn(2, 16), old_file, opset=opset)
    for opset in (19, 26):
        with pytest.raises(ExportError, match=f"opset {opset} is outside of 20 to 25"):
            export_onnx(Linear(16, 8, 8).eval(), torch.randn(2, 16), old_file, opset=opset)


def test_operators_of_many_opsets(path):
    """Conversion to opset 25 keeps what layers mean."""

    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = store(torch.randn(8, 4, 3, 3), 2)
            self.norms = nn.Sequential(nn.GroupNorm(2, 8), nn.BatchNorm2d(8), nn.GELU(), nn.AvgPool2d(2), nn.MaxPool2d(2))

        def forward(self, x):
            x = self.norms(nn.functional.conv2d(x, self.weight()))
            x = nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
            return nn.functional.pad(x, (1, 1, 1, 1), mode="reflect").softmax(1).cumsum(2).amax(-1)

    assert export_onnx(Many().eval(), torch.randn(1, 4, 14, 14), path).opset == 25


def test_model_that_is_not_converted(old_file):
    with pytest.raises(ExportError, match=r"the Linear holds no integer weight\. Call convert_diffq"):
        export_onnx(nn.Linear(4, 4), torch.randn(1, 4), old_file)
    prepared = diffq_fx.prepare_diffq(nn.Sequential(nn.Linear(32, 32)), torch.randn(1, 32))
    with pytest.raises(ExportError, match=r"still quantizes '0\.weight' for training\. Call convert_diffq"):
        export_onnx(prepared, torch.randn(1, 32), old_file)


def test_float_grid_has_no_onnx_form(old_file):
    model = Linear(16, 8, 4, grid="float", name="encoder.weight").eval()
    with pytest.raises(ExportError, match=r"weight 'encoder\.weight' is on the float grid.*grid=\"affine\""):
        export_onnx(model, torch.randn(1, 16), old_file)


def test_storage_without_onnx_form(old_file):
    class Codebook(StoredWeight):
        def forward(self):
            return torch.zeros(4, 4)

        def footprint(self):
            raise NotImplementedError

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.coded = Codebook(store(torch.randn(4, 4), 4, name="coded").spec, torch.device("cpu"))

        def forward(self, x):
            return x @ self.coded()

    with pytest.raises(ExportError, match="weight 'coded' is a Codebook, which has no ONNX form yet"):
        export_onnx(Reader(), torch.randn(1, 4), old_file)


def test_unknown_layout(old_file):
    with pytest.raises(ValueError, match="layout must be one of"):
        export_onnx(Linear(16, 8, 4), torch.randn(1, 16), old_file, layout="fast")


def test_model_that_cannot_be_traced(old_file):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Linear(16, 8, 4)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else x

    with pytest.raises(ExportError, match=r"torch\.export cannot trace the Branching"):
        export_onnx(Branching().eval(), torch.randn(2, 16), old_file)


def test_path_that_cannot_be_written(tmp_path, monkeypatch):
    model, example = Linear(16, 8, 4).eval(), torch.randn(2, 16)
    with pytest.raises(ExportError, match=r"cannot write .*missing.*No such file"):
        export_onnx(model, example, tmp_path / "missing" / "model.onnx")
    with pytest.raises(ExportError, match="it is a folder"):
        export_onnx(model, example, tmp_path)
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the old file")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everything
    with pytest.raises(ExportError, match="the file is read-only"):
        export_onnx(model, example, path)
    assert path.read_bytes() == b"the old file"


@pytest.mark.parametrize("broken", ["save", "checker", "replace"])
def test_failure_at_any_step_leaves_the_old_file(broken, old_file, monkeypatch):
    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device") if broken != "checker" else onnx.checker.ValidationError("bad graph")

    targets = {"save": "onnx_ir.save", "checker": "onnx.checker.check_model", "replace": "os.replace"}
    monkeypatch.setattr(targets[broken], fail)
    with pytest.raises(ExportError, match="refuses the exported model: bad graph" if broken == "checker" else "No space left"):
        export_onnx(Linear(16, 8, 4).eval(), torch.randn(2, 16), old_file)


@pytest.mark.parametrize("layout", ["onnxruntime", "qdq"])
def test_wrong_scale_of_one_percent_is_refused(layout, old_file, monkeypatch):
    save_draft = pipeline.save_draft

    def save_wrong(model, folder, path):
        scale = model.graph.initializers["weight.scale"]
        scale.const_value = type(scale.const_value)(scale.const_value.numpy() * np.float32(1.01), name="weight.scale")
        return save_draft(model, folder, path)

    monkeypatch.setattr(pipeline, "save_draft", save_wrong)
    for model in (Linear(16, 8, 4), Linear(512, 512, 4)):
        with pytest.raises(ExportError, match=r"differs from PyTorch by .*, 0\.0\d+ of its largest value"):
            export_onnx(model.eval(), torch.randn(1, model.weight.spec.shape[1]), old_file, layout=layout)


def test_without_verification(path):
    result = export_onnx(Linear(16, 8, 4).eval(), torch.randn(1, 16), path, verify=False)
    assert (result.max_abs_error, result.max_relative_error, result.operators) == (None, None, None)


def test_mode_is_restored(path):
    model = nn.Sequential(Linear(16, 8, 4), nn.Dropout(0.5), nn.BatchNorm1d(8))
    model.train()
    model[1].eval()
    export_onnx(model, torch.randn(2, 16), path)
    assert [module.training for module in model] == [True, False, True]
    with pytest.raises(ExportError, match="does not run on example_inputs"):
        export_onnx(model, torch.randn(2, 17), path)
    assert [module.training for module in model] == [True, False, True]


def test_what_onnxruntime_does_not_fuse_is_folded_after_all(path, monkeypatch):
    """Here it does not fuse because the rule for Relu is switched off; older releases fuse less."""
    monkeypatch.setattr("diffq_fx.export.onnx.layout.linear._spell_out_activation", lambda *_: None)
    model = nn.Sequential(Linear(512, 512, 4, name="first"), nn.ReLU(), Linear(512, 512, 4, name="second")).eval()
    result = export_onnx(model, torch.zeros(1, 512), path)
    assert [record.rule for record in result.weights] == ["fold", "linear"]
    assert "this onnxruntime does not fuse it here" in result.weights[0].reason
    assert "DequantizeLinear" not in result.operators


def test_rest_in_half_precision(path):
    model = nn.Sequential(Linear(64, 64, 4, name="first"), nn.LayerNorm(64), nn.Linear(64, 64)).eval()
    full = export_onnx(model, torch.randn(1, 64), path)
    model.rest_dtype = torch.float16
    half = export_onnx(model, torch.randn(1, 64), path)
    assert full.file_bytes - half.file_bytes > 64 * 64 * 2
    assert half.max_relative_error < 1e-5  # against the model with rounded parameters
    assert {"2.weight.float16", "0.bias.float16"} <= {tensor.name for tensor in onnx.load(path).graph.initializer}
    assert "Cast" not in half.operators
    assert model[2].weight.dtype == torch.float32


def test_metadata_and_sizes(path):
    bits = torch.tensor([3, 4, 6, 8])[torch.randint(4, (64, 1))]
    model = Parallel(Linear(64, 64, bits, name="a.weight"), Linear(64, 64, 5, name="b.weight", grid="symmetric")).eval()
    result = export_onnx(model, torch.randn(2, 64), path)
    metadata = read_metadata(path)
    assert metadata.weights == result.weights
    assert metadata.layout == "onnxruntime"
    learned = int(bits.sum()) * 64 + 5 * 64 * 64
    assert metadata.payload_bytes == result.payload_bytes == -(-learned // 8)
    held = int((bits <= 4).sum()) * 64 * 4 + int((bits > 4).sum()) * 64 * 8 + 8 * 64 * 64
    assert result.container_payload_bytes == held // 8
    assert result.file_bytes == path.stat().st_size > result.container_payload_bytes > result.payload_bytes
    file = onnx.load(path)
    assert (file.producer_name, file.producer_version) == ("diffq_fx", diffq_fx.__version__)
    assert all(tensor.raw_data for tensor in file.graph.initializer)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert "diffq_fx.weights" in session.get_modelmeta().custom_metadata_map


def test_weights_beyond_the_limit_of_protobuf_go_to_a_second_file(path, monkeypatch):
    monkeypatch.setattr("diffq_fx.export.onnx.saving._PROTOBUF_LIMIT", 1000)
    model = Linear(64, 64, 4).eval()
    result = export_onnx(model, torch.randn(2, 64), path)
    data = path.with_name("model.onnx.data")
    assert result.file_bytes == path.stat().st_size + data.stat().st_size
    assert data.stat().st_size >= 64 * 64 // 2
    assert sorted(os.listdir(path.parent)) == ["model.onnx", "model.onnx.data"]
    fresh = torch.randn(3, 64)
    assert_same(run_exact(path, fresh), model(fresh))


def test_a_convolution_with_external_data_and_calibration(path, monkeypatch):
    """The drafts of the calibration and of the comparison are beyond the limit too."""
    monkeypatch.setattr("diffq_fx.export.onnx.saving._PROTOBUF_LIMIT", 1000)
    model = nn.Sequential(Conv(nn.functional.conv2d, (32, 16, 3, 3), 4), nn.ReLU()).eval()
    x = torch.randn(2, 16, 9, 9)
    result = export_onnx(model, x, path, activations="int8", calibration=[x])
    assert result.weights[0].rule == "int8"
    assert result.file_bytes == path.stat().st_size + path.with_name("model.onnx.data").stat().st_size
    assert sorted(os.listdir(path.parent)) == ["model.onnx", "model.onnx.data"]
    export_onnx(model, x, path, activations="int8", calibration=[x])  # over both old files


def test_a_reader_that_is_not_known_gets_the_float_weight(path):
    """Nobody has a rule for these: they run, and the record names them."""

    class Unknown(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (store(torch.randn(8, 16), 4, name=name) for name in "ab")

        def forward(self, x):
            return x * self.a().cumsum(1), torch.einsum("bi,ji->bj", x.amax(1), self.b().softmax(1))

    model = Unknown().eval()
    first, second = export_onnx(model, torch.randn(2, 8, 16), path).weights
    assert (first.rule, second.rule) == ("fold", "fold")
    assert "read by CumSum, which onnxruntime does not fuse" in first.reason
    assert "read by Softmax" in second.reason
    x = torch.randn(3, 8, 16)
    assert_same(run_exact(path, x), model(x))


def test_branches_of_a_condition_read_the_folded_weight(path):
    class Condition(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Linear(512, 16, 4, name="a"), Linear(512, 16, 4, name="b")

        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: self.a(x), lambda x: self.b(x), (x,))

    result = export_onnx(Condition().eval(), torch.randn(2, 512), path)
    assert [record.rule for record in result.weights] == ["fold", "fold"]
    assert "DequantizeLinear" not in result.operators


def test_file_holds_no_paths_of_the_exporting_machine(path):
    export_onnx(Bare(16, 8, 4).eval(), torch.randn(2, 16), path)
    assert b"stored_models" not in path.read_bytes()
    assert b"/site-packages/" not in path.read_bytes()


def test_model_scope_and_module_scope_from_end_to_end(path):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 32)).eval()
    example = torch.randn(1, 3, 8, 8)
    for scope in ("model", "module"):
        prepared = diffq_fx.prepare_diffq(model, example, scope=scope)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DiffQWarning)
            converted = diffq_fx.convert_diffq(prepared)
        result = export_onnx(converted, example, path)
        assert [record.name for record in result.weights] == ["0.weight", "3.weight"]
        fresh = torch.randn(3, 3, 8, 8)
        assert_same(run_exact(path, fresh), converted(fresh))


def test_importing_the_package_does_not_import_onnx():
    code = "import sys, diffq_fx, diffq_fx.export; sys.exit('onnx' in sys.modules or 'onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("wrong", [1.01, 0.0, -1.0, float("nan"), float("inf")])
def test_comparison_sees_wrong_outputs(wrong):
    expected = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    assert parity.compare_outputs({"y": expected + np.float32(1e-6)}, [expected])[0] < 2e-6
    with pytest.raises(ExportError, match="output 'y' differs"):
        parity.compare_outputs({"y": expected * np.float32(wrong)}, [expected])


def test_comparison_of_outputs_that_do_not_fit():
    one = np.ones((2, 2), np.float32)
    with pytest.raises(DiffQError, match="the file has 1 outputs"):
        parity.compare_outputs({"y": one}, [one, one])
    with pytest.raises(DiffQError, match=r"shape \[4\] in PyTorch and \[2, 2\] in onnxruntime"):
        parity.compare_outputs({"y": one}, [one.reshape(4)])
    zero = np.zeros(2, np.float32)
    assert parity.compare_outputs({"y": zero}, [zero]) == (0.0, 0.0)
    with pytest.raises(ExportError, match="differs"):
        parity.compare_outputs({"y": zero + 1}, [zero])
    infinite = np.array([np.nan, np.inf, 1.0])
    assert parity.compare_outputs({"y": infinite}, [infinite]) == (0.0, 0.0)


def test_weights_of_equal_levels_and_other_scales(tmp_path):
    net = nn.Sequential(nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 16, bias=False))
    with torch.no_grad():
        net[2].weight.copy_(2 * net[0].weight)
        net[4].weight.copy_(net[0].weight)
    x = torch.randn(2, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = convert_diffq(prepare_diffq(net, x, DiffQConfig(clip_ranges=False)))
    first, second = (converted.get_submodule(f"{i}.weight_quantized") for i in (0, 2))
    assert torch.equal(first.levels_OI(), second.levels_OI())
    export_onnx(converted, x, tmp_path / "model.onnx")  # compares with PyTorch
