"""Filters the system calls of a process, irrevocably (seccomp(2)).

Linux only; standard library only. The child calls :func:`install` right before it executes the
kernel. All its descendants inherit the filter, through fork and exec, and cannot remove it. The
runner sends the filter; sandbox/host/seccomp_policy.py explains its content.
"""

from __future__ import annotations

import ctypes
import os

# The number of seccomp(2) by the machine's name in uname(2).
SECCOMP = {"x86_64": 317, "aarch64": 277}
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_SET_MODE_FILTER = 1
# The size of struct sock_filter in bytes.
INSTRUCTION_BYTES = 8


def install(program: bytes) -> None:
    """Apply a filter to the calling thread and all its descendants, irrevocably.

    Raises OSError that names the step that failed.
    """
    # Without no_new_privs, a filter could mislead a set-user-id program. With it, sudo and its like
    # stay the user who called them.
    libc = ctypes.CDLL(None, use_errno=True)
    # Arguments of variadic functions: what is passed as an int would leave the upper half of the
    # register to chance.
    numbers = [ctypes.c_ulong(number) for number in (1, 0, 0, 0)]
    _check(libc.prctl(PR_SET_NO_NEW_PRIVS, *numbers), "set no_new_privs")
    # The pointer in sock_fprog owns nothing: both names must live until the call is over, when the
    # system has made its copy.
    buffer = ctypes.create_string_buffer(program, len(program))
    header = _SockFprog(len(program) // INSTRUCTION_BYTES, ctypes.addressof(buffer))
    number = ctypes.c_long(SECCOMP[os.uname().machine])
    result = libc.syscall(
        number, ctypes.c_long(SECCOMP_SET_MODE_FILTER), ctypes.c_long(0), ctypes.byref(header)
    )
    _check(result, "install the filter of system calls")


class _SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def _check(result: int, action: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot {action}: {os.strerror(number)}")
