"""Learned mixed-precision weight compression for PyTorch models: prepare, train normally, convert, export.

Importing this needs torch alone; :mod:`diffq_fx.export` needs onnx and onnxruntime.
"""

import sys

# As python -m: argv[0] then stands for the module's name.
if sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)].removeprefix("-m") == __name__:  # before anything imports torch
    import diffq_fx_command

    diffq_fx_command.at_signals()

from diffq_fx.compression import Compression
from diffq_fx.convert import CompressionRecord, convert, convert_diffq
from diffq_fx.errors import (
    CaptureError,
    ConversionError,
    DiffQError,
    DiffQWarning,
    DivergenceError,
    ExportError,
    PackedFileError,
    PassError,
    PreparationError,
)
from diffq_fx.methods.base import Method, WeightQuantizer
from diffq_fx.methods.diffq import DiffQConfig
from diffq_fx.methods.recompute import recompute_weights
from diffq_fx.model_size import model_size
from diffq_fx.post_training.compress import compress
from diffq_fx.prepare import prepare, prepare_diffq
from diffq_fx.report import BitsReport, bits_report
from diffq_fx.storage import IntegerWeight, StoredWeight
from diffq_fx.training.distillation import Distillation
from diffq_fx.training.finalize import freeze_bits, reestimate_batch_norm
from diffq_fx.training.optimizer import setup_optimizer
from diffq_fx.weights import SkippedWeight, WeightSpec

__version__ = "0.1.0"

__all__ = [
    # what users call
    "DiffQConfig",
    "prepare_diffq",
    "prepare",
    "compress",
    "model_size",
    "setup_optimizer",
    "freeze_bits",
    "Distillation",
    "reestimate_batch_norm",
    "recompute_weights",
    "convert_diffq",
    "convert",
    "bits_report",
    # what the calls take and give
    "BitsReport",
    "Compression",
    "CompressionRecord",
    "IntegerWeight",
    "Method",
    "SkippedWeight",
    "StoredWeight",
    "WeightQuantizer",
    "WeightSpec",
    # what can go wrong
    "CaptureError",
    "ConversionError",
    "DiffQError",
    "DiffQWarning",
    "DivergenceError",
    "ExportError",
    "PackedFileError",
    "PassError",
    "PreparationError",
]
