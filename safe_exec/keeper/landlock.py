"""Landlock: walls that any process can put around itself, for hosts without namespaces.

Linux only; standard library only.

Theory of operation (landlock(7); kernel documentation userspace-api/landlock). A ruleset names the
kinds of access that it handles, and forbids them everywhere except beneath the paths of its rules.
:func:`restrict` makes the ruleset, adds the rules, and applies it to the calling thread and all its
descendants, irrevocably. The child calls it right before it executes the kernel.

Each version of Landlock (ABI) adds kinds of access; :func:`describe` tells which walls follow:

=== ===================================================================================
ABI new
=== ===================================================================================
1   read, execute, write, make and remove files; moving them to other directories fails
2   move files between writable directories (REFER)
3   truncate(2); with older versions any file that the user may write to can be emptied
4   TCP: bind and connect
5   ioctl(2) on devices that are opened from then on
6   abstract Unix sockets of processes outside, and signals to them
7   options of the audit log, which are not used here
=== ===================================================================================

No ABI up to 7 restricts reading and changing a file's attributes (stat, access; chmod, chown,
utime, setxattr), chdir, Unix sockets with a path, UDP, and descriptors that are already open. A
hidden tree can be read at a second mount, a hidden file at a second hard link. A restricted process
can mount nothing and trace no process outside (ptrace(2)). So it cannot open /proc/PID/mem, root
and cwd of those, nor environ and maps; the last two are open to root on newer systems
(CAP_PERFMON).

A rule opens a whole tree, without exceptions. To hide one directory, :func:`all_but` opens
everything beside it instead: the directories above the hidden one can be passed through but not
listed, and files that are added to them later cannot be read. Writable trees are readable, even
beneath hidden ones.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

# linux/landlock.h: LANDLOCK_ACCESS_FS_*, in the order of their bits
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE, MAKE_CHAR, MAKE_DIR = (
    1 << bit for bit in range(8)
)
MAKE_REG, MAKE_SOCK, MAKE_FIFO, MAKE_BLOCK, MAKE_SYM, REFER, TRUNCATE, IOCTL_DEV = (
    1 << bit for bit in range(8, 16)
)
BIND_TCP, CONNECT_TCP = 1, 2
SCOPE_ABSTRACT_UNIX_SOCKET, SCOPE_SIGNAL = 1, 2

# The rights that ABI 1 knows: all bits below REFER.
FIRST = REFER - 1
READ = EXECUTE | READ_FILE | READ_DIR
# Root could make a device file of the disk that a hidden directory lies on.
NEVER = MAKE_CHAR | MAKE_BLOCK
# The rights that a rule for anything but a directory may contain.
OF_A_FILE = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV

# The same numbers on every architecture that we run on.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
CREATE_RULESET_VERSION = 1
RULE_PATH_BENEATH = 1
PR_SET_NO_NEW_PRIVS = 38


class Handled(NamedTuple):
    """struct landlock_ruleset_attr: kinds of access that need a rule to be allowed."""

    files: int
    net: int
    scoped: int


def describe(abi: int) -> dict[str, bool]:
    """Return the walls that a version of Landlock can raise."""
    since = {
        "files": 1,
        "truncation": 3,
        "tcp": 4,
        "devices": 5,
        "abstract_sockets": 6,
        "signals": 6,
    }
    return {wall: abi >= first for wall, first in since.items()}


def handled(abi: int, *, tcp: bool | None) -> Handled:
    """Return the access rights that Landlock restricts: all that version ``abi`` knows."""
    files = (
        FIRST
        | (REFER if abi >= 2 else 0)  # noqa: PLR2004
        | (TRUNCATE if abi >= 3 else 0)  # noqa: PLR2004
        | (IOCTL_DEV if abi >= 5 else 0)  # noqa: PLR2004
    )
    walls = describe(abi)
    net = BIND_TCP | CONNECT_TCP if walls["tcp"] and tcp is False else 0
    return Handled(files, net, SCOPE_ABSTRACT_UNIX_SOCKET | SCOPE_SIGNAL if walls["signals"] else 0)


def rules(abi: int, *, readable: Iterable[str], writable: Iterable[str]) -> dict[str, int]:
    """Return the rights that are allowed beneath each path."""
    known_rights = handled(abi, tcp=None).files
    return {
        **dict.fromkeys(readable, READ & known_rights),
        **dict.fromkeys(writable, known_rights & ~NEVER),
    }


def all_but(
    hidden: Sequence[str],
    *,
    listdir: Callable[[str], list[str]] = os.listdir,
    islink: Callable[[str], bool] = os.path.islink,
    resolve: Callable[[str], str] = os.path.realpath,
) -> list[str]:
    """Return the paths to open so that everything but the hidden trees can be read.

    Only directories above a hidden tree are listed.
    """
    # Links are left out: following one needs no right, and what it leads to is opened for itself,
    # or hidden. A rule for a link would open its target, which may be what is to be hidden.
    closed = {"/" + resolve(path).lstrip("/") for path in hidden}
    from pathlib import PurePosixPath

    above = {str(parent) for path in closed for parent in PurePosixPath(path).parents}
    paths, todo = [], ["/"]
    while todo:
        path = todo.pop()
        if path in closed:
            continue
        if path not in above:
            paths.append(path)
            continue
        try:
            children = [os.path.join(path, name) for name in listdir(path)]
        except OSError:  # what cannot be listed stays closed altogether
            continue
        todo += [child for child in children if not islink(child)]
    return sorted(paths)


# --- the calls ------------------------------------------------------------------------------------


class _RulesetAttr(ctypes.Structure):
    # Older systems take the longer structure, so long as what they do not know is zero.
    _fields_ = (("files", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneathAttr(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def abi() -> int:
    """Return the version of Landlock of the running system, 0 without Landlock."""
    try:
        return _call(CREATE_RULESET, None, 0, CREATE_RULESET_VERSION, action="ask for Landlock")
    except OSError:
        return 0


def restrict(*, readable: Iterable[str], writable: Iterable[str], tcp: bool | None) -> None:
    """Restrict this process irrevocably; ``tcp=False`` refuses TCP, otherwise TCP stays as it is.

    Raises OSError that names the step that failed.
    """
    # Paths are followed where they are links. Those that are missing, or that we cannot get at, are
    # left out: that forbids more, not less.
    version = abi()
    if version == 0:
        raise OSError(errno.EOPNOTSUPP, "cannot wall off files: the system has no Landlock")
    attr = _RulesetAttr(*handled(version, tcp=tcp))
    ruleset = _call(
        CREATE_RULESET, ctypes.byref(attr), ctypes.sizeof(attr), 0, action="make a Landlock ruleset"
    )
    try:
        for path, access in rules(version, readable=readable, writable=writable).items():
            _allow(ruleset, path, access)
        _no_new_privileges()
        _call(RESTRICT_SELF, ruleset, 0, action="put up the walls of Landlock")
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, access: int) -> None:
    try:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (
            errno.EMFILE,
            errno.ENFILE,
            errno.ENOMEM,
        ):  # not the path's fault: a rule would be missing
            raise OSError(error.errno, f"cannot open {path}: {error.strerror}") from error
        return
    try:
        attr = _PathBeneathAttr(access if os.path.isdir(parent) else access & OF_A_FILE, parent)
        _call(
            ADD_RULE,
            ruleset,
            RULE_PATH_BENEATH,
            ctypes.byref(attr),
            0,
            action=f"allow what is beneath {path}",
        )
    finally:
        os.close(parent)


def _no_new_privileges() -> None:
    """Set no_new_privs, without which an ordinary user may not restrict itself (prctl(2))."""
    # Landlock requires no_new_privs of ordinary users: walls could mislead a set-user-id program.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, *(ctypes.c_ulong(number) for number in (1, 0, 0, 0))) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot set no_new_privs: {os.strerror(number)}")


def _call(number: int, *arguments: object, action: str) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    # Arguments of a variadic function: an int would leave the upper half of its register to chance.
    wide = [
        ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments
    ]
    result: int = libc.syscall(ctypes.c_long(number), *wide)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot {action}: {os.strerror(code)}")
    return result
