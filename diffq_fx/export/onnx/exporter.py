"""export_onnx: a converted model in, one ONNX file out, checked against PyTorch before it is put in its place."""

import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from diffq_fx import _compat
from diffq_fx.arguments import as_path, check_flags
from diffq_fx.convert import convert
from diffq_fx.errors import DiffQWarning, ExportError
from diffq_fx.example import in_eval
from diffq_fx.export.onnx.metadata import ExportResult
from diffq_fx.export.onnx.options import check_options, layout_and_container
from diffq_fx.methods import STE
from diffq_fx.methods.base import WeightQuantizer
from diffq_fx.parts import unwrapped
from diffq_fx.prepare import prepare_as
from diffq_fx.storage import StoredWeight
from diffq_fx.weights import not_finite


def export_onnx(
    converted: nn.Module,
    example_inputs: Any,
    path: str | Path,
    *,
    runtime: Literal["onnxruntime", "web", "openvino", "ort-format"] | None = None,
    layout: Literal["onnxruntime", "qdq"] | None = None,
    activations: Literal["float", "dynamic", "int8"] = "float",
    target: Literal["portable", "x86-avx2", "x86-vnni", "arm64", "this-machine"] = "portable",
    min_container: Literal[2, 4, 8] | None = None,
    calibration: Iterable[Any] | None = None,
    input_names: Sequence[str] | Mapping[str, str] | None = None,
    output_names: Sequence[str] | Mapping[str, str] | None = None,
    dynamic_shapes: Any = None,
    opset: int | None = None,
    cache: bool = False,
    verify: bool = True,
) -> ExportResult:
    """Write a converted model as an ONNX file whose weights stay integers of 2, 4, 8 or 16 bits.

    Layout "onnxruntime" gives each weight the form that onnxruntime runs fastest on the machines of ``target``: linear layers become
    integer products where that beats float, everything else is folded to float when the file is loaded. The choice is made for the size
    of the example inputs, so give them the batch and length that the file will see. A weight is one node,
    a standard DequantizeLinear or the call of a function that the file brings along. Layout "qdq" writes a standard DequantizeLinear for
    every weight, for other runtimes: some know no functions. The file is checked by onnx.checker and by an onnxruntime run against
    PyTorch on fresh random inputs; a failure leaves an old file under ``path`` as it was. The model is not changed.

    ``activations`` says where they may be rounded to 8 bits *in the graph*:

    - "float": nowhere. Inside fused products onnxruntime itself rounds them, block by block (1 to 3 % of the output's largest value on a
      six-layer encoder with random weights); ``session_options(path, exact=True)`` keeps them in float.
    - "dynamic": in front of linear layers, with a range that is found at every run, where that is predicted to be the fastest
      (0.13 to 0.3 of the float time from about 384 x 384 and 8 rows on). Needs no data.
    - "int8": that, and convolutions become integer ones, with the Adds and poolings between them. The ranges of their inputs and
      outputs come from ``calibration``. Widths up to 8 bits with a scale per channel. Depthwise filters of 8 affine bits are
      rounded once more when the file is loaded (the record's remark says how far). Groups of less than 32 channels stay float, where int8
      is slower, and so does ConvTranspose, which has no int8 kernel.

    ``target`` says which machines the file shall be fast on. It changes speed and memory, never what a file may run on:

    - "portable": x86 of any age. A layer gets an integer product only where that is predicted to beat float both with AVX2 alone and with
      AVX-512 VNNI, at the example's number of rows; where the batch is open, a speed of 0.8 times float's is allowed at 32 times as many
      rows. Choose it where you do not know the machine.
    - "x86-avx2" (Intel before 2019, AMD before Zen 4), "x86-vnni" (AVX-512 VNNI): one of the two kinds.
    - "arm64": Arm64 with dot products. This profile was not measured: it follows from onnxruntime's sources.
    - "this-machine": the forms of every different layer are timed here, in about half a second each and 20 seconds in all, and the fastest
      is kept. Choose it where the file runs on the kind of machine that exports it, and let the machine do nothing else meanwhile.

    ``runtime`` stands for the values of two other options, which a table tells who reads (docs/how-to/runtimes.md). A larger
    ``min_container`` may be given with it:

    - "onnxruntime", "web" (onnxruntime-web): the defaults, layout "onnxruntime" with containers from 2 bits on.
    - "openvino": ``layout="qdq", min_container=4``.
    - "ort-format" (files for ``convert_onnx_models_to_ort``): ``layout="qdq", min_container=8``.

    Each weight's ``choice`` in the result, in the file and in ``diffq-fx inspect`` says what decided.

    The weights keep their learned widths in the file whatever ``activations`` is. No integer product can saturate on any processor:
    levels of up to 7 bits lie within +-64 in int8, levels of 8 bits are multiplied as uint8, which is slower on x86 (the record's
    ``products`` tell). Each written file is searched for products that are not exact, with or without ``verify``.

    Args:
        converted: from ``convert_diffq``, or a module that holds such models; exported in eval mode, its own mode is restored.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        path: the file to write.
        runtime: a preset for two options, see above; None leaves them to you.
        layout: see above; None for the runtime's, "onnxruntime" without one.
        activations: see above; "float" with layout "qdq".
        target: see above; of no use with layout "qdq", which has one form for every weight.
        min_container: the smallest container of the file in bits, for runtimes that do not read all types: narrower levels lie in it
            as they are. 2, 4 or 8; None for the runtime's, 2 without one.
        calibration: for "int8": typical inputs, each in the form of ``example_inputs`` and without labels. Every range is the least and
            the largest number that was seen; some dozens of batches are usual.
        input_names: names of the inputs in their order, or a dict from their default names to others. By default an input is called as
            the parameter of ``forward`` that takes it.
        output_names: the same for outputs. By default an output is called by its key where ``forward`` returns a dict, a named tuple or
            an output of transformers, else "output", or "output_0", "output_1" and so on.
        dynamic_shapes: as in ``torch.export.export``; None makes every size of an input dynamic that the model allows, but the heights
            and widths of images (float inputs of four sizes or more). The first size is called "batch", another "<input>_<axis>". The
            result's ``fixed_sizes`` say of the others why they are fixed.
        opset: None for the smallest that holds the containers (20; 21 for 4 bits; 25 for 2 bits), else at least that.
        cache: for decoders of transformers: the file takes and returns the keys and values of all layers, as optimum's do for
            ``ORTModelForCausalLM``. Its inputs are ``input_ids``, ``attention_mask`` over what is cached and what is new, ``position_ids``
            if the model takes them, ``past_key_values.0.key`` and so on; its outputs ``logits``, ``present.0.key`` and so on. Batch, new
            and cached length are dynamic. ``example_inputs`` are token ids, five or more, of which the check caches the first two.
        verify: run the file in onnxruntime and compare.

    Returns:
        What was written.

    Raises:
        ExportError: torch is older than 2.9; the model is not converted, has a parameter that is not finite, holds a weight without ONNX
            form (the float grid), cannot be traced, does not fit ``opset``; the calibration is empty, does not
            fit the model, or is not finite; with ``cache`` the model has none of keys and values, or fixes a length; the file cannot be
            written or does not compute what the model computes.
        TypeError: ``example_inputs`` is none of the above, ``calibration`` no iterable, ``opset`` no whole number, or names are no texts.
        ValueError: unknown ``runtime``, ``layout``, ``activations``, ``target`` or ``min_container``, or they do not go together, or a
            ``calibration`` is missing or of no use, or names are not as many as inputs, or given twice; ``cache`` does not go together
            with ``dynamic_shapes`` or "int8".

    Warns:
        DiffQWarning: the batch could not be made dynamic, or onnxruntime dequantizes a weight at every run.

    Example:
        >>> import os, tempfile, torch
        >>> from diffq_fx import convert, prepare
        >>> from diffq_fx.methods import STE
        >>> converted = convert(prepare(nn.Linear(16, 8), torch.zeros(1, 16), STE(bits=4)))
        >>> path = os.path.join(tempfile.mkdtemp(), "linear.onnx")
        >>> result = export_onnx(converted, torch.randn(1, 16), path)
        >>> result.opset, result.payload_bytes, result.weights[0].containers
        (21, 64, {4: 128})
    """
    _compat.check_torch_translates_operators()
    path = as_path("export_onnx", "path", path)
    check_flags("export_onnx", cache=cache, verify=verify)
    layout, min_container = layout_and_container(runtime, layout, min_container)
    check_options(layout, activations, target, min_container, calibration, cache=cache, sizes_given=dynamic_shapes is not None)
    if opset is not None and not isinstance(opset, int):
        raise TypeError(f"opset must be a whole number or None, got {opset!r}.")
    converted = unwrapped(converted)
    _check_converted(converted)
    _check_finite(converted)
    from diffq_fx.export.onnx.layout.request import LayoutRequest
    from diffq_fx.export.onnx.measuring import machines_of
    from diffq_fx.export.onnx.naming import InterfaceNames
    from diffq_fx.export.onnx.pipeline import export_file  # onnx and onnxruntime are only loaded to export

    request = LayoutRequest(
        layout=layout, activations=activations, target=target, machines=machines_of(target), min_container=min_container, opset=opset
    )
    with in_eval(converted):
        result = export_file(
            converted,
            example_inputs,
            path,
            request,
            calibration=calibration,
            dynamic_shapes=dynamic_shapes,
            names=InterfaceNames(input_names, output_names),
            cache=cache,
            verify=verify,
        )
    for remark in result.remarks:
        warnings.warn(f"export_onnx: {remark}", DiffQWarning, stacklevel=2)
    return result


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


def _check_finite(converted: nn.Module) -> None:
    """Nothing that a model with such parameters computes can be compared."""
    for name, parameter in converted.named_parameters():
        hides = not parameter.requires_grad and not bool(parameter.isnan().any())  # a mask of -inf that nothing trains
        if not hides and (where := not_finite(parameter)):
            raise ExportError(f"export_onnx: parameter {name!r} {where}: its training diverged. Load an earlier state.")


def _check_converted(converted: nn.Module) -> None:
    for name, module in converted.named_modules():
        if isinstance(module, WeightQuantizer):
            raise ExportError(
                f"export_onnx: {name or type(module).__name__!r} still quantizes {module.spec.name!r} for training. "
                "Call convert_diffq(model) first and export what it returns."
            )
    if not any(isinstance(module, StoredWeight) for module in converted.modules()):
        raise ExportError(
            f"export_onnx: the {type(converted).__name__} holds no integer weight. "
            "Call convert_diffq(model) on the prepared model first and export what it returns."
        )
