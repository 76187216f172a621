"""How far a compression is: one bar with the stage and the time left."""


class ProgressBar:
    """A bar of rich, imported when it is made; without ``shown`` nothing is printed."""

    def __init__(self, *, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
        self._bar = Progress(*columns, console=Console(stderr=True, quiet=not shown), transient=True, disable=not shown)
        self._task = self._bar.add_task("compress", total=None)

    def stage(self, name: str, work: int) -> None:
        """Begin a stage of so many units of work."""
        self._bar.reset(self._task, description=name, total=work)

    def advance(self) -> None:
        """One unit is done."""
        self._bar.advance(self._task)

    def __enter__(self) -> "ProgressBar":
        """Show it."""
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Take it away."""
        self._bar.stop()
