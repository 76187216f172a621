"""What the zoo's tests do with a model: run it, compare outputs, switch the noise off, find every tensor it holds."""

import copy
import dataclasses
import functools
import random
import types
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffq_fx import DiffQConfig, DiffQWarning, convert_diffq, prepare_diffq
from zoo import models
from zoo.entry import Entry

MODES = ("train", "eval", "eval without grad")


def prepared(entry: Entry, model: nn.Module | None = None, **options: Any) -> nn.Module:
    """Prepare a model of the zoo; a penalty in place of a target, since many weights here are too small for any target."""
    args, kwargs = entry.example()
    options = {"config": DiffQConfig(penalty=1.0), "scope": entry.asked} | options
    with warnings.catch_warnings():
        if entry.unseen:  # that this warns has a test of its own
            warnings.simplefilter("ignore", DiffQWarning)
        return prepare_diffq(entry.make() if model is None else model, kwargs or args, **options)


@functools.cache
def _kept(name: str) -> tuple[nn.Module, nn.Module]:
    """A prepared model with one optimizer step behind it and bits that have moved apart, and what convert makes of it."""
    entry = models.BY_NAME[name]
    model = prepared(entry)
    with torch.no_grad():
        for quantizer in model.compression.quantizers:
            quantizer.logits.add_(torch.randn(quantizer.logits.shape, generator=torch.Generator().manual_seed(1)) / 20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss_of(run(model, entry, "train")).backward()
    optimizer.step()
    model.zero_grad()
    return model, converted(model)


def trained(entry: Entry) -> tuple[nn.Module, nn.Module]:
    """A trained prepared model and its conversion; made once, copied for every test that wants them."""
    return copy.deepcopy(_kept(entry.name))


def converted(model: nn.Module) -> nn.Module:
    """Convert without the warning that the bits were not trained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DiffQWarning)
        return convert_diffq(model)


def run(model: nn.Module, entry: Entry, mode: str, variant: int = 0, seed: int = 3) -> Any:
    """Call a model from a seed, in one mode."""
    args, kwargs = entry.example(variant)
    model.train(mode == "train")
    random.seed(seed)
    with torch.random.fork_rng(), torch.set_grad_enabled(mode != "eval without grad"):
        torch.manual_seed(seed)
        return model(*args, **kwargs)


def parts(value: Any) -> Iterator[tuple[str, Any]]:
    """An output, its containers and its leaves, each with a path; a container is given as its type."""
    if isinstance(value, Mapping):
        children = list(value.items())
    elif isinstance(value, tuple | list):
        children = list(enumerate(value))
    elif dataclasses.is_dataclass(value):
        children = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    else:
        yield "", value
        return
    yield "", type(value)
    for name, child in children:
        yield from ((f"[{name}]{path}", leaf) for path, leaf in parts(child))


def assert_same(found: Any, expected: Any) -> None:
    """Two outputs are equal bit by bit, in the same containers."""
    found_parts, expected_parts = list(parts(found)), list(parts(expected))
    assert [path for path, _ in found_parts] == [path for path, _ in expected_parts]
    for (path, a), (_, b) in zip(found_parts, expected_parts, strict=True):
        assert type(a) is type(b), path
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda text, path=path: f"{path}: {text}")
        else:
            assert a == b, path


def tensors_in(output: Any) -> list[Tensor]:
    """The tensors of an output."""
    return [leaf for _, leaf in parts(output) if isinstance(leaf, Tensor)]


def loss_of(output: Any) -> Tensor:
    """A loss that gives every element of the output a gradient of its own."""
    generator = torch.Generator().manual_seed(11)
    floats = [t for t in tensors_in(output) if t.requires_grad]
    return sum((t * torch.randn(t.shape, generator=generator)).sum() for t in floats)


@contextmanager
def noise_off(model: nn.Module) -> Iterator[None]:
    """Every quantizer gives out the true weight."""
    try:
        for quantizer in model.compression.quantizers:
            weight = model.get_parameter(quantizer.spec.name)
            quantizer.pass_through(lambda weight=weight: weight)
        yield
    finally:
        for quantizer in model.compression.quantizers:
            quantizer.pass_through(None)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that may be seen of a model from outside: classes, flags, attributes, children, and the values of its tensors."""
    seen: dict[str, Any] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for path, module in model.named_modules():
        registries = {kind: list(getattr(module, kind)) for kind in ("_parameters", "_buffers", "_modules")}
        seen[f"{path}:"] = (type(module), module.training, sorted(vars(module)), registries)
        seen.update({f"{path}:{name}": tensor.clone() for name, tensor in module._buffers.items() if tensor is not None})
    seen["parameters"] = [(id(p), p.requires_grad, p.grad) for p in model.parameters()]
    return seen


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Two snapshots are equal."""
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]) if isinstance(value, Tensor) else value == after[key], key


def reachable_tensors(root: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that can be reached from an object: attributes, containers, closures, and the classes made for it."""
    seen: set[int] = set()
    stack: list[tuple[str, Any]] = [("", root)]
    while stack:
        path, value = stack.pop()
        if id(value) in seen or isinstance(value, str | int | float | bool | bytes | types.ModuleType | torch.dtype | torch.device | None):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield path, value
        stack.extend((f"{path}{step}", child) for step, child in _children(value))


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((f"[{key}]", child) for key, child in value.items())
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((f"[{i}]", child) for i, child in enumerate(value))
    elif isinstance(value, types.FunctionType):
        yield from ((f"<closure {i}>", cell.cell_contents) for i, cell in enumerate(value.__closure__ or ()))
        yield from (("<defaults>", child) for child in value.__defaults__ or ())
        if value.__code__.co_filename.startswith("<"):  # generated: its globals are its own
            yield "<globals>", value.__globals__
    elif isinstance(value, functools.partial):
        yield from (("<function>", value.func), ("<args>", value.args), ("<keywords>", value.keywords))
    elif isinstance(value, types.MethodType):
        yield from (("<self>", value.__self__), ("<function>", value.__func__))
    elif isinstance(value, type):
        yield from ((f"<class {name}>", child) for name, child in vars(value).items())
        yield from ((f"<base {i}>", base) for i, base in enumerate(value.__bases__) if base.__module__ not in ("builtins",))
    else:
        if isinstance(value, nn.Module):
            yield "<class>", type(value)
        yield from ((f".{name}", child) for name, child in getattr(value, "__dict__", {}).items())
