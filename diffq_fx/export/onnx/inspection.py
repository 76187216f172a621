"""What lies in an ONNX file, tensor by tensor: width, container, payload, scales, and who reads it.

Works on any ONNX file; of files that diffq_fx has written it also knows the bits that were learned. Three sizes are
kept apart: the learned bits (bit-packed), the ONNX container (2, 4, 8, 16 bits and more), and the bytes in the file,
whose encoding may be wasteful. Weights are never decoded.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from onnx import ModelProto

from diffq_fx.export.onnx.files import (
    Region,
    blaming,
    container_bits,
    external_region,
    load_graph,
    payload_bytes,
    size_bytes,
)
from diffq_fx.export.onnx.metadata import ExportMetadata, WeightRecord, metadata_of
from diffq_fx.export.onnx.usage import Constant, external_locations, find_constants

Role = Literal["quantized", "scale", "zero_point", "float", "other"]


@dataclass(frozen=True, kw_only=True)
class TensorReport:
    """One constant tensor of an ONNX file."""

    name: str
    """Its name; behind the name of the node and of the graph where it belongs to an inner graph or a function."""
    role: Role
    """"quantized" if it has a scale; "scale" and "zero_point" of such a one, or of activations; "float"; or "other"
    (indices, shapes, text)."""
    readers: tuple[str, ...]
    """Operators that it passes, up to the one that computes with it: ``"DequantizeLinear > MatMul"``."""
    shape: tuple[int, ...]
    dtype: str
    """As ONNX calls it: "float", "int4", "uint2"."""
    container_bits: int
    """Bits of one value in the file: those of the type, or those that MatMulNBits says it has packed; 0 for strings."""
    is_packed: bool = False
    """Whether an operator unpacks the values from bytes (MatMulNBits), so that ``dtype`` is not theirs."""
    values: int
    """Number of values."""
    payload_bytes: int
    """The values in their container."""
    scale_bytes: int = 0
    """The scales that belong to these values. A scale that serves several tensors counts with the first."""
    zero_point_bytes: int = 0
    file_bytes: int
    """What the tensor takes in the file, its name and encoding included."""
    file_share: float
    """``file_bytes`` as a part of the whole, external data included: 0 to 1."""
    external: str | None = None
    """The file that holds the values, if it is another one."""
    learned_bits: dict[int, int] | None = None
    """Learned bits -> number of values; None where the file does not say."""

    @property
    def learned_payload_bytes(self) -> int | None:
        """The values bit-packed at the width that each has learned; None where the file does not say."""
        return None if self.learned_bits is None else -(-sum(width * count for width, count in self.learned_bits.items()) // 8)


@dataclass(frozen=True, kw_only=True)
class OnnxInspection:
    """An ONNX file, its constant tensors and their sums."""

    path: str
    producer: str
    ir_version: int
    opsets: dict[str, int]
    """Operator set versions; the standard one has the empty name."""
    file_bytes: int
    """The file and the files of its external data."""
    tensors: tuple[TensorReport, ...]
    metadata: ExportMetadata | None = None
    """What diffq_fx wrote into the file; None for files of others."""

    def of_role(self, role: Role) -> tuple[TensorReport, ...]:
        """The tensors of one role, in the order of the file."""
        return tuple(tensor for tensor in self.tensors if tensor.role == role)

    def payload_bytes(self, role: Role | None = None) -> int:
        """Bytes of the values, in their containers, of all tensors or those of one role."""
        return sum(tensor.payload_bytes for tensor in self.tensors if role in (None, tensor.role))

    def to_dict(self) -> dict[str, Any]:
        """Everything above as plain lists, dicts and numbers, ready for JSON."""
        entries = asdict(self)
        for entry, tensor in zip(entries["tensors"], self.tensors, strict=True):
            entry["learned_payload_bytes"] = tensor.learned_payload_bytes
        entries["totals"] = {
            "file_bytes": self.file_bytes,
            "graph_bytes": self.file_bytes - sum(tensor.file_bytes for tensor in self.tensors),
            "learned_payload_bytes": None if self.metadata is None else self.metadata.payload_bytes,
            **{f"{role}_payload_bytes": self.payload_bytes(role) for role in get_args(Role)},
            "float_tensors": [tensor.name for tensor in self.of_role("float")],
        }
        return entries


def inspect_onnx(path: str | Path) -> OnnxInspection:
    """Report every constant tensor of any ONNX file: width, container, payload, scales, readers, share of the file, learned bits of ours.

    Constant nodes, inner graphs, functions and sparse tensors count as initializers do; data outside the file is measured, not read.

    Raises:
        FileNotFoundError: The file, or one that holds its weights, is missing.
        DiffQError: The file is not ONNX, cut short or damaged, or of a newer diffq_fx.

    Example:
        >>> import onnx, tempfile
        >>> weight = onnx.helper.make_tensor("weight", onnx.TensorProto.FLOAT, [4, 2], range(8))
        >>> x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 4])
        >>> y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 2])
        >>> node = onnx.helper.make_node("MatMul", ["x", "weight"], ["y"])
        >>> graph = onnx.helper.make_graph([node], "example", [x], [y], [weight])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     onnx.save(onnx.helper.make_model(graph), f"{folder}/model.onnx")
        ...     tensor = inspect_onnx(f"{folder}/model.onnx").tensors[0]
        >>> tensor.readers, tensor.container_bits, tensor.payload_bytes
        (('MatMul',), 32, 32)
    """
    model = load_graph(path)
    with blaming(path):
        return _inspected(model, path)


def _inspected(model: ModelProto, path: str | Path) -> OnnxInspection:
    metadata = metadata_of(model)
    constants = find_constants(model)
    total = size_bytes(path, external_locations(constants))
    records = {name: record for record in (metadata.weights if metadata else ()) for name in record.initializers}
    seen: set[Region] = set()  # two tensors may share one region
    reports: list[TensorReport] = []
    for constant in constants:
        taken = sum(tensor.ByteSize() for tensor in constant.parts)
        for region in map(external_region, constant.parts):
            if region is not None and region not in seen:
                seen.add(region)
                taken += region.length
        reports.append(_report(constant, taken, total, records.get(constant.name)))
    return OnnxInspection(
        path=str(path),
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        ir_version=model.ir_version,
        opsets={"" if entry.domain == "ai.onnx" else str(entry.domain): entry.version for entry in model.opset_import},
        file_bytes=total,
        tensors=tuple(reports),
        metadata=metadata,
    )


def _report(constant: Constant, taken: int, total: int, record: WeightRecord | None) -> TensorReport:
    region = external_region(constant.tensor)
    return TensorReport(
        name=constant.name,
        role=constant.part or ("quantized" if constant.is_quantized else "float" if constant.is_floating else "other"),
        readers=tuple(constant.readers),
        shape=constant.shape,
        dtype=constant.dtype.name.lower(),
        container_bits=constant.packed_bits or container_bits(constant.tensor.data_type),
        is_packed=constant.packed_bits is not None,
        values=constant.packed_values or math.prod(constant.tensor.dims),
        payload_bytes=_payload(constant),
        scale_bytes=_payload(*constant.scales),
        zero_point_bytes=_payload(*constant.zero_points),
        file_bytes=taken,
        file_share=taken / total,
        external=None if region is None else region.location,
        learned_bits=None if record is None else _learned_bits(constant, record),
    )


def _payload(*constants: Constant) -> int:
    return sum(payload_bytes(tensor) for constant in constants for tensor in constant.parts)


def _learned_bits(constant: Constant, record: WeightRecord) -> dict[int, int] | None:
    """The part of a weight's histogram that lies in this initializer: all of it where there is but one; None where it does not fit."""
    bits = record.bits
    if len(record.initializers) > 1:
        containers, width = sorted(record.containers), container_bits(constant.tensor.data_type)
        bits = {each: count for each, count in bits.items() if width in [c for c in containers if c >= each][:1]}
    return bits if sum(bits.values()) == math.prod(constant.tensor.dims) else None
