"""Export of converted models to ONNX. Importing this needs torch alone; exporting needs onnx, onnxscript and onnxruntime."""

from diffq_fx.export.onnx.exporter import ExportResult, export_onnx
from diffq_fx.export.onnx.metadata import ExportMetadata, WeightRecord, read_metadata

__all__ = ["ExportMetadata", "ExportResult", "WeightRecord", "export_onnx", "read_metadata"]
