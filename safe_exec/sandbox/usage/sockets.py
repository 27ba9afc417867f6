"""Network peers of a sandbox as seen from outside, and free ports for a kernel."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import random
import socket
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from safe_exec.keeper import procfs

# The agent reports the kernel's own connections. This module covers other kernels and programs that
# a kernel starts (``!curl``). It is polled, so connections that end between two polls are missed.

RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
# Lower ports may belong to well-known services.
LOWEST_PORT = 10_000
TRIED_PORTS = 100
TABLES = ("tcp", "tcp6", "udp", "udp6")
LISTENING = "0A"
_PREFIX, _SUFFIX = "socket:[", "]"


def peers(root: int, first: int) -> set[str]:
    """Return the hosts that sockets of the descendants of ``root`` are connected to.

    ``first`` is one of the descendants.
    """
    # Most network namespaces have no connection to another host. Then the descriptors need not be
    # read.
    remote = _remote(first)
    if not remote:
        return set()
    return {
        remote[inode]
        for pid in procfs.descendants(root)
        for inode in _inodes(pid)
        if inode in remote
    }


def _remote(pid: int) -> dict[str, str]:
    """Map the inodes of all sockets in a network namespace to their peers on other hosts."""
    addresses: dict[str, str] = {}
    for table in TABLES:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/net/{table}") as lines:
            next(lines, None)
            for line in lines:
                fields = line.split()
                address = address_of(fields[2].partition(":")[0])
                if fields[3] != LISTENING and address is not None:
                    addresses[fields[9]] = address
    return addresses


def listening(pid: int, targets: Iterable[str]) -> tuple[str, ...]:
    """Return the addresses on which ``targets`` (``socket:[...]``) listen for TCP connections."""
    inodes = {
        target[len(_PREFIX) : -len(_SUFFIX)] for target in targets if target.startswith(_PREFIX)
    }
    return tuple(address for inode, address in _listeners(pid) if inode in inodes) if inodes else ()


def listens(port: int) -> bool:
    """Whether a program in our own network namespace listens on a TCP port of loopback."""
    for _, address in _listeners("self"):
        host, _, number = address.rpartition(":")
        interface = ipaddress.ip_address(host.strip("[]"))
        if number == str(port) and (interface.is_loopback or interface.is_unspecified):
            return True
    return False


def _listeners(pid: int | str) -> Iterator[tuple[str, str]]:
    """Yield inode and ``address:port`` of the listening TCP sockets in a network namespace."""
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/net/{table}") as lines:
            next(lines, None)
            for line in lines:
                fields = line.split()
                if fields[3] == LISTENING:
                    host, _, port = fields[1].partition(":")
                    address = str(_address(host))
                    host_text = f"[{address}]" if ":" in address else address
                    yield fields[9], f"{host_text}:{int(port, 16)}"


def quiet_ports(count: int) -> list[int]:
    """Return free loopback ports for a kernel to listen on; empty if there are not enough."""
    # Port 0 would give a port in the range of outgoing connections (``ip_local_port_range``,
    # ip(7)). Between our choice and the kernel's bind any program that connects somewhere may get
    # the same port, and the kernel would end before it is ready. So choose ports below that range.
    with contextlib.suppress(OSError, ValueError):
        first = int(RANGE.read_text().split()[0])
        ports: list[int] = []
        with contextlib.ExitStack() as stack:
            room = range(LOWEST_PORT, max(LOWEST_PORT, first))
            for port in random.sample(room, min(TRIED_PORTS, len(room))):
                sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
                with contextlib.suppress(OSError):
                    sock.bind(("127.0.0.1", port))
                    ports.append(port)
                if len(ports) == count:
                    return ports
    return []


def address_of(text: str) -> str | None:
    """Return the address of a row of /proc/net/tcp; ``None`` for an address of this machine."""
    address = _address(text)
    return None if address.is_loopback or address.is_unspecified else str(address)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Parse an address of /proc/net/tcp; an IPv4 address mapped into IPv6 becomes IPv4."""
    # The address is printed as 32-bit words in host byte order.
    groups = [int(text[at : at + 8], 16) for at in range(0, len(text), 8)]
    address = ipaddress.ip_address(b"".join(struct.pack("=I", group) for group in groups))
    mapped: ipaddress.IPv4Address | None = getattr(address, "ipv4_mapped", None)
    return mapped or address


def _inodes(pid: int) -> set[str]:
    inodes: set[str] = set()
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(entry.path)
                if target.startswith(_PREFIX):
                    inodes.add(target[len(_PREFIX) : -len(_SUFFIX)])
    return inodes
