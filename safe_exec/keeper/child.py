"""The last steps of a process that becomes the kernel: descriptors, limits, walls, execution. Standard library only.

Taken by the keeper's child, or inside bubblewrap by the child of the init there; either way they are the same.
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]  # what signal is made of, without enum
import binascii
import fcntl
import os
import resource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

BASE_DESCRIPTORS = 10
HIGHEST = 65536
ROOM = 64


def place_descriptors(
    plan: dict[str, Any], stderr_fd: int, given: dict[str, int]
) -> dict[str, int]:
    """Standard streams, and the descriptors in ``given`` as high up as they go; where each is now.

    High up, since programs that close "all" descriptors stop at 256, 512 or 1024, and the fault handler's must
    survive them. Done before RLIMIT_NOFILE is set: an open descriptor above the limit stays valid.
    ``stdout`` and ``stderr`` in ``given`` take the place of the keeper's own pipe.
    """
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(given.get("stdout", stderr_fd), 1)
    os.dup2(given.get("stderr", stderr_fd), 2)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    floor = max(BASE_DESCRIPTORS, min(hard, HIGHEST) - ROOM)
    placed: dict[str, int] = {}
    for name, fd in given.items():
        if name in ("stdout", "stderr"):
            continue
        high = fcntl.fcntl(fd, fcntl.F_DUPFD, floor)
        os.set_inheritable(high, True)
        placed[name] = high
        plan["argv"] = [part.replace("{" + name + "}", str(high)) for part in plan["argv"]]
    return placed


def execute(plan: dict[str, Any], parent: int) -> None:
    """Take the limits, raise the walls, execute the kernel. Never returns; raises what went wrong before the execution.

    ``parent`` is this process's parent, as it sees it.
    """
    for number, soft, hard in plan["rlimits"]:
        resource.setrlimit(number, (soft, hard))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft_files = plan["open_files_soft"]
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (min(soft_files, most) if soft_files else most, most)
    )
    for number in range(1, signal.NSIG):
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            try:
                signal.signal(number, signal.SIG_DFL)
            except (OSError, ValueError):
                continue  # the C library keeps two for itself
    signal.set_wakeup_fd(-1)
    # ipykernel leaves when this process is no longer its parent, and believes to be a user's own kernel without it.
    plan["env"]["JPY_PARENT_PID"] = str(parent)
    walls = plan.get("walls") or {}
    if not walls:
        _enter(plan["cwd"])
        return
    _harden(walls, plan["cwd"])


def _enter(folder: str) -> None:
    try:
        os.chdir(folder)
    except PermissionError as error:
        raise PermissionError(
            f"the kernel's user ({os.geteuid()}) may not enter the notebook's folder {folder}: let others enter it and the"
            " folders above it (chmod o+x), or run the notebook in another folder"
        ) from error


def _harden(walls: dict[str, Any], folder: str) -> None:
    """What a process can give up by itself: core dumps, its user, writing and reading elsewhere, system calls."""
    # Imported before anything is given up: another user may not be able to read where they lie.
    if walls.get("capabilities_dropped"):
        from safe_exec.keeper import capabilities
    if walls.get("landlock") is not None:
        from safe_exec.keeper import landlock
    if walls.get("seccomp") is not None:
        from safe_exec.keeper import seccomp

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if walls.get("capabilities_dropped"):
        capabilities.give_up(for_uid=walls.get("uid"))
    # Root without capabilities may not enter a private copy (mode 0700) that belongs to the kernel's user.
    _enter(folder)
    if walls.get("landlock") is not None:
        landlock.restrict(**walls["landlock"])
    if walls.get("seccomp") is not None:
        seccomp.install(binascii.a2b_base64(walls["seccomp"]))


class Refused(Exception):  # noqa: N818 - what the child could not do
    """The child did not become the kernel: at the ``stage`` sandbox (ours to answer for) or command (the kernelspec's)."""

    def __init__(self, stage: str, message: str) -> None:
        super().__init__(message)
        self.stage, self.message = stage, message


def run(plan: dict[str, Any], parent: int, error_fd: int) -> None:
    """Become the kernel, or write why not to ``error_fd`` and leave. Never returns."""
    stage = "sandbox"
    try:
        execute(plan, parent)
        stage = "command"
        os.execvpe(plan["argv"][0], plan["argv"], plan["env"])  # noqa: S606 - the kernel's own command
    except BaseException as error:  # noqa: BLE001 - told to the keeper; nothing may run on in this process
        tell(error_fd, stage, error)


def tell(error_fd: int, stage: str, error: BaseException) -> None:
    """Say what went wrong at which stage, and leave. Never returns."""
    os.write(error_fd, f"{stage} {type(error).__name__}: {error}".encode("utf-8", "replace"))
    os._exit(127)
