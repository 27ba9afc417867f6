"""Builds bubblewrap's arguments from the requested isolation. Pure; imports model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from safe_exec.model.limits import FolderUse, Isolation

# bubblewrap (the program ``bwrap``, 0.5 or later) makes namespaces and mounts and then executes our
# init (keeper/bwrap_init.py), which starts the kernel. Mounts are made in the order of the
# arguments: first the system, then the covers that hide parts of it, then the openings in the
# covers.

# The first version with ``--size`` and ``--perms`` for tmpfs.
OLDEST = (0, 5, 0)
# The default sizes of the sandbox's own /tmp and /dev/shm. Both use memory.
TMP_BYTES = 1 << 30
SHM_BYTES = 1 << 30
# The size of a directory that only leads to an opening; nothing is written to it.
PARENT_BYTES = 1 << 20
# The size of the directory of the kernel's sockets, which themselves need no space.
SOCKETS_BYTES = 1 << 20
STICKY = "1777"
# Sockets of other programs (docker, dbus, a session's agents) are in /run.
HIDDEN_SYSTEM = ("/run", "/var/tmp")  # noqa: S108 - hidden, not used
NEEDED_RUN = ("/run/systemd/resolve", "/run/resolvconf", "/run/netns")
# The devices of the machine that bubblewrap's own /dev contains.
OWN_DEV = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")


class SandboxPaths(Struct, frozen=True, kw_only=True):
    """The paths that the walls surround or open, as the notebook sees them.

    ``folder`` is the working directory, ``runtime`` the directory of the sockets, with
    ``read_only`` files in it (the connection file). ``homes`` are to be hidden; ``visible`` paths
    (interpreters, packages) must be readable in them. ``files`` are the paths of ``Isolation.hide``
    that are not directories. ``disk`` is the directory of limited size, if any, with ``folder``,
    ``tmp``, ``home`` and ``sockets`` in it. ``repository`` stays open around the folder, writable
    if ``repository_is_writable``; ``interpreters`` in it or in the folder stay read-only. ``links``
    are the links among ``Isolation.writable`` and ``show``, whose targets are listed there too.
    """

    folder: Path
    runtime: Path
    homes: tuple[Path, ...]
    visible: tuple[Path, ...]
    files: frozenset[Path] = frozenset()
    read_only: tuple[Path, ...] = ()
    disk: Path | None = None
    repository: Path | None = None
    repository_is_writable: bool = False
    interpreters: tuple[Path, ...] = ()
    links: frozenset[Path] = frozenset()


def arguments(
    program: str,
    isolation: Isolation,
    view: SandboxPaths,
    *,
    shm_bytes: int | None,
    root: bool,
) -> list[str]:
    """Return bubblewrap's command line up to the ``--`` before the program inside."""
    covers = _covers(isolation, view, has_shm=shm_bytes is not None)
    openings = _openings(isolation, view, covers)
    ways = _ways(openings, covers)
    return [
        program,
        *_namespaces(isolation),
        *_capabilities(isolation, root=root),
        *_system(isolation),
        *_own_mounts(isolation, view, shm_bytes),
        *_places(isolation, view, openings, ways),
        *_sockets(view),
        *_close(isolation, view, [path for path, is_closed in ways.items() if is_closed]),
        # Another user than bubblewrap's may be needed to enter the folder, so the kernel's process
        # changes to it itself.
        "--chdir", "/",
        "--",
    ]  # fmt: skip


def is_needed(isolation: Isolation, *, disk: bool, shm: bool) -> bool:
    """Tell whether bubblewrap is needed: a requested wall or limit needs namespaces."""
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
    # Without --die-with-parent bubblewrap would outlive a keeper that was killed with SIGKILL.
    yield "--die-with-parent"
    if isolation.own_processes:
        yield from (
            "--unshare-pid",
            "--unshare-ipc",
            "--unshare-uts",
            "--unshare-cgroup-try",
            "--hostname",
            "sandbox",
        )
        # Our init becomes process 1. bubblewrap's own init runs without limits and filters, and
        # processes of the same user could write code into its memory (/proc/1/mem).
        yield "--as-pid-1"
    if not isolation.network:
        # bubblewrap brings up the loopback interface, the only one in the new namespace.
        yield "--unshare-net"


def drops_capabilities(isolation: Isolation, *, root: bool) -> bool:
    """Whether the kernel must lose root's capabilities; ordinary users have none anyway."""
    # If only a limited file system or no network was requested, root stays root.
    return root and (isolation.read_only_system or isolation.own_processes or isolation.other_user)


def _capabilities(isolation: Isolation, *, root: bool) -> Iterator[str]:
    # Keep the capabilities that are needed to empty the bounding set (CAP_SETPCAP) and to become
    # another user. keeper/capabilities.py drops them afterwards.
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
        # Root owns these files and can write to them without any capability. For example,
        # /proc/sys/kernel/core_pattern would run a program outside the sandbox.
        for path in ("/proc/sys", "/proc/sysrq-trigger", "/proc/irq", "/proc/bus"):
            yield from ("--ro-bind-try", path, path)


def _own_mounts(isolation: Isolation, view: SandboxPaths, shm_bytes: int | None) -> Iterator[str]:
    """Yield the options for the sandbox's own file systems; /run is hidden."""
    if isolation.read_only_system or view.disk is not None:
        yield from _tmpfs_or(view.disk and view.disk / "tmp", "/tmp", TMP_BYTES)  # noqa: S108
    if isolation.read_only_system or shm_bytes is not None:
        yield from _tmpfs_or(None, "/dev/shm", shm_bytes or SHM_BYTES)  # noqa: S108
    if isolation.read_only_system:
        for path in HIDDEN_SYSTEM:
            yield from ("--size", str(TMP_BYTES), "--tmpfs", path)
        if isolation.network:
            for path in NEEDED_RUN:
                yield from ("--ro-bind-try", path, path)


def _close(isolation: Isolation, view: SandboxPaths, ways: Sequence[Path]) -> Iterator[str]:
    """Yield the options that make covered directories, and those made in them, read-only."""
    # Files written to a cover would count against no limit. These options come last, since
    # bubblewrap cannot make mount points in a read-only directory.
    own, others = (view.homes[:1], view.homes[1:]) if isolation.hide_home else ((), ())
    system = map(Path, ("/dev", *HIDDEN_SYSTEM)) if isolation.read_only_system else ()
    mounted_over = {*own, view.folder, *map(Path, isolation.writable), *view.files}
    for path in dict.fromkeys((*system, *others, *map(Path, isolation.hide))):
        if path not in mounted_over:
            yield from ("--remount-ro", str(path))
    for path in ways:
        yield from ("--remount-ro", str(path))


def shared_devices(isolation: Isolation, *, root: bool) -> tuple[str, ...]:
    """Return the machine's own devices that must be mounted read-only for the sandbox."""
    # Root inside could change their modes. A read-only mount prevents that, but still lets programs
    # write to the device itself.
    return (*OWN_DEV, *isolation.devices) if root and isolation.read_only_system else ()


def _tmpfs_or(source: Path | None, target: str, size: int) -> Iterator[str]:
    if source is not None:
        yield from ("--bind", str(source), target)
    else:
        yield from ("--perms", STICKY, "--size", str(size), "--tmpfs", target)


# --- covered places, and openings in them ---------------------------------------------------------

# For each open path its mount: option, source, target.
Openings = Mapping[Path, tuple[str, ...]]


class Cover(Struct, frozen=True, kw_only=True):
    """A directory that the kernel sees as empty.

    ``stays_writable`` is set for the sandbox's own home, /tmp and /dev/shm.
    """

    path: Path
    stays_writable: bool = False
    is_home: bool = False


def _covers(isolation: Isolation, view: SandboxPaths, *, has_shm: bool) -> tuple[Cover, ...]:
    """Return every covered place, outer places first."""
    homes = view.homes if isolation.hide_home else ()
    covers = [Cover(path=path, stays_writable=path == homes[0], is_home=True) for path in homes]
    covers += [
        Cover(path=path)
        for path in map(Path, isolation.hide)
        if not _lies_in(path, _left_open(isolation, view))
    ]
    if isolation.read_only_system or view.disk is not None:
        covers.append(Cover(path=Path("/tmp"), stays_writable=True))  # noqa: S108
    if isolation.read_only_system or has_shm:
        covers.append(Cover(path=Path("/dev/shm"), stays_writable=True))  # noqa: S108
    if isolation.read_only_system:
        covers += [Cover(path=Path(path)) for path in HIDDEN_SYSTEM]
    return tuple(sorted(covers, key=lambda cover: len(cover.path.parts)))


def _left_open(isolation: Isolation, view: SandboxPaths) -> list[Path]:
    """Return the paths that stay open even inside a covered directory."""
    # ``Isolation.hide`` can name parts of them, which are covered afterwards.
    repository = [] if view.repository is None else [view.repository]
    return [
        view.folder,
        *repository,
        *map(Path, isolation.writable),
        *map(Path, isolation.show),
        *view.visible,
    ]


def _openings(isolation: Isolation, view: SandboxPaths, covers: Sequence[Cover]) -> Openings:
    """Return the mounts of the open paths; of two for the same path the later one counts."""
    covered = [cover.path for cover in covers]
    around_folder = [view.folder, *([] if view.repository is None else [view.repository])]
    openings: dict[Path, tuple[str, ...]] = {}
    for path in _outermost(view.visible):
        if _lies_in(path, covered) and not _lies_in(
            path, [*around_folder, *map(Path, isolation.writable)]
        ):
            openings[path] = ("--ro-bind-try", str(path), str(path))
    for path in map(Path, isolation.show):
        if _lies_in(path, covered) and not _lies_in(path, around_folder):
            openings[path] = ("--ro-bind", str(path), str(path))
    if view.repository is not None:
        bind = "--bind" if view.repository_is_writable else "--ro-bind"
        openings[view.repository] = (bind, str(view.repository), str(view.repository))
    openings[view.folder] = _folder(isolation, view)
    for path in _protected(isolation, view):
        openings[path] = ("--ro-bind-try", str(path), str(path))
    for path in map(Path, isolation.writable):
        openings[path] = ("--bind", str(path), str(path))
    # A link outside of all covers, or within an opening, works by itself; and nothing can be
    # mounted on a link.
    passable = [
        link
        for link in view.links
        if not _lies_in(link, covered) or _lies_in(link.parent, openings)
    ]
    return {path: mount for path, mount in openings.items() if path not in passable}


def _folder(isolation: Isolation, view: SandboxPaths) -> tuple[str, ...]:
    folder = str(view.folder)
    if isolation.folder is FolderUse.READ:
        return ("--ro-bind", folder, folder)
    return ("--bind", str(view.disk / "folder") if view.disk is not None else folder, folder)


def _protected(isolation: Isolation, view: SandboxPaths) -> list[Path]:
    """Return the interpreters in the folder or repository, which stay read-only."""
    # safe-exec itself may run from one of them, outside of all walls, and imports modules until its
    # end. So a notebook must not change them. Files in a copy of the folder may change, since no
    # process outside runs from it.
    tops = [view.repository] if view.repository is not None and view.repository_is_writable else []
    tops += [view.folder] if view.disk is None and isolation.folder is FolderUse.WRITE else []
    return [
        path
        for path in _outermost(view.interpreters if isolation.read_only_system else ())
        if any(path != top and path.is_relative_to(top) for top in tops)
        and not view.folder.is_relative_to(path)
        and not (view.disk is not None and path.is_relative_to(view.folder))
    ]


def _hide(path: Path, isolation: Isolation, view: SandboxPaths) -> Iterator[str]:
    if path in view.files:
        yield from ("--ro-bind", "/dev/null", str(path))
    else:
        yield from (
            "--perms",
            STICKY if isolation.other_user else "0755",
            "--size",
            str(TMP_BYTES),
            "--tmpfs",
            str(path),
        )


def _lies_in(path: Path, tops: Iterable[Path]) -> bool:
    return any(path.is_relative_to(top) for top in tops)


def _ways(openings: Openings, covers: Sequence[Cover]) -> Mapping[Path, bool]:
    """Return the directories that lead from a covered directory to a mount in it.

    The value of a directory is true if it must be made read-only.
    """
    # A file written into such a directory would be lost after the run, although a directory of that
    # name outside exists and a user would expect it there. So in a writable cover the first
    # directory on the way gets its own mount, which is made read-only. An exception are directories
    # of a home whose names begin with a dot (``~/.local``): programs keep settings and caches there
    # and fail without write access, and losing those files harms nobody.
    ways: dict[Path, bool] = {}
    for path in (*openings, *(cover.path for cover in covers)):
        cover = next(
            (
                cover
                for cover in reversed(covers)
                if path != cover.path and path.is_relative_to(cover.path)
            ),
            None,
        )
        if cover is None or any(
            path != other and _lies_in(path, [other]) and _lies_in(other, [cover.path])
            for other in openings
        ):
            continue
        parents = [
            parent
            for parent in reversed(path.parents)
            if parent != cover.path and parent.is_relative_to(cover.path)
        ]
        for parent in parents:
            is_dotted = cover.is_home and parent.name.startswith(".")
            is_first = parent == parents[0] and cover.stays_writable and not is_dotted
            ways[parent] = ways.get(parent, False) or is_first
    return ways


def _places(
    isolation: Isolation, view: SandboxPaths, openings: Openings, ways: Mapping[Path, bool]
) -> Iterator[str]:
    """Yield the mounts of covered directories, of the directories in them, and of open paths."""
    # Outer paths come first, so that no mount covers an earlier one. The more specific path wins: a
    # part of an opening can be hidden, and a part of a hidden place opened.
    homes = view.homes if isolation.hide_home else ()
    hidden = {*homes, *map(Path, isolation.hide)}
    for path in _outer_first([*ways, *openings, *hidden]):
        if view.disk is not None and path in homes[:1]:
            yield from ("--bind", str(view.disk / "home"), str(path))
        elif path in hidden and (path not in openings or str(path) in isolation.hide):
            yield from _hide(path, isolation, view)
        elif path not in openings:
            # By default bubblewrap makes directories with mode 0700, which another user inside
            # could not enter.
            options = ("--size", str(PARENT_BYTES), "--tmpfs") if ways[path] else ("--dir",)
            yield from ("--perms", "0755", *options, str(path))
        if path in openings and str(path) not in isolation.hide:
            yield from openings[path]


def _outermost(paths: Sequence[Path]) -> list[Path]:
    """Return the paths that are not below another one."""
    outermost: list[Path] = []
    for path in sorted(set(paths)):
        if not _lies_in(path, outermost):
            outermost.append(path)
    return outermost


def _outer_first(paths: Iterable[Path]) -> list[Path]:
    """Sort paths so that no mount covers an earlier one."""
    return sorted(dict.fromkeys(paths), key=lambda path: len(path.parts))


def _sockets(view: SandboxPaths) -> Iterator[str]:
    """Yield the mount for the kernel's sockets."""
    # Files written there count against the disk limit. The runner reaches the directory by a
    # descriptor that the init hands out (keeper/bwrap_init.py). The mount covers the real
    # directory, which contains the limited file system and would show hidden parts of the folder.
    yield from _tmpfs_or(view.disk and view.disk / "sockets", str(view.runtime), SOCKETS_BYTES)
    for path in view.read_only:
        yield from ("--ro-bind", str(path), str(path))
