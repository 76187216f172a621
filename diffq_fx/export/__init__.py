"""Ways out of the library: ONNX files for runtimes, packed files for PyTorch."""

from diffq_fx.export.onnx import ExportMetadata, ExportResult, WeightRecord, check_onnx, export_onnx, read_metadata, session_options
from diffq_fx.export.packed import load_packed, save_packed

__all__ = [
    "ExportMetadata",
    "ExportResult",
    "WeightRecord",
    "check_onnx",
    "export_onnx",
    "load_packed",
    "read_metadata",
    "save_packed",
    "session_options",
]
