"""The table of what was compressed without training."""

from benchmarks._result import markdown_table
from benchmarks.frontier.job import Point
from benchmarks.frontier.tasks import Task

_HEADER = ("budget", "system", "bits a weight", "MiB", "{score}", "seconds", "peak MiB more", "setting")
_NOTE = """Without training and without labels, largest budget first and the best of each budget first. A budget is bits a weight; with
"-e8" embeddings have 8 bits and the other weights the budget. "bits a weight" is what all weight matrices take, with scales, zero points
and embeddings; a peer has its setting next to the budget, which lies above it in some rows. MiB is the size of the whole model. Seconds
and the growth of memory are those of the compression, without the scoring."""


def post_training_table(points: list[Point], kind: type[Task]) -> str:
    """A row for each point, or nothing."""
    points = [point for point in points if "bits_a_weight" in point]
    if not points:
        return ""
    sign = -1 if kind.higher_is_better else 1
    points.sort(key=lambda point: (-point["bits"], point["system"].endswith("-e8"), sign * point["score"]))
    rows = [
        (
            f"{point['bits']:g}{' + embedding at 8' if point['system'].endswith('-e8') else ''}",
            point["system"],
            f"{point['bits_a_weight']:.3f}",
            f"{point['mib']:.2f}",
            f"{point['score']:.2f}",
            f"{point['compress_seconds']:.0f}",
            point.get("peak_mib", ""),
            point["setting"].replace("|", "\\|"),
        )
        for point in points
    ]
    return _NOTE + "\n\n" + markdown_table([each.format(score=kind.score_name) for each in _HEADER], rows)
