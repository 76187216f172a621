"""Export of converted models to ONNX. Importing this needs torch alone; exporting needs onnx, onnxscript and onnxruntime."""

from diffq_fx.export.onnx.exporter import check_onnx, export_onnx
from diffq_fx.export.onnx.metadata import ExportMetadata, ExportResult, WeightRecord, read_metadata
from diffq_fx.export.onnx.sessions import session_options

__all__ = ["ExportMetadata", "ExportResult", "WeightRecord", "check_onnx", "export_onnx", "read_metadata", "session_options"]
