"""Which of onnxruntime's kernels this processor gets: the kinds that ``export_onnx(target=...)`` knows."""

import platform
import tempfile
from pathlib import Path

import numpy as np


def processor_kind() -> str:
    """``x86-avx2``, ``x86-vnni`` or ``arm64``: without VNNI a product of uint8 and int8 saturates, which is how the first is known."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "arm64"
    levels = np.full((64, 64), 127, dtype=np.int8)
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 64])
    y = helper.make_tensor_value_info("y", TensorProto.INT32, [1, 64])
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "graph", [x], [y], [numpy_helper.from_array(levels, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "product.onnx")
        onnx.save(model, path)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = np.asarray(session.run(None, {"x": np.full((1, 64), 255, dtype=np.uint8)})[0])
    return "x86-vnni" if int(found[0, 0]) == 64 * 255 * 127 else "x86-avx2"


def kind_title(kind: str) -> str:
    """The kind, and that the processor could do more where it could."""
    cpuinfo = Path("/proc/cpuinfo")
    has_vnni = cpuinfo.exists() and "avx512_vnni" in cpuinfo.read_text()
    return f"{kind} (a processor with AVX-512, onnxruntime restricted to AVX2)" if kind == "x86-avx2" and has_vnni else kind
