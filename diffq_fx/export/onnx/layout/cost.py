"""Which form of a product is the fastest: times of the machines that a file is for in, a choice and its reason out.

The times come from machines: a :class:`Profile` predicts them (:mod:`.profiles` has one per kind of processor), a :class:`Measurement`
knows them. :func:`choose` is the one place that compares them: a form must be faster than float on *every* machine, and of those the one
whose worst machine is best is taken.

Shape legend: M rows (the product of the activation's leading sizes), K inputs, N output channels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

KernelName = Literal["float", "fused 2", "fused 4", "fused 8", "dynamic int8", "dynamic uint8"]

_BUSY, _BUSY_RATIO = 32, 0.8
"""At so many times the example's rows a form must have this part of float's speed: an example batch of one says little about others."""
_TIE = 0.97
"""Forms within this part of the fastest one's speed are equally fast: the first of them is taken."""
_CACHED_WEIGHTS = 400e3
"""Weights that stay in the cache between two runs."""


class Kernel(NamedTuple):
    """What onnxruntime computes a product with."""

    name: KernelName
    """"float" (MatMul), "fused" and its bits (MatMulNBits), "dynamic" and the type of the levels (DynamicQuantizeMatMul)."""
    block: int = 0
    """Inputs that share a scale in a fused product."""

    @property
    def bits(self) -> int:
        """The width that a fused kernel computes with."""
        return int(self.name.removeprefix("fused "))

    @property
    def is_dynamic(self) -> bool:
        """Whether activations are rounded by the graph's own operators."""
        return self.name.startswith("dynamic")

    @property
    def title(self) -> str:
        """For people: ``fused, 4 bits``."""
        family, _, kind = self.name.partition(" ")
        return family if not kind else f"{family}, {kind} bits" if kind.isdigit() else f"{family}, {kind} weights"


FLOAT = Kernel("float")


class Product(NamedTuple):
    """A layer, as far as its time depends on it."""

    rows: int
    """M in the example."""
    inputs: int
    outputs: int
    is_open: bool = False
    """Whether the file takes other numbers of rows too."""


class Cost(NamedTuple):
    """What a kernel takes, part by part; the sum is its time."""

    call: float  # us a call
    weight: float  # ns a weight, whatever the number of rows
    distant_weight: float  # ns a weight that does not fit the cache
    activation: float  # ns an input value: quantizing it
    output: float  # ns an output value
    product: float  # ps a product
    scale: float = 0.0  # ns a scale, whatever the number of rows
    scaled_product: float = 0.0  # ps a scale and row

    def microseconds(self, kernel: Kernel, rows: int, inputs: int, outputs: int) -> float:
        """The predicted time of one run."""
        return sum(cost * often for cost, often in zip(self, often_paid(kernel, rows, inputs, outputs), strict=True))


def often_paid(kernel: Kernel, rows: int, inputs: int, outputs: int) -> tuple[float, ...]:
    """How often each part of a :class:`Cost` is paid, in such units that the sum of ``cost * often`` is in microseconds."""
    blocks = -(-inputs // kernel.block) if kernel.block else 1
    weights = (blocks * kernel.block if kernel.block else inputs) * outputs
    scales = 0 if kernel == FLOAT else blocks * outputs
    per_run = (weights, max(0.0, weights - _CACHED_WEIGHTS), rows * inputs, rows * outputs)
    return 1.0, *(1e-3 * count for count in per_run), 1e-6 * rows * weights, 1e-3 * scales, 1e-6 * rows * scales


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A kind of processor: what each kernel costs there."""

    name: str
    source: str
    """Where the numbers come from."""
    margin: float
    """So many times as fast as float must a form be before it is taken: what the times are off by, and no less than 1."""
    costs: Mapping[KernelName, Cost]
    """Kernels that are missing are never used."""
    is_measured = False

    def times(self, kernel: Kernel, product: Product) -> tuple[float, ...]:
        """Predicted microseconds at the example's rows, and at 32 times as many where the number is open."""
        cost = self.costs.get(kernel.name)
        if cost is None:
            return ()
        judged = (product.rows, _BUSY * product.rows) if product.is_open else (product.rows,)
        return tuple(cost.microseconds(kernel, rows, product.inputs, product.outputs) for rows in judged)


@dataclass(frozen=True)
class Measurement:
    """The times of one product on the machine that exports."""

    microseconds: Mapping[Kernel, float]
    name = "this machine"
    margin = 1.03
    is_measured = True

    def times(self, kernel: Kernel, product: Product) -> tuple[float, ...]:
        """The median at the example's rows."""
        return (self.microseconds[kernel],)


Machine = Profile | Measurement
Machines = Callable[[Product, Sequence[Kernel]], Sequence[Machine]]
"""A product and the forms that it could have -> the machines whose times decide between these and float."""


@dataclass(frozen=True)
class Choice:
    """The form of a product, and why."""

    kernel: Kernel
    reason: str
    time: float = 0.0
    """Microseconds of the float product on the first machine, times the largest part of it that the form takes on any machine; 0 where no
    time was asked for."""


def choose(kernels: Sequence[Kernel], product: Product, machines: Sequence[Machine]) -> Choice:
    """Choose the form of a product: of those that are faster than float on every machine the one whose worst machine is best.

    Faster means its ``margin`` times at the example's number of rows and, where other numbers may come, no less than 0.8 times at 32 times
    as many. ``kernels`` come the smallest first: the first one of equally fast ones is taken.

    Example:
        >>> costs = {"float": Cost(5, 0, 0, 0, 0, 10.0), "fused 4": Cost(5, 0, 0, 0, 0, 4.0)}
        >>> fast = Profile(name="fast", source="", margin=1.1, costs=costs)
        >>> slow = Profile(name="slow", source="", margin=1.1, costs={**costs, "fused 4": Cost(5, 0, 0, 0, 0, 20.0)})
        >>> choose([Kernel("fused 4", 32)], Product(8, 512, 512), [fast]).reason
        'fused, 4 bits: predicted 1.94 times as fast as float on fast for 8 rows'
        >>> choose([Kernel("fused 4", 32)], Product(8, 512, 512), [fast, slow]).kernel.name
        'float'
    """
    float_time = _typical(machines[0].times(FLOAT, product))
    speeds = {kernel: min(_typical(_speeds(machine, kernel, product)) for machine in machines) for kernel in kernels}
    refusals = {kernel: _refusal(kernel, product, machines) for kernel in kernels}
    taken = [kernel for kernel in kernels if refusals[kernel] is None]
    if not taken:
        least_bad = max(kernels, key=lambda kernel: speeds[kernel])
        return Choice(FLOAT, f"{product.inputs} inputs and {product.outputs} outputs: {refusals[least_bad]}", float_time)
    fastest = max(speeds[kernel] for kernel in taken)
    best = next(kernel for kernel in taken if speeds[kernel] >= _TIE * fastest)
    return Choice(best, _why(best, product, machines), 1 / speeds[best] * float_time)


def _speeds(machine: Machine, kernel: Kernel, product: Product) -> list[float]:
    """Float's time over the kernel's, at each number of rows that the machine tells; empty where it has no such kernel."""
    times = machine.times(kernel, product)
    return [float_time / time for float_time, time in zip(machine.times(FLOAT, product), times, strict=True)] if times else []


def _typical(numbers: Sequence[float]) -> float:
    """The geometric mean, by which forms are compared."""
    return math.prod(numbers) ** (1 / len(numbers)) if numbers else 0.0


def _refusal(kernel: Kernel, product: Product, machines: Sequence[Machine]) -> str | None:
    """Why a form must not be taken: the machine that is worst off with it."""
    for machine in sorted(machines, key=lambda machine: _typical(_speeds(machine, kernel, product))):
        speeds = _speeds(machine, kernel, product)
        if not speeds:
            return f"{kernel.title}: {machine.name} has no such kernel"
        if machine.is_measured and speeds[0] < machine.margin:
            return f"{kernel.title}, measured on {machine.name} for {_rows(product.rows)}: not faster than float"
        for speed, rows, least in zip(speeds, (product.rows, _BUSY * product.rows), (machine.margin, _BUSY_RATIO)):  # noqa: B905
            if speed < least:
                predicted = f"predicted {speed:.2f} times as fast as float on {machine.name} for {_rows(rows)}"
                return f"{kernel.title}: {predicted}, and taken from {least:.2f} on"
    return None


def _why(kernel: Kernel, product: Product, machines: Sequence[Machine]) -> str:
    if any(machine.is_measured for machine in machines):
        return f"{kernel.title}: measured to be the fastest on {machines[0].name} for {_rows(product.rows)}"
    speeds = ", ".join(f"{_speeds(machine, kernel, product)[0]:.2f} on {machine.name}" for machine in machines)
    return f"{kernel.title}: predicted {speeds.replace(' on', ' times as fast as float on', 1)} for {_rows(product.rows)}"


def _rows(count: int) -> str:
    return f"{count} row{'s' * (count != 1)}"
