"""What onnxruntime's offline tools leave of a file: which undo the compression by folding, and which option keeps it."""

import onnxruntime
import pytest
import torch
from onnxruntime.quantization import quant_pre_process
from runtimes import run_onnxruntime, to_ort_format
from stored_models import Conv
from torch.nn import functional as F

from diffq_fx.export import export_onnx

FLOAT_BYTES = 64 * 64 * 3 * 4
LEVEL = onnxruntime.GraphOptimizationLevel


def optimized(path, made, level=LEVEL.ORT_ENABLE_ALL, **entries):
    """What a session writes to ``optimized_model_filepath``."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.graph_optimization_level, options.optimized_model_filepath = 4, level, str(made)
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def without_folding(path, made):
    optimized(path, made, **{"optimization.disable_specified_optimizers": "ConstantFolding"})


def pre_processed(path, made, **options):
    quant_pre_process(str(path), str(made), skip_symbolic_shape=True, **options)


def transformers_optimizer(path, made, level=None):
    pytest.importorskip("sympy")
    from onnxruntime.transformers.optimizer import optimize_model

    optimize_model(str(path), "bert", opt_level=level).save_model_to_file(str(made))


TOOLS = {
    "optimized_model_filepath": (optimized, True),
    "the same, no optimization": (lambda path, made: optimized(path, made, LEVEL.ORT_DISABLE_ALL), False),
    "the same without ConstantFolding": (without_folding, False),
    "quant_pre_process": (pre_processed, True),
    "quant_pre_process(skip_optimization=True)": (lambda path, made: pre_processed(path, made, skip_optimization=True), False),
    "transformers.optimizer": (transformers_optimizer, True),
    "transformers.optimizer, opt_level=0": (lambda path, made: transformers_optimizer(path, made, 0), False),
}
"""Tool -> how it is called, and whether it makes floats of the weights of the default layout."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    model, folder = Conv(F.conv1d, (64, 64, 3), 4).eval(), tmp_path_factory.mktemp("offline")
    for layout in ("onnxruntime", "qdq"):
        export_onnx(model, torch.randn(1, 64, 9), folder / f"{layout}.onnx", layout=layout)
    return model, folder


@pytest.mark.parametrize("layout", ["onnxruntime", "qdq"])
@pytest.mark.parametrize("tool", TOOLS)
def test_what_a_tool_leaves_of_the_compression(tool, layout, exported, path):
    """Layout "qdq" outlives all of them. A test that fails for the default one may be good news: the tool has learned to keep it."""
    model, folder = exported
    use, folds = TOOLS[tool]
    use(folder / f"{layout}.onnx", path)
    is_float = path.stat().st_size > FLOAT_BYTES
    assert is_float == (folds and layout == "onnxruntime")
    x = torch.randn(2, 64, 9)
    (found,) = run_onnxruntime(path, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-4, atol=1e-4)


def test_the_ort_format_keeps_eight_bits_with_its_preset_alone(exported, tmp_path):
    """Without it the default layout becomes float, and the format has no types of 4 bits."""
    model, folder = exported
    assert to_ort_format(folder / "onnxruntime.onnx").stat().st_size > FLOAT_BYTES
    kept = export_onnx(model, torch.randn(1, 64, 9), tmp_path / "model.onnx", runtime="ort-format")
    assert to_ort_format(kept.path).stat().st_size < FLOAT_BYTES / 2
