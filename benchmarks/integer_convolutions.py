"""onnxruntime's kernels for integer products: what zero points, uint8 weights and a sum of two int8 terms cost.

    python -m benchmarks.integer_convolutions --threads 1

The models of a shape are timed in turns. A zero point of 0 has a kernel of its own, others get a product of matrices: the rule in
``diffq_fx/export/onnx/layout/convolution.py`` follows that. Levels of 8 bits are exact on every processor as uint8, or as the sum of two
int8 terms within +-64 (twice the inputs): ``diffq_fx/export/onnx/layout/products.py`` takes uint8.
"""

import argparse
import statistics
import time

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from benchmarks._result import markdown_table, write_result

SHAPES = (
    (112, 16, 96, 1, 1),
    (56, 24, 144, 1, 1),
    (112, 32, 16, 1, 1),
    (28, 32, 192, 1, 1),
    (14, 64, 384, 1, 1),
    (56, 96, 24, 1, 1),
    (28, 144, 32, 1, 1),
    (224, 3, 64, 7, 2),
    (7, 160, 960, 1, 1),
    (56, 256, 64, 1, 1),
    (7, 320, 1280, 1, 1),
    (14, 384, 64, 1, 1),
    (56, 64, 64, 3, 1),
    (7, 960, 320, 1, 1),
    (28, 128, 128, 3, 1),
    (14, 256, 256, 3, 1),
    (7, 512, 512, 3, 1),
)
"""Height and width, input channels, output channels, kernel, stride: of ResNet-18 and MobileNet-v2, by the inputs of a filter."""
ROUNDS = 15


MATRICES = ((1, 384, 1536), (32, 384, 1536), (1, 1024, 1024), (64, 1024, 1024), (256, 1024, 1024), (32, 2048, 2048))
"""Rows, inputs, outputs of MatMulInteger."""


def session(shape: tuple[int, ...], zero_point: int, threads: int, dtype: type = np.int8) -> onnxruntime.InferenceSession:
    """One QLinearConv, whose first channel has this zero point and the others 0."""
    size, inputs, outputs, kernel, stride = shape
    zero_points = np.zeros(outputs, dtype)
    zero_points[0] = zero_point
    levels = np.random.default_rng(0).integers(0, 8, (outputs, inputs, kernel, kernel)).astype(dtype)
    scale, middle = np.float32(0.02), np.uint8(128)
    constants = {
        "x_scale": scale,
        "x_zero": middle,
        "w": levels,
        "w_scale": np.full(outputs, 0.01, np.float32),
        "w_zero": zero_points,
        "y_scale": scale,
        "y_zero": middle,
    }
    node = helper.make_node(
        "QLinearConv", ["x", *constants], ["y"], kernel_shape=[kernel] * 2, pads=[kernel // 2] * 4, strides=[stride] * 2
    )
    x = helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, ["n", inputs, size, size])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.UINT8, None)
    graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=9)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def product(inputs: int, outputs: int, threads: int, dtype: type) -> onnxruntime.InferenceSession:
    """One MatMulInteger with int8 or uint8 weights."""
    levels = np.random.default_rng(0).integers(0, 64, (inputs, outputs)).astype(dtype)
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    x = helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, ["m", inputs])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.INT32, None)
    graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(levels, "w")])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=9)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def compare(pair: list[onnxruntime.InferenceSession], feeds: list[np.ndarray]) -> str:
    """How many times as fast the second one is: median [quartiles] of the pairs."""
    for each, x in zip(pair, feeds, strict=True):
        each.run(None, {"x": x})
    ratios = []
    for _ in range(ROUNDS):
        seconds = []
        for each, x in zip(pair, feeds, strict=True):
            began = time.perf_counter()
            each.run(None, {"x": x})
            seconds.append(time.perf_counter() - began)
        ratios.append(seconds[0] / seconds[1])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def convolutions(threads: int) -> str:
    """How fast a zero point of 1, and uint8, make each convolution."""
    rows = []
    for shape in SHAPES:
        size, inputs, outputs, kernel, stride = shape
        label = f"{inputs} to {outputs}, {kernel}x{kernel} / {stride}, {size}x{size}"
        usual, moved, unsigned = (session(shape, zero, threads, dtype) for zero, dtype in ((0, np.int8), (1, np.int8), (1, np.uint8)))
        cells = []
        for other in (moved, unsigned):
            for batch in (1, 8):
                x = np.random.default_rng(1).integers(0, 255, (batch, inputs, size, size)).astype(np.uint8)
                cells.append(compare([usual, other], [x, x]))
        rows.append((label, inputs * kernel**2, *cells))
    heads = ("zero point 1, batch 1", "batch 8", "uint8, batch 1", "batch 8")
    return markdown_table(("convolution", "inputs of a filter", *heads), rows)


def matrices(threads: int) -> str:
    """How fast uint8, and two int8 terms, make each product of matrices."""
    rows = []
    for count, inputs, outputs in MATRICES:
        x = np.random.default_rng(1).integers(0, 255, (count, inputs)).astype(np.uint8)
        usual, unsigned = (product(inputs, outputs, threads, dtype) for dtype in (np.int8, np.uint8))
        terms = product(2 * inputs, outputs, threads, np.int8)
        cells = compare([usual, unsigned], [x, x]), compare([usual, terms], [x, np.concatenate([x, x], 1)])
        rows.append((f"{count} rows, {inputs} to {outputs}", *cells))
    return markdown_table(("MatMulInteger", "uint8", "two int8 terms"), rows)


def main() -> None:
    """Time every shape and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    threads = parser.parse_args().threads
    body = "How many times as fast as int8 weights with zero points of 0: median [quartiles] of interleaved pairs.\n\n"
    body += f"{convolutions(threads)}\n\n{matrices(threads)}"
    name = f"integer_convolutions_{threads}thread"
    print(write_result(name, "Integer products in onnxruntime", body, ["onnxruntime"]).read_text())


if __name__ == "__main__":
    main()
