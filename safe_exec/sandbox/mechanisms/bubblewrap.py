"""The walls that bubblewrap puts up: from what is asked to its arguments. Pure; imports model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from safe_exec.model.limits import FolderUse, Isolation

# bubblewrap (the program ``bwrap``, 0.5 or later) makes namespaces and mounts and then executes the
# init of ours (keeper/bwrap_init.py), which starts the kernel. The order of mounts is the order of
# the arguments: first the system, then what hides parts of it, then what stays visible in there.

# ``--size`` and ``--perms`` for tmpfs.
OLDEST = (0, 5, 0)
TMP_BYTES = 1 << 30
# What a /tmp or /dev/shm of its own may hold where no limit says otherwise: memory in either case.
SHM_BYTES = 1 << 30
# For a directory that leads to what stays open; nothing is ever written to it.
PARENT_BYTES = 1 << 20
# For what else a kernel may put beside its sockets, which take none.
SOCKETS_BYTES = 1 << 20
STICKY = "1777"
# Sockets of other programs (docker, dbus, a session's agents) are in /run.
HIDDEN_SYSTEM = ("/run", "/var/tmp")  # noqa: S108 - hidden, not used
NEEDED_RUN = ("/run/systemd/resolve", "/run/resolvconf", "/run/netns")
# What bubblewrap's own /dev has of the machine's.
OWN_DEV = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")


class SandboxPaths(Struct, frozen=True, kw_only=True):
    """The paths around which the walls are built, as the notebook sees them.

    ``folder`` is its working directory, ``runtime`` that of its sockets, with ``read_only`` files
    in it (the connection file); ``homes`` are to be hidden, ``visible`` must be readable in them
    (interpreters, packages); ``files`` are those of ``Isolation.hide`` that are no directories.
    ``disk`` is a directory of limited size with ``folder``, ``tmp``, ``home`` and ``sockets`` in
    it, where there is one. ``repository`` is left open around the folder, to be written if
    ``repository_is_writable``; ``interpreters`` in it or in the folder stay read-only. ``links``
    are those of ``Isolation.writable`` and ``show``, which are in there by the path that they lead
    to as well.
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
        # The kernel's process goes to its folder itself, as the user that may enter it.
        "--chdir", "/",
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
    # Without it bubblewrap outlives a keeper that is killed by SIGKILL.
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
        # The init of ours is the first process. bubblewrap's own would let others of its user write
        # into its memory (/proc/1/mem): it runs under no limit and no filter, and so would what
        # they write there.
        yield "--as-pid-1"
    if not isolation.network:
        # bubblewrap brings up the loopback in the new namespace; there is nothing else in it.
        yield "--unshare-net"


def drops_capabilities(isolation: Isolation, *, root: bool) -> bool:
    """Whether the kernel is to have no capabilities; an ordinary user has none to begin with."""
    # Where no more is asked for than a file system of limited size, or no network, root stays what
    # it is.
    return root and (isolation.read_only_system or isolation.own_processes or isolation.other_user)


def _capabilities(isolation: Isolation, *, root: bool) -> Iterator[str]:
    """Yield the options for capabilities."""
    # Root keeps what it takes to empty the bounding set and to become another user
    # (capabilities.py).
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
        # To root without any capability the files below are still its own:
        # /proc/sys/kernel/core_pattern runs programs outside.
        for path in ("/proc/sys", "/proc/sysrq-trigger", "/proc/irq", "/proc/bus"):
            yield from ("--ro-bind-try", path, path)


def _own_mounts(isolation: Isolation, view: SandboxPaths, shm_bytes: int | None) -> Iterator[str]:
    """File systems of its own where the system may not be written.

    What other programs have in /run is hidden.
    """
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
    """Yield the options that make mere covers read-only.

    Nor are ``ways``. Last, when all is mounted.
    """
    # Files written there would count for no limit.
    own, others = (view.homes[:1], view.homes[1:]) if isolation.hide_home else ((), ())
    system = map(Path, ("/dev", *HIDDEN_SYSTEM)) if isolation.read_only_system else ()
    mounted_over = {*own, view.folder, *map(Path, isolation.writable), *view.files}
    for path in dict.fromkeys((*system, *others, *map(Path, isolation.hide))):
        if path not in mounted_over:
            yield from ("--remount-ro", str(path))
    for path in ways:
        yield from ("--remount-ro", str(path))


def shared_devices(isolation: Isolation, *, root: bool) -> tuple[str, ...]:
    """Return the machine's own devices that the sandbox sees."""
    # Root inside could change their modes, unless they are mounted read-only outside.
    # That takes nothing from whoever uses them: a read-only mount keeps files from being written,
    # not devices.
    return (*OWN_DEV, *isolation.devices) if root and isolation.read_only_system else ()


def _tmpfs_or(source: Path | None, target: str, size: int) -> Iterator[str]:
    if source is not None:
        yield from ("--bind", str(source), target)
    else:
        yield from ("--perms", STICKY, "--size", str(size), "--tmpfs", target)


# --- places that are covered, and places that stay open in them -----------------------------------

# The mount that opens a path: option, source, target.
Openings = Mapping[Path, tuple[str, ...]]


class Cover(Struct, frozen=True, kw_only=True):
    """A place that is empty for the kernel.

    ``stays_writable``: a home, /tmp or /dev/shm of its own rather than a mere lid.
    """

    path: Path
    stays_writable: bool = False
    is_home: bool = False


def _covers(isolation: Isolation, view: SandboxPaths, *, has_shm: bool) -> tuple[Cover, ...]:
    """Return everything that is mounted over, outer places first."""
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
    """Return every path that stays open, whatever surrounds it."""
    # Parts of them are hidden afterwards.
    repository = [] if view.repository is None else [view.repository]
    return [
        view.folder,
        *repository,
        *map(Path, isolation.writable),
        *map(Path, isolation.show),
        *view.visible,
    ]


def _openings(isolation: Isolation, view: SandboxPaths, covers: Sequence[Cover]) -> Openings:
    """The mounts of what stays open. Where two name the same path the later one counts."""
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
    # A link that is there in an opening, or outside of all covers, leads on by itself, and nothing
    # can be mounted on it.
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
    # safe-exec may run from one of them itself, outside of all walls, and imports modules until its
    # end: a notebook must not change them. A copy of the folder may be changed, since nobody runs
    # from it.
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
    """Return the directories that lead to mounts in a cover; true for those to be closed."""
    # What is written into such a directory would be gone after the run, though in its place outside
    # there is one that keeps it. So where the cover can be written the first directory below it is
    # mounted, to be made read-only with all in it. Not in a home if its name begins with a dot:
    # programs keep settings and caches there (``~/.local``), which nobody misses, and fail if they
    # cannot.
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
    """Hidden places, the ways in them, and the openings."""
    # Outer ones first, so that no mount covers one that is wanted.
    # What says more of a path has the last word: part of an opening can be hidden, and part of a
    # hidden place opened.
    homes = view.homes if isolation.hide_home else ()
    hidden = {*homes, *map(Path, isolation.hide)}
    for path in _outer_first([*ways, *openings, *hidden]):
        if view.disk is not None and path in homes[:1]:
            yield from ("--bind", str(view.disk / "home"), str(path))
        elif path in hidden and (path not in openings or str(path) in isolation.hide):
            yield from _hide(path, isolation, view)
        elif path not in openings:
            # bubblewrap itself would make directories for their owner alone.
            options = ("--size", str(PARENT_BYTES), "--tmpfs") if ways[path] else ("--dir",)
            yield from ("--perms", "0755", *options, str(path))
        if path in openings and str(path) not in isolation.hide:
            yield from openings[path]


def _outermost(paths: Sequence[Path]) -> list[Path]:
    """Paths that lie in no other one."""
    outermost: list[Path] = []
    for path in sorted(set(paths)):
        if not _lies_in(path, outermost):
            outermost.append(path)
    return outermost


def _outer_first(paths: Iterable[Path]) -> list[Path]:
    """The order in which no mount covers one that came before."""
    return sorted(dict.fromkeys(paths), key=lambda path: len(path.parts))


def _sockets(view: SandboxPaths) -> Iterator[str]:
    """Yield the mount for the kernel's sockets."""
    # What it writes there counts as what it writes elsewhere does. We reach it by a descriptor that
    # the init hands out (keeper/bwrap_init.py). It covers the real one, in which the file system of
    # limited size lies: seen there, that would show what is hidden in the folder.
    yield from _tmpfs_or(view.disk and view.disk / "sockets", str(view.runtime), SOCKETS_BYTES)
    for path in view.read_only:
        yield from ("--ro-bind", str(path), str(path))
