"""Layout rules: the ONNX form of each quantized weight."""
