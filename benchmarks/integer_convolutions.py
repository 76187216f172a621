"""onnxruntime's two kernels for integer convolutions: that for zero points of 0, and the product of matrices that others get.

    python benchmarks/integer_convolutions.py --threads 1

Each shape's two models differ in one zero point and are timed in turns. The rule in ``diffq_fx/export/onnx/layout/int8.py`` follows
the result.
"""

import argparse
import statistics
import time

import numpy as np
import onnx
import onnxruntime
from _result import markdown_table, write_result
from onnx import helper, numpy_helper

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


def session(shape: tuple[int, ...], zero_point: int, threads: int) -> onnxruntime.InferenceSession:
    """One QLinearConv, whose first channel has this zero point and the others 0."""
    size, inputs, outputs, kernel, stride = shape
    zero_points = np.zeros(outputs, np.int8)
    zero_points[0] = zero_point
    levels = np.random.default_rng(0).integers(-7, 8, (outputs, inputs, kernel, kernel)).astype(np.int8)
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


def compare(shape: tuple[int, ...], batch: int, threads: int) -> str:
    """How many times as fast the product of matrices is: median [quartiles] of the pairs."""
    pair = [session(shape, zero_point, threads) for zero_point in (0, 1)]
    x = {"x": np.random.default_rng(1).integers(0, 255, (batch, shape[1], shape[0], shape[0])).astype(np.uint8)}
    for each in pair:
        each.run(None, x)
    ratios = []
    for _ in range(ROUNDS):
        seconds = []
        for each in pair:
            began = time.perf_counter()
            each.run(None, x)
            seconds.append(time.perf_counter() - began)
        ratios.append(seconds[0] / seconds[1])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    """Time every shape and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    threads = parser.parse_args().threads
    rows = []
    for shape in SHAPES:
        size, inputs, outputs, kernel, stride = shape
        label = f"{inputs} to {outputs}, {kernel}x{kernel} / {stride}, {size}x{size}"
        rows.append((label, inputs * kernel**2, *(compare(shape, batch, threads) for batch in (1, 8))))
    body = "How many times as fast one zero point of 1 makes the convolution: median [quartiles] of interleaved pairs.\n\n"
    table = markdown_table(("convolution", "inputs of a filter", "batch 1", "batch 8"), rows)
    print(
        write_result(
            f"integer_convolutions_{threads}thread", "Integer convolutions in onnxruntime", body + table, ["onnxruntime"]
        ).read_text()
    )


if __name__ == "__main__":
    main()
