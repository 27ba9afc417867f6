"""The walls that bubblewrap puts up: from what is asked to its arguments. Pure; imports model.

bubblewrap (the program ``bwrap``, 0.5 or later) makes namespaces and mounts and then executes the init of ours (keeper/bwrap_init.py), which starts the
kernel. The order of mounts is the order of the arguments: first the system, then what hides parts of it, then what stays visible in there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from safe_exec.model.limits import FolderUse, Isolation
from safe_exec.records import dataclass

OLDEST = (0, 5, 0)
"""``--size`` and ``--perms`` for tmpfs."""
TMP_BYTES = 1 << 30
SHM_BYTES = 1 << 30
"""What a /tmp or /dev/shm of its own may hold where no limit says otherwise: memory in either case."""
SOCKETS_BYTES = 1 << 20
"""For what else a kernel may put beside its sockets, which take none."""
STICKY = "1777"
HIDDEN_SYSTEM = ("/run", "/var/tmp")  # noqa: S108 - hidden, not used
"""Sockets of other programs (docker, dbus, a session's agents) are in /run."""
NEEDED_RUN = ("/run/systemd/resolve", "/run/resolvconf", "/run/netns")
OWN_DEV = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")
"""What bubblewrap's own /dev has of the machine's."""
DEVICES = ("/dev/fuse", "/dev/kvm")


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """What the walls are put around: paths as the notebook sees them.

    ``folder`` is its working directory, ``runtime`` that of its sockets, with ``given`` in it to read (the connection file); ``homes`` are to be
    hidden, ``visible`` must be readable in them (interpreters, packages); ``files`` are those of ``Isolation.hide`` that are no directories.
    ``disk`` is a directory of limited size with ``folder``, ``tmp``, ``home`` and ``sockets`` in it, where there is one.
    """

    folder: Path
    runtime: Path
    homes: tuple[Path, ...]
    visible: tuple[Path, ...]
    files: frozenset[Path] = frozenset()
    given: tuple[Path, ...] = ()
    disk: Path | None = None


def arguments(
    program: str,
    isolation: Isolation,
    around: Surroundings,
    *,
    shm_bytes: int | None,
    root: bool,
) -> list[str]:
    """Bubblewrap's command line up to and with the ``--`` before the program that is to run inside."""
    return [
        program,
        *_namespaces(isolation),
        *_capabilities(isolation, root=root),
        *_system(isolation),
        *_own_mounts(isolation, around, shm_bytes),
        *_homes(isolation, around),
        *_inner(isolation, around),
        *_sockets(around),
        *_close(isolation, around),
        "--chdir", str(around.folder),
        "--",
    ]  # fmt: skip


def is_needed(isolation: Isolation, *, disk: bool, shm: bool) -> bool:
    """Whether anything is asked for that takes namespaces."""
    return (
        isolation.hide_home
        or isolation.read_only_system
        or isolation.own_processes
        or not isolation.network
        or isolation.folder is not FolderUse.WRITE
        or bool(isolation.hide)
        or disk
        or shm
    )


def _namespaces(isolation: Isolation) -> Iterator[str]:
    yield "--die-with-parent"
    if isolation.own_processes:
        yield from ("--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try", "--hostname", "sandbox")
        # The init of ours is the first process. bubblewrap's own would let others of its user write into its memory (/proc/1/mem): it runs
        # under no limit and no filter, and so would what they write there.
        yield "--as-pid-1"
    if not isolation.network:
        yield "--unshare-net"


def drops_capabilities(isolation: Isolation, *, root: bool) -> bool:
    """Whether the kernel is to have no capabilities; an ordinary user has none to begin with.

    Where no more is asked for than a file system of limited size, or no network, root stays what it is.
    """
    return root and (isolation.read_only_system or isolation.own_processes or isolation.other_user)


def _capabilities(isolation: Isolation, *, root: bool) -> Iterator[str]:
    """Root keeps what it takes to empty the bounding set and to become somebody else, until it has (capabilities.py)."""
    if drops_capabilities(isolation, root=root):
        yield from ("--cap-drop", "ALL", "--cap-add", "CAP_SETPCAP")
        if isolation.other_user:
            yield from ("--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID")


def _system(isolation: Isolation) -> Iterator[str]:
    if isolation.read_only_system:
        yield from ("--ro-bind", "/", "/", "--dev", "/dev")
        for device in isolation.devices:
            yield from ("--dev-bind", device, device)
    else:
        yield from ("--dev-bind", "/", "/")
    if isolation.own_processes:
        yield from ("--proc", "/proc")
    if isolation.read_only_system:
        # To root without any capability the files below are still its own: /proc/sys/kernel/core_pattern runs programs outside.
        for path in ("/proc/sys", "/proc/sysrq-trigger", "/proc/irq", "/proc/bus"):
            yield from ("--ro-bind-try", path, path)


def _own_mounts(isolation: Isolation, around: Surroundings, shm_bytes: int | None) -> Iterator[str]:
    """File systems of its own where the system may not be written; what other programs have in /run is hidden."""
    if isolation.read_only_system or around.disk is not None:
        yield from _tmpfs_or(around.disk and around.disk / "tmp", "/tmp", TMP_BYTES)  # noqa: S108
    if isolation.read_only_system or shm_bytes is not None:
        yield from ("--perms", STICKY, "--size", str(shm_bytes or SHM_BYTES), "--tmpfs", "/dev/shm")  # noqa: S108
    if isolation.read_only_system:
        for path in HIDDEN_SYSTEM:
            yield from ("--size", str(TMP_BYTES), "--tmpfs", path)
        if isolation.network:
            for path in NEEDED_RUN:
                yield from ("--ro-bind-try", path, path)


def _close(isolation: Isolation, around: Surroundings) -> Iterator[str]:
    """What only hides what was there is not to be written either: it would count for no limit. Last, when all is mounted in there."""
    own, others = (around.homes[:1], around.homes[1:]) if isolation.hide_home else ((), ())
    system = map(Path, ("/dev", *HIDDEN_SYSTEM)) if isolation.read_only_system else ()
    mounted_over = {*own, around.folder, *map(Path, isolation.writable), *around.files}
    for path in dict.fromkeys((*system, *others, *map(Path, isolation.hide))):
        if path not in mounted_over:
            yield from ("--remount-ro", str(path))


def shared_devices(isolation: Isolation, *, root: bool) -> tuple[str, ...]:
    """Devices in there that are the machine's own, and that root could give another mode, unless they are mounted read-only outside.

    That takes nothing from whoever uses them: a read-only mount keeps files from being written, not devices.
    """
    return (*OWN_DEV, *isolation.devices) if root and isolation.read_only_system else ()


def _tmpfs_or(source: Path | None, target: str, size: int) -> Iterator[str]:
    if source is not None:
        yield from ("--bind", str(source), target)
    else:
        yield from ("--perms", STICKY, "--size", str(size), "--tmpfs", target)


def _homes(isolation: Isolation, around: Surroundings) -> Iterator[str]:
    """Empty homes, in which what the interpreter needs stays readable; the first is the user's own, and can be written."""
    homes = around.homes if isolation.hide_home else ()
    hidden = _outer_first(
        [*homes, *(path for path in map(Path, isolation.hide) if not _lies_in(path, _inside(isolation, around)))]
    )
    for path in hidden:
        if around.disk is not None and path in homes[:1]:
            yield from ("--bind", str(around.disk / "home"), str(path))
        else:
            yield from _hide(path, isolation, around)
    covered = [*hidden, *((Path("/tmp"),) if isolation.read_only_system or around.disk else ())]  # noqa: S108
    shown = [path for path in _outermost(around.visible) if _lies_in(path, covered)]
    yield from _ways([*shown, around.folder, *map(Path, isolation.writable)], covered)
    for path in shown:
        yield from ("--ro-bind-try", str(path), str(path))


def _hide(path: Path, isolation: Isolation, around: Surroundings) -> Iterator[str]:
    if path in around.files:
        yield from ("--ro-bind", "/dev/null", str(path))
    else:
        yield from ("--perms", STICKY if isolation.other_user else "0755", "--size", str(TMP_BYTES), "--tmpfs", str(path))


def _inside(isolation: Isolation, around: Surroundings) -> list[Path]:
    """What is shown as it is, whatever lies around it: hiding a part of it has to come later."""
    return [around.folder, *map(Path, isolation.writable), *around.visible]


def _lies_in(path: Path, tops: Iterable[Path]) -> bool:
    return any(path.is_relative_to(top) for top in tops)


def _ways(paths: Sequence[Path], covered: Sequence[Path]) -> Iterator[str]:
    """The directories on the way to what stays visible below what is covered: bubblewrap would make them for their owner alone."""
    made: list[Path] = []
    for path in paths:
        for parent in reversed(path.parents):
            if parent not in made and any(parent != top and parent.is_relative_to(top) for top in covered):
                made.append(parent)
                yield from ("--perms", "0755", "--dir", str(parent))


def _outermost(paths: Sequence[Path]) -> list[Path]:
    """Paths that lie in no other one."""
    found: list[Path] = []
    for path in sorted(set(paths)):
        if not _lies_in(path, found):
            found.append(path)
    return found


def _outer_first(paths: Iterable[Path]) -> list[Path]:
    """The order in which no mount covers one that came before."""
    return sorted(dict.fromkeys(paths), key=lambda path: len(path.parts))


def _inner(isolation: Isolation, around: Surroundings) -> Iterator[str]:
    """The folder, what else may be written, and what is hidden in there: what says more of a path has the last word."""
    writable = list(map(Path, isolation.writable))
    hidden = [path for path in map(Path, isolation.hide) if _lies_in(path, _inside(isolation, around))]
    for path in _outer_first([around.folder, *writable, *hidden]):
        if path in hidden:
            yield from _hide(path, isolation, around)
        elif path in writable:
            yield from ("--bind", str(path), str(path))
        else:
            yield from _folder(isolation, around)


def _folder(isolation: Isolation, around: Surroundings) -> Iterator[str]:
    folder = str(around.folder)
    if isolation.folder is FolderUse.READ:
        yield from ("--ro-bind", folder, folder)
    elif around.disk is not None:
        yield from ("--bind", str(around.disk / "folder"), folder)
    else:
        yield from ("--bind", folder, folder)


def _sockets(around: Surroundings) -> Iterator[str]:
    """The directory in which the kernel binds its sockets is one of its own too, with nothing of the machine's below.

    What it writes there counts as what it writes elsewhere does. We reach it by a descriptor that the init hands
    out (keeper/bwrap_init.py). It covers the
    real one, in which the file system of limited size lies: seen there, that would show what is hidden in the folder.
    """
    yield from _tmpfs_or(around.disk and around.disk / "sockets", str(around.runtime), SOCKETS_BYTES)
    for path in around.given:
        yield from ("--ro-bind", str(path), str(path))
