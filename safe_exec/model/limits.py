"""Limits and isolation as types: the rules that a user sets for a notebook, and their enforcement.

Sizes are in bytes, times in seconds; ``None`` means unlimited.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from msgspec import Meta, Struct

Count = Annotated[int, Meta(ge=0)]
"""Bytes, or a number of things."""
Amount = Annotated[float, Meta(ge=0)]
"""Seconds, or processors."""


class Mechanism(StrEnum):
    """The mechanism that enforces a limit."""

    CGROUP_V2 = "cgroup-v2"
    SYSTEMD = "systemd"
    CGROUP_V1 = "cgroup-v1"
    RLIMIT = "rlimit"
    BUBBLEWRAP = "bubblewrap"
    LANDLOCK = "landlock"
    SECCOMP = "seccomp"
    KERNEL = "kernel"
    WATCHDOG = "watchdog"
    RUNNER = "runner"
    NONE = "none"


class LimitName(StrEnum):
    """The limits a user may set; each is a field of :class:`Limits`."""

    MEMORY = "memory"
    CPUS = "cpus"
    CPU_TIME = "cpu_time"
    CELL_TIMEOUT = "cell_timeout"
    TIMEOUT = "timeout"
    START_TIMEOUT = "start_timeout"
    PROCESSES = "processes"
    OPEN_FILES = "open_files"
    FILE_SIZE = "file_size"
    CELL_OUTPUT = "cell_output"
    OUTPUT = "output"
    DISK = "disk"
    SHM = "shm"


class Limits(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The limits for one notebook; ``None`` means unlimited."""

    # The kernel and all its descendants together.
    memory: Count | None = None
    cpus: Amount | None = None
    # The processor time of the whole process tree.
    cpu_time: Amount | None = None
    cell_timeout: Amount | None = None
    timeout: Amount | None = None
    start_timeout: Amount | None = None
    processes: Count | None = None
    # For each process, as is file_size.
    open_files: Count | None = None
    file_size: Count | None = None
    cell_output: Count | None = None
    output: Count | None = None
    # Everything written to the folder, /tmp and scratch together.
    disk: Count | None = None
    # Everything written to /dev/shm.
    shm: Count | None = None
    # The time that a cell has to answer an interrupt before its kernel is killed.
    interrupt_grace: Amount = 2.0

    def __post_init__(self) -> None:
        """Raises TypeError for a value that is not a number, and ValueError for a negative one."""
        for name, value in self.as_dict().items():
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int | float)
            ):
                raise TypeError(
                    f"Limits.{name} is a number of bytes, seconds or things, not {value!r}; "
                    "pass units as options"
                )
            if value is not None and not value >= 0:
                raise ValueError(f"Limits.{name} cannot be {value!r}")

    def of(self, name: LimitName) -> int | float | None:
        """Return the value of one limit, ``None`` if it is unlimited."""
        value: int | float | None = getattr(self, name.value)
        return value

    def as_dict(self) -> dict[str, int | float | None]:
        """Return every limit by name, in bytes, seconds and counts."""
        return {name: getattr(self, name) for name in self.__struct_fields__}


class FolderUse(StrEnum):
    """How a notebook uses its folder.

    Changes in a copy are lost unless ``Isolation.write_back`` is set.
    """

    WRITE = "write"
    READ = "read"
    COPY = "copy"


class RepositoryUse(StrEnum):
    """The access to the repository around the folder.

    With ``closed`` the repository is as accessible as any other place.
    """

    WRITE = "write"
    READ = "read"
    CLOSED = "closed"


class SystemCalls(StrEnum):
    """Whether unneeded system calls are allowed, refused (EPERM), or fatal (SIGSYS)."""

    ALL = "all"
    REFUSE = "refuse"
    KILL = "kill"


class Isolation(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a notebook may access, besides its limits. The defaults isolate nothing."""

    # Home directories are empty except for the files that the interpreter needs.
    hide_home: bool = False
    # Only the folder, `writable`, and a private /tmp, /dev/shm and home are writable.
    read_only_system: bool = False
    folder: FolderUse = FolderUse.WRITE
    repository: RepositoryUse = RepositoryUse.WRITE
    write_back: bool = True
    # Access to other hosts; loopback always stays.
    network: bool = True
    # Private process, ipc and host names.
    own_processes: bool = False
    # Only variables that are known to be harmless, and `env`.
    listed_environment: bool = False
    system_calls: SystemCalls = SystemCalls.ALL
    # Run as a user who owns nothing, if safe-exec runs as root.
    other_user: bool = False
    # Run nothing if one of these walls cannot be set up.
    required: bool = False
    env: tuple[str, ...] = ()
    writable: tuple[str, ...] = ()
    # Places that stay readable behind the walls.
    show: tuple[str, ...] = ()
    hide: tuple[str, ...] = ()
    # Paths below /dev.
    devices: tuple[str, ...] = ()


class Wall(StrEnum):
    """The walls of isolation: each keeps a notebook away from one thing outside.

    The verdict names the enforcement of each requested one.
    """

    HOME = "home"
    SYSTEM = "system"
    FOLDER = "folder"
    HIDDEN = "hidden"
    NETWORK = "network"
    PROCESSES = "processes"
    ENVIRONMENT = "environment"
    SYSTEM_CALLS = "system_calls"
    PRIVILEGES = "privileges"
    USER = "user"


class Enforcement(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The enforcement of a limit or wall.

    ``hard`` is true if the operating system enforces it without exception.
    """

    by: Mechanism
    hard: bool
    note: str = ""
