"""When a compression has to end, and what that leaves for each of its stages."""

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """So many steps of the tuning at most, and so many seconds of all stages from a time of ``time.monotonic`` on."""

    steps: int
    seconds: float
    began: float

    @property
    def share(self) -> float:
        """Which part of the seconds is over."""
        return (time.monotonic() - self.began) / self.seconds

    def times(self, share: float, each: float, least: int, most: int) -> int:
        """How often what takes ``each`` can be done within ``share``, both parts of the seconds.

        Example:
            >>> Limits(0, 60.0, 0.0).times(0.5, 0.15, least=2, most=16)
            3
        """
        return min(max(int(share / max(each, 1e-9)), least), most)
