"""The one training loop of all recipes: it resumes, runs in several processes, and ends with files and a result."""

import math
import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffq_fx import Distillation, prepare
from diffq_fx.errors import DiffQError
from recipes.common.checkpoint import read_checkpoint
from recipes.common.methods import Optimizers, Turns, make_method
from recipes.common.processes import Processes
from recipes.common.recipe import Batch, Recipe
from recipes.common.settings import Settings
from recipes.common.stages import Stages

_MAY_CHANGE = "out", "data", "device", "stop_after", "save_every", "evaluate_every", "tensorboard", "onnx", "smoke"
"""Settings that an interrupted training may go on with changed."""


def float_mib(model: nn.Module) -> float:
    """Parameters as float32, in MiB."""
    return 4 * sum(each.numel() for each in model.parameters()) / 2**20


class Training:
    """A model on its way through the training of one recipe."""

    def __init__(self, recipe: Recipe[Any], processes: Processes) -> None:
        settings: Settings = recipe.settings
        self.recipe, self.settings, self.processes = recipe, settings, processes
        self.steps = max(math.ceil(settings.epochs * recipe.steps_an_epoch), 1)
        self.done = 0
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []
        torch.manual_seed(settings.seed)
        self.model = self._prepared(recipe.make_model())
        self.distillation = Distillation(self.model) if settings.distil and self.is_prepared else None
        self.model.to(processes.device)
        if self.distillation is not None:
            self.distillation.teacher.to(processes.device)
        self.optimizers = Optimizers(settings, self.model, self.is_prepared)
        self.turns = Turns(settings, self.model, self.steps) if settings.method == "lc" else None
        self.average = _Average(self.optimizers.weights, settings.ema) if settings.ema else None
        self.running = self.wrapped()
        self.stages = Stages(self) if settings.method == "pq" else None
        self.resumed_at = self._resume()
        self.log = _log(settings) if processes.is_first else None

    def _prepared(self, model: nn.Module) -> nn.Module:
        """Put the method on the float model: on the CPU, where the comparison with the original is exact."""
        start = self.settings.start
        if start is not None:
            try:
                state = load_file(start)
            except (SafetensorError, OSError) as wrong:
                raise SystemExit(f"--start {start} is no safetensors file that can be read: {wrong}. Make it again.") from wrong
            if broken := [name for name, value in state.items() if not value.isfinite().all()]:
                raise SystemExit(f"--start {start} has values that are not finite in {', '.join(broken[:3])}. Make it again.")
            try:
                model.load_state_dict(state)
            except RuntimeError as wrong:
                raise SystemExit(f"--start {start} has other weights than the model: {' '.join(str(wrong).split())[:300]}") from wrong
        self.float_mib = float_mib(model)
        example = self.recipe.example
        try:
            method = make_method(self.settings, self.steps)
            self.is_prepared = method is not None
            return model if method is None else prepare(model, example, method)
        except (ValueError, TypeError, DiffQError) as wrong:  # what the options ask for cannot be, and the library says why
            raise SystemExit(f"--method {self.settings.method}: {wrong}") from wrong

    def wrapped(self) -> nn.Module:
        """What the training calls: the model itself, compiled or in DistributedDataParallel if so asked."""
        running = self.model
        if self.processes.count > 1:
            on_gpu = self.processes.device.type == "cuda"
            running = DistributedDataParallel(running, device_ids=[self.processes.device.index] if on_gpu else None)
        if self.settings.compile:
            running.compile()
        return running

    @property
    def autocast(self) -> Any:
        """The precision of the activations."""
        wanted, device = self.settings.precision, self.processes.device.type
        if wanted == "bf16" or (wanted == "auto" and device == "cuda"):
            return torch.autocast(device, dtype=torch.bfloat16)
        return nullcontext()

    def rate(self, step: int) -> float:
        """What the learning rates are multiplied with in a step."""
        settings, share = self.settings, step / self.steps
        if share < settings.warm_up:
            return (step + 1) / (settings.warm_up * self.steps + 1)
        if settings.schedule == "steps":
            return settings.drop_by ** int(share / settings.drop_every + 1e-9)
        if settings.schedule == "cosine":
            return (1 + math.cos(math.pi * (share - settings.warm_up) / (1 - settings.warm_up))) / 2
        return 1.0

    def run(self) -> None:
        """Train to the end, from where the training stands."""
        settings, each_epoch = self.settings, self.recipe.steps_an_epoch
        evaluate_every = settings.evaluate_every and max(round(settings.evaluate_every * each_epoch), 1)
        self.running.train()
        total, began, counted = torch.zeros((), device=self.processes.device), time.monotonic(), 0
        while self.done < self.steps:
            total += self.step()
            counted += 1
            ends = self.done == self.steps
            looks = evaluate_every and self.done % evaluate_every == 0 and not ends
            if ends or looks or self.done % each_epoch == 0 or (settings.save_every and self.done % settings.save_every == 0):
                loss = float(total) / counted  # waits for the device
                self.seconds += time.monotonic() - began
                self.tell({"epoch": self.done / each_epoch, "loss": loss, "seconds": self.seconds})
                if looks:
                    self.tell({"epoch": self.done / each_epoch, **self.recipe.evaluate(self.model)})
                self.save()
                total, began, counted = torch.zeros_like(total), time.monotonic(), 0
            if settings.stop_after and self.done >= settings.stop_after:
                self.save()
                os.kill(os.getpid(), signal.SIGKILL)
        if self.average is not None and not (self.stages is not None and self.stages.history()):
            self.average.put_into(self.optimizers.weights)
        if self.turns is not None:
            self.tell({"distance": self.turns.finish()})
        if self.stages is not None:
            self.stages.run()

    def step(self) -> Tensor:
        """One optimizer step; every one is seeded by its number, so that a resumed training draws what the whole one draws."""
        epoch, index = divmod(self.done, self.recipe.steps_an_epoch)
        torch.manual_seed((self.settings.seed + 1) * 1_000_003 + self.done)
        if self.turns is not None:
            self.turns.before_step(self.done)
        self.optimizers.zero_grad()
        loss = self.loss(self.recipe.batch(epoch, index, self.processes.share))
        (loss if self.turns is None else loss + self.turns.loss()).backward()
        self.optimizers.step(self.rate(self.done), most=math.inf if self.turns is None else self.turns.largest_rate)
        if self.average is not None:
            self.average.update(self.optimizers.weights)
        self.done += 1
        return loss.detach()

    def loss(self, batch: Batch) -> Tensor:
        """The recipe's, or the distance from the float model's outputs."""
        with self.autocast:
            if self.distillation is None:
                return self.recipe.loss(self.running, batch)
            return self.distillation(batch[0], self.running(*batch[0]))

    def tell(self, values: dict[str, float]) -> None:
        """Print and keep numbers of this moment; the training ends where one is not finite."""
        self.history.append(values)
        if any(isinstance(value, float) and not math.isfinite(value) for value in values.values()):
            raise SystemExit(f"step {self.done}: {values} is not finite. Lower --lr, or set --clip-norm.")
        if not self.processes.is_first:
            return
        print("  ".join(f"{name} {value:.6g}" for name, value in values.items()), flush=True)  # noqa: T201
        if self.log is not None:
            for name, value in values.items():
                self.log.add_scalar(name, value, self.done)

    @property
    def _checkpoint(self) -> Path:
        return self.settings.out / "checkpoint.pt"

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        if self.processes.is_first:
            self.settings.out.mkdir(parents=True, exist_ok=True)
            draft = self._checkpoint.with_suffix(".draft")
            torch.save(self._state(), draft)
            os.replace(draft, self._checkpoint)
        self.processes.wait()

    def _state(self) -> dict[str, Any]:
        return {
            "settings": self._that_count(),
            "model": self.model.state_dict(),
            "optimizers": self.optimizers.state_dict(),
            "average": None if self.average is None else self.average.values,
            "stages": None if self.stages is None else self.stages.history(),
            "done": self.done,
            "seconds": self.seconds,
            "history": self.history,
        }

    def _that_count(self) -> dict[str, str]:
        return {name: str(value) for name, value in vars(self.settings).items() if name not in _MAY_CHANGE}

    def _resume(self) -> int:
        """Go on from the checkpoint, if there is one."""
        if not self._checkpoint.exists():
            return 0
        state = read_checkpoint(self._checkpoint, self.processes.device, self._state())
        mine, theirs = self._that_count(), state["settings"]
        if differing := [
            f"--{name.replace('_', '-')} was {theirs.get(name)}, is {mine[name]}" for name in mine if mine[name] != theirs.get(name)
        ]:
            raise SystemExit(f"{self._checkpoint} is of another training: {'; '.join(differing)}. Give another --out, or delete it.")
        self.model.load_state_dict(state["model"])
        self.optimizers.load_state_dict(state["optimizers"])
        if self.average is not None:
            self.average.values = state["average"]
        if self.stages is not None:
            self.stages.load(state["stages"])
        self.done, self.seconds, self.history = state["done"], state["seconds"], state["history"]
        return self.done


class _Average:
    """A moving average of the weights; bits and scales keep their own last values, which belong to no weight of an earlier step."""

    def __init__(self, weights: list[nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.values = [each.detach().clone() for each in weights]

    @torch.no_grad()
    def update(self, weights: list[nn.Parameter]) -> None:
        """After a step."""
        torch._foreach_lerp_(self.values, [each.detach() for each in weights], 1 - self.decay)

    @torch.no_grad()
    def put_into(self, weights: list[nn.Parameter]) -> None:
        """In the end."""
        for weight, value in zip(weights, self.values, strict=True):
            weight.copy_(value)


def _log(settings: Settings) -> Any:
    """TensorBoard's writer, where it was asked for."""
    if not settings.tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as missing:
        raise SystemExit("--tensorboard needs tensorboard: pip install tensorboard.") from missing
    return SummaryWriter(str(settings.out))
