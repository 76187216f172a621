"""The settings of a recipe: a dataclass, of which each field is an option of the command line."""

import argparse
import inspect
import re
import types
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from diffq_fx.methods.learning_compression import CodebookKind

MethodName = Literal["float", "diffq", "diffq-paper", "ste", "lsq", "quant-noise", "pq", "lc"]
S = TypeVar("S", bound="Settings")

_ONLY_FOR: dict[str, tuple[str, tuple[str, ...]]] = {
    "bits": ("method", ("diffq", "ste", "lsq", "quant-noise", "pq", "lc")),
    "mib": ("method", ("diffq",)),
    "penalty": ("method", ("diffq", "diffq-paper")),
    "bits_lr": ("method", ("diffq", "diffq-paper")),
    "group": ("method", ("diffq", "diffq-paper", "ste", "lsq", "quant-noise")),
    "scales_lr": ("method", get_args(MethodName)[1:]),
    "noise_rate": ("method", ("quant-noise", "pq")),
    **dict.fromkeys(("codebook", "mu_start", "mu_end", "turns"), ("method", ("lc",))),
    **dict.fromkeys(("finetune_epochs", "finetune_lr"), ("method", ("pq",))),
    "momentum": ("optimizer", ("sgd",)),
    **dict.fromkeys(("drop_every", "drop_by"), ("schedule", ("steps",))),
}
"""Options that have an effect only where another has one of these values."""
_RANGES = {
    **dict.fromkeys(("epochs", "lr", "mib", "penalty", "mu_start", "mu_end", "finetune_lr", "drop_every", "seconds"), "(0, 1e30]"),
    **dict.fromkeys(("weight_decay", "clip_norm", "bits_lr", "scales_lr", "finetune_epochs", "evaluate_every"), "[0, 1e30]"),
    **dict.fromkeys(("min_size", "save_every", "limit", "stop_after"), "[0, inf)"),
    **dict.fromkeys(("batch_size", "size", "least_count", "context", "length", "words", "width", "layers"), "[1, inf)"),
    **dict.fromkeys(("momentum", "warm_up", "ema", "smoothing"), "[0, 1)"),
    "bits": "(0, 32]",
    "noise_rate": "[0, 1]",
    "drop_by": "(0, 1]",
    "turns": "[2, inf)",
    "seed": "[0, 4294967295]",
}
"""Where the numbers of all recipes lie; torch computes with float32."""
_PAPER = {"penalty": 5.0, "group": "8"}
"""diffq-paper, where a recipe's preset has no others."""


@dataclass(kw_only=True)
class Settings:
    """What every recipe may be told."""

    data: Path = Path("data")
    """Folder or file of the data set."""
    out: Path = Path("runs/recipe")
    """Folder of this run: checkpoint, result.json, files. The same command goes on where it was interrupted."""
    model: str = ""
    """Which of the recipe's models."""
    start: Path | None = None
    """Float weights to start from (a .safetensors file, as `--method float` leaves one); without it from scratch."""

    method: MethodName = "diffq"
    """How weights are compressed; diffq-paper has the settings of the DiffQ paper, pq is product quantization with iPQ."""
    bits: float = 4.0
    """Bits a weight: the target of diffq, the width of ste, lsq and quant-noise; pq and an adaptive codebook of lc have 2^bits entries."""
    mib: float | None = None
    """Target of diffq for the size of the whole model in MiB, in place of bits."""
    penalty: float | None = None
    """The paper's lambda in loss per MiB, in place of a target (diffq, diffq-paper)."""
    group: str = "channel"
    """Weights that share a width (diffq) or a scale (ste, lsq, quant-noise): channel, tensor, or a number of weights."""
    min_size: int = 0
    """Weights with fewer elements stay in float."""
    noise_rate: float = 0.5
    """Share of the weights that quant-noise or pq disturbs in a forward."""
    codebook: CodebookKind = "adaptive"
    """Of lc; adaptive has 2^bits entries."""
    mu_start: float = 1e-3
    """Of lc: weight of the penalty at the start."""
    mu_end: float = 1.0
    """Of lc: weight of the penalty at the end."""
    turns: int = 40
    """Of lc: how often weights and codebooks take turns."""
    finetune_epochs: float = 1.0
    """Of pq: epochs after each group of layers that iPQ rounds."""
    finetune_lr: float = 1e-2
    """Of pq: learning rate of these epochs, by SGD with momentum."""
    distil: bool = False
    """Train on the float model's outputs in place of the labels."""

    epochs: float = 1.0
    """Length of the training."""
    batch_size: int = 128
    """Of all processes together."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """Of the weights; sgd has Nesterov momentum."""
    lr: float = 0.1
    """Learning rate of the weights at the start."""
    momentum: float = 0.9
    """Of sgd."""
    weight_decay: float = 0.0
    """Of the weights."""
    schedule: Literal["steps", "cosine", "constant"] = "cosine"
    """How the learning rate falls."""
    drop_every: float = 0.3
    """With steps: the share of the training after which the rate is multiplied with drop_by, again and again."""
    drop_by: float = 0.2
    """With steps: by what the rate is multiplied."""
    warm_up: float = 0.0
    """Share of the training in which the rate rises."""
    clip_norm: float = 0.0
    """Largest norm of the gradients; 0 for none."""
    bits_lr: float | None = None
    """Adam's rate for the bits; it stays the same. Without it that of the paper, or 1e-3 where there is a target."""
    scales_lr: float = 1e-3
    """Adam's rate for learned scales and ranges; it falls as that of the weights."""
    ema: float = 0.0
    """Decay of a moving average of the weights, which is what is kept in the end; 0 for none."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is the GPU where there is one."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Of the activations in training; auto is bf16 on a GPU."""
    compile: bool = False
    """Compile the model with torch.compile."""
    seed: int = 0
    """Of weights, order and noise."""
    evaluate_every: float = 1.0
    """Epochs between two looks at the test set; 0 for the end alone."""
    save_every: int = 0
    """Steps between two checkpoints; 0 for each epoch."""
    tensorboard: bool = False
    """Write a log for TensorBoard into the folder of the run."""
    onnx: bool = True
    """Write an ONNX file in the end."""
    limit: int = 0
    """Take so many examples of each part of the data; 0 for all."""
    stop_after: int = 0
    """Steps after which the process saves and kills itself, to try the resuming; 0 for never."""
    smoke: bool = False
    """Try everything on a little of the data: two steps, killed after the first, resumed, converted, exported, compared."""

    @classmethod
    def preset(cls, model: str, method: str) -> dict[str, Any]:
        """What a model's or a method's defaults are where they are not those of the recipe."""
        return {}

    def without_effect(self) -> dict[str, str]:
        """Options that change nothing beside the others, each with the reason."""
        found = {
            name: f"is for --{other} {', '.join(values)}, which is {getattr(self, other)} here"
            for name, (other, values) in _ONLY_FOR.items()
            if getattr(self, other) not in values
        }
        if self.method == "diffq":
            aim = next((name for name in ("penalty", "mib") if getattr(self, name) is not None), "bits")
            found |= {name: f"has no effect beside --{aim}" for name in ("mib", "bits") if name != aim}
        if self.method == "lc" and self.codebook != "adaptive":
            found["bits"] = f"is for an adaptive codebook, not for {self.codebook}"
        return found

    def check(self, given: Collection[str]) -> None:
        """Refuse what cannot work, and what was given without an effect, naming the option."""
        for name, why in self.without_effect().items():
            if name in given:
                raise SystemExit(f"{_option(name)} {why}.")
        for name, interval in _RANGES.items():
            value = getattr(self, name, None)
            if value is not None and not _lies_in(value, interval):
                raise SystemExit(f"{_option(name)} must lie in {interval}, got {value}.")
        if self.method not in ("float", "diffq") and self.bits % 1:
            raise SystemExit(f"--bits must be a whole number with --method {self.method}, got {self.bits}.")
        if not (self.group.isdecimal() and int(self.group)) and (self.method == "diffq-paper" or self.group not in ("channel", "tensor")):
            names = "" if self.method == "diffq-paper" else "channel, tensor or "
            raise SystemExit(f"--group must be {names}a number from 1, got {self.group!r}.")
        if self.start is not None and not self.start.is_file():
            raise SystemExit(f"--start: there is no file {self.start}. `--method float` leaves one, float.safetensors, in its --out.")
        if self.distil and (self.start is None or self.method == "float"):
            raise SystemExit("--distil follows a trained float model: give its weights as --start, and a --method other than float.")


def parse(cls: type[S], argv: Sequence[str] | None, description: str) -> S:
    """Settings from the command line: what is not given there is as the preset of the model and method has it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    hints, texts = get_type_hints(cls), _texts(cls)
    for field in fields(cls):
        kind, choices = _kind(hints[field.name])
        option, text = _option(field.name), f"{texts.get(field.name, '')} [{field.default}]".replace("%", "%%")
        if kind is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            parser.add_argument(option, type=kind, choices=choices, default=argparse.SUPPRESS, help=text)
    given = vars(parser.parse_args(argv))
    plain = cls(**given)
    paper = _PAPER if plain.method == "diffq-paper" else {}
    settings = cls(**{**paper, **cls.preset(plain.model, plain.method), **given})
    settings.check(given)
    return settings


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _lies_in(value: float, interval: str) -> bool:
    low, high = map(float, interval[1:-1].split(","))
    return (low < value or (interval[0] == "[" and value == low)) and (value < high or (interval[-1] == "]" and value == high))


def _kind(hint: Any) -> tuple[Any, Any]:
    """The type that a value is read with, and the values that are possible."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(each for each in get_args(hint) if each is not type(None))
    return (str, get_args(hint)) if get_origin(hint) is Literal else (hint, None)


def _texts(cls: type) -> dict[str, str]:
    """What stands below each field, of the class and what it is made of."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__[:-1]):
        below = re.findall(r'^    (\w+): [^\n]*\n    """(.*?)"""$', inspect.getsource(each), re.MULTILINE | re.DOTALL)
        found |= {name: " ".join(text.split()) for name, text in below}
    return found
