"""Integer products as the kernels of other processors compute them: pairs of products are added in int16."""

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch.nn import functional as F


def x86_without_vnni(activation_MK, levels_KN):
    """uint8 times int8: two neighbours along K are multiplied and added in int16, which saturates. uint8 times uint8 is exact."""
    if levels_KN.dtype == np.uint8:
        return exact(activation_MK, levels_KN)
    odd = activation_MK.shape[-1] % 2
    activation = np.pad(activation_MK.astype(np.int32), [(0, 0)] * (activation_MK.ndim - 1) + [(0, odd)])
    levels = np.pad(levels_KN.astype(np.int32), ((0, odd), (0, 0)))
    pairs = activation[..., 0::2, None] * levels[0::2] + activation[..., 1::2, None] * levels[1::2]
    return np.clip(pairs, -(2**15), 2**15 - 1).sum(-2)


def arm_without_dot(activation_MK, levels_KN):
    """int8 times int8, the activations less 128: inputs 8 apart are multiplied and added in int16, which wraps around."""
    if levels_KN.dtype == np.uint8:
        return exact(activation_MK, levels_KN)
    missing = -activation_MK.shape[-1] % 16
    activation = np.pad(activation_MK.astype(np.int32) - 128, [(0, 0)] * (activation_MK.ndim - 1) + [(0, missing)])
    levels = np.pad(levels_KN.astype(np.int32), ((0, missing), (0, 0)))
    activation = activation.reshape(*activation.shape[:-1], -1, 2, 8)
    pairs = (activation[..., None] * levels.reshape(-1, 2, 8, levels.shape[1])).sum(-3)
    return pairs.astype(np.int16).astype(np.int32).sum((-3, -2)) + 128 * levels.sum(0)


def exact(activation_MK, levels_KN):
    return activation_MK.astype(np.int32) @ levels_KN.astype(np.int32)


MACHINES = [x86_without_vnni, arm_without_dot]


def run_on(machine, path, inputs):
    """The outputs of a file whose MatMulInteger nodes are computed as a machine does it."""

    class MatMulInteger(OpRun):
        def _run(self, activation, levels, activation_zero_point=0, zero_point=0):
            activation_zero_point, zero_point = np.int32(activation_zero_point), np.asarray(zero_point, np.int32)
            product = machine(activation, levels) - activation_zero_point * levels.astype(np.int32).sum(0)
            sums = activation.astype(np.int32).sum(-1, keepdims=True) - activation.shape[-1] * activation_zero_point
            return ((product - sums * zero_point).astype(np.int32),)

    model = onnx.load(path)
    feeds = {model.graph.input[0].name: inputs.numpy()}
    return [torch.from_numpy(output) for output in ReferenceEvaluator(model, new_ops=[MatMulInteger]).run(None, feeds)]


def columns(images, kernel, *, channels_last):
    """The inputs of each output of a 2D convolution, (positions, inputs), in the order of onnxruntime's kernels."""
    unfolded = F.unfold(images.float(), kernel).unflatten(1, (images.shape[1], -1))
    order = (0, 3, 2, 1) if channels_last else (0, 3, 1, 2)
    return unfolded.permute(order).flatten(2).flatten(0, 1).numpy().astype(np.uint8)


def filters(levels, *, channels_last):
    """Filters as a matrix of (inputs, outputs)."""
    order = (2, 3, 1, 0) if channels_last else (1, 2, 3, 0)
    return np.ascontiguousarray(levels.transpose(order)).reshape(-1, levels.shape[0])
