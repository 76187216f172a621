"""What an exported file says about itself: the learned bits next to the containers that ONNX has for them.

An ONNX file knows the width of its initializers, 2, 4, 8 or 16 bits, but not that a weight has learned 3 or 5. The
export therefore writes these ``metadata_props`` (strings to strings, kept by every ONNX tool), one of them JSON:

==================== ==================================================================================================
key                  value
==================== ==================================================================================================
diffq_fx.schema      "1", the version of this table; a reader refuses a larger one
diffq_fx.producer    "diffq_fx"
diffq_fx.layout      "onnxruntime" or "qdq"
diffq_fx.activations "float", "dynamic" or "int8"
diffq_fx.target      the machines that the forms of the products were chosen for; missing in layout "qdq", which has one form
diffq_fx.session.*   onnxruntime's session entries that the file wants: its own key with ``diffq_fx.`` before it
diffq_fx.sizes       JSON object, name of a size that inputs leave open -> what it was in the example
diffq_fx.fixed_sizes JSON object, ``"input.axis"`` of each other size -> why it is fixed
diffq_fx.weights     JSON object, weight name -> the fields of :class:`WeightRecord` but the name and what is None or empty
==================== ==================================================================================================

In the JSON the keys of ``bits`` and ``containers`` are decimal strings, as JSON demands. All counts are of weights, so that
``sum(bits * count)`` is the bit-packed payload of a weight and the same sum over ``containers`` what its levels take in
the file. Scales and zero points are not part of either.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffq_fx.errors import ExportError
from diffq_fx.export.onnx.files import DAMAGE, load_graph

if TYPE_CHECKING:
    from onnx import ModelProto

SCHEMA_VERSION = 1
PREFIX = "diffq_fx."
_SIZES = ("sizes", "fixed_sizes")


@dataclass(frozen=True, kw_only=True)
class WeightRecord:
    """One quantized weight of an exported file."""

    name: str
    """The weight's name in the model's state_dict."""
    aliases: tuple[str, ...] = ()
    """The other names of a tied weight."""
    shape: tuple[int, ...]
    """As PyTorch has it; the initializers may be transposed."""
    axis: int
    """The output channel axis of ``shape``."""
    grid: str
    """"affine" or "half" (the initializers are unsigned, with zero points), "symmetric" (signed, without), or "codebook"."""
    bits: dict[int, int]
    """Learned bits -> number of weights that have them."""
    containers: dict[int, int]
    """Container bits in the file -> number of weights held in them. Several when a weight is split by width."""
    rule: str
    """How the weight reaches its readers: "linear" (MatMulNBits), "dynamic" (integer product), "int8" (integer convolution), "rows"
    (embedding), "codebook", "fold" (made float when the file is loaded), several of them as "linear+rows"; "qdq" in that layout."""
    choice: str | None = None
    """What each reader gets, and for products the speed that decided, on the machines of the export's target."""
    products: tuple[str, ...] = ()
    """Types that integer kernels multiply the levels in: "int8" where all lie within +-64, and "uint8" else. Both are exact on every
    processor. Empty where products stay in float, or onnxruntime packs the levels itself (MatMulNBits)."""
    reason: str | None = None
    """Why some reader does not get the fused form; None where all do, and in layout "qdq"."""
    remarks: tuple[str, ...] = ()
    """Other things worth knowing about this weight in this file."""
    initializers: tuple[str, ...] = ()
    """Names of the initializers that hold the levels."""

    @property
    def numel(self) -> int:
        """Number of weights."""
        return sum(self.bits.values())

    @property
    def payload_bits(self) -> int:
        """Bits of the levels, each at the width it has learned."""
        return _bits(self.bits)

    @property
    def container_payload_bits(self) -> int:
        """Bits of the levels in the containers of the file."""
        return _bits(self.containers)

    @property
    def container_bits(self) -> int:
        """The widest container of the weight."""
        return max(self.containers)


def _bits(histogram: Mapping[int, int]) -> int:
    return sum(width * count for width, count in histogram.items())


@dataclass(frozen=True, kw_only=True)
class ExportMetadata:
    """Everything that the export writes into ``metadata_props``."""

    layout: str
    activations: str = "float"
    """Where the graph rounds activations: "float" nowhere, "dynamic" in front of linear layers, "int8" around convolutions too."""
    target: str | None = None
    """The machines that the forms of the products were chosen for; None in layout "qdq", which has one form."""
    session: Mapping[str, str] = field(default_factory=dict)
    """The session entries that the file asks for."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Name of each size that inputs leave open -> what it was in the example."""
    fixed_sizes: Mapping[str, str] = field(default_factory=dict)
    """``"input.axis"`` of each size that is fixed -> why."""
    weights: tuple[WeightRecord, ...] = ()
    """Per weight: bits, containers, the rule that was applied, why it, and why not a faster one."""

    @property
    def payload_bytes(self) -> int:
        """All levels at the widths that they have learned."""
        return -(-sum(record.payload_bits for record in self.weights) // 8)

    @property
    def container_payload_bytes(self) -> int:
        """All levels in the containers of the file."""
        return -(-sum(record.container_payload_bits for record in self.weights) // 8)


@dataclass(frozen=True, kw_only=True)
class ExportResult(ExportMetadata):
    """What ``export_onnx`` wrote, and why one can trust it."""

    path: Path
    opset: int
    file_bytes: int
    """The file on disk, with its scales, its float parameters and its graph."""
    max_abs_error: float | None
    """Largest difference to PyTorch over the verification's inputs; None with ``verify=False``."""
    max_relative_error: float | None
    """The same as a part of the output's largest value. Both are measured with activations in float everywhere: they show that the
    file computes with the model's own weights."""
    fast_relative_error: float | None
    """The relative error of the file as it runs by default, with activations rounded to int8 where that is faster; on the first item
    of the calibration, on random inputs without one."""
    rounding_relative_error: float | None
    """What rounding in the graph makes of it where linear layers multiply in float. A file that is more than four times as far off as this
    is refused."""
    operators: dict[str, int] | None
    """Operators that onnxruntime runs in one inference, as the check met them: it does not fold more than 2^24 weights, so that products
    with them may have other names there. None with ``verify=False``."""
    remarks: tuple[str, ...]
    """What is worth knowing about the file as a whole."""


def to_props(metadata: ExportMetadata) -> dict[str, str]:
    """Write metadata as ``metadata_props``, the entries of the table above.

    Example:
        >>> sorted(to_props(ExportMetadata(layout="qdq")))
        ['diffq_fx.activations', 'diffq_fx.layout', 'diffq_fx.producer', 'diffq_fx.schema', 'diffq_fx.weights']
    """
    weights = {}
    for record in metadata.weights:
        entry = {key: value for key, value in asdict(record).items() if value not in (None, ())}
        weights[entry.pop("name")] = entry
    return {
        f"{PREFIX}schema": str(SCHEMA_VERSION),
        f"{PREFIX}producer": "diffq_fx",
        f"{PREFIX}layout": metadata.layout,
        f"{PREFIX}activations": metadata.activations,
        **({} if metadata.target is None else {f"{PREFIX}target": metadata.target}),
        **{f"{PREFIX}{key}": value for key, value in metadata.session.items()},
        **{f"{PREFIX}{name}": json.dumps(sizes) for name in _SIZES if (sizes := dict(getattr(metadata, name)))},
        f"{PREFIX}weights": json.dumps(weights, separators=(",", ":")),
    }


def from_props(props: Mapping[str, str]) -> ExportMetadata | None:
    """Read metadata back from ``metadata_props``; None for a file that diffq_fx has not written.

    ``onnxruntime``'s ``session.get_modelmeta().custom_metadata_map`` and ``onnx_ir.Model.metadata_props`` are such mappings.

    Raises:
        ExportError: The entries are of a newer schema, or damaged.

    Example:
        >>> from_props(to_props(ExportMetadata(layout="qdq"))).layout
        'qdq'
        >>> from_props({"author": "somebody"}) is None
        True
    """
    try:
        ours = {key.removeprefix(PREFIX): value for key, value in props.items() if key.startswith(PREFIX)}
        if "schema" not in ours:
            return None
        schema = int(ours["schema"])
        if schema > SCHEMA_VERSION:
            raise ExportError(f"diffq_fx metadata of schema {schema}, this version reads up to {SCHEMA_VERSION}: upgrade diffq_fx.")
        return ExportMetadata(
            layout=_text(ours["layout"]),
            activations=_text(ours.get("activations", "float")),
            target=_text(ours["target"]) if "target" in ours else None,
            session={key: _text(value) for key, value in ours.items() if key.startswith("session.")},
            sizes={_text(name): _count(size) for name, size in json.loads(ours.get("sizes", "{}")).items()},
            fixed_sizes={_text(name): _text(why) for name, why in json.loads(ours.get("fixed_sizes", "{}")).items()},
            weights=tuple(_record(name, entry) for name, entry in json.loads(ours["weights"]).items()),
        )
    except DAMAGE as error:
        raise ExportError(f"diffq_fx metadata is damaged: {error!r}. Export the model again.") from error


def read_metadata(path: str | Path) -> ExportMetadata | None:
    """Read the metadata of an ONNX file, without its external data.

    Args:
        path: an ONNX file.

    Returns:
        The metadata, or None for a file that diffq_fx has not written.

    Raises:
        FileNotFoundError: There is no such file.
        DiffQError: The file is not ONNX, or its entries are of a newer schema or damaged.

    Example:
        >>> import tempfile, torch
        >>> from diffq_fx import convert, prepare
        >>> from diffq_fx.export import export_onnx
        >>> from diffq_fx.methods import STE
        >>> converted = convert(prepare(torch.nn.Linear(16, 8), torch.zeros(1, 16), STE(bits=4)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = export_onnx(converted, torch.zeros(2, 16), f"{folder}/model.onnx").path
        ...     read_metadata(path).weights[0].bits
        {4: 128}
    """
    return metadata_of(load_graph(path))


def metadata_of(model: "ModelProto") -> ExportMetadata | None:
    """:func:`from_props` of a model that is read."""
    return from_props({entry.key: entry.value for entry in model.metadata_props})


def _record(name: str, entry: dict[str, Any]) -> WeightRecord:
    """One entry of the JSON; fields that a later minor version adds are ignored."""
    known = {f.name for f in fields(WeightRecord)} - {"name"}
    values = {key: value for key, value in entry.items() if key in known}
    for key in ("bits", "containers"):
        values[key] = {_count(int(width)): _count(count) for width, count in values[key].items()}
        if not values[key] or (key == "containers" and 0 in values[key]):  # the codes of one entry have 0 bits
            raise ValueError(f"weight {name!r} has {key} {values[key]}")
    for key, parse in _LISTS.items():
        values[key] = tuple(map(parse, values.get(key, ())))
    values |= {key: _text(values[key]) for key in _TEXTS if key in values}
    values["axis"] = _count(values["axis"])
    return WeightRecord(name=_text(name), **values)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.100} is not text")
    value.encode()  # half of a surrogate pair is an error
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r:.100} is not a number of things")
    return value


_TEXTS = ("grid", "rule", "choice", "reason")
_LISTS = {"aliases": _text, "shape": _count, "products": _text, "remarks": _text, "initializers": _text}
