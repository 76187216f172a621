"""The command ``diffq-fx``. It is outside the package, of which every module imports torch first: who interrupts that gets one line."""

import os
import signal
from typing import NoReturn


def main() -> None:
    """Run the command line of this process."""
    signals = [each for each in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(each) is not signal.SIG_IGN]  # as nohup sets it
    for each in signals:
        signal.signal(each, _leave)
    from diffq_fx.cli import app

    for each in signals:
        signal.signal(each, signal.default_int_handler)  # docker, timeout and schedulers send SIGTERM: tidy up as after Ctrl-C
    app(prog_name="diffq-fx")


def _leave(*_: object) -> NoReturn:
    """Leave at once: nothing is there to tidy up, and an exception is not safe in the middle of any import."""
    os.write(2, b"diffq-fx: interrupted.\n")
    os._exit(130)
