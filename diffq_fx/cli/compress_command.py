"""``diffq-fx compress``: a Hugging Face folder, or a function that returns a model and batches, compressed without a training."""

import importlib
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from diffq_fx.atomic import new_folder, refuse_same_file
from diffq_fx.cli.output import Answer, command, mib
from diffq_fx.errors import DiffQError, DiffQWarning
from diffq_fx.runtimes import RUNTIMES

if TYPE_CHECKING:
    from torch import nn

    from diffq_fx.methods.diffq import DiffQConfig

Format = Literal["packed", "onnx", "hf", "gguf", "onnxruntime-genai", "all"]
_RUNTIMES = {"gguf": 5.0, "onnxruntime-genai": 4.0}
"""Formats that have settings of their own -> bits a weight without ``--bits``."""


class _Source(NamedTuple):
    """What is compressed, by what."""

    model: "nn.Module"
    batches: Iterable[Any]
    first: Any
    """The first of them."""
    folder: Path | None = None
    """The Hugging Face folder that it comes from."""
    told: str = ""
    """What the batches are."""

    @property
    def example(self) -> Any:
        """The call that an ONNX file is exported with: a graph cannot return the cache of a model that generates text."""
        generates = getattr(self.model, "can_generate", lambda: False)()
        return {**self.first, "use_cache": False} if generates and isinstance(self.first, Mapping) else self.first


@command
def compress(
    target: Annotated[
        str, typer.Argument(help="A Hugging Face folder, or module:function returning (model, batches).", show_default=False)
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            help="For a folder: texts, one a line; or rows of inputs, as .safetensors with a tensor for each argument or as .npy."
        ),
    ] = None,
    target_bits: Annotated[
        float | None, typer.Option("--bits", help="Bits a weight, scales included; 4, or 5 for gguf, without --mib.")
    ] = None,
    target_mib: Annotated[float | None, typer.Option("--mib", help="Size of the whole model in MiB.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write, new or empty.")] = Path("diffq-fx-compressed"),
    format: Annotated[Format | None, typer.Option(help="By default hf for a folder, packed for a function.", show_default=False)] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Pattern of names that stay in float; may be repeated.")] = None,
    minutes: Annotated[float, typer.Option(help="Most minutes of the compression, about.")] = 10.0,
    steps: Annotated[int | None, typer.Option(help="Most steps of distillation; 300 by default, 0 for none.")] = None,
    with_page: Annotated[bool, typer.Option("--report", help="Write report.html too.")] = False,
) -> Answer:
    """Compress a float model to a size by unlabelled inputs: no labels, no loss and no training loop.

    Format packed is packed.safetensors for load_packed, onnx is model.onnx, hf is a folder for from_pretrained, all is each of these.
    Decoders: gguf is model.gguf for llama.cpp, onnxruntime-genai a folder for that. The folder is written whole or not at all.
    """
    from diffq_fx import bits_report
    from diffq_fx import compress as compressed

    config = _config(target_bits, target_mib, format, tuple(exclude or ()))
    refuse_same_file(out, [target] if data is None else [target, data], DiffQError)
    with new_folder(out, DiffQError) as draft:
        source = _from_folder(Path(target), data) if os.path.exists(target) else _from_function(target, data)
        formats = _formats(format, source)
        try:
            converted = compressed(source.model, source.batches, config, minutes=minutes, steps=steps)
        except TypeError as error:  # what the caller of compress gave, or a fault in it
            raise DiffQError(str(error)) if str(error).startswith("compress:") else error from error
        report = bits_report(converted)
        failed, remarks = _write(formats, converted, source, draft)
        if with_page:
            report.save_page(draft / "report.html")
    files = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    lines = [f"inputs: {source.told}"] * bool(source.told) + remarks + [f"{out / name}: {mib(size)} MiB" for name, size in files.items()]
    answer = {"folder": str(out), "files": files, "failed": failed, "report": report.as_dict()}
    return Answer(answer, [report, *lines], failed=" ".join(failed.values()))


def _config(bits: float | None, mib: float | None, format: Format | None, exclude: tuple[str, ...]) -> "DiffQConfig":
    from diffq_fx import DiffQConfig

    if bits is not None and mib is not None:
        raise ValueError(f"--bits {bits:g} and --mib {mib:g} are two sizes. Give one of them.")
    if format in _RUNTIMES:
        usual = _RUNTIMES[format] if mib is None else None
        return DiffQConfig.for_runtime(format, target_bits=usual if bits is None else bits, target_mib=mib, exclude=exclude)
    if mib is None:
        return DiffQConfig(target_bits=4 if bits is None else bits, exclude=exclude)
    return DiffQConfig(target_bits=None, target_mib=mib, size_of="onnx_file" if format == "onnx" else "widths", exclude=exclude)


def _from_folder(folder: Path, data: Path | None) -> _Source:
    if not folder.is_dir():
        raise DiffQError(f"'{folder}' is a file. Give a Hugging Face folder or module:function; diffq-fx pack rounds a float state dict.")
    if data is None:
        raise DiffQError(f"'{folder}' is a folder, and says nothing of the model's inputs: give --data with texts, or with rows of inputs.")
    from diffq_fx.integrations.hf_sources import batches_of, load_float

    model = load_float(folder)
    batches, told = batches_of(data, model, folder)
    return _Source(model, batches, batches[0], folder, told)


def _from_function(target: str, data: Path | None) -> _Source:
    """What a function of the user's returns; a module in the current folder is found."""
    name, _, attribute = target.rpartition(":")
    if not name or not attribute:
        raise DiffQError(f"there is no folder '{target}'. Give a Hugging Face folder, or module:function; nothing is downloaded.")
    if data is not None:
        raise ValueError(f"--data {data} is for a folder: {target} returns the batches itself.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with _user_code(f"module '{name}' does not import"):
        module = importlib.import_module(name)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise DiffQError(f"module '{name}' has no function '{attribute}'.")
    with _user_code(f"{target} failed"):
        made: Any = function()
    _check_made(target, made)
    batches = _guarded(target, made[1])
    first = next(batches, None)
    return _Source(made[0], batches if first is None else chain([first], batches), first)


@contextmanager
def _user_code(what: str) -> Iterator[None]:
    try:
        yield
    except (Exception, SystemExit) as error:  # the user's code may raise anything, and a script may leave
        raise DiffQError(f"{what}: {type(error).__name__}: {error}") from error


def _guarded(target: str, batches: Iterable[Any]) -> Iterator[Any]:
    with _user_code(f"the batches of {target} failed"):
        yield from batches


def _check_made(target: str, made: Any) -> None:
    from torch import Tensor, nn

    pair = made if isinstance(made, tuple | list) else (made,)
    right = (
        len(pair) == 2
        and isinstance(pair[0], nn.Module)
        and isinstance(pair[1], Iterable)
        and not isinstance(pair[1], Tensor | Mapping | str)
    )
    if not right:
        found = ", ".join(type(each).__name__ for each in pair) or "nothing"
        raise DiffQError(f"{target} must return (model, batches), a torch.nn.Module and an iterable of its inputs; it returned {found}.")


def _formats(format: Format | None, source: _Source) -> list[str]:
    """What is to be written, the fastest first."""
    is_pretrained = hasattr(source.model, "save_pretrained")
    if format == "hf" and not is_pretrained:
        raise DiffQError(f"--format hf is for models of transformers; a {type(source.model).__name__} has no save_pretrained.")
    if format == "onnxruntime-genai" and source.folder is None:
        raise DiffQError("--format onnxruntime-genai is for a Hugging Face folder: the tokenizer there goes into the result.")
    if format in _RUNTIMES:
        _writer_for(format).refuse_unknown(source.model, source.folder)  # before minutes are spent on it
    if format == "onnx" and source.first is not None:
        _onnx("check_onnx", source.model, source.example)
    if format == "all":
        return ["packed", *["hf"] * is_pretrained, "onnx"]
    return [format or ("packed" if source.folder is None else "hf")]


def _writer_for(runtime: str) -> Any:
    """The module that writes for a runtime."""
    return importlib.import_module(RUNTIMES[runtime].writer.rpartition(".")[0])


def _onnx(function: str, *arguments: Any) -> Iterable[str]:
    """Call a function that exports. Returns its remarks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DiffQWarning)  # the remarks, which are told at the end
        return getattr(importlib.import_module("diffq_fx.export"), function)(*arguments).remarks


def _write(formats: list[str], converted: "nn.Module", source: _Source, folder: Path) -> tuple[dict[str, str], list[str]]:
    """Write each format; what cannot be written does not take the others with it. Returns why, by format, and remarks."""
    failed: dict[str, str] = {}
    remarks: list[str] = []
    for each in formats:
        try:
            remarks += _write_one(each, converted, source, folder)
        except (DiffQError, ValueError, TypeError) as error:
            if len(formats) == 1:
                raise
            failed[each] = f"{each}: {error}"
    return failed, remarks


def _write_one(format: str, converted: "nn.Module", source: _Source, folder: Path) -> Iterable[str]:
    """Write a format into a folder, which is empty where it is for onnxruntime-genai. Returns remarks."""
    from diffq_fx.export import save_packed

    if format == "onnx":
        return _onnx("export_onnx", converted, source.example, folder / "model.onnx")
    if format == "packed":
        save_packed(converted, folder / "packed.safetensors")
    elif format == "hf":
        from diffq_fx.integrations.hf_sources import save_folder

        save_folder(converted, source.folder, folder)
    elif format == "gguf":
        _writer_for(format).export_gguf(converted, folder / "model.gguf", tokenizer=source.folder)
    else:
        _writer_for(format).export_genai(converted, folder, source.folder)
    return ()
