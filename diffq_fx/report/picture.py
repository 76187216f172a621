"""The report as a picture: the three sizes above, below them every weight with its widths in colour.

Drawn with matplotlib's Figure alone, never pyplot: no display, no global state, no window.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, PercentFormatter

from diffq_fx.budget.size import mib
from diffq_fx.report.numbers import BitsNumbers, WeightBits, joined
from diffq_fx.report.tables import named_sizes, percent

MOST_ROWS = 80
"""Beyond that the picture shows modules in place of weights."""

_FEWEST_MODULES = 12
_WIDTH_INCHES = 11.0
_SIZES_INCHES = 1.5
_ROW_INCHES = 0.21
_LEGEND_LINE_INCHES = 0.2
_TEXT = 8
_LONGEST_NAME = 52
_PART_COLORS = {"levels": "#31688e", "scales, widths": "#e08214", "not quantized": "#a6a6a6"}


class Row(NamedTuple):
    """One bar: a weight, or several that are shown together."""

    label: str
    histogram: dict[int, int]

    @property
    def numel(self) -> int:
        """Number of weights."""
        return sum(self.histogram.values())


def picture_rows(weights: Sequence[WeightBits]) -> list[Row]:
    """What to draw a bar for: each weight, or where there are more than ``MOST_ROWS`` what a module holds, else runs of neighbours."""
    if len(weights) <= MOST_ROWS:
        return [_row(weight.name, [weight]) for weight in weights]
    for depth in range(max(weight.name.count(".") for weight in weights), 0, -1):
        modules: dict[str, list[WeightBits]] = {}
        for weight in weights:
            modules.setdefault(".".join(weight.name.split(".")[:depth]), []).append(weight)
        if _FEWEST_MODULES <= len(modules) <= MOST_ROWS:
            return [_row(prefix, held) for prefix, held in modules.items()]
    length = -(-len(weights) // MOST_ROWS)
    runs = [weights[start : start + length] for start in range(0, len(weights), length)]
    return [_row(f"{run[0].name} ... {run[-1].name}", run) for run in runs]


def _row(label: str, weights: Sequence[WeightBits]) -> Row:
    """A bar; a label has its middle left out where it is too long for the margin."""
    label = label if len(weights) > 1 else weights[0].name
    half = (_LONGEST_NAME - 3) // 2
    shown = label if len(label) <= _LONGEST_NAME else f"{label[:half]}...{label[-half:]}"
    return Row(shown if len(weights) == 1 else f"{shown} ({len(weights)} tensors)", joined(weight.histogram for weight in weights))


def draw(report: BitsNumbers) -> Figure:
    """Draw the report into a Figure that belongs to no window; its height follows the number of rows."""
    rows = picture_rows(report.weights)
    widths = list(report.histogram)
    rows_inches = max(_ROW_INCHES * len(rows), _LEGEND_LINE_INCHES * (len(widths) + 1)) + 0.3
    figure = Figure(figsize=(_WIDTH_INCHES, _SIZES_INCHES + rows_inches + 1.1), layout="constrained", facecolor="white")
    grid = figure.add_gridspec(2, 2, height_ratios=[_SIZES_INCHES, rows_inches], width_ratios=[3, 1])
    _draw_sizes(figure.add_subplot(grid[0, :]), report)
    sizes = figure.add_subplot(grid[1, 0])
    shares = figure.add_subplot(grid[1, 1], sharey=sizes)
    _draw_widths(sizes, rows, widths, share=False)
    _draw_widths(shares, rows, widths, share=True)
    _finish_rows(sizes, shares, rows, rows_inches)
    labels = [f"{width} ({percent(report.histogram[width] / report.numel)})" for width in widths]
    _legend(shares, "bits (of all weights)", labels, _colors(widths))
    title = (
        f"{report.model}, {report.stage}: {report.average_bits:.2f} bits a weight "
        f"({report.average_bits_in_all:.2f} with scales and widths), {report.compression_ratio:.1f}x smaller than float"
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", parse_math=False)
    return figure


def _draw_sizes(axes: Axes, report: BitsNumbers) -> None:
    """The three sizes as bars, each in its parts."""
    sizes = named_sizes(report)
    longest = max(size.total_mib for size in sizes.values())
    for place, size in enumerate(sizes.values()):
        left = 0.0
        for bits, color in zip((size.levels_bits, size.overhead_bits, size.rest_bits), _PART_COLORS.values(), strict=True):
            axes.barh(place, mib(bits), left=left, color=color, height=0.7)
            left += mib(bits)
        times = report.float_size.total_mib / size.total_mib
        text = f" {size.total_mib:.4g} MiB" + (f", {times:.1f}x smaller" if place < len(sizes) - 1 else "")
        axes.text(left, place, text, va="center", fontsize=_TEXT)
    axes.set_yticks(range(len(sizes)), list(sizes), fontsize=_TEXT)
    axes.set_ylim(len(sizes) - 0.5, -0.5)
    axes.set_xlim(0, 1.25 * longest)
    axes.set_xlabel("MiB (parameters)", fontsize=_TEXT)
    _legend(axes, "parts", list(_PART_COLORS), list(_PART_COLORS.values()))
    _plain_frame(axes)


def _draw_widths(axes: Axes, rows: Sequence[Row], widths: Sequence[int], *, share: bool) -> None:
    """Stacked bars, one colour per width; as long as the weight is large, or all of one length to show shares."""
    left = [0.0] * len(rows)
    for width, color in zip(widths, _colors(widths), strict=True):
        lengths = [row.histogram.get(width, 0) * (100 / row.numel if share else 1) for row in rows]
        axes.barh(range(len(rows)), lengths, left=left, color=color, height=0.8)
        left = [start + length for start, length in zip(left, lengths, strict=True)]


def _finish_rows(sizes: Axes, shares: Axes, rows: Sequence[Row], rows_inches: float) -> None:
    """Labels, limits and axes of the lower panels."""
    longest = max(row.numel for row in rows)
    for place, row in enumerate(rows):
        average = sum(width * count for width, count in row.histogram.items()) / row.numel
        sizes.text(row.numel + 0.01 * longest, place, f"{average:.2f} bits", va="center", fontsize=_TEXT - 1)
    sizes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=_TEXT, parse_math=False)
    sizes.set_ylim(max(len(rows), 0.7 * rows_inches / _ROW_INCHES) - 0.5, -0.5)
    sizes.set_xlim(0, 1.15 * longest)
    sizes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    sizes.set_xlabel("number of weights", fontsize=_TEXT)
    shares.set_xlim(0, 100)
    shares.xaxis.set_major_formatter(PercentFormatter())
    shares.set_xlabel("share of each width", fontsize=_TEXT)
    shares.tick_params(axis="y", left=False, labelleft=False)
    for axes in (sizes, shares):
        _plain_frame(axes)


def _plain_frame(axes: Axes) -> None:
    axes.tick_params(axis="x", labelsize=_TEXT)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)


def _colors(widths: Sequence[int]) -> list[tuple[float, float, float, float]]:
    """Colours of the widths, few bits light and many dark; 2 and 8 bits look the same in every picture that stays within them."""
    low, high = min(2, *widths), max(8, *widths)
    return [matplotlib.colormaps["viridis_r"](0.02 + 0.96 * (width - low) / (high - low)) for width in widths]


def _legend(axes: Axes, title: str, labels: Sequence[str], colors: Sequence[Any]) -> None:
    """A legend right of the axes, its upper end at theirs."""
    axes.legend(
        handles=[Patch(color=color, label=label) for label, color in zip(labels, colors, strict=True)],
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        borderaxespad=0.7,
        frameon=False,
        fontsize=_TEXT,
        title=title,
        title_fontsize=_TEXT,
        alignment="left",
    )
