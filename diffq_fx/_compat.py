"""Every name of torch and onnxruntime that is not public, and what happens in a version without it.

Each is looked up when this module is imported and is None where it is gone; the function beside it then does the same in another way.
So no rename stops ``import diffq_fx``. Not here: attributes of Module, Tensor and Graph that subclasses have had to know since torch 1
(``_parameters``, ``_buffers``, ``_modules``, ``_forward_hooks``, ``_apply``, ``_load_from_state_dict``, ``_version``, ``_flat_weights``).
"""

import copy
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor

from diffq_fx.errors import ExportError

OLDEST_TORCH_FOR_ONNX = (2, 9)
"""Before 2.6, torch.onnx takes no translations of operators of a library; 2.6 cannot translate recurrent layers with a dynamic size."""


def _private(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


_flatten = _private("torch._utils", "_flatten_dense_tensors")
_unflatten = _private("torch._utils", "_unflatten_dense_tensors")
_foreach_copy = _private("torch", "_foreach_copy_")
_interpreter_stack = _private("torch._C._functorch", "peek_interpreter_stack")
_in_dispatch_mode = _private("torch.utils._python_dispatch", "is_in_torch_dispatch_mode")
_tree_leaves = _private("torch.utils._pytree", "tree_leaves")
_tree_map_only = _private("torch.utils._pytree", "tree_map_only")
_decompositions = _private("torch._decomp", "decomposition_table")
_dispatch_key = _private("torch._C", "DispatchKey")
_forward_pre_hooks = _private("torch.nn.modules.module", "_global_forward_pre_hooks")
_forward_hooks = _private("torch.nn.modules.module", "_global_forward_hooks")
_backward_pre_hooks = _private("torch.nn.modules.module", "_global_backward_pre_hooks")
_backward_hooks = _private("torch.nn.modules.module", "_global_backward_hooks")
_check = _private("torch", "_check")
_disable_dynamo = _private("torch._compile", "_disable_dynamo")
_graph_task = _private("torch._C", "_current_graph_task_id")


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """All values in one row. Without torch's C++ function: slower for hundreds of tensors."""
    return _flatten(tensors) if _flatten is not None else torch.cat([tensor.reshape(-1) for tensor in tensors])


def unflatten(row: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Views of a row in the shapes of these tensors. Without torch's C++ function: slower for hundreds of tensors."""
    if _unflatten is not None:
        return _unflatten(row, tensors)
    return tuple(part.view_as(tensor) for part, tensor in zip(row.split([tensor.numel() for tensor in tensors]), tensors, strict=True))


def copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target. Without torch's function for lists: one at a time."""
    if _foreach_copy is not None:
        _foreach_copy(targets, sources)
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def in_function_transform(unknown: bool) -> bool:
    """Whether this runs inside a transform of torch.func; ``unknown`` if torch does not tell."""
    return unknown if _interpreter_stack is None else _interpreter_stack() is not None


def in_backward() -> bool:
    """Whether this runs inside a backward pass. False if torch does not tell: then what cannot work there ends in torch's own error."""
    return _graph_task is not None and _graph_task() != -1


def leave_to_python(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep torch.compile out of a function, as ``torch.compiler.disable`` does, which is slow to import and so waits for the first call."""
    return function if _disable_dynamo is None else _disable_dynamo(function)


def caller() -> FrameType:
    """The frame that called the function which asks, without what :func:`leave_to_python` puts between them."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("torch._compile", "torch._dynamo")):
        frame = frame.f_back
    return frame


def in_dispatch_mode() -> bool:
    """Whether operations are recorded by a mode. True if torch does not tell: then no C kernel runs, which is always right."""
    return _in_dispatch_mode is None or _in_dispatch_mode()


def has_global_hooks() -> bool:
    """Whether a hook is registered for all modules. False if torch does not tell: it then fires on the modules that a graph calls."""
    return any((_forward_pre_hooks, _forward_hooks, _backward_pre_hooks, _backward_hooks))


def tree_leaves(tree: Any) -> list[Any]:
    """What nested containers hold. Without torch's pytree: of dicts, lists and tuples, but not of classes registered with torch."""
    if _tree_leaves is not None:
        return _tree_leaves(tree)
    if not isinstance(tree, Mapping | list | tuple):
        return [tree]
    return [leaf for part in (tree.values() if isinstance(tree, Mapping) else tree) for leaf in tree_leaves(part)]


def map_tensors(change: Callable[[Tensor], Any], tree: Any) -> Any:
    """The same containers with each tensor replaced. Without torch's pytree: see :func:`tree_leaves`."""
    if _tree_map_only is not None:
        return _tree_map_only(Tensor, change, tree)
    if isinstance(tree, Mapping):
        mapped = cast("dict[Any, Any]", copy.copy(tree))
        mapped.update({key: map_tensors(change, part) for key, part in tree.items()})
        return mapped
    if isinstance(tree, list | tuple):
        parts = [map_tensors(change, part) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return change(tree) if isinstance(tree, Tensor) else tree


@contextmanager
def shapes_without_running(shapes: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    """Let tracers take what operators return from these functions.

    Without torch's tables they run them instead: slower, and a recurrent layer's sequence keeps the length of the example, of which
    export_onnx warns.
    """
    tables = [[getattr(operator, name, None) for name in ("py_kernels", "_dispatch_cache")] for operator in shapes]
    if _dispatch_key is None or not all(isinstance(table, dict) for table in [_decompositions, *itertools.chain(*tables)]):
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(_decompositions, shapes))
        for (kernels, cache), function in zip(cast("list[list[dict[Any, Any]]]", tables), shapes.values(), strict=True):
            stack.callback(cache.clear)  # after the patch below is undone
            stack.enter_context(mock.patch.dict(kernels, {_dispatch_key.CompositeImplicitAutograd: function}))
            cache.clear()
        yield


def check_shape(tensor: Tensor, sizes: Mapping[int, Any]) -> None:
    """Tell torch.export what these axes measure. Without torch's function: what nothing else ties has a dynamic size of its own."""
    for axis, size in sizes.items():
        if _check is not None:
            _check(tensor.shape[axis] == size)


def size_conditions(program: torch.export.ExportedProgram) -> list[Any]:
    """The conditions on its dynamic sizes that a trace has passed, as sympy's expressions. Without torch's record of them: none."""
    values = (node.meta.get("val") for node in program.graph.nodes)
    sizes = (size for value in values if isinstance(value, Tensor) for size in value.shape if isinstance(size, torch.SymInt))
    environment = getattr(getattr(next(sizes, None), "node", None), "shape_env", None)
    return [guard.expr for guard in getattr(environment, "guards", ())]


def onnxruntime_errors() -> tuple[type[Exception], ...]:
    """Everything that onnxruntime raises; its exceptions have no class in common. Without its list: any exception."""
    try:
        state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    except ImportError:
        return (Exception,)
    own = [kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return (RuntimeError, ValueError, *own) if own else (Exception,)


def check_torch_translates_operators() -> None:
    """Refuse to export with a torch.onnx that is too old.

    Raises:
        ExportError: which torch this is, and which it takes.
    """
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < OLDEST_TORCH_FOR_ONNX:
        oldest = ".".join(map(str, OLDEST_TORCH_FOR_ONNX))
        raise ExportError(
            f"export_onnx: needs torch {oldest} or newer, this is torch {torch.__version__}. Save the converted model with save_packed "
            f"here, load_packed it with a newer torch and export it there."
        )
