"""Why a model cannot be exported, in the words of whatever failed first: torch.onnx wraps it in several layers of its own."""

import inspect
import keyword
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import rnn

import diffq_fx
from diffq_fx.errors import DiffQError
from diffq_fx.example import restored_random_state
from diffq_fx.export.onnx.examples import ExportExample

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_NODE = re.compile(r"translating node %(\w+) .*?target=torch\.ops\.([\w.]+)")
_FRAME = re.compile(r'File "(.+)", line (\d+), in .*\n\s*(.+)')
_MISSING = "No ONNX function found"
_MOST_LINES = 3
_MOST_CHARACTERS = 300
_CACHES = (
    (
        r"Found <class '.*Cache'> in output",
        "it returns a cache of keys and values. Add use_cache=False to example_inputs (a dict of keyword arguments), or give cache=True "
        "for a decoder whose file takes and returns its tensors.",
    ),
    (
        r"Unsupported input type <class '.*Cache'>",
        "a cache of keys and values is no tensor. Leave it out of example_inputs and give cache=True, if the model is one of transformers; "
        "else export a wrapper that takes the cache's tensors and makes the cache in its forward.",
    ),
)

_PACKED = (
    "it packs sequences (torch.nn.utils.rnn), which have no form in ONNX. Export a forward that gives the recurrent layer a padded batch: "
    "in one direction each row's outputs are the same up to its length, and its last state is the output there."
)


def failure_cause(model: nn.Module, example: ExportExample, error: DiffQError) -> str:
    """Why an export fails where the model itself (in eval mode) is the reason; else what the error that stopped it says."""
    if any(advice in str(error) for _, advice in _CACHES):
        return str(error)
    name = type(model).__name__
    dtypes = sorted({str(parameter.dtype) for parameter in model.parameters() if parameter.is_floating_point()})
    try:
        first, second = (example.run(model) for _ in range(2))
    except Exception as refusal:  # noqa: BLE001  the forward is the user's
        given = sorted({str(tensor.dtype) for tensor in example.tensors})
        return f"the {name} (parameters: {', '.join(dtypes)}) does not run on example_inputs ({', '.join(given)}): {_shown(refusal)}"
    for number, value in enumerate(first):
        if isinstance(value, int | float | complex | str | bytes):
            return f"output {number} of the {name} is {value!r}, no tensor. Export a wrapper whose forward returns tensors alone."
    if _differ(first, second):
        with restored_random_state():
            first = example.run(model)
        with restored_random_state():
            keeps = _differ(first, example.run(model))
        why = "keeps something that the next one reads. Give it" if keeps else "draws random numbers. Give them"
        return f"two runs of the {name} on the same inputs differ: its forward {why} as an input."
    if "NOT_IMPLEMENTED" in str(error) and "torch.bfloat16" in dtypes:
        return f"the {name} is in bfloat16, for which onnxruntime has no kernels here. Call .float() on it, and on the example inputs."
    return str(error)


def _differ(first: list[Any], second: list[Any]) -> bool:
    pairs = [pair for pair in zip(first, second, strict=True) if isinstance(pair[0], torch.Tensor)]
    return any(one.shape != other.shape or not torch.allclose(one, other, rtol=0, atol=0, equal_nan=True) for one, other in pairs)


def tracing_cause(error: Exception) -> str:
    """Why torch.export fails, and what to do where that is known."""
    if any(
        frame.f_code.co_filename == rnn.__file__ or any(isinstance(each, rnn.PackedSequence) for each in frame.f_locals.values())
        for frame, _ in traceback.walk_tb(error.__traceback__)
    ):
        return _PACKED + _line_of_the_model(error)
    return next((advice for pattern, advice in _CACHES if re.search(pattern, str(error))), _shown(error) + _line_of_the_model(error))


def left_out(model: nn.Module, example: ExportExample) -> str:
    """The arguments whose default None a forward may replace, but not while it is traced."""
    signature = inspect.signature(model.forward)
    given = signature.bind_partial(*example.args, **example.kwargs).arguments
    names = [name for name, each in signature.parameters.items() if each.default is None and name not in given]
    return f" The example leaves out {', '.join(names)}, one of which may be needed while torch.export traces." if names else ""


def _line_of_the_model(error: Exception) -> str:
    """Where the forward was: the innermost line that is neither Python's, torch's nor ours."""
    theirs = (Path(torch.__file__).parent, Path(diffq_fx.__file__).parent)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if file.exists() and file.parent != Path(traceback.__file__).parent and not any(each in file.parents for each in theirs):
            return f"\n  at {_place(frame.filename, frame.lineno)}: {frame.line}"
    return ""


def line_of(node: fx.Node) -> str:
    """The line of the forward that made a node of a traced graph; empty where torch does not tell."""
    found = _FRAME.findall(node.meta.get("stack_trace") or "")
    return f"{_place(*found[-1][:2])}: {found[-1][2]}" if found else ""


def _place(file: str, line: int | str | None) -> str:
    return f"{'/'.join(Path(file).parts[-2:])}:{line}"


def translation_cause(error: Exception, program: torch.export.ExportedProgram) -> str:
    """Why torch.onnx fails: the operator, the module that calls it, and the innermost reason."""
    errors = list(_chain(error))
    if isinstance(errors[-1], SyntaxError) and (name := _keyword_in_a_name(program)):
        return f"the name {name!r} holds a keyword of Python, which torch.onnx cannot write. Rename that part of the float model."
    found = next((match for each in errors if (match := _NODE.search(_COLOURS.sub("", str(each))))), None)
    if found is None:
        return _shown(errors[-1])
    name, operator = found.groups()
    where = _caller(name, program)
    if any(_MISSING in str(each) for each in errors):
        return f"{operator}{where} has no translation to ONNX. Write it with other operators."
    return f"{operator}{where}: {_shown(errors[-1])}"


def _keyword_in_a_name(program: torch.export.ExportedProgram) -> str | None:
    return next((name for name in (*program.state_dict, *program.constants) if any(map(keyword.iskeyword, name.split(".")))), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _caller(name: str, program: torch.export.ExportedProgram) -> str:
    """The module whose forward calls the operator of a node; empty for the model itself, and where it is not known."""
    node = _find(program.graph, name)
    if node is None:
        try:
            node = _find(program.run_decompositions().graph, name)  # torch.onnx names the parts that an operator is made of
        except Exception:  # noqa: BLE001  it is the export that has failed; this only looks for a name
            node = None
    stack = list((node.meta.get("nn_module_stack") or {}).values()) if node is not None else []
    path, kind = stack[-1] if stack else ("", "")
    return f" in {path!r} ({str(kind).rpartition('.')[2]})" if path else ""


def _find(graph: fx.Graph, name: str) -> fx.Node | None:
    return next((node for node in graph.nodes if node.name == name), None)


def _shown(error: BaseException) -> str:
    lines = [line.strip() for line in _COLOURS.sub("", str(error)).splitlines() if line.strip()]
    text = "\n  ".join(lines[:_MOST_LINES])
    text = text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
