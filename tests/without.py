"""Takes system calls away from a command: ``python without.py clone3:ENOSYS,namespaces:EPERM command ...``.

A filter (seccomp(2)) that goes through exec to all that comes of it, as in containers, sandboxes and on kernels older than a call.
``namespaces`` stands for whatever makes or enters one: unshare, setns, mount, clone with such a flag, and clone3, whose flags no filter
sees (ENOSYS, as Docker's does). Standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

# asm/unistd_64.h and asm-generic/unistd.h; from 424 on they are the same.
CALLS = {
    "clone3": (435, 435), "close_range": (436, 436), "openat2": (437, 437), "faccessat2": (439, 439), "epoll_pwait2": (441, 441),
    "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438), "landlock_create_ruleset": (444, 444),
    "landlock_add_rule": (445, 445), "landlock_restrict_self": (446, 446), "memfd_create": (319, 279), "tee": (276, 77), "splice": (275, 76),
    "copy_file_range": (326, 285), "process_vm_readv": (310, 270), "statx": (332, 291), "seccomp": (317, 277), "unshare": (272, 97),
    "setns": (308, 268), "mount": (165, 40),
}  # fmt: skip
CLONE = (56, 220)
NAMESPACES = 0x7E020000
COLUMN = {"x86_64": 0, "aarch64": 1}[platform.machine()]
LOAD, EQUAL, ANY, RETURN = 0x20, 0x15, 0x45, 0x06
NUMBER_AT, FIRST_ARGUMENT_AT = 0, 16
ALLOW, REFUSE = 0x7FFF0000, 0x00050000


def program(words: str) -> list[tuple[int, int, int, int]]:
    """Rows of a classic BPF program (code, jump if true, jump if false, value)."""
    rows = [(LOAD, 0, 0, NUMBER_AT)]
    for word in words.split(","):
        name, _, code = word.partition(":")
        if name == "namespaces":
            for call in ("unshare", "setns", "mount"):
                rows += refused(CALLS[call][COLUMN], code)
            rows += refused(CALLS["clone3"][COLUMN], "ENOSYS")
            rows += [
                (EQUAL, 0, 4, CLONE[COLUMN]),
                (LOAD, 0, 0, FIRST_ARGUMENT_AT),
                (ANY, 0, 1, NAMESPACES),
            ]
            rows += [(RETURN, 0, 0, REFUSE | getattr(errno, code)), (RETURN, 0, 0, ALLOW)]
        else:
            rows += refused(CALLS[name][COLUMN], code)
    return [*rows, (RETURN, 0, 0, ALLOW)]


def refused(number: int, code: str) -> list[tuple[int, int, int, int]]:
    """Two rows: this call fails."""
    return [(EQUAL, 0, 1, number), (RETURN, 0, 0, REFUSE | getattr(errno, code))]


def install(words: str) -> None:
    """Put this process under the filter, for good."""
    rows = program(words)
    text = b"".join(struct.pack("HBBI", *row) for row in rows)
    buffer = ctypes.create_string_buffer(text, len(text))
    described = struct.pack("HxxxxxxP", len(rows), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((38, 1, 0, 0, 0), (22, 2, ctypes.c_char_p(described), 0, 0)):
        if libc.prctl(*arguments) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    install(sys.argv[1])
    os.execvp(sys.argv[2], sys.argv[2:])
