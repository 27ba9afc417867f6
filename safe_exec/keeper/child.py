"""The last steps of a process that becomes the kernel: descriptors, limits, walls, execution.

The keeper's child carries them out, or the child of the init inside bubblewrap. Standard library
only.
"""

import _signal as signal  # type: ignore[import-not-found]  # what signal is made of, without enum
import binascii
import os
import sys

if sys.platform.startswith("linux"):
    # Elsewhere, where nothing is run (platforms.py), the types below are imported all the same.
    import fcntl
    import resource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

BASE_DESCRIPTORS = 10
HIGHEST = 65536
ROOM = 64


# The three types below are plain classes: the init inside bubblewrap uses them too, and importing
# typing for NamedTuple would take longer than all else that it does.


class LandlockRules:
    """Paths that stay readable and writable.

    ``tcp`` is false to refuse TCP, and ``None`` not to restrict it.
    """

    readable: tuple[str, ...]
    writable: tuple[str, ...]
    tcp: bool | None
    _fields = ("readable", "writable", "tcp")

    def __init__(
        self, *, readable: tuple[str, ...], writable: tuple[str, ...], tcp: bool | None
    ) -> None:
        self.readable, self.writable, self.tcp = readable, writable, tcp


class Walls:
    """Privileges that the process gives up. ``seccomp`` is a filter program in base64."""

    uid: int | None
    drop_capabilities: bool
    landlock: LandlockRules | None
    seccomp: str | None
    _fields = ("uid", "drop_capabilities", "landlock", "seccomp")

    def __init__(
        self,
        *,
        uid: int | None = None,
        drop_capabilities: bool = False,
        landlock: LandlockRules | None = None,
        seccomp: str | None = None,
    ) -> None:
        self.uid, self.drop_capabilities = uid, drop_capabilities
        self.landlock, self.seccomp = landlock, seccomp


class KernelCommand:
    """The command of a kernel, and the limits and walls that its process sets up first.

    ``rlimits`` are rows of resource number, soft and hard limit. ``open_files_soft`` is the soft
    limit on open files, ``None`` for as high as the hard one.
    """

    argv: tuple[str, ...]
    env: dict[str, str]
    cwd: str
    rlimits: tuple[tuple[int, int, int], ...]
    open_files_soft: int | None
    walls: Walls | None
    _fields = ("argv", "env", "cwd", "rlimits", "open_files_soft", "walls")

    def __init__(
        self,
        *,
        argv: tuple[str, ...],
        env: dict[str, str],
        cwd: str,
        rlimits: tuple[tuple[int, int, int], ...] = (),
        open_files_soft: int | None = None,
        walls: Walls | None = None,
    ) -> None:
        self.argv, self.env, self.cwd = argv, env, cwd
        self.rlimits, self.open_files_soft, self.walls = rlimits, open_files_soft, walls

    def with_argv(self, argv: tuple[str, ...]) -> "KernelCommand":
        """Return a copy with another command line."""
        return KernelCommand(
            argv=argv,
            env=self.env,
            cwd=self.cwd,
            rlimits=self.rlimits,
            open_files_soft=self.open_files_soft,
            walls=self.walls,
        )


def command_from(values: "dict[str, Any]") -> KernelCommand:
    """Return the command from the plain values of ``protocol.as_plain``."""
    walls = values["walls"]
    if walls is not None:
        rules = walls["landlock"]
        walls = Walls(**{**walls, "landlock": rules and LandlockRules(**rules)})
    return KernelCommand(**{**values, "walls": walls})


def place_descriptors(
    argv: tuple[str, ...], stderr_fd: int, descriptors: "Mapping[str, int]"
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Set the standard streams, and move ``descriptors`` to the highest numbers that are allowed.

    ``stdout`` and ``stderr`` among them become the process's own, in place of the keeper's pipe.
    Returns the command with the new numbers in place of ``{name}``, and the numbers by name.
    """
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(descriptors.get("stdout", stderr_fd), 1)
    os.dup2(descriptors.get("stderr", stderr_fd), 2)
    # Programs that close "all" descriptors stop at 256, 512 or 1024, and the fault handler's must
    # survive them. RLIMIT_NOFILE of the run is set later: a descriptor above it stays valid.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    floor = max(BASE_DESCRIPTORS, min(hard, HIGHEST) - ROOM)
    placed: dict[str, int] = {}
    for name, fd in descriptors.items():
        if name in ("stdout", "stderr"):
            continue
        high = fcntl.fcntl(fd, fcntl.F_DUPFD, floor)
        os.set_inheritable(high, True)
        placed[name] = high
        argv = tuple(part.replace("{" + name + "}", str(high)) for part in argv)
    return argv, placed


def prepare(command: KernelCommand) -> None:
    """Set the limits and raise the walls; only the execution is left.

    Raises OSError and ValueError.
    """
    for number, soft, hard in command.rlimits:
        resource.setrlimit(number, (soft, hard))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft_files = command.open_files_soft
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (min(soft_files, most) if soft_files else most, most)
    )
    for number in range(1, signal.NSIG):
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            try:
                signal.signal(number, signal.SIG_DFL)
            except (OSError, ValueError):
                # The C library keeps two signals for itself.
                continue
    signal.set_wakeup_fd(-1)
    if command.walls is None:
        _enter(command.cwd)
    else:
        _raise_walls(command.walls, command.cwd)


def _enter(folder: str) -> None:
    try:
        os.chdir(folder)
    except PermissionError as error:
        raise PermissionError(
            f"the kernel's user ({os.geteuid()}) may not enter the notebook's folder {folder}: "
            "let others enter it and the folders above it (chmod o+x), or run the notebook in "
            "another folder"
        ) from error


def _raise_walls(walls: Walls, folder: str) -> None:
    # Imported before anything is given up: another user may not be able to read these files.
    if walls.drop_capabilities:
        from safe_exec.keeper import capabilities
    if walls.landlock is not None:
        from safe_exec.keeper import landlock
    if walls.seccomp is not None:
        from safe_exec.keeper import seccomp

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if walls.drop_capabilities:
        capabilities.give_up(for_uid=walls.uid)
    # Root without capabilities may not enter a private copy (mode 0700) of the kernel's user, so
    # the change of user comes first.
    _enter(folder)
    if walls.landlock is not None:
        rules = walls.landlock
        landlock.restrict(readable=rules.readable, writable=rules.writable, tcp=rules.tcp)
    if walls.seccomp is not None:
        seccomp.install(binascii.a2b_base64(walls.seccomp))


class SetupFailed(Exception):  # noqa: N818 - what happened to the child
    """The child did not become the kernel.

    ``stage`` is "sandbox" for a failure of safe-exec, and "command" for one of the kernelspec's
    command.
    """

    def __init__(self, stage: str, message: str) -> None:
        super().__init__(message)
        self.stage, self.message = stage, message


def run(command: KernelCommand, parent: int, error_fd: int) -> None:
    """Become the kernel, or write the reason to ``error_fd`` and exit. Never returns.

    ``parent`` is the id of this process's parent in this process's own namespace.
    """
    stage = "sandbox"
    try:
        prepare(command)
        stage = "command"
        # ipykernel exits when this process is no longer its parent. Without the variable it takes
        # itself for a kernel that a user started by hand.
        env = {**command.env, "JPY_PARENT_PID": str(parent)}
        os.execvpe(command.argv[0], command.argv, env)  # noqa: S606 - the kernel's own command
    except BaseException as error:  # noqa: BLE001 - reported to the keeper
        report_failure(error_fd, stage, error)


def report_failure(error_fd: int, stage: str, error: BaseException) -> None:
    """Write the error and its stage to the pipe, and exit. Never returns."""
    os.write(error_fd, f"{stage} {type(error).__name__}: {error}".encode("utf-8", "replace"))
    os._exit(127)
