"""Where notebooks can be run at all: on Linux. Elsewhere nothing would hold their limits, and nothing is begun.

Control groups, rlimits that count private memory, the raw wait status of a kernel's whole tree, /proc: all are Linux's. Imports errors only,
so that it can be asked before anything is imported that other systems lack (fcntl, resource).
"""

from __future__ import annotations

import sys

from safe_exec.errors import PlatformError

NAMES = {"darwin": "macOS", "win32": "Windows"}
WAYS = {"win32": "run it in WSL 2 (`wsl --install`) or in a Linux container"}
ELSEWHERE = "run it in a Linux virtual machine or container"


def refuse_elsewhere() -> None:
    """Raise PlatformError on anything but Linux."""
    if not sys.platform.startswith("linux"):
        name = NAMES.get(sys.platform, sys.platform)
        raise PlatformError(
            f"notebooks are run on Linux only, and this is {name}: {WAYS.get(sys.platform, ELSEWHERE)}"
        )
