"""The one table of runtimes: which weights each of them holds as they are learned, and how an ONNX file is laid out for it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffq_fx.functional import Grid
from diffq_fx.functional.groups import GroupSize
from diffq_fx.weights import WeightSpec


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What a runtime can hold without a second rounding and without a wasted bit."""

    widths: Mapping[Grid, tuple[int, ...]]
    """Grid -> the widths of its containers; the first grid is that of :meth:`preset`."""
    blocks: tuple[GroupSize, ...]
    """What may share a scale: numbers of inputs, "channel", "tensor"."""
    block: GroupSize = 32
    """What shares a scale in :meth:`preset`."""
    blocked_matrices: bool = False
    """Whether it has matrices alone, each of one width and in whole blocks."""
    float_layers: bool = True
    """Whether matrices in the layers of a decoder may be floats."""
    scale_dtypes: tuple[str, ...] = ("float16", "float32")
    same_width: str | None = None
    """Weights that it fuses where they have one width."""
    onnx_options: Mapping[str, Any] = field(default_factory=dict)
    """The options of ``export_onnx`` that it stands for; none where another function writes its files."""
    writer: str = "diffq_fx.export.export_onnx"
    """The function that writes its files."""

    def preset(self, grid: Any = None) -> dict[str, Any]:
        """Settings of :class:`~diffq_fx.DiffQConfig` whose weights it holds as they are learned: one width a weight, block scales."""
        first, widths = next((each for each in self.widths.items() if grid == each[0]), next(iter(self.widths.items())))
        own: dict[str, Any] = {"group_size": "tensor", "range_per": self.block, "scale_dtype": self.scale_dtypes[0]}
        return {**own, "grid": first, "widths": widths, "same_width": self.same_width}

    def default_target(self, grid: Grid) -> float | None:
        """Bits a weight in reach of :meth:`preset`, a little above the narrowest width and its scales; None where the usual ones are."""
        narrowest, numbers = self.widths[grid][0], 1 if grid == "symmetric" else 2
        return None if narrowest < 4 else narrowest + 16 * numbers / 32 + 0.5


_CONTAINERS: Mapping[Grid, tuple[int, ...]] = {"affine": (2, 4, 8), "symmetric": (2, 4, 8)}
_WIDER: Mapping[Grid, tuple[int, ...]] = {"affine": (4, 8), "symmetric": (4, 8)}
_BLOCKS = (16, 32, 64, 128)
_ONNXRUNTIME = Runtime(
    widths=_CONTAINERS, blocks=(*_BLOCKS, 256, "channel", "tensor"), onnx_options={"layout": "onnxruntime", "min_container": 2}
)

RUNTIMES: Mapping[str, Runtime] = {
    "onnxruntime": _ONNXRUNTIME,
    "web": _ONNXRUNTIME,  # onnxruntime-web runs the same operators and types
    "openvino": Runtime(  # knows no functions of a model and no types of 2 bits
        widths=_WIDER, blocks=_ONNXRUNTIME.blocks, onnx_options={"layout": "qdq", "min_container": 4}
    ),
    "ort-format": Runtime(  # its converter folds chains of nodes; the format has no types below 8 bits
        widths={"affine": (8,), "symmetric": (8,)}, blocks=_ONNXRUNTIME.blocks, onnx_options={"layout": "qdq", "min_container": 8}
    ),
    "onnxruntime-genai": Runtime(
        widths=_CONTAINERS,
        blocks=_BLOCKS,
        blocked_matrices=True,
        float_layers=False,
        same_width="same_input",
        writer="diffq_fx.integrations.genai.export_genai",
    ),
    "gguf": Runtime(  # Q4_0, Q5_0, Q8_0; on the float grid Q4_1, Q5_1
        widths={"symmetric": (4, 5, 8), "float": (4, 5)},
        blocks=(32,),
        blocked_matrices=True,
        scale_dtypes=("float16",),
        writer="diffq_fx.export.gguf.export_gguf",
    ),
}
"""Name of a runtime, as ``DiffQConfig.for_runtime`` and ``export_onnx(runtime=...)`` take it -> what it holds."""


def runtime_named(name: str) -> Runtime:
    """A runtime of the table.

    Raises:
        ValueError: there is none of this name.

    Example:
        >>> runtime_named("gguf").preset()["widths"]
        (4, 5, 8)
    """
    if name not in tuple(RUNTIMES):  # what cannot be hashed, too
        with_choice = tuple(each for each, runtime in RUNTIMES.items() if len(runtime.preset()["widths"]) > 1)
        raise ValueError(f"DiffQConfig: runtime must be one of {with_choice}, got {name!r}.")
    return RUNTIMES[name]


def how_to_prepare(name: str) -> str:
    """What to prepare with, in words, for levels and scales that a runtime holds.

    Example:
        >>> how_to_prepare("gguf")
        'Prepare with DiffQConfig.for_runtime("gguf"), or STE(group_size=32, grid="symmetric", scale_dtype="float16") of up to 8 bits'
    """
    runtime = RUNTIMES[name]
    (grid, widths), (scale_dtype, *others) = next(iter(runtime.widths.items())), runtime.scale_dtypes
    scales = "" if others else f', scale_dtype="{scale_dtype}"'
    fixed = f'STE(group_size={runtime.block}, grid="{grid}"{scales})'
    return f'Prepare with DiffQConfig.for_runtime("{name}"), or {fixed} of up to {widths[-1]} bits'


def refuse_settings(
    name: str,
    *,
    grid: Grid,
    widths: tuple[int, ...],
    limits: Mapping[str, float],
    group_size: GroupSize,
    range_size: GroupSize,
    scale_dtype: str,
    size_of: str,
) -> None:
    """Refuse settings of which a runtime cannot hold the weights as they are learned.

    ``limits`` are those of the widths that were given beside them.

    Raises:
        ValueError: says the runtime, what it has, and what was found.
    """
    runtime = runtime_named(name)
    allowed = {
        "grid": (grid, tuple(runtime.widths)),
        "group_size": (group_size, ("tensor",) if runtime.blocked_matrices else ("tensor", "channel")),
        "range_per": (range_size, runtime.blocks),
        "scale_dtype": (scale_dtype, runtime.scale_dtypes),
        "size_of": (size_of, ("widths", "onnx_file") if runtime.onnx_options else ("widths",)),
    }
    for setting, (found, has) in allowed.items():
        if found not in has:
            raise ValueError(f"DiffQConfig: the runtime {name!r} has {setting} of {' or '.join(map(repr, has))}, got {found!r}.")
    asked = {str(widths): widths} | {f"{limit}={bits:g}": (bits,) for limit, bits in limits.items()}
    for found, bits in asked.items():
        if not set(bits) <= set(has := runtime.widths[grid]):
            raise ValueError(f"DiffQConfig: the runtime {name!r} has widths of {has} on the {grid} grid, got {found}.")


def reason_against(name: str, spec: WeightSpec) -> str:
    """Why a runtime cannot hold this weight, and what to do; empty if it can.

    Example:
        >>> reason_against("gguf", WeightSpec(name="w", shape=(8, 100), axis=0, group_size="tensor", range_size=32))
        "the runtime 'gguf' has whole blocks of 32 inputs, and its rows have 100. Leave it in float by exclude=('w',)"
    """
    runtime, block = RUNTIMES[name], spec.range_layout.block
    instead = f"Leave it in float by exclude=({spec.name!r},)"
    if not runtime.float_layers:
        instead += ' if it is an embedding or a head, else use the runtime "onnxruntime" and export_onnx'
    if not runtime.blocked_matrices:
        return ""
    if len(spec.shape) != 2:
        has = 'matrices alone, no experts in one tensor and no kernels of convolutions ("onnxruntime" has them)'
        return f"the runtime {name!r} has {has}. {instead}"
    if spec.columns % block or (spec.range_layout.kind != "block" and spec.columns not in runtime.blocks):
        fitting = [size for size in runtime.blocks if isinstance(size, int) and spec.columns % size == 0]
        instead = f"Give the DiffQConfig range_per={fitting[-1]}" if fitting else instead
        return f"the runtime {name!r} has whole blocks of {spec.range_size} inputs, and its rows have {spec.columns}. {instead}"
    return ""
