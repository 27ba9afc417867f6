"""Refuses platforms on which notebooks cannot run; imports only modules that every system has.

Notebooks need Linux and a Python with its global interpreter lock.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from safe_exec.errors import PlatformError

# Limits need Linux: control groups, rlimits that count private memory, /proc, and the raw wait
# status of every process in a tree.
NAMES = {"darwin": "macOS", "win32": "Windows"}
WAYS = {"win32": "run it in WSL 2 (`wsl --install`) or in a Linux container"}
ELSEWHERE = "run it in a Linux virtual machine or container"


# The module about sub-interpreters, since Python 3.13 and before.
SUBINTERPRETERS = ("_interpreters", "_xxsubinterpreters")


def refuse_elsewhere() -> None:
    """Raise PlatformError unless on Linux, with the interpreter's lock, in the main interpreter."""
    if not sys.platform.startswith("linux"):
        name = NAMES.get(sys.platform, sys.platform)
        raise PlatformError(
            f"notebooks are run on Linux only, and this is {name}: {WAYS.get(sys.platform, ELSEWHERE)}"
        )
    # Without the lock, the stack of a running thread cannot be read.
    if not has_global_lock():
        raise PlatformError(
            f"safe-exec is not tested on a free-threaded Python ({sys.version.split()[0]}) without the global"
            " interpreter lock: set PYTHON_GIL=1, or run it with the ordinary build"
        )
    if not in_main_interpreter():
        raise PlatformError(
            "safe-exec does not run in a sub-interpreter, where no signals arrive and pyzmq cannot be loaded:"
            " call it from the main interpreter, or run the safe-exec command"
        )


def has_global_lock() -> bool:
    """Tell whether only one thread runs Python at a time."""
    # Since Python 3.13. A free-threaded build (PEP 703) may run with the lock (PYTHON_GIL=1).
    is_enabled = getattr(sys, "_is_gil_enabled", None)
    return is_enabled is None or bool(is_enabled())


def in_main_interpreter() -> bool:
    """Tell whether this is the first interpreter of the process."""
    for name in SUBINTERPRETERS:
        try:
            module = importlib.import_module(name)
        # PyPy, and builds without sub-interpreters.
        except ImportError:
            continue
        return _number(module.get_current()) == _number(module.get_main())
    return True


def _number(interpreter: Any) -> int:
    """Return the number of an interpreter."""
    # Python 3.13 returns a tuple that begins with the number.
    return int(interpreter[0] if isinstance(interpreter, tuple) else interpreter)
