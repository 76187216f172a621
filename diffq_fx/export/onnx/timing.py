"""Times things in turns, so that whatever slows the computer down meets all of them. Nothing here knows onnxruntime."""

import math
import time
from collections.abc import Callable, Sequence

Run = Callable[[], object]
Clock = Callable[[], float]

_SAMPLE_SECONDS = 1e-3
"""A sample repeats a fast model until it has run this long: caches are warm again and the clock is fine enough."""
_WARMUP_RUNS = 5
_MAX_RUNS_PER_SAMPLE = 1000
_LEAST_TURNS = 3
"""As many turns there are whatever they take: the median of fewer says little."""


def time_in_turns(
    runs: Sequence[Run],
    *,
    turns: int,
    seconds: float = math.inf,
    clock: Clock = time.perf_counter,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[list[float]]:
    """Time several things in turns, A B C, C B A, A B C, ...: for each the seconds of one run, turn by turn.

    No further turn begins after so many ``seconds``, once there are three.
    ``on_progress`` is called after every turn with the turns done and ``turns``.
    """
    samples = [_runs_per_sample(run, clock) for run in runs]
    times: list[list[float]] = [[] for _ in runs]
    start = clock()
    for turn in range(turns):
        for which in range(len(runs)) if turn % 2 == 0 else reversed(range(len(runs))):
            times[which].append(_seconds(runs[which], samples[which], clock) / samples[which])
        if on_progress is not None:
            on_progress(turn + 1, turns)
        if turn + 1 >= _LEAST_TURNS and clock() - start > seconds:
            break
    return times


def _runs_per_sample(run: Run, clock: Clock) -> int:
    """Run until nothing is new, and tell how many runs one sample takes."""
    fastest = math.inf
    for warm_up in range(_WARMUP_RUNS):
        fastest = min(fastest, _seconds(run, 1, clock))
        if warm_up and fastest > _SAMPLE_SECONDS:
            break
    return min(max(1, math.ceil(_SAMPLE_SECONDS / fastest)), _MAX_RUNS_PER_SAMPLE)


def _seconds(run: Run, times: int, clock: Clock) -> float:
    start = clock()
    for _ in range(times):
        run()
    return clock() - start
