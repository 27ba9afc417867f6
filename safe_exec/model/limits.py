"""Limits and isolation as types: what a user allows one notebook, and what enforces it.

Sizes are bytes and times are seconds; ``None`` is "unlimited".
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
    """What holds a limit."""

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
    """What the user allows one notebook; ``None`` is unlimited.

    ``disk`` is what may be written to the folder, /tmp and scratch together, ``shm`` to /dev/shm. ``memory`` covers the kernel and all its
    descendants; ``open_files`` and ``file_size`` hold for each process.
    ``cpu_time`` is the processor time of the whole tree; ``interrupt_grace`` is how long a kernel that ran past its
    time may take to answer an interrupt before it is killed.
    """

    memory: Count | None = None
    cpus: Amount | None = None
    cpu_time: Amount | None = None
    cell_timeout: Amount | None = None
    timeout: Amount | None = None
    start_timeout: Amount | None = None
    processes: Count | None = None
    open_files: Count | None = None
    file_size: Count | None = None
    cell_output: Count | None = None
    output: Count | None = None
    disk: Count | None = None
    shm: Count | None = None
    interrupt_grace: Amount = 2.0

    def __post_init__(self) -> None:
        """Raises TypeError for what is no number (units are for files and options), ValueError for one below zero."""
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
        """The value of one limit, ``None`` where it is unlimited."""
        value: int | float | None = getattr(self, name.value)
        return value

    def as_dict(self) -> dict[str, int | float | None]:
        """Every limit by its name, in bytes, seconds and counts."""
        return {name: getattr(self, name) for name in self.__struct_fields__}


class FolderUse(StrEnum):
    """What a notebook may do with its folder. Of a copy nothing comes back unless ``Isolation.write_back``."""

    WRITE = "write"
    READ = "read"
    COPY = "copy"


class RepositoryUse(StrEnum):
    """How much of the repository around the folder stays open behind the walls; ``closed``: no more than of any other place."""

    WRITE = "write"
    READ = "read"
    CLOSED = "closed"


class SystemCalls(StrEnum):
    """Whether system calls that no notebook needs are let through, refused with EPERM, or end the kernel (SIGSYS)."""

    ALL = "all"
    REFUSE = "refuse"
    KILL = "kill"


class Isolation(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a notebook may reach, beside its limits. The defaults wall off nothing.

    ``hide_home``: home directories are empty but for what the kernel's interpreter needs. ``read_only_system``: nothing may be
    written but the folder, ``writable``, and a /tmp, /dev/shm and home of its own. ``network``: other hosts; loopback always stays.
    ``own_processes``: process, ipc and host names of its own. ``listed_environment``: of the environment only what is known to be
    harmless, and ``env``. ``other_user``: as a user that owns nothing, where we are root. ``devices`` are paths below /dev.
    ``required``: where one of these walls does not stand nothing is run. ``repository``, ``writable`` and ``show`` (to be read) are places
    that stay open behind the walls.
    """

    hide_home: bool = False
    read_only_system: bool = False
    folder: FolderUse = FolderUse.WRITE
    repository: RepositoryUse = RepositoryUse.WRITE
    write_back: bool = True
    network: bool = True
    own_processes: bool = False
    listed_environment: bool = False
    system_calls: SystemCalls = SystemCalls.ALL
    other_user: bool = False
    required: bool = False
    env: tuple[str, ...] = ()
    writable: tuple[str, ...] = ()
    show: tuple[str, ...] = ()
    hide: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()


class Wall(StrEnum):
    """The walls that isolation may put up; the verdict says of each that was asked for what holds it."""

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
    """What holds one limit or wall: ``hard`` means the operating system's kernel does, with no way past it."""

    by: Mechanism
    hard: bool
    note: str = ""
