"""``python -m safe_exec`` and the ``safe-exec`` command. The only place that exits."""

from __future__ import annotations

import contextlib
import gc
import os
import sys

OBJECTS_UNTIL_COLLECTION = 50_000


def main() -> None:
    """Run the command line; exits with its code."""
    if sys.argv[1:2] != ["batch"]:  # which lives long
        # What is imported stays: to look through it at every 700 objects takes a tenth of the start.
        gc.set_threshold(OBJECTS_UNTIL_COLLECTION)
    if sys.argv[1:2] == ["run"] and sys.platform.startswith("linux") and not {"-h", "--help"} & set(sys.argv):
        from safe_exec import early

        early.begin()
    from safe_exec.commands import cli

    code = cli.call(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a reader that is gone; a stream that was closed
            stream.flush()
    os._exit(code)  # everything was closed by who opened it; taking Python apart takes longer than writing a verdict


if __name__ == "__main__":
    main()
