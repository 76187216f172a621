"""The pictures of a report's page, as coordinates: the page draws them in the colours of light and dark mode."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 340, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 12, 10, 34
_TICKS = 5
_MARGIN = 0.05
_LARGEST = 9.0


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
