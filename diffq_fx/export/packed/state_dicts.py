"""Float safetensors state dicts to packed files and back, for the command line."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from diffq_fx.atomic import refuse_same_file, replaced_atomically
from diffq_fx.errors import PackedFileError
from diffq_fx.export.packed.container import FORMAT
from diffq_fx.export.packed.dtypes import FLOAT_TYPES
from diffq_fx.export.packed.loading import load_packed
from diffq_fx.export.packed.writer import write_packed
from diffq_fx.file_kinds import foreign_kind
from diffq_fx.functional import Grid
from diffq_fx.functional.groups import GroupSize
from diffq_fx.methods.fixed import FixedBitsQuantizer
from diffq_fx.storage import IntegerWeight, StoredWeight
from diffq_fx.weights import WeightSpec


@dataclass(frozen=True)
class Rounding:
    """What the rounding of a state dict has done."""

    errors: dict[str, float]
    """Name of each rounded weight -> squared error over the sum of its squares."""
    overall: float
    """The same of all rounded weights together."""
    skipped: tuple[str, ...]
    """Names of the tensors with two dimensions or more that stay as they are."""


def pack_state_dict(
    source: Path, target: Path, *, bits: int, group_size: str, grid: Grid = "affine", exclude: Sequence[str] = (), entropy: bool = True
) -> Rounding:
    """Round the weights of a float state dict to the nearest level and pack them.

    A weight is a floating-point tensor with two dimensions or more; its first one is taken for the output channels. The arguments are those
    of ``diffq-fx pack``.
    """
    if not 1 <= bits <= 16:
        raise ValueError(f"bits must be from 1 to 16, got {bits}.")
    size = _group_size(group_size)
    refuse_same_file(target, [source], PackedFileError)
    tensors = _read_state_dict(source)
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in tensors):
            raise ValueError(f"the pattern '{pattern}' matches no tensor of '{source}'.")
    stored: list[StoredWeight] = []
    rest: dict[str, Tensor] = {}
    squares: dict[str, tuple[float, float]] = {}
    for name, tensor in tensors.items():
        excluded = any(fnmatchcase(name, pattern) for pattern in exclude)
        if tensor.dim() < 2 or not tensor.numel() or tensor.dtype not in FLOAT_TYPES.values() or excluded:
            rest[name] = tensor
        else:
            spec = WeightSpec(name=name, shape=tuple(tensor.shape), axis=0, dtype=tensor.dtype, group_size=size, range_size=size, grid=grid)
            stored.append(_rounded(tensor, spec, bits))
            exact = tensor.double()
            squares[name] = (exact - stored[-1]().double()).square().sum().item(), exact.square().sum().item()
    if not stored:
        raise PackedFileError(
            f"'{source}' has nothing to round: none of its {len(tensors)} tensors that are not excluded is a floating-point one with two "
            "dimensions or more."
        )
    try:
        write_packed(stored, [((name,), tensor) for name, tensor in rest.items()], target, entropy=entropy)
    except PackedFileError as error:
        raise PackedFileError(f"{error}.") from error
    errors = {name: error / (whole or 1.0) for name, (error, whole) in squares.items()}
    error, whole = (sum(each) for each in zip(*squares.values(), strict=True))
    return Rounding(errors, error / (whole or 1.0), tuple(name for name, tensor in rest.items() if tensor.dim() >= 2))


def _group_size(value: str) -> GroupSize:
    if value == "tensor" or value == "channel":
        return value
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f'the group size is "tensor", "channel" or a number from 1, got {value!r}.')
    return int(value)


def _read_state_dict(source: Path) -> dict[str, Tensor]:
    import safetensors

    if kind := foreign_kind(source):
        raise PackedFileError(f"{str(source)!r} {kind}; a safetensors file is wanted.")
    try:
        with safetensors.safe_open(source, "pt") as file:
            if (file.metadata() or {}).get("format") == FORMAT:
                raise PackedFileError(f"'{source}' is packed already; to give it other bits unpack it first (diffq-fx unpack).")
            return {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise PackedFileError(f"{str(source)!r} is not a safetensors file that can be read: {str(error)!r}.") from error


def _rounded(weight: Tensor, spec: WeightSpec, bits: int) -> IntegerWeight:
    if not torch.isfinite(weight).all():
        raise PackedFileError(f"weight '{spec.name}' of shape {spec.shape} has values that are not finite.")
    return FixedBitsQuantizer(spec, bits, weight.device).store(weight)


def unpack_state_dict(source: Path, target: Path) -> None:
    """Write the float state dict of a packed file as safetensors, with a tied weight under each of its names."""
    from safetensors.torch import save

    refuse_same_file(target, [source], PackedFileError)
    tensors = load_packed(source)
    first = {id(tensor): name for name, tensor in reversed(tensors.items())}
    untied = {name: tensor if first[id(tensor)] == name else tensor.clone() for name, tensor in tensors.items()}
    data = save(untied, metadata={"format": "pt"})
    try:
        with replaced_atomically(target, PackedFileError) as file:
            file.write(data)
    except PackedFileError as error:
        raise PackedFileError(f"{error}.") from error
