"""check_onnx: what an export says of a model, before anybody trains it."""

import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from diffq_fx.convert import convert
from diffq_fx.export.onnx.exporter import export_onnx
from diffq_fx.export.onnx.metadata import ExportResult
from diffq_fx.methods import STE
from diffq_fx.prepare import prepare_as


def check_onnx(model: nn.Module, example_inputs: Any, **options: Any) -> ExportResult:
    """Export a copy of a float model, rounded to 4 bits, to a folder that is removed: what is refused is known before a training.

    Args:
        model: a float model, which is not prepared yet; it is left as it was.
        example_inputs: what it is called with.
        options: those of :func:`~diffq_fx.export.export_onnx`.

    Returns:
        What ``export_onnx`` returns: ``fixed_sizes`` says which sizes of the inputs are fixed, and why. The file is gone.

    Raises:
        ExportError: as ``export_onnx``.
        DiffQError: as :func:`~diffq_fx.prepare`.

    Warns:
        DiffQWarning: as ``export_onnx``.

    Example:
        >>> import torch
        >>> check_onnx(nn.Linear(16, 8), torch.randn(2, 16)).fixed_sizes
        {'input.1': 'the model fixes it'}
    """
    converted = convert(prepare_as("check_onnx", model, example_inputs, STE(bits=4), "auto"))
    with tempfile.TemporaryDirectory() as folder:
        return export_onnx(converted, example_inputs, Path(folder, "model.onnx"), **options)
