"""What is worth a curve of a training: a few hundred points of each, however long it is."""

from collections.abc import Mapping

from torch import Tensor

_MOST = 256
"""Points of a curve, after which every second is dropped and half as many are taken."""


class History:
    """Curves over the steps of a training.

    Example:
        >>> history = History()
        >>> for step in range(10_000):
        ...     history.add(step, {"loss": 1 / (1 + step)})
        >>> len(history.curves["loss"]) <= 256, history.curves["loss"][1]
        (True, [64.0, 0.015384615384615385])
    """

    def __init__(self) -> None:
        self._points: dict[str, list[tuple[int, float | Tensor]]] = {}
        self._every: dict[str, int] = {}

    def wants(self, name: str, step: int) -> bool:
        """Whether a value at this step would be kept."""
        points = self._points.get(name)
        return not points or step >= points[-1][0] + self._every[name]

    def add(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        """Keep values of a step, where their curves want them; a tensor is not read before :attr:`curves` is, so that no device waits."""
        for name, value in values.items():
            if not self.wants(name, step):
                continue
            points = self._points.setdefault(name, [])
            points.append((step, value.detach().clone() if isinstance(value, Tensor) else value))
            self._every.setdefault(name, 1)
            if len(points) == _MOST:
                del points[1::2]
                self._every[name] = points[-1][0] - points[-2][0]

    @property
    def curves(self) -> dict[str, list[list[float]]]:
        """Name -> ``[step, value]`` of each point, as JSON has it."""
        return {name: [[float(step), float(value)] for step, value in points] for name, points in self._points.items()}
