"""The runtimes that read our files, each as a function of a file and its inputs; a test is skipped by name where one is missing."""

import contextlib
import io
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from diffq_fx.export.onnx.sessions import EXACT


def run_onnxruntime(path, feeds):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    for key, value in EXACT.items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, feeds)


def run_reference(path, feeds):
    """onnx's own evaluator."""
    return ReferenceEvaluator(onnx.load(path)).run(None, feeds)


def run_openvino(path, feeds):
    openvino = pytest.importorskip("openvino")
    # By default OpenVINO rounds the activations of products to 8 bits, in groups; the second entry turns that off.
    options = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    compiled = openvino.Core().compile_model(str(path), "CPU", options)
    outputs = compiled(feeds)
    return [outputs[place] for place in range(len(compiled.outputs))]


def run_web(path, feeds):
    """onnxruntime-web in node: ``npm install onnxruntime-web``, and NODE_PATH where that is not above the tests."""
    node, script = shutil.which("node"), Path(__file__).with_name("run_in_web.js")
    if node is None:
        pytest.skip("node is not installed")
    if subprocess.run([node, "-e", "require('onnxruntime-web')"], cwd=script.parent, capture_output=True).returncode:
        pytest.skip("onnxruntime-web is not installed where node finds it (NODE_PATH)")
    kinds = {np.dtype("float32"): "float32", np.dtype("int64"): "int64"}
    entries = {name: {"type": kinds[a.dtype], "dims": a.shape, "data": a.ravel().tolist()} for name, a in feeds.items()}
    path.with_suffix(".json").write_text(json.dumps(entries))
    subprocess.run([node, str(script), str(path.parent)], check=True, capture_output=True, text=True)
    outputs = json.loads(path.with_suffix(".out.json").read_text())
    return [np.array(output["data"], dtype=np.float32).reshape(output["dims"]) for output in outputs.values()]


def to_ort_format(path):
    """The file that onnxruntime's converter makes, with its default options."""
    from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle, convert_onnx_models_to_ort

    with contextlib.redirect_stdout(io.StringIO()):
        convert_onnx_models_to_ort(path, path.parent / "ort", [OptimizationStyle.Fixed])
    (made,) = (path.parent / "ort").rglob("*.ort")
    return made


def run_ort_format(path, feeds):
    return run_onnxruntime(to_ort_format(path), feeds)


RUNNERS = {"onnxruntime": run_onnxruntime, "web": run_web, "openvino": run_openvino, "ort-format": run_ort_format}
"""Runtime of a preset -> what runs a file there."""
