"""From the command line to the result."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from diffq_fx.errors import DiffQError
from recipes.common.finish import finish
from recipes.common.loop import Training
from recipes.common.processes import held, joined
from recipes.common.recipe import Recipe
from recipes.common.settings import Settings, parse

_SMOKE: dict[str, Any] = {"limit": 16, "batch_size": 8, "epochs": 1, "evaluate_every": 0, "save_every": 1, "turns": 2}


def main(recipe: type[Recipe[Any]], argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run a recipe with the options of the command line; its result, which ``result.json`` holds too."""
    module = sys.modules[recipe.__module__]
    settings = parse(recipe.settings_type, argv, module.__doc__ or "")
    if settings.smoke:
        settings = replace(settings, **_SMOKE, smoke=False, out=settings.out / "smoke")
        if not settings.stop_after:
            _train_and_be_killed(module, settings, argv)
    try:
        result = _trained(recipe, settings)
    except (DiffQError, OSError) as wrong:
        raise SystemExit(str(wrong)) from wrong
    if result:
        print(json.dumps(result), flush=True)  # noqa: T201
    return result


def _trained(recipe: type[Recipe[Any]], settings: Settings) -> dict[str, Any]:
    """The result, in the first process."""
    with joined(settings.device) as processes, held(settings.out) if processes.is_first else nullcontext():
        if processes.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        training = Training(recipe(settings, processes.device), processes)
        torch.backends.cudnn.benchmark = True
        training.run()
        result = finish(training) if processes.is_first else {}
        processes.wait()
    return result


def _train_and_be_killed(module: Any, settings: Settings, argv: Sequence[str] | None) -> None:
    """The first step in another process, which kills itself once its checkpoint is written."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return
    shutil.rmtree(settings.out, ignore_errors=True)
    name = module.__spec__.name
    given = list(sys.argv[1:] if argv is None else argv)
    killed = subprocess.run([sys.executable, "-m", name, *given, "--stop-after", "1"], check=False)
    if killed.returncode != -signal.SIGKILL or not (settings.out / "checkpoint.pt").exists():
        raise SystemExit(f"{name} --smoke: the first process was to be killed after its checkpoint, it ended with {killed.returncode}.")
