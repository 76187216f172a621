"""What is made of a trained model: scores, a packed file, an ONNX file, and the line of its result."""

import datetime
import json
import platform
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

import diffq_fx
from diffq_fx import convert, model_size
from diffq_fx.atomic import replaced_atomically
from diffq_fx.errors import DiffQError
from recipes.common.loop import Training

_ALWAYS_NAMED = "bits", "epochs", "batch_size", "lr", "seed"
_NEVER_NAMED = "model", "method", "data", "out", "device", "onnx", "tensorboard", "evaluate_every", "save_every"


def finish(training: Training) -> dict[str, Any]:
    """Convert, score, write the files and ``result.json`` into the folder of the run."""
    recipe, settings, out = training.recipe, training.settings, training.settings.out
    out.mkdir(parents=True, exist_ok=True)
    plain = type(settings)()
    told = {name: value for name, value in vars(settings).items() if name in _ALWAYS_NAMED or value != getattr(plain, name)}
    untold = {*_NEVER_NAMED, *settings.without_effect()}
    told = {name: value.name if isinstance(value, Path) else value for name, value in told.items() if name not in untold}
    result: dict[str, Any] = {"recipe": recipe.name, "model": settings.model, "method": settings.method, "settings": told}
    result |= {"score_name": recipe.score_name, "float_mib": training.float_mib}
    if not training.is_prepared:
        state = {name: each.contiguous() for name, each in training.model.state_dict().items()}
        with replaced_atomically(out / "float.safetensors", DiffQError) as file:
            file.write(save(state))
        result |= {"size_mib": training.float_mib, **recipe.evaluate(training.model)}
    else:
        size = float(model_size(training.model, exact=True))
        converted = convert(training.model).eval()
        result |= {"size_mib": size, **recipe.evaluate(converted)}
        converted.cpu()
        result["packed"] = _packed(converted, out / "model.safetensors")
        if settings.onnx:
            result["onnx"] = _onnx(converted, training, out / "model.onnx")
    result |= {
        "steps": training.steps,
        "step_ms": round(1e3 * training.seconds / training.steps, 3),
        "train_seconds": round(training.seconds, 1),
        "resumed_at": training.resumed_at,
        "processes": training.processes.count,
        "device": torch.cuda.get_device_name() if training.processes.device.type == "cuda" else platform.machine(),
        "versions": f"torch {torch.__version__}, diffq_fx {diffq_fx.__version__}, Python {platform.python_version()}",
        "date": datetime.date.today().isoformat(),
    }
    with replaced_atomically(out / "result.json", DiffQError) as file:
        file.write(json.dumps(result).encode() + b"\n")
    return result


def _packed(converted: nn.Module, path: Path) -> dict[str, Any] | str:
    try:
        from diffq_fx.export import save_packed

        save_packed(converted, path)
    except ImportError as missing:
        return f"not written: {missing}. Run the command again where it is installed."
    return {"mib": path.stat().st_size / 2**20}


def _onnx(converted: nn.Module, training: Training, path: Path) -> dict[str, Any] | str:
    """Export, which compares the file with PyTorch, and score the file on the whole test set."""
    try:
        import onnxruntime

        from diffq_fx import ExportError
        from diffq_fx.export import export_onnx, session_options
    except ImportError as missing:
        return f"not written: {missing}. Run the command again where it is installed."
    example = tuple(each.cpu() for each in next(training.recipe.test_batches())[0])
    try:
        written = export_onnx(converted, example, path)
    except ExportError as error:
        return f"not written: {str(error).splitlines()[0]}"
    session = onnxruntime.InferenceSession(path, session_options(path, exact=True))
    names = [each.name for each in session.get_inputs()]

    def predict(*inputs: torch.Tensor) -> torch.Tensor:
        fed = dict(zip(names, (each.cpu().numpy() for each in inputs), strict=True))
        return torch.from_numpy(session.run(None, fed)[0]).to(training.processes.device)

    return {"mib": written.file_bytes / 2**20, **training.recipe.evaluate(predict)}
