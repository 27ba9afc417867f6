"""Run ``python -m safe_exec`` and the ``safe-exec`` command.

No other module exits the process.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys

# The imports of a run make some 105,000 objects, all of which stay.
OBJECTS_UNTIL_COLLECTION = 150_000
# Modules that jsonschema imports if JupyterLab is installed; compiling a grammar takes 0.8 s, the
# others 2 ms. No notebook's schema uses the formats that they check.
UNUSED = (
    "fqdn",
    "isoduration",
    "rfc3339_validator",
    "rfc3986_validator",
    "rfc3987_syntax",
    "uri_template",
    "webcolors",
)


def main() -> None:
    """Run the command line and exit with its code."""
    # A batch runs long enough to need the default.
    if sys.argv[1:2] != ["batch"]:
        # Python's default is 700: collecting garbage that often takes a tenth of the start, and
        # every 50,000 objects 20 ms.
        gc.set_threshold(OBJECTS_UNTIL_COLLECTION)
    for name in UNUSED:
        # None makes an import fail, as if the module were not installed.
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    if (
        sys.argv[1:2] == ["run"]
        and sys.platform.startswith("linux")
        and not {"-h", "--help"} & set(sys.argv)
    ):
        # The keeper's interpreter takes 25 ms to start. Meanwhile this process imports the command
        # line.
        from safe_exec.sandbox import keeper_process

        keeper_process.prestart()
    from safe_exec.cli import main as cli

    code = cli.call(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        # The reader may have exited, or the stream may be closed.
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    # All files are closed. Shutting the interpreter down takes longer than writing a verdict.
    os._exit(code)


if __name__ == "__main__":
    main()
