"""Processes that a test forks."""

import os

from diffq_fx.errors import DiffQError


def in_child(work):
    """Fork, work, and leave by 0, or by 7 where an error of ours says why not."""
    if pid := os.fork():
        return pid
    try:
        work()
        os._exit(0)
    except DiffQError as error:
        os._exit(7 if "cannot write" in str(error) else 8)
    finally:
        os._exit(1)


def code_of(pid):
    """How a process ended, which is waited for."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
