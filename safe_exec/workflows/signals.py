"""Signals that ask a command to stop: Ctrl-C, SIGTERM, SIGHUP."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator
from typing import Any


def no_signal_handlers(_arrive: Any) -> contextlib.AbstractContextManager[None]:
    """Leave the signals to the caller."""
    return contextlib.nullcontext()


@contextlib.contextmanager
def signals(arrive: Any) -> Iterator[None]:
    """Pass Ctrl-C, SIGTERM and SIGHUP to ``arrive`` until the block ends.

    Does nothing outside the main thread. A signal that is ignored stays ignored: under nohup the
    run goes on after the terminal closes, and so does a background job of a script (``&``) on
    Ctrl-C.
    """
    loop, handled = asyncio.get_running_loop(), []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # nohup and `&` set these to be ignored on purpose.
        if signal.getsignal(number) is signal.SIG_IGN:
            continue
        with contextlib.suppress(RuntimeError, ValueError, NotImplementedError):
            # asyncio refuses signal handlers outside the main thread, where tools like papermill
            # may be.
            loop.add_signal_handler(number, arrive, number)
            handled.append(number)
    try:
        yield
    finally:
        for number in handled:
            loop.remove_signal_handler(number)
