"""The command ``diffq-fx``. It is outside the package, of which every module imports torch: who interrupts that gets one line."""

import os
import signal
from collections.abc import Callable
from typing import NoReturn


def _leave(*_: object) -> NoReturn:
    """Leave at once: nothing is there to tidy up, and an exception is not safe in the middle of any import."""
    os.write(2, b"diffq-fx: interrupted.\n")
    os._exit(130)


def main() -> None:
    """Run the command line of this process."""
    at_signals(_leave)
    from diffq_fx.cli import app

    at_signals(signal.default_int_handler)  # docker, timeout and schedulers send SIGTERM: tidy up as after Ctrl-C
    app(prog_name="diffq-fx")


def at_signals(handler: Callable[..., object] = _leave) -> None:
    """Set what an interruption does; by default it ends the process at once."""
    for each in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(each) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(each, handler)
