"""Table and plot of all points: score against exact size, mean and spread over the seeds."""

import argparse
import inspect
import statistics
from collections.abc import Iterable
from pathlib import Path

from benchmarks._result import markdown_table, write_result
from benchmarks.frontier.job import Point
from benchmarks.frontier.points import SYSTEMS, path_of, read_points
from benchmarks.frontier.post_training.table import post_training_table
from benchmarks.frontier.tasks import TASKS, Task

Groups = dict[tuple, list[Point]]
_MARKERS = "osD^vP*Xp<>hd8"
_NAMES = {
    "ours": "diffq_fx",
    "ours-distilled": "diffq_fx, Distillation",
    "ours-uniform": "diffq_fx, same bits for all",
    "ours-widths": "diffq_fx, widths 2, 4, 8",
    "ours-paper": "diffq_fx, the paper's settings",
    "lsq": "LSQ",
    "lc": "LC",
    "ste": "STE-QAT",
    "quant-noise": "Quant-Noise",
    "brevitas-fixed": "Brevitas, fixed width",
    "brevitas-learned": "Brevitas, learned width",
    "diffq": "diffq",
    "diffq-aimed": "diffq, penalty above the budget",
    "ort-int8": "onnxruntime, int8",
    "float-trained": "float, trained on as long",
}
"""What systems are called in a picture, if not as they are."""
_SHOWN = 0.13
"""How far from the best score a picture reaches, as a part of it."""


def report(asked: argparse.Namespace) -> None:
    """Write the table, the plot of every task that has points."""
    names = [name for name in TASKS if path_of(asked.results, name).exists() and asked.task in (None, name)]
    if not names:
        raise SystemExit(f"{asked.results} has no points yet: run first.")
    for name in names:
        print(report_task(asked.results, TASKS[name]).read_text(encoding="utf-8"))


def picture(asked: argparse.Namespace) -> None:
    """Draw the points of some systems, from several folders; a system's points are those of the last folder that has them."""
    latest: dict[str, list[Point]] = {}
    for folder in asked.results:
        found: dict[str, list[Point]] = {}
        for point in read_points(folder, asked.task):
            if point["system"] in asked.systems and "bits_a_weight" not in point:
                found.setdefault(point["system"], []).append(point)
        latest |= found
    _draw(grouped(point for name in asked.systems for point in latest.get(name, [])), TASKS[asked.task], asked.out, asked.title)


def report_task(results: Path, kind: type[Task]) -> Path:
    """Write the report of one task and return the markdown's path."""
    points = read_points(results, kind.name)
    groups = grouped(point for point in points if "bits_a_weight" not in point)
    rows = [_row(key, found) for key, found in groups.items()]
    header = ("system", "bits asked for", "steps", "rate", "exact MiB", "packed file MiB", kind.score_name, "seeds", "seconds", "setting")
    systems = list(dict.fromkeys(point["system"] for point in points))
    legend = "\n".join(f"- {name}: {SYSTEMS[name].summary}" for name in systems if name in SYSTEMS)
    through = _through_onnx(groups, kind)
    tables = [markdown_table(header, rows), through, post_training_table(points, kind)]
    parts = [inspect.getdoc(kind) or "", *tables, legend, _versions(points), _note(points)]
    path = write_result(
        f"frontier_{kind.name}",
        f"Frontier: {kind.name}",
        "\n\n".join(part for part in parts if part),
        ["torch"],
        command="python -m benchmarks.frontier report",
        folder=results,
    )
    if any(key[2] for key in groups):
        _draw(groups, kind, path.with_suffix(".png"))
    return path


def grouped(points: Iterable[Point]) -> Groups:
    """The points that differ in their seed alone, largest size first."""
    groups: Groups = {}
    for point in points:
        key = tuple(point[name] for name in ("system", "bits", "steps", "rate", "penalty", "bits_rate"))
        groups.setdefault(key, []).append(point)
    return dict(sorted(groups.items(), key=lambda item: (-item[0][1], item[0][0], *map(str, item[0][2:]))))


def _spread(values: list[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _row(key: tuple, found: list[Point]) -> list[str]:
    system, bits, steps, rate, *_ = key
    return [
        system,
        f"{bits:g}",
        str(steps) if steps else "",
        f"{rate:g}" if rate else "",
        _spread([point["mib"] for point in found], 4),
        _spread(packed, 4) if (packed := [point["packed_mib"] for point in found if "packed_mib" in point]) else "",
        _spread([point["score"] for point in found], 3),
        str(len(found)),
        f"{statistics.mean(point['seconds'] for point in found):.0f}",
        found[-1]["setting"].replace("|", "\\|"),
    ]


def _through_onnx(groups: Groups, kind: type[Task]) -> str:
    """Scores of the exported files beside those of the converted models."""
    rows = []
    for key, found in groups.items():
        for point in found:
            if "onnx" not in point:
                continue
            onnx = point["onnx"]
            cells = (
                [onnx["refused"], "", ""] if "refused" in onnx else [f"{onnx[n]:.4f}" for n in ("exact_score", "fast_score", "file_mib")]
            )
            rows.append([key[0], f"{key[1]:g}", str(point["seed"]), f"{point['score']:.4f}", *cells])
    if not rows:
        return ""
    header = ("system", "bits asked for", "seed", f"{kind.score_name}, converted model", "ONNX, exact", "ONNX, fast", "file MiB")
    return "Through ONNX, on the whole test set:\n\n" + markdown_table(header, rows)


def _versions(points: list[Point]) -> str:
    found: dict[str, dict[str, None]] = {}
    for point in points:
        for package, version in point["versions"].items():
            found.setdefault(package, {})[version] = None
    return (
        "Versions of the points: " + ", ".join(f"{package} {' and '.join(versions)}" for package, versions in sorted(found.items())) + "."
    )


def _note(points: list[Point]) -> str:
    threads = sorted({point["threads"] for point in points})
    quick = (
        " **Some points are from --quick runs: they show that the code runs, and nothing else.**" if any(p["quick"] for p in points) else ""
    )
    return f"Seconds are training and scoring of one point with {' or '.join(map(str, threads))} threads.{quick}"


def _draw(groups: Groups, kind: type[Task], path: Path, title: str | None = None) -> None:
    """Default systems at the number of steps that most have, near float's score; what lies further off is an arrow at the edge."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5))
    lines: dict[str, list[tuple[float, float, float]]] = {}
    usual = statistics.mode([steps for _, _, steps, *_ in groups if steps] or [0])
    for (system, _, steps, *_), found in groups.items():
        if steps not in (0, usual) or (system in SYSTEMS and not SYSTEMS[system].is_default):
            continue
        scores = [point["score"] for point in found]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        lines.setdefault(system, []).append((statistics.mean(point["mib"] for point in found), statistics.mean(scores), spread))
    sign = 1 if kind.higher_is_better else -1
    best = max(sign * score for line in lines.values() for _, score, _ in line)
    edge = sign * (best - _SHOWN * abs(best))
    for number, name in enumerate(name for name in lines if not name.startswith("float")):
        near = [point for point in sorted(lines[name]) if sign * (point[1] - edge) > 0]
        style = {"marker": _MARKERS[number % len(_MARKERS)], "color": f"C{number % 10}", "linewidth": 2.2 if name == "ours" else 1}
        sizes, scores, spreads = zip(*near, strict=True) if near else ((), (), ())
        axes.errorbar(sizes, scores, spreads, label=_NAMES.get(name, name), capsize=2, markersize=5, **style)
        for mib, score, _ in (point for point in lines[name] if point not in near):
            axes.annotate(f"{score:.1f}", (mib, edge), (0, 10), textcoords="offset points", rotation=60, color=style["color"], fontsize=8)
            axes.plot([mib], [edge], marker=11, color=style["color"], clip_on=False)
    for name in (name for name in lines if name.startswith("float")):
        axes.axhline(lines[name][0][1], color="grey", linestyle=":" if name == "float-trained" else "--", label=_NAMES.get(name, name))
    axes.set(xlabel="exact size in MiB", ylabel=kind.score_name, title=title or f"{kind.name}, {usual} steps", xscale="log")
    if all(sign * (score - edge) > 0 for line in lines.values() for _, score, _ in line):
        axes.margins(y=0.1)
    else:
        axes.set_ylim(
            *((edge, None) if sign > 0 else (edge, min(score for line in lines.values() for _, score, _ in line) - 0.05 * best * sign))
        )
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="both", labelsize=8)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
