"""Gives up all capabilities irrevocably. Linux only; standard library only.

A change of the user id from root clears the permitted, effective and ambient sets, but neither the
inheritable nor the bounding set (capabilities(7)): with those, a program file that carries
capabilities could give some back. Root that stays root gets all of the bounding set at its next
execution.
"""

from __future__ import annotations

import ctypes
import errno
import os

PR_CAPBSET_READ, PR_CAPBSET_DROP = 23, 24
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
CAP_SETGID, CAP_SETUID = 6, 7
VERSION_3 = 0x20080522
HIGHEST = 64


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def give_up(*, for_uid: int | None) -> None:
    """Empty every capability set of the calling thread.

    ``for_uid`` is the user that it will become. Raises OSError that names the step that failed. The
    bounding set can only be emptied with CAP_SETPCAP; in a container without it the set stays, and
    no_new_privs, which comes with the filter of system calls, keeps an execution from giving any of
    it back.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    _check(
        _prctl(libc, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL),
        "clear the ambient capabilities",
        but=(errno.EINVAL,),
    )
    for number in range(HIGHEST):
        bounding = _prctl(libc, PR_CAPBSET_READ, number)
        if bounding < 0:
            # This capability is beyond the last one that the system knows.
            break
        if bounding:
            _check(
                _prctl(libc, PR_CAPBSET_DROP, number),
                f"drop capability {number}",
                but=(errno.EPERM,),
            )
    if for_uid is not None:
        _set(libc, 1 << CAP_SETUID | 1 << CAP_SETGID)
        os.setgroups([])
        os.setresgid(for_uid, for_uid, for_uid)
        os.setresuid(for_uid, for_uid, for_uid)
    _set(libc, 0)


def _set(libc: ctypes.CDLL, capabilities: int) -> None:
    """Make only ``capabilities`` effective and permitted, and none inheritable."""
    sets = (_Sets * 2)(_Sets(capabilities, capabilities, 0), _Sets(0, 0, 0))
    _check(libc.capset(ctypes.byref(_Header(VERSION_3, 0)), sets), "give up capabilities")


def _prctl(libc: ctypes.CDLL, option: int, argument: int) -> int:
    return int(libc.prctl(option, *map(ctypes.c_ulong, (argument, 0, 0, 0))))


def _check(result: int, action: str, but: tuple[int, ...] = ()) -> None:
    number = ctypes.get_errno()
    if result != 0 and number not in but:
        raise OSError(number, f"cannot {action}: {os.strerror(number)}")
