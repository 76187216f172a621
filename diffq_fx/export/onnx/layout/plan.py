"""Decides how the file holds a weight and how each of its readers gets it. Nothing here changes a graph."""

from dataclasses import dataclass

import onnx_ir as ir

from diffq_fx.export.onnx.layout.consumers import LinearUse, Uses
from diffq_fx.export.onnx.layout.cost import FLOAT, Choice
from diffq_fx.export.onnx.layout.linear import TWO_BIT_ALIGNMENT, choose_kernel, refusal
from diffq_fx.export.onnx.layout.request import LayoutRequest
from diffq_fx.export.onnx.layout.rows import picks_rows
from diffq_fx.export.onnx.layout.table import Form, Storage, WeightTable, one_container, split_by_width

_TIME_FOR_BYTES = 1.15
"""A smaller file may cost so much of the fastest time."""
_MAX_COPIES = 4
"""Products that may hold the same weight as integers: more, and the float weight that they would share is smaller."""
_TWO_BITS = 2


@dataclass(frozen=True, eq=False)
class WeightPlan:
    """What happens to one weight."""

    uses: Uses
    storage: Storage
    products: tuple[Choice, ...]
    """The kernel of each linear use."""
    convolutions: tuple[ir.Node, ...] = ()
    """The convolutions that become integer ones."""
    reasons: tuple[str, ...] = ()
    """Why other convolutions stay float ones."""

    @property
    def table(self) -> WeightTable:
        """The weight."""
        return self.storage.table

    @property
    def picks_rows(self) -> bool:
        """Whether embeddings pick integer rows: not if any other reader needs the float table anyway."""
        in_float = any(choice.kernel == FLOAT for choice in self.products) or len(self.convolutions) < len(self.uses.convolutions)
        return bool(self.uses.gathers) and not in_float and not self.uses.others and picks_rows(self.table)

    @property
    def time(self) -> float:
        """Microseconds of all linear readers, each by the machine where it is slowest beside float."""
        return sum(choice.time for choice in self.products)


def plan_for_onnxruntime(table: WeightTable, uses: Uses, request: LayoutRequest) -> WeightPlan:
    """Choose the storage and the kernels: the smallest file among those whose predicted time is close to the best."""
    refused = request.refused.get(table.spec.name)
    whole = sum(use.rows is None for use in uses.linear)
    if refused is None and whole > _MAX_COPIES:
        refused = f"{whole} products read it, and each would hold a copy of its own: the float weight is smaller"
    if refused is not None:
        return _all_in_float(table, uses, (Choice(FLOAT, refused),) * len(uses.linear))
    form = _form(table, uses)
    plans = []
    for storage in (split_by_width(table, form), one_container(table, form)):
        chosen: list[Choice] = []
        for use in uses.linear:
            shared = any(choice.kernel.block for choice in chosen)
            chosen.append(choose_kernel(storage, use, request, shared=shared))
        plans.append(WeightPlan(uses, storage, tuple(chosen)))
    fastest = min(plan.time for plan in plans)
    best = min((p for p in plans if p.time <= _TIME_FOR_BYTES * fastest), key=lambda plan: plan.storage.file_bytes)
    if all(choice.kernel == FLOAT for choice in best.products):
        return _all_in_float(table, uses, best.products)
    return best


def _all_in_float(table: WeightTable, uses: Uses, products: tuple[Choice, ...]) -> WeightPlan:
    return WeightPlan(uses, split_by_width(table, _plain_form(table)), products)


def _form(table: WeightTable, uses: Uses) -> Form:
    """[K, N] for the linear readers that can be fused, if there are any."""
    fusable = [use for use in uses.linear if refusal(table, use) is None]
    if fusable:
        return "transposed" if fusable[0].transposed else "weight"
    return _plain_form(table)


def _plain_form(table: WeightTable) -> Form:
    return "rows" if table.blocks > 1 and len(table.spec.shape) > 2 else "weight"


def plan_for_qdq(table: WeightTable, uses: Uses) -> WeightPlan:
    """One container and one DequantizeLinear; [K, N] where a linear layer reads the weight."""
    turned = any(use.transposed and (table.is_per_tensor or use.channel_axis == table.spec.axis) for use in uses.linear)
    storage = one_container(table, "transposed" if turned else _plain_form(table))
    plan = WeightPlan(uses, storage, (Choice(FLOAT, ""),) * len(uses.linear))
    misread = storage.shape[1] % TWO_BIT_ALIGNMENT and any(takes_stored(storage, use) for use in uses.linear)
    transposed = table.blocks == 1 and uses.turned != {storage.form == "transposed"}
    if storage.width == _TWO_BITS and storage.factor is None and (misread or transposed):
        # onnxruntime would fuse this one too and compute a wrong product, for it reads packed rows as if each began at a byte; or it would
        # move a Transpose in front of the DequantizeLinear, and then cannot load the file.
        return WeightPlan(uses, Storage(table, storage.form, storage.widths * 2), plan.products)
    return plan


def takes_stored(storage: Storage, use: LinearUse) -> bool:
    """Whether a product can read the dequantized weight as it lies in the file."""
    return storage.form != "rows" and (storage.form == "transposed") == use.transposed and use.rows is None
