"""Where notebooks can be run at all: on Linux, by a Python with its global lock. Elsewhere nothing is begun.

Control groups, rlimits that count private memory, the raw wait status of a kernel's whole tree, /proc: all are Linux's. Imports errors only,
so that it can be asked before anything is imported that other systems lack (fcntl, resource).
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from safe_exec.errors import PlatformError

NAMES = {"darwin": "macOS", "win32": "Windows"}
WAYS = {"win32": "run it in WSL 2 (`wsl --install`) or in a Linux container"}
ELSEWHERE = "run it in a Linux virtual machine or container"


SUBINTERPRETERS = ("_interpreters", "_xxsubinterpreters")
"""The module that knows them, since Python 3.13 and before."""


def refuse_elsewhere() -> None:
    """Raise PlatformError on anything but Linux, without the interpreter's lock, and in a sub-interpreter."""
    if not sys.platform.startswith("linux"):
        name = NAMES.get(sys.platform, sys.platform)
        raise PlatformError(
            f"notebooks are run on Linux only, and this is {name}: {WAYS.get(sys.platform, ELSEWHERE)}"
        )
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
    """Whether one thread runs Python at a time; a free-threaded build (PEP 703) may have the lock switched on."""
    is_enabled = getattr(sys, "_is_gil_enabled", None)  # since Python 3.13
    return is_enabled is None or bool(is_enabled())


def in_main_interpreter() -> bool:
    """Whether this is the interpreter that the process began with."""
    for name in SUBINTERPRETERS:
        try:
            module = importlib.import_module(name)
        except ImportError:  # PyPy, and builds without it
            continue
        return _number(module.get_current()) == _number(module.get_main())
    return True


def _number(interpreter: Any) -> int:
    """The number of an interpreter, which Python 3.13 hands out in a tuple."""
    return int(interpreter[0] if isinstance(interpreter, tuple) else interpreter)
