"""Integer tensors for ONNX: levels packed as raw data, least significant bits first."""

import numpy as np
import onnx_ir as ir
import torch

from diffq_fx.storage.packing import pack_levels

_TYPES = {
    (2, True): ir.DataType.INT2,
    (2, False): ir.DataType.UINT2,
    (4, True): ir.DataType.INT4,
    (4, False): ir.DataType.UINT4,
    (8, True): ir.DataType.INT8,
    (8, False): ir.DataType.UINT8,
    (16, True): ir.DataType.INT16,
    (16, False): ir.DataType.UINT16,
}


def integer_type(bits: int, *, signed: bool) -> ir.DataType:
    """The ONNX type of a container.

    Example:
        >>> integer_type(4, signed=False).name
        'UINT4'
    """
    return _TYPES[bits, signed]


def integer_tensor(levels: np.ndarray, bits: int, *, signed: bool) -> ir.TensorProtocol:
    r"""Put levels into a container.

    Args:
        levels: int, any shape, within the range of the container.
        bits: 2, 4, 8 or 16.
        signed: whether the container is signed.

    Returns:
        A tensor that is serialized as raw_data.

    Example:
        >>> integer_tensor(np.array([[-8, 7, 1]]), 4, signed=True).tobytes()
        b'x\x01'
    """
    dtype = integer_type(bits, signed=signed)
    if bits >= 8:
        return ir.Tensor(np.ascontiguousarray(levels, dtype=dtype.numpy()), dtype=dtype)
    unsigned = torch.from_numpy(np.ascontiguousarray(levels & (2**bits - 1)))
    return ir.PackedTensor(pack_levels(unsigned, bits).numpy(), dtype, shape=levels.shape)
