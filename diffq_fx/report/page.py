"""The report as one HTML page: nothing is loaded from elsewhere, it follows light and dark mode and fits a phone.

Pictures are coordinates here: the page draws them in the colours of light and dark mode.
"""

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jinja2

from diffq_fx.arguments import as_path
from diffq_fx.atomic import replaced_atomically
from diffq_fx.budget.size import mib
from diffq_fx.errors import DiffQError
from diffq_fx.report.numbers import BitsNumbers, joined
from diffq_fx.report.tables import first_names, named_sizes, skipped_by_reason, summary_lines

WIDTH, HEIGHT = 340, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 12, 10, 34
_TICKS = 5
_MARGIN = 0.05
_LARGEST = 9.0
_VERSIONS = ("diffq-fx", "torch", "onnxruntime")


@dataclass(frozen=True)
class Axis:
    """Numbers to pixels."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float) -> "Axis":
        """One that shows all of the values, with a margin."""
        low, high = min(values), max(values)
        margin = _MARGIN * (high - low) or 0.5 * abs(high) or 0.5
        return cls(low - margin, high + margin, start, end)

    def place(self, value: float) -> float:
        """In pixels."""
        return round(self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low), 2)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Round numbers, pixels and text.

        Example:
            >>> [text for _, text in Axis(0.3, 4.2, 0, 100).ticks]
            ['1', '2', '3', '4']
        """
        rough = (self.high - self.low) / _TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * each for each in (1, 2, 5, 10) if power * each >= rough)
        numbers = range(math.ceil(self.low / step), math.floor(self.high / step) + 1)
        return [(self.place(number * step), f"{number * step:.4g}") for number in numbers]


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Points on two axes."""

    title: str
    x_title: str
    y_title: str
    x: Axis
    y: Axis
    circles: Sequence[tuple[float, float, float, str]] = ()
    """Place, radius and what it is."""
    line: Sequence[tuple[float, float]] = ()
    """A curve, or where there are circles what they are seen against."""


def scatter(named: Sequence[tuple[str, float, float, int]]) -> Plot:
    """Bits against sensitivity: name, sensitivity, bits and number of weights of each tensor; the larger, the larger its circle."""
    total, most = sum(numel for *_, numel in named), max(numel for *_, numel in named)
    shift = sum(numel * (bits - asked) for _, asked, bits, numel in named) / total
    wanted = [asked + shift for _, asked, _, _ in named]
    x = Axis.over(wanted, _LEFT, WIDTH - _RIGHT)
    y = Axis.over([bits for _, _, bits, _ in named], HEIGHT - _BOTTOM, _TOP)
    circles = [
        (x.place(at), y.place(bits), round(max(_LARGEST * math.sqrt(numel / most), 2), 2), f"{name}: {bits:.2f} bits, asks for {at:.2f}")
        for at, (name, _, bits, numel) in zip(wanted, named, strict=True)
    ]
    low, high = max(x.low, y.low), min(x.high, y.high)
    line = [(x.place(each), y.place(each)) for each in (low, high)] if low < high else []
    return Plot(
        title="Bits against sensitivity",
        x_title="bits it asks for",
        y_title="bits it has",
        x=x,
        y=y,
        circles=circles,
        line=line,
    )


def curve(name: str, points: Sequence[Sequence[float]]) -> Plot:
    """A value over the steps of the training; values that are not finite are left out."""
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    steps, values = ([each[i] for each in finite] or [0.0] for i in (0, 1))
    x, y = Axis.over(steps, _LEFT, WIDTH - _RIGHT), Axis.over(values, HEIGHT - _BOTTOM, _TOP)
    line = [(x.place(step), y.place(value)) for step, value in finite]
    return Plot(title=name, x_title="step", y_title="", x=x, y=y, line=line)


@dataclass(frozen=True, kw_only=True)
class PageWeight:
    """One quantized weight."""

    name: str
    shape: tuple[int, ...]
    histogram: Mapping[int, int]
    """Bits -> number of weights that have them; empty where the file does not say."""
    numel: int
    mib: float
    """Its levels and scales, as the model or file keeps them."""
    read_by: str
    why: str = ""
    """What decided the form that it has in a file."""
    sensitivity: float | None = None
    """Bits that it asked for, but for a constant that all weights share."""

    @classmethod
    def of(cls, weight: Any, **facts: Any) -> "PageWeight":
        """Of what has a name, aliases and a shape; ``facts`` are the other fields."""
        return cls(name=" = ".join((weight.name, *weight.aliases)), shape=weight.shape, **facts)

    @property
    def average(self) -> float | None:
        """Mean number of bits."""
        return sum(bits * count for bits, count in self.histogram.items()) / self.numel if self.histogram else None


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a page shows."""

    title: str
    facts: Sequence[str]
    sizes: Sequence[tuple[str, Mapping[str, float]]]
    """Names of the sizes that it compares, and what each is made of -> MiB."""
    weights: Sequence[PageWeight]
    skipped: Sequence[tuple[str, str]] = ()
    """Why parameters stay in float, and which."""
    settings: Sequence[str] = ()
    curves: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    """What was logged in training -> step and value."""
    measurements: Sequence[Mapping[str, object]] = ()
    """Rows of a table: heading -> what was measured."""

    def __post_init__(self) -> None:
        """Refuse rows that do not make a table."""
        for row in self.measurements:
            if list(row) != list(self.measurements[0]):
                raise ValueError(f"measurements: every row needs the headings {list(self.measurements[0])}, one has {list(row)}.")

    @property
    def plots(self) -> list[Plot]:
        """Sensitivity against bits, and the curves of the training."""
        known = [(each.name, each.sensitivity, each.average, each.numel) for each in self.weights]
        named = [(name, asked, bits, numel) for name, asked, bits, numel in known if asked is not None and bits is not None]
        curves = [curve(name, points) for name, points in self.curves.items() if len(points) > 1]
        return [scatter(named), *curves] if named else curves

    @property
    def histogram(self) -> dict[int, int]:
        """Bits -> number of weights of the whole model."""
        return joined(weight.histogram for weight in self.weights)

    def html(self) -> str:
        """The page as text, complete in itself."""
        largest = max(sum(parts.values()) for _, parts in self.sizes)
        source = resources.files("diffq_fx.report").joinpath("page.html").read_text(encoding="utf-8")
        environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
        return environment.from_string(source).render(page=self, largest=largest, made=_made(), width=WIDTH, height=HEIGHT)

    def save(self, path: str | Path) -> Path:
        """Write the page; an older file survives until the new one is complete."""
        path, page = as_path("save_page", "path", path), self.html().encode()
        with replaced_atomically(path, DiffQError) as file:
            file.write(page)
        return path


def page_of(report: BitsNumbers, measurements: Sequence[Mapping[str, object]] = ()) -> Page:
    """The page of a prepared or converted model."""
    sizes = [
        (name, {"levels": mib(size.levels_bits), "scales, widths": mib(size.overhead_bits), "not quantized": mib(size.rest_bits)})
        for name, size in named_sizes(report).items()
    ]
    weights = [
        PageWeight.of(
            weight,
            histogram=weight.histogram,
            numel=weight.numel,
            mib=mib(weight.packed_bits),
            read_by=weight.consumer,
            sensitivity=weight.sensitivity,
        )
        for weight in report.weights
    ]
    return Page(
        title=f"{report.model}, {report.stage}",
        facts=list(summary_lines(report)),
        sizes=sizes,
        weights=weights,
        skipped=[(f"{reason} ({len(names)})", first_names(names)) for reason, names in skipped_by_reason(report).items()],
        settings=report.settings,
        curves=report.curves,
        measurements=measurements,
    )


def _made() -> str:
    """With what, and when."""
    versions = []
    for name in _VERSIONS:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return f"{', '.join(versions)}; Python {platform.python_version()}; {date.today().isoformat()}"
