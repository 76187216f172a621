"""What an export says of the file that it wrote."""

from dataclasses import dataclass
from pathlib import Path

from diffq_fx.export.onnx.metadata import WeightRecord


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What :func:`~diffq_fx.export.onnx.exporter.export_onnx` wrote, and why one can trust it."""

    path: Path
    opset: int
    layout: str
    activations: str
    target: str | None
    """The machines that the forms of the products were chosen for; None in layout "qdq"."""
    weights: tuple[WeightRecord, ...]
    """Per weight: bits, containers, the rule that was applied, why it, and why not a faster one."""
    payload_bytes: int
    """The levels at the widths that they have learned."""
    container_payload_bytes: int
    """The levels in the containers of the file."""
    file_bytes: int
    """The file on disk, with its scales, its float parameters and its graph."""
    max_abs_error: float | None
    """Largest difference to PyTorch over the verification's inputs; None with ``verify=False``."""
    max_relative_error: float | None
    """The same as a part of the output's largest value. Both are measured with activations in float everywhere: they show that the
    file computes with the model's own weights."""
    fast_relative_error: float | None
    """The relative error of the file as it runs by default, with activations rounded to int8 where that is faster; on the first item
    of the calibration, on random inputs without one."""
    operators: dict[str, int] | None
    """Operators that onnxruntime runs in one inference; None with ``verify=False``."""
    remarks: tuple[str, ...]
    """What is worth knowing about the file as a whole."""
