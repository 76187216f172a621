"""Decides how the file holds a weight and how each of its readers gets it. Nothing here changes a graph."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import onnx_ir as ir

from diffq_fx.export.onnx.layout.consumers import LinearUse, Uses
from diffq_fx.export.onnx.layout.cost import FLOAT, Choice, Machines, Product
from diffq_fx.export.onnx.layout.linear import BLOCKED_OPSET, TWO_BIT_ALIGNMENT, Fusion, choose_fusion, in_float, refusal
from diffq_fx.export.onnx.layout.rows import picks_rows
from diffq_fx.export.onnx.layout.table import Form, Storage, WeightTable, one_container, split_by_width

Layout = Literal["onnxruntime", "qdq"]
Activations = Literal["float", "dynamic", "int8"]
Range = tuple[float, float]

_TIME_FOR_BYTES = 1.15
"""A smaller file may cost so much of the fastest time."""
_MAX_COPIES = 4
"""Products that may hold the same weight as integers: more, and the float weight that they would share is smaller."""
_TWO_BITS = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class LayoutRequest:
    """What a graph is laid out for."""

    machines: Machines
    """What tells the times of a product's forms; not asked in layout "qdq"."""
    layout: Layout = "onnxruntime"
    activations: Activations = "float"
    target: str = "portable"
    """What ``machines`` is made of, as the user calls it."""
    opset: int | None = None
    """What the user asked for; None for the smallest that holds the graph."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Symbolic size of the graph -> what it is at the example inputs."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Name of a weight -> why no integer kernel shall read it."""
    halved: frozenset[str] = frozenset()
    """Initializers that the file will hold as float16."""
    ranges: Mapping[str, Range] | None = None
    """Name of a value -> its calibrated range; None before the calibration."""
    twin: bool = False
    """Make the same graph with activations that are not rounded, to compare it with PyTorch and to calibrate."""

    @property
    def rounds(self) -> bool:
        """Whether activations may be rounded in the graph."""
        return self.activations != "float"


@dataclass(frozen=True, eq=False)
class WeightPlan:
    """What happens to one weight."""

    table: WeightTable
    uses: Uses
    storage: Storage
    fusions: tuple[Fusion, ...]
    """One per linear use."""
    convolutions: tuple[ir.Node, ...] = ()
    """The convolutions that become integer ones."""
    reasons: tuple[str, ...] = ()
    """Why other convolutions stay float ones."""

    @property
    def makes_float(self) -> bool:
        """Whether any reader but Gather needs the float weight."""
        in_float = any(fusion.mode == "float" for fusion in self.fusions)
        return in_float or bool(self.uses.others) or len(self.convolutions) < len(self.uses.convolutions)

    @property
    def picks_rows(self) -> bool:
        """Whether embeddings pick integer rows: not if the float table is there anyway."""
        return bool(self.uses.gathers) and not self.makes_float and picks_rows(self.table)

    @property
    def slowness(self) -> float:
        """Time of all linear readers as a part of that in float, each on the machine where it is largest."""
        timed = [fusion.choice for fusion in self.fusions if fusion.choice.times]
        in_float = sum(choice.float_times[0] for choice in timed)
        return sum(choice.slowness * choice.float_times[0] for choice in timed) / in_float if timed else 1.0

    @property
    def file_bytes(self) -> int:
        """What the levels take in the file."""
        return self.storage.file_bytes(self.table.spec.columns)


def plan_for_onnxruntime(table: WeightTable, uses: Uses, request: LayoutRequest) -> WeightPlan:
    """Choose the storage and the fusions: the smallest file among those whose predicted time is close to the best.

    Args:
        table: the weight.
        uses: what reads it.
        request: what the graph is laid out for.
    """
    refused = request.refused.get(table.spec.name)
    whole = sum(use.rows is None for use in uses.linear)
    if refused is None and whole > _MAX_COPIES:
        refused = f"{whole} products read it, and each would hold a copy of its own: the float weight is smaller"
    if refused is not None:
        return _all_in_float(table, uses, tuple(in_float(refused) for _ in uses.linear))
    form = _form(table, uses)
    plans = []
    for storage in (split_by_width(table, form), one_container(table, form)):
        chosen: list[Fusion] = []
        for use in uses.linear:
            shared = any(fusion.mode in ("native", "bytes") for fusion in chosen)
            product = _product(table, use, request)
            allowed = {"shared": shared, "dynamic": request.rounds, "blocked": request.opset is None or request.opset >= BLOCKED_OPSET}
            chosen.append(choose_fusion(table, storage, use, product, request.machines, **allowed))
        plans.append(WeightPlan(table, uses, storage, tuple(chosen)))
    fastest = min(plan.slowness for plan in plans)
    best = min((p for p in plans if p.slowness <= _TIME_FOR_BYTES * fastest), key=lambda plan: plan.file_bytes)
    if all(fusion.mode == "float" for fusion in best.fusions):
        return _all_in_float(table, uses, best.fusions)
    return best


def _product(table: WeightTable, use: LinearUse, request: LayoutRequest) -> Product:
    outputs = table.spec.rows if use.rows is None else len(use.rows)
    return Product(use.num_rows(request.sizes), table.spec.columns, outputs, use.is_open)


def _all_in_float(table: WeightTable, uses: Uses, fusions: tuple[Fusion, ...]) -> WeightPlan:
    return WeightPlan(table, uses, split_by_width(table, _form(table, None)), fusions)


def _form(table: WeightTable, uses: Uses | None) -> Form:
    """[K, N] for the linear readers that can be fused, if there are any."""
    fusable = [use for use in uses.linear if refusal(table, use) is None] if uses is not None else []
    if fusable:
        return "transposed" if fusable[0].transposed else "weight"
    is_matrix = len(table.spec.shape) == 2
    return "rows" if table.blocks > 1 and not is_matrix else "weight"


def plan_for_qdq(table: WeightTable, uses: Uses) -> WeightPlan:
    """One container and one DequantizeLinear; [K, N] where a linear layer reads the weight.

    Args:
        table: the weight.
        uses: what reads it.
    """
    turned = any(use.transposed and (table.is_per_tensor or use.channel_axis == table.spec.axis) for use in uses.linear)
    form = "transposed" if turned else _form(table, None)
    products = [use for use in uses.linear if _takes_stored(form, use)]
    storage = one_container(table, form)
    if products and storage.width == _TWO_BITS and table.stored_shape(form)[1] % TWO_BIT_ALIGNMENT:
        # onnxruntime would fuse this one too, and compute a wrong product: it reads packed rows as if each began at a byte.
        storage = Storage(form, storage.widths * 2)
    fusions = tuple(Fusion("native" if use in products else "float", Choice(FLOAT, "")) for use in uses.linear)
    return WeightPlan(table, uses, storage, fusions)


def _takes_stored(form: Form, use: LinearUse) -> bool:
    return form != "rows" and (form == "transposed") == use.transposed and use.rows is None
