"""Behaviour that jupyter_client's local provisioner and safe-exec's must share.

Source: jupyter_client's ``provisioning/local_provisioner.py`` and ``launcher.py``. Imports
jupyter_client and zmq.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import IO, Any, Self

import zmq
from jupyter_client.localinterfaces import is_local_ip, local_ips

PORTS = ("shell_port", "iopub_port", "stdin_port", "hb_port", "control_port")
ENCRYPTED_TRANSPORTS = ("tcp", "ipc")


def refuse_other_machines(manager: Any) -> None:
    """Raise RuntimeError if a manager's address does not belong to this machine."""
    if manager.transport == "tcp" and not is_local_ip(manager.ip):
        raise RuntimeError(
            f"Can only launch a kernel on a local interface. This one is not: {manager.ip}. "
            "Make sure"
            " that the '*_address' attributes are configured properly. Currently valid "
            "addresses are:"
            f" {local_ips()}"
        )


def give_keys(manager: Any, wish: str | None) -> None:
    """Create a manager's CurveZMQ keys if its policy asks for them and the kernel supports them.

    ``wish`` is this start's policy, ``None`` for the manager's own. Raises RuntimeError if
    encryption is required and the transport has none.
    """
    # Managers before jupyter_client 8.9 have no policy.
    policy_of = getattr(manager, "_transport_encryption_policy", None)
    if policy_of is None:
        return
    policy = policy_of(wish) if wish is not None else policy_of()
    if policy == "required" and manager.transport not in ENCRYPTED_TRANSPORTS:
        raise RuntimeError(
            "transport_encryption='required' is only supported when transport is 'tcp' or 'ipc'."
        )
    if policy not in ("auto", "required") or manager.transport not in ENCRYPTED_TRANSPORTS:
        return
    takes_keys = policy == "required" or manager._kernel_supports_curve_encryption()  # noqa: SLF001
    # Keep existing keys: the connection file, which clients have read, also outlives a restart.
    if takes_keys and manager.curve_publickey is None:
        manager.curve_publickey, manager.curve_secretkey = zmq.curve_keypair()


def demand_command(cmd: Sequence[str], env: Mapping[str, str], cwd: str) -> None:
    """Raise subprocess.Popen's error for an unusable directory or command."""
    # Callers know these exceptions from jupyter_client's local provisioner. The keeper reports a
    # failed exec as text only.
    if not os.path.isdir(cwd):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), cwd)
    path = os.path.join(cwd, cmd[0]) if os.path.dirname(cmd[0]) else cmd[0]
    if shutil.which(path, path=env.get("PATH", os.defpath)) is not None:
        return
    if os.path.dirname(cmd[0]) and os.path.exists(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), cmd[0])
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), cmd[0])


class standard_streams:  # noqa: N801 - used as a function
    """Opens a process's stdout and stderr, given in the forms that subprocess.Popen takes.

    A context manager: ``descriptors`` are open within it, and ``readers()`` returns our ends of the
    pipes.
    """

    def __init__(self, stdout: Any, stderr: Any) -> None:
        self._wishes = {"stdout": stdout, "stderr": stderr}
        self._owned: list[int] = []
        self._ours: dict[str, IO[bytes]] = {}
        self.descriptors: dict[str, int] = {}

    def __enter__(self) -> Self:
        try:
            for number, (name, wish) in enumerate(self._wishes.items(), 1):
                self.descriptors[name] = self._descriptor(name, number, wish)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _descriptor(self, name: str, number: int, wish: Any) -> int:
        if wish is None:
            return number if _is_open(number) else self._null()
        if wish == subprocess.STDOUT:
            return self.descriptors["stdout"]
        if wish == subprocess.DEVNULL:
            return self._null()
        if wish == subprocess.PIPE:
            reader, writer = os.pipe2(os.O_CLOEXEC)
            self._owned.append(writer)
            self._ours[name] = os.fdopen(reader, "rb")
            return writer
        return wish if isinstance(wish, int) else int(wish.fileno())

    def _null(self) -> int:
        self._owned.append(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC))
        return self._owned[-1]

    def readers(self) -> tuple[IO[bytes] | None, IO[bytes] | None]:
        """Return our ends of the pipes for stdout and stderr; the caller closes them."""
        ours, self._ours = self._ours, {}
        return ours.get("stdout"), ours.get("stderr")

    def __exit__(self, *_: object) -> None:
        for reader in self._ours.values():
            reader.close()
        for fd in self._owned:
            os.close(fd)
        self._owned.clear()


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
