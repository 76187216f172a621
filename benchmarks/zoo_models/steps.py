"""Everything that is asked of one architecture, in one process, with the time and the memory of each step."""

import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from benchmarks.zoo_models.entry import BATCH, Architecture
from diffq_fx import DiffQConfig, convert_diffq, prepare_diffq
from diffq_fx.errors import DiffQError
from diffq_fx.example import tensors_of
from diffq_fx.export import check_onnx, export_onnx, load_packed, save_packed, session_options
from diffq_fx.parts import stored_weights

STEPS = 3
FORWARD_SECONDS = 0.06
"""Of processor time, which counts in ticks of 4 ms: forwards are repeated until it is over."""
TOLERANCE = 1e-3
"""Of the file at another batch, relative to the largest output; export_onnx itself has compared at 1e-4."""


Until = Literal["prepare", "packed", "onnx"]


class Measured:
    """What is known of one model so far; a step that raises leaves its name in ``at``."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {"seconds": {}, "peak_mib": {}}
        self.at = "build"

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Processor time, and the memory at most above that before."""
        self.at = name
        Path("/proc/self/clear_refs").write_text("5")  # the largest resident set begins anew
        before, start = resident("VmRSS"), time.process_time()
        yield
        self.found["seconds"][name] = time.process_time() - start
        self.found["peak_mib"][name] = (resident("VmHWM") - before) / 2**20


def resident(entry: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most, VmSize of addresses."""
    return int(re.search(rf"{entry}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def measure(entry: Architecture, measured: Measured, *, torch_first: bool, until: Until, torch_onnx: bool) -> None:
    """Take one architecture through the steps; what goes wrong is raised.

    Where our export fails, torch.onnx exports the float model too, and ``check_onnx`` says whether that was known before the training.
    """
    found = measured.found
    args, kwargs = entry.example()
    with measured.step("build"):
        model = entry.make()
        twin = entry.make()
    found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    with measured.step("float step"):
        _loss(_call(twin.train(), entry)).backward()
    without = {name for name, parameter in twin.named_parameters() if parameter.grad is None}
    before = _forward_time(twin, entry)
    _trace(measured, entry)
    with measured.step("prepare"):
        prepared = prepare_diffq(model, kwargs or args, DiffQConfig(penalty=1.0))
    found["forward_seconds"] = (before + _forward_time(twin, entry)) / 2
    found["weights"] = len(prepared.compression.quantizers)
    found["scope"], found["scope_reason"] = prepared.compression.scope, prepared.compression.scope_reason[:300]
    if until == "prepare":
        return
    with measured.step("train"):
        _train(prepared, entry, without)
    with measured.step("eval"):
        expected = _call(prepared.eval(), entry)
    with measured.step("convert"):
        converted = convert_diffq(prepared)
    _check_same(_call(converted.eval(), entry), expected, "the converted model differs from the prepared one in eval()")
    with tempfile.TemporaryDirectory() as folder:
        with measured.step("packed"):
            file = save_packed(converted, Path(folder, "model"))
            loaded = load_packed(entry.make(), file)
        found["packed_bytes"] = file.stat().st_size
        _check_loaded(loaded.eval(), converted, entry, expected)
        if until == "packed":
            return
        if torch_onnx and torch_first:
            _export_float(measured, entry, Path(folder, "float.onnx"))
        try:
            _export(measured, converted, entry, Path(folder, "model.onnx"))
        except DiffQError as error:
            found["known_before_training"] = _before_training(entry) in (str(error), found.get("fixed_sizes"))
            torch_onnx = True
            raise
        finally:
            if torch_onnx and "torch.onnx" not in found["seconds"]:
                _export_float(measured, entry, Path(folder, "float.onnx"))


def _call(model: nn.Module, entry: Architecture, batch: int = BATCH, seed: int = 3) -> list[Tensor]:
    args, kwargs = entry.example(batch)
    torch.manual_seed(seed)
    with torch.set_grad_enabled(model.training):
        return tensors_of(model(*args, **kwargs))


def _loss(outputs: list[Tensor]) -> Tensor:
    """Gives every element of every output a gradient of its own."""
    generator = torch.Generator().manual_seed(11)
    floats = [torch.view_as_real(each) if each.is_complex() else each for each in outputs if each.requires_grad]
    return sum(((each * torch.randn(each.shape, generator=generator)).sum() for each in floats), torch.zeros(()))


def _forward_time(model: nn.Module, entry: Architecture) -> float:
    start, count = time.process_time(), 0
    while (taken := time.process_time() - start) < FORWARD_SECONDS:
        _call(model, entry)
        count += 1
    return taken / count


def _train(prepared: nn.Module, entry: Architecture, without: set[str]) -> None:
    """Three steps; every weight and bit must get a finite gradient, but of what the float model gives none either."""
    optimizer = torch.optim.AdamW(prepared.parameters(), lr=1e-4)
    quantizers = [each for each in prepared.compression.quantizers if not without.issuperset(each.spec.names)]
    wanted = {f"{each.spec.name} bits": each.logits for each in quantizers}
    wanted |= {each.spec.name: prepared.get_parameter(each.spec.name) for each in quantizers}
    missing = set(wanted)
    for step in range(STEPS):
        optimizer.zero_grad()
        _loss(_call(prepared.train(), entry, seed=3 + step)).backward()
        missing -= {name for name, parameter in wanted.items() if parameter.grad is not None}
        bad = [name for name, parameter in wanted.items() if parameter.grad is not None and not parameter.grad.isfinite().all()]
        if bad:
            raise ArithmeticError(f"step {step}: gradients that are not finite: {', '.join(bad[:4])}")
        optimizer.step()
    if missing:
        raise ArithmeticError(f"no gradient for {', '.join(sorted(missing)[:4])}")


def _check_same(found: list[Tensor], expected: list[Tensor], what: str) -> None:
    if len(found) != len(expected):
        raise ArithmeticError(f"{what}: {len(found)} outputs in place of {len(expected)}")
    for place, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if not torch.equal(torch.nan_to_num(ours), torch.nan_to_num(theirs)):
            raise ArithmeticError(f"{what}: output {place} by {(ours.double() - theirs.double()).abs().max():.3g}")


def _check_loaded(loaded: nn.Module, converted: nn.Module, entry: Architecture, expected: list[Tensor]) -> None:
    """Its weights are equal; its products may run in another kernel, for a plain weight lies otherwise in memory than a dequantized one."""
    for _, stored in stored_weights(converted):
        if not torch.equal(loaded.get_parameter(stored.spec.name), stored()):
            raise ArithmeticError(f"weight {stored.spec.name!r} of the packed file differs")
    for place, (ours, theirs) in enumerate(zip(_call(loaded, entry), expected, strict=True)):
        if not torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()) if theirs.numel() else 0.0, equal_nan=True):
            raise ArithmeticError(f"output {place} of the packed file's model differs by {(ours - theirs).abs().max():.3g}")


def _trace(measured: Measured, entry: Architecture) -> None:
    """torch's own trace of the float model with torch.fx, where it can."""
    model = entry.make()
    try:
        with measured.step("torch.fx"):
            torch.fx.symbolic_trace(model)
    except Exception as error:  # noqa: BLE001  Python in the forward that a Proxy does not pass may raise anything
        measured.found["torch_fx_failure"] = f"{type(error).__name__}: {error}"[:200]


def _export(measured: Measured, converted: nn.Module, entry: Architecture, path: Path) -> None:
    import onnxruntime

    args, kwargs = entry.example()
    with measured.step("onnx"):
        result = export_onnx(converted, kwargs or args, path)
    measured.at = "onnx at another batch"
    measured.found |= {
        "onnx_bytes": result.file_bytes,
        "onnx_error": result.max_relative_error,
        "fixed_sizes": dict(result.fixed_sizes),
        "remarks": [str(r)[:300] for r in result.remarks],
    }
    options = session_options(path, exact=True, threads=1)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for value, tensor in zip(session.get_inputs(), tensors_of(entry.example(BATCH + 1)), strict=True):
        fixed = [axis for axis, size in enumerate(value.shape) if isinstance(size, int) and size != tensor.shape[axis]]
        if fixed:
            reason = result.fixed_sizes.get(f"{value.name}.{fixed[0]}", "")
            raise DiffQError(f"the file runs at the example's batch alone: size {fixed[0]} of {value.name!r}: {reason}")
    if not (difference := _at_another_batch(session, converted, entry)) <= TOLERANCE:
        raise ArithmeticError(f"the file differs by {difference:.3g} of the largest output at a batch of {BATCH + 1}")


def _at_another_batch(session: Any, model: nn.Module, entry: Architecture) -> float:
    """The largest difference between a file and its model on other values, in parts of the largest output."""
    inputs = tensors_of(entry.example(BATCH + 1))
    found = session.run(None, {value.name: tensor.numpy() for value, tensor in zip(session.get_inputs(), inputs, strict=True)})
    differences = [0.0]
    for ours, theirs in zip(found, _call(model, entry, BATCH + 1), strict=True):
        difference = np.abs(ours.astype(np.float64) - theirs.double().numpy()).max(initial=0.0)
        differences.append(float(difference / max(theirs.double().abs().max().item() if theirs.numel() else 0.0, 1e-6)))
    return max(differences, key=lambda each: (each != each, each))  # what is no number is the worst


def _before_training(entry: Architecture) -> Any:
    """Why the float model cannot be exported, or which sizes its file fixes."""
    args, kwargs = entry.example()
    try:
        return dict(check_onnx(entry.make(), kwargs or args).fixed_sizes)
    except DiffQError as error:
        return str(error)


def _export_float(measured: Measured, entry: Architecture, path: Path) -> None:
    """torch.onnx's own export of the float model, with the sizes dynamic that export_onnx would have so, and whether its file is right."""
    import onnxruntime

    from diffq_fx.export.onnx.examples import ExportExample

    args, kwargs = entry.example()
    example = ExportExample.of(kwargs or args).on_its_own()
    at, export, trace = measured.at, torch.export.export, 0.0

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal trace
        start = time.process_time()
        try:
            return export(*args, **kwargs)
        finally:
            trace += time.process_time() - start

    with mock.patch.object(torch.export, "export", timed):
        failure = _failure_of(
            measured,
            lambda: torch.onnx.export(
                entry.make().eval(),
                example.args,
                path,
                kwargs=example.kwargs,
                dynamo=True,
                verbose=False,
                dynamic_shapes=example.dynamic_sizes(lengths=example.has_lengths),
            ),
        )
    measured.found["seconds"]["torch.export"] = trace
    if not failure:
        shapes = [value.type.tensor_type.shape.dim for value in onnx.load(path, load_external_data=False).graph.input]
        firsts = [each[0].dim_param or str(each[0].dim_value) for each in shapes if each]  # a size that the code fixes may be a text
        measured.found["torch_onnx_fixes_batch"] = str(BATCH) in firsts
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        try:
            measured.found["torch_onnx_difference"] = _at_another_batch(session, entry.make().eval(), entry)
        except Exception as error:  # noqa: BLE001  onnxruntime's errors have no common class
            measured.found["torch_onnx_difference"] = f"{type(error).__name__}: {error}"[:300]
    measured.at = at
    if failure:
        measured.found["torch_onnx_failure"] = failure


def _failure_of(measured: Measured, export: Callable[[], Any]) -> str:
    try:
        with measured.step("torch.onnx"):
            export()
    except Exception as error:  # noqa: BLE001  torch's errors have no common class
        lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
        return f"{type(error.__cause__ or error).__name__}: {' '.join(lines[:2])[:300]}"
    return ""
