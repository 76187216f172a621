"""Ways out of the library: ONNX files for runtimes."""

from diffq_fx.export.onnx import ExportMetadata, ExportResult, WeightRecord, export_onnx, read_metadata, session_options

__all__ = ["ExportMetadata", "ExportResult", "WeightRecord", "export_onnx", "read_metadata", "session_options"]
