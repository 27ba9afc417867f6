"""Finds things that a cell asked for, that exist outside the sandbox, and that isolation took away.

All three conditions must hold: a file that exists nowhere is missing with and without isolation.
Outside the sandbox, names are only looked up (stat(2), access(2)): nothing is opened or listed. At
most MOST_LOOKUPS names are looked up, since the notebook chooses them. May import model and needs.
"""

from __future__ import annotations

import errno
import os
import platform
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.machinery import EXTENSION_SUFFIXES

from msgspec import Struct
from msgspec.structs import replace

from safe_exec.model.evidence import Access, IsolationConflict, IsolationFacts, NeedKind
from safe_exec.model.limits import Mechanism
from safe_exec.sandbox.usage import sockets
from safe_exec.trial.needs import Need

MOST_LOOKUPS = 300
MOST_CONFLICTS = 8
# A name may lie on a file server that does not answer: then nothing is known of it.
SECONDS = 2.0
# What bubblewrap's walls replace besides the places of `IsolationFacts` (mechanisms of bubblewrap:
# HIDDEN_SYSTEM and a /dev of its own).
PRIVATE_SYSTEM = ("/run", "/var/run", "/var/tmp", "/dev")  # noqa: S108 - named, not used
SHARED_SYSTEM = (
    "/run/systemd/resolve", "/run/resolvconf", "/run/netns", "/dev/null", "/dev/zero",
    "/dev/full", "/dev/random", "/dev/urandom",
    "/dev/tty", "/dev/ptmx", "/dev/pts", "/dev/stdin", "/dev/stdout", "/dev/stderr", "/dev/fd",
)  # fmt: skip
MODULE_ENDS = ("", ".py", *EXTENSION_SUFFIXES)
WILDCARDS = "*?["
# The tables of routes (proc_net(5)): of each the columns of the destination and its mask, and how
# those of a default route read.
ROUTES = (
    ("/proc/net/route", 1, "00000000", 7, "00000000"),
    ("/proc/net/ipv6_route", 0, "0" * 32, 1, "00"),
)


class Lookup:
    """Looks up names outside the sandbox, with one system call each."""

    def __init__(self, *, bare_root: bool = False) -> None:
        """Create a lookup. ``bare_root`` is true if the kernel is root without capabilities."""
        # The kernel is root without capabilities, so file modes apply to it.
        self.remaining_lookups = MOST_LOOKUPS
        self.bare_root = bare_root

    def exists(self, path: str) -> bool:
        """Tell whether the path exists, following links."""
        return self._mode(path) is not None

    def is_directory(self, path: str) -> bool:
        """Tell whether the path is a directory."""
        mode = self._mode(path)
        return mode is not None and stat.S_ISDIR(mode)

    def is_socket(self, path: str) -> bool:
        """Whether the path is a socket on which a program listens."""
        mode = self._mode(path)
        return mode is not None and stat.S_ISSOCK(mode)

    def is_program(self, path: str) -> bool:
        """Tell whether the path is an executable file."""
        mode = self._mode(path)
        return mode is not None and stat.S_ISREG(mode) and self.may(path, os.X_OK)

    def is_for_others(self, path: str) -> bool:
        """Tell whether users who own nothing may read the path."""
        mode = self._mode(path)
        return mode is not None and bool(mode & stat.S_IROTH)

    def may(self, path: str, access_mode: int) -> bool:
        """Tell whether safe-exec itself may read (R_OK) or write (W_OK) the path."""
        # A file system that is mounted read-only outside the sandbox is not writable either.
        self.remaining_lookups -= 1
        if self.remaining_lookups < 0 or not os.access(path, access_mode):
            return False
        return not self.bare_root or _may_bare_root(path, access_mode)

    def real(self, path: str) -> str:
        """Resolve the links in a path; return it with its links if that is not possible."""
        self.remaining_lookups -= 1
        if self.remaining_lookups < 0:
            return path
        try:
            return os.path.realpath(path)
        except OSError:
            # realpath(3) of Python does not expect that readlink(2) is refused (/proc/1/root).
            return os.path.normpath(path)

    def has_route(self) -> bool:
        """Tell whether this machine itself has a route to other hosts."""
        return any(_has_default_route(*table) for table in ROUTES)

    def listens(self, port: int) -> bool:
        """Tell whether a program listens for TCP connections to loopback on that port."""
        return sockets.listens(port)

    def _mode(self, path: str) -> int | None:
        self.remaining_lookups -= 1
        if self.remaining_lookups < 0:
            return None
        try:
            return os.stat(path).st_mode
        except (OSError, ValueError):
            return None


class Reach:
    """The access of an isolated kernel to each part of the file system.

    For nested directories the deepest one decides.
    """

    def __init__(self, facts: IsolationFacts) -> None:
        tops = {"/": Access.READ_ONLY if facts.read_only else Access.OPEN}
        if facts.by is Mechanism.BUBBLEWRAP:
            private = (*facts.discarded, *(PRIVATE_SYSTEM if facts.read_only else ()))
            tops |= dict.fromkeys((path for path in private if path != facts.folder), Access.HIDDEN)
            tops |= dict.fromkeys(SHARED_SYSTEM if facts.read_only else (), Access.OPEN)
        else:
            tops |= dict.fromkeys(facts.discarded, Access.OPEN)
        tops |= dict.fromkeys(facts.hidden_homes, Access.HIDDEN)
        tops |= dict.fromkeys(facts.readable, Access.READ_ONLY)
        if facts.folder is not None:
            tops[facts.folder] = (
                Access.OPEN
                if facts.folder in (*facts.writable, *facts.discarded)
                else Access.READ_ONLY
            )
        tops |= dict.fromkeys(facts.writable, Access.OPEN)
        self._tops = tops | dict.fromkeys(facts.hidden, Access.HIDDEN)

    def to(self, path: str) -> Access:
        """Return the kernel's access to a path that is absolute and has its links resolved."""
        # POSIX keeps two leading slashes apart (so does realpath(3)), and dirname("//") is "//".
        path = f"/{path.lstrip('/')}"
        # "/" is always in the table, so the loop ends.
        while path not in self._tops:
            path = os.path.dirname(path)
        return self._tops[path]

    def leads_to(self, folder: str) -> bool:
        """Tell whether a directory exists for the kernel, because it or a part is accessible."""
        if self.to(folder) is not Access.HIDDEN:
            return True
        below = f"{folder.rstrip('/')}/"
        return any(
            access is not Access.HIDDEN and top.startswith(below)
            for top, access in self._tops.items()
        )


class Sight(Struct, frozen=True, kw_only=True):
    """Resolves names as the cell does: relative to its working directory, with the kernel's home.

    ``cwd``, ``sys_path`` and ``search`` (PATH) are the kernel's claims; ``env`` is the environment
    outside. ``other_user`` is true if the kernel runs as a user who owns nothing. ``r_version`` is
    the version of R, for an R kernel.
    """

    facts: IsolationFacts
    # The environment outside the sandbox. It may hold secrets, so it is left out of the repr.
    env: Mapping[str, str]
    # This and the next two are the kernel's claims.
    cwd: str | None = None
    sys_path: tuple[str, ...] = ()
    search: str = ""
    # The kernel runs as a user who owns nothing.
    other_user: bool = False
    r_version: str | None = None

    def __repr__(self) -> str:
        # Without the environment, which may hold secrets.
        items = (f"{n}={getattr(self, n)!r}" for n in self.__struct_fields__ if n != "env")
        return f"{type(self).__name__}({', '.join(items)})"

    def r_libraries(self) -> tuple[str, ...]:
        """Return the user's own library of R packages (see ``?.libPaths``)."""
        if not self.r_version:
            return ()
        system, version = (
            f"{platform.machine()}-pc-linux-gnu-library",
            ".".join(self.r_version.split(".")[:2]),
        )
        return (self.env.get("R_LIBS_USER") or f"~/R/{system}/{version}",)

    def shown(self, name: str) -> str:
        """Format a name with ``~`` for the kernel's own home, whose path differs in each run."""
        home = self.facts.home
        is_moved = home is not None and home != self.env.get("HOME")
        return (
            f"~{name[len(home) :]}" if is_moved and home and name.startswith(f"{home}/") else name
        )

    def places(self, name: str) -> Iterator[tuple[str, bool]]:
        """Yield the absolute paths outside that a name may denote.

        The second value tells whether the path differs because the kernel has a home of its own.
        """
        if not name or "\0" in name:
            return
        home, kernel_home = self.env.get("HOME", ""), self.facts.home or ""
        moved = bool(home and kernel_home and home != kernel_home)
        if home and (
            name == "~" or name.startswith("~/")
        ):  # shells, R and DuckDB expand it and name it unexpanded
            yield os.path.join(home, name[2:]), moved
        path = os.path.join(self.cwd or self.facts.folder or "/", name)
        if moved and path.startswith(kernel_home + "/"):
            yield os.path.join(home, path[len(kernel_home) + 1 :]), True
        yield path, False


def conflicts(
    needs: Sequence[Need], sight: Sight, lookup: Lookup | None = None
) -> tuple[IsolationConflict, ...]:
    """Return a conflict for each need that isolation refused."""
    # If a lookup takes longer than SECONDS, its name and all following ones are left out.
    # bubblewrap drops the capabilities of a root that gets a read-only system
    # (mechanisms/bubblewrap.py).
    bare_root = (
        os.geteuid() == 0 and sight.facts.by is Mechanism.BUBBLEWRAP and sight.facts.read_only
    )
    finder = _Finder(sight, lookup or Lookup(bare_root=bare_root))
    results: list[IsolationConflict] = []

    def look() -> None:
        for need in needs:
            if len(results) < MOST_CONFLICTS and (conflict := finder.find(need)) is not None:
                results.append(conflict)

    # stat(2) on a dead network file system cannot be interrupted; a daemon thread can be abandoned.
    thread = threading.Thread(target=look, name="safe-exec-lookup", daemon=True)
    thread.start()
    thread.join(SECONDS)
    return tuple(results)


class _Finder:
    def __init__(self, sight: Sight, lookup: Lookup) -> None:
        self.sight, self.lookup = sight, lookup
        self.reach = Reach(sight.facts)
        self._find: Mapping[NeedKind, Callable[[Need], IsolationConflict | None]] = {
            NeedKind.VARIABLE: self._variable,
            NeedKind.HOST: self._host,
            NeedKind.MODULE: self._module,
            NeedKind.PROGRAM: self._program,
            NeedKind.PATH: self._path,
        }

    def find(self, need: Need) -> IsolationConflict | None:
        return self._find[need.kind](need)

    def _variable(self, need: Need) -> IsolationConflict | None:
        return (
            _conflict(need, Access.HIDDEN)
            if need.name in self.sight.facts.removed_variables
            else None
        )

    def _host(self, need: Need) -> IsolationConflict | None:
        if self.sight.facts.network:
            return None
        # The connection was refused by a loopback where nobody listens on that port.
        if need.number == errno.ECONNREFUSED:
            listens = self.lookup.listens(int(need.name.rpartition(":")[2]))
            return _conflict(need, Access.HIDDEN, local=True) if listens else None
        return _conflict(need, Access.HIDDEN, usable=self.lookup.has_route())

    def _module(self, need: Need) -> IsolationConflict | None:
        file = need.name.replace(".", "/")
        for entry in dict.fromkeys((*self.sight.sys_path, *self.sight.r_libraries(), ".")):
            for folder, moved in self.sight.places(entry or "."):
                for end in MODULE_ENDS:
                    path = os.path.join(folder, file + end)
                    if self._is_hidden(path) or (moved and self.lookup.exists(path)):
                        real = self.lookup.real(path)
                        return _conflict(
                            need,
                            Access.HIDDEN,
                            path=real,
                            allow=self._hidden_ones(folder, path),
                            moved=moved,
                        )
        return None

    def _program(self, need: Need) -> IsolationConflict | None:
        if "/" in need.name:
            return None
        for search in (self.sight.search, self.sight.env.get("PATH", "")):
            for folder in search.split(os.pathsep):
                path = os.path.join(folder, need.name)
                if os.path.isabs(folder) and self._is_hidden(path) and self.lookup.is_program(path):
                    return _conflict(
                        need, Access.HIDDEN, path=path, allow=self._hidden_ones(folder, path)
                    )
        return None

    def _path(self, need: Need) -> IsolationConflict | None:
        name = need.name
        at = next((number for number, letter in enumerate(name) if letter in WILDCARDS), None)
        # The name is a pattern: look up the directory before it.
        if at is not None:
            name = os.path.dirname(name[:at])
        for place, moved in self.sight.places(name):
            conflict = self._refused(need, place, moved=moved)
            if conflict is not None:
                return replace(
                    conflict,
                    name=self.sight.shown(conflict.name),
                    socket=self.lookup.is_socket(conflict.path or place),
                )
        return None

    def _refused(self, need: Need, place: str, *, moved: bool) -> IsolationConflict | None:
        # Walls apply to real paths, not to links.
        real = self.lookup.real(place)
        access, exists = self.reach.to(real), self.lookup.exists(real)
        readable = exists and need.number != errno.EROFS and not need.writes
        # A hidden link may lead to a place that is not hidden, or the kernel looked for the name in
        # a home of its own.
        is_elsewhere = moved or self.reach.to(os.path.normpath(place)) is Access.HIDDEN
        if readable and access is not Access.HIDDEN and is_elsewhere:
            return _conflict(need, Access.HIDDEN, path=real, moved=moved)
        if access is Access.OPEN:
            return self._other_users(need, real, access) if exists else None
        if (
            readable
            and access is Access.HIDDEN
            and not (need.may_write and self.lookup.is_directory(real))
        ):
            return self._hidden(need, real, moved=moved)
        if self._is_write(need, access):
            return self._unwritable(need, real, access)
        return self._other_users(need, real, access) if exists else None

    def _hidden(self, need: Need, real: str, *, moved: bool) -> IsolationConflict | None:
        # The user could not read it either, so isolation is not the reason.
        if not self.lookup.may(real, os.R_OK):
            return None
        usable = not self.sight.other_user or self.lookup.is_for_others(real)
        return _conflict(need, Access.HIDDEN, path=real, allow=(real,), usable=usable, moved=moved)

    def _is_write(self, need: Need, access: Access) -> bool:
        """Tell whether the cell tried to write."""
        # A read-only file system refuses only writes, and Landlock permits reading everything
        # visible.
        refused_by_landlock = (
            need.number == errno.EACCES and self.sight.facts.by is Mechanism.LANDLOCK
        )
        by_number = need.number == errno.EROFS or (
            refused_by_landlock and access is Access.READ_ONLY
        )
        return by_number or (need.may_write if need.writes is None else need.writes)

    def _unwritable(self, need: Need, real: str, access: Access) -> IsolationConflict | None:
        """Return the conflict if safe-exec may write to a place and the kernel may not."""
        exists, folder = self.lookup.exists(real), os.path.dirname(real)
        if not exists and need.number == errno.ENOENT and not self.lookup.is_directory(folder):
            # Outside the sandbox the directory is missing, too.
            return None
        if not exists and need.says_missing and self.reach.leads_to(folder):
            # If the directory exists inside, too, a new file is refused with EROFS or EACCES.
            return None
        while folder != "/" and not self.lookup.exists(folder):
            folder = os.path.dirname(folder)
        if not self.lookup.may(real if exists else folder, os.W_OK):
            return None
        allow = real if self.lookup.is_directory(real) else folder
        is_known = need.writes is not None or need.number in (errno.EROFS, errno.EACCES)
        # The source only looks as if the cell wrote the file.
        need = need if is_known else replace(need, exact=False)
        conflict = _conflict(
            need, access, path=real, allow=(allow,) if allow != "/" else (), writes=True
        )
        home = self.sight.facts.folder
        return replace(conflict, in_folder=home is not None and f"{real}/".startswith(f"{home}/"))

    def _other_users(self, need: Need, real: str, access: Access) -> IsolationConflict | None:
        """Return the conflict if the user may read a file and the kernel's user may not."""
        refused = need.number in (errno.EACCES, errno.EPERM) and self.sight.other_user
        if not refused or self.lookup.is_for_others(real) or not self.lookup.may(real, os.R_OK):
            return None
        return _conflict(need, access, path=real, usable=False)

    def _is_hidden(self, path: str) -> bool:
        """Tell whether a path exists and it, or the name used for it, lies in a hidden place."""
        if not self.lookup.exists(path):
            return False
        return Access.HIDDEN in (
            self.reach.to(self.lookup.real(path)),
            self.reach.to(os.path.normpath(path)),
        )

    def _hidden_ones(self, folder: str, path: str) -> tuple[str, ...]:
        """Return the paths to open for a file: its folder, and the target if it is a link."""
        folder, real = self.lookup.real(folder), self.lookup.real(path)
        both = [folder] if self.reach.to(folder) is Access.HIDDEN else []
        outside = not real.startswith(folder + "/") and self.reach.to(real) is Access.HIDDEN
        return (*both, *([real] if outside else []))


def _conflict(
    need: Need,
    access: Access,
    *,
    path: str | None = None,
    allow: tuple[str, ...] = (),
    writes: bool = False,
    usable: bool = True,
    moved: bool = False,
    local: bool = False,
) -> IsolationConflict:
    return IsolationConflict(
        kind=need.kind,
        name=need.name,
        access=access,
        path=path,
        allow=allow,
        writes=writes,
        usable=usable,
        moved=moved,
        local=local,
        exact=need.exact and not need.remote,
        line=need.line,
        cell=need.cell,
        in_output=need.in_output,
    )


def _has_default_route(table: str, destination: int, nowhere: str, mask: int, wide: str) -> bool:
    try:
        with open(table, encoding="ascii") as rows:
            fields = [row.split() for row in rows]
    except OSError:
        return False
    routes = [row for row in fields if len(row) > max(destination, mask) and row[-1] != "lo"]
    return any(row[destination] == nowhere and row[mask] == wide for row in routes)


def _may_bare_root(path: str, access_mode: int) -> bool:
    """Tell whether a file's mode grants root the access (R_OK, W_OK, X_OK are mode bits)."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return False
    shift = 6 if status.st_uid == 0 else 3 if status.st_gid == 0 else 0
    return (status.st_mode >> shift) & access_mode == access_mode
