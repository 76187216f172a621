"""Run exported files in onnxruntime on whatever processor this Python has: numpy and onnxruntime alone, so that an emulator bears it.

python run_exported.py FOLDER LABEL    # FOLDER/NAME.onnx, its input in FOLDER/NAME.npy -> outputs in FOLDER/NAME.LABEL.npz
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime

folder, label = Path(sys.argv[1]), sys.argv[2]
for path in sorted(folder.glob("*.onnx")):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    np.savez(path.with_suffix(f".{label}.npz"), *session.run(None, {session.get_inputs()[0].name: np.load(path.with_suffix(".npy"))}))
