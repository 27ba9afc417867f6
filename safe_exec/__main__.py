"""``python -m safe_exec`` and the ``safe-exec`` command. The only place that exits."""

from __future__ import annotations

import contextlib
import gc
import os
import sys

OBJECTS_UNTIL_COLLECTION = 50_000
UNUSED = ("isoduration", "rfc3986_validator", "rfc3987_syntax")
"""What jsonschema imports for formats that no notebook's schema has, where JupyterLab is installed: a grammar that is compiled in 0.8 s."""


def main() -> None:
    """Run the command line; exits with its code."""
    if sys.argv[1:2] != ["batch"]:  # which lives long
        # What is imported stays: to look through it at every 700 objects takes a tenth of the start.
        gc.set_threshold(OBJECTS_UNTIL_COLLECTION)
    for name in UNUSED:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # an import of it fails, as where it is not installed
    if (
        sys.argv[1:2] == ["run"]
        and sys.platform.startswith("linux")
        and not {"-h", "--help"} & set(sys.argv)
    ):
        from safe_exec.sandbox import keeper_process

        keeper_process.prestart()
    from safe_exec.cli import main as cli

    code = cli.call(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(
            OSError, ValueError
        ):  # a reader that is gone; a stream that was closed
            stream.flush()
    os._exit(
        code
    )  # everything was closed by who opened it; taking Python apart takes longer than writing a verdict


if __name__ == "__main__":
    main()
