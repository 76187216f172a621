"""Layout rules: the ONNX form of each quantized weight, one rule per file."""
