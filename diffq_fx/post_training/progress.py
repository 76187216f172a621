"""How far a compression is: one bar with the stage and the time left."""

from types import TracebackType


class ProgressBar:
    """A bar of rich, imported when it is shown; without ``shown`` nothing is printed."""

    def __init__(self, *, shown: bool) -> None:
        self._bar = None
        if not shown:
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("compress", total=None)

    def stage(self, name: str, work: int) -> None:
        """Begin a stage of so many units of work."""
        if self._bar is not None:
            self._bar.reset(self._task, description=name, total=work)

    def advance(self) -> None:
        """One unit is done."""
        if self._bar is not None:
            self._bar.advance(self._task)

    def __enter__(self) -> "ProgressBar":
        """Show it."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Take it away."""
        if self._bar is not None:
            self._bar.stop()
