"""Plans the walls around one kernel on this machine: folder, homes, interpreters.

The result is plain data for the keeper (keeper/bwrap.py and keeper/child.py).
"""

from __future__ import annotations

import ast
import base64
import contextlib
import os
import pwd
import re
import shutil
import site
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

import safe_exec
from safe_exec.errors import IsolationError
from safe_exec.keeper.child import LandlockRules, Walls
from safe_exec.keeper.protocol import BwrapSetup, LimitedDisk
from safe_exec.model.evidence import IsolationFacts
from safe_exec.model.limits import (
    Enforcement,
    FolderUse,
    Isolation,
    LimitName,
    Mechanism,
    RepositoryUse,
    SystemCalls,
    Wall,
)
from safe_exec.sandbox.host.repository import SYSTEM, repository_access
from safe_exec.sandbox.isolation_facts import KernelPaths, facts_of, inside_places, outside_places
from safe_exec.sandbox.mechanisms import bubblewrap
from safe_exec.sandbox.plan import SpawnPlan
from safe_exec.sandbox.sandbox import WallSetup

# A user that owns no files: no distribution allocates ids in this range (systemd, UIDs-GIDs.md).
OTHER_UID = 1_060_660
INODE_BYTES = 4096
LEAST_INODES = 1024
NO_WALL = Enforcement(by=Mechanism.NONE, hard=False)


def homes() -> tuple[Path, ...]:
    """Return the home directories: the user's own first, then those of others."""
    # HOME and the user database can differ, under sudo for example. Hide both.
    own = [Path(os.environ["HOME"])] if os.path.isabs(os.environ.get("HOME", "")) else []
    with contextlib.suppress(KeyError):  # a user without an entry
        own.append(Path(pwd.getpwuid(os.geteuid()).pw_dir))
    candidates = [
        path for path in (*own, Path("/root"), Path("/home")) if path.is_dir() and path != Path("/")
    ]
    resolved = list(dict.fromkeys(path.resolve() for path in candidates))
    return tuple(
        p
        for n, p in enumerate(resolved)
        if not any(p != q and p.is_relative_to(q) for q in resolved[:n])
    )


# --- what must stay readable ----------------------------------------------------------------------


def interpreters(argv: Sequence[str], env: Mapping[str, str]) -> tuple[Path, ...]:
    """Return the environments of the kernel and of safe-exec, and our package.

    None of the paths is a whole home directory.
    """
    ours = [Path(sys.prefix), Path(sys.base_prefix), Path(sys.exec_prefix)]
    wide = _wide()
    prefixes = [
        part for prefix in (*ours, *_kernel_prefixes(argv, env)) for part in _narrowed(prefix, wide)
    ]
    return _existing_forms([*prefixes, Path(safe_exec.__file__).parent], wide)


def visible(argv: Sequence[str], env: Mapping[str, str]) -> tuple[Path, ...]:
    """Return the directories that a kernel needs: interpreters and their package directories."""
    linked = [
        path
        for prefix in (Path(sys.prefix), *_kernel_prefixes(argv, env))
        for path in _linked(prefix)
    ]
    search = [
        Path(part)
        for name in ("PYTHONPATH", "JUPYTER_PATH", "R_LIBS", "LD_LIBRARY_PATH")
        for part in _parts(env, name)
    ]
    users = [
        Path(site.getusersitepackages()),
        Path("~/.local/share/jupyter").expanduser(),
        Path("~/.local/lib").expanduser(),
    ]
    return tuple(
        dict.fromkeys(
            (*interpreters(argv, env), *_existing_forms([*linked, *search, *users], _wide()))
        )
    )


def _kernel_prefixes(argv: Sequence[str], env: Mapping[str, str]) -> list[Path]:
    return _prefixes(shutil.which(argv[0], path=env.get("PATH", os.defpath)) or "")


def _existing_forms(paths: Sequence[Path], wide: frozenset[Path]) -> tuple[Path, ...]:
    """Return the paths that exist, as given and with links resolved, except those in ``wide``."""
    both = [form for path in paths for form in (path, path.resolve())]
    return tuple(
        dict.fromkeys(
            # Not Path.exists, which raises for a directory that this user may not enter.
            path
            for path in both
            if path.is_absolute() and path not in wide and os.path.exists(path)
        )
    )


# The parts of a directory that form an environment, if the directory holds more than that.
PARTS = (
    "bin",
    "lib",
    "lib64",
    "libexec",
    "include",
    "share/jupyter",
    "etc/jupyter",
    "pyvenv.cfg",
    "conda-meta",
)


def _wide() -> frozenset[Path]:
    """Return the directories that are too general to open as a whole, such as /tmp and homes."""
    # With an interpreter at ``~/bin/python`` the prefix is the home itself, which must stay hidden.
    narrow = [
        *homes(),
        *(home / ".local" for home in homes()),
        Path("/tmp"),  # noqa: S108
        Path("/var/tmp"),  # noqa: S108
        Path("/run"),
    ]
    return frozenset(wide for path in narrow for wide in (path, *path.parents))


def _narrowed(prefix: Path, wide: frozenset[Path]) -> list[Path]:
    return (
        [prefix / part for part in PARTS]
        if prefix in wide or prefix.resolve() in wide
        else [prefix]
    )


def _parts(env: Mapping[str, str], name: str) -> list[str]:
    return [part for part in env.get(name, "").split(os.pathsep) if part]


def _prefixes(program: str) -> list[Path]:
    """Return the directories of a program's environment."""
    # The program may be a link, and a virtual environment needs its base too. So follow the links
    # one by one and collect the prefix at each step.
    prefixes: list[Path] = []
    path = Path(program)
    # The program was not found; a relative path would be resolved from the wrong directory.
    if not path.is_absolute():
        return []
    # Bounded, since links can form a circle.
    for _ in range(10):
        prefix = path.parent.parent
        prefixes.append(prefix)
        config = prefix / "pyvenv.cfg"
        if config.is_file():
            base = re.search(r"^home\s*=\s*(.+)$", config.read_text(errors="replace"), re.MULTILINE)
            prefixes += [Path(base[1].strip()).parent] if base else []
        if not path.is_symlink():
            break
        path = path.parent / os.readlink(path)
    real = Path(os.path.realpath(program)).parent.parent
    return [*prefixes, real]


def _linked(prefix: Path) -> list[Path]:
    """Return the package directories that an environment adds through ``.pth`` files."""
    # A line is a directory for sys.path, or it imports a module that finds packages (setuptools'
    # ``__editable___NAME_finder``, and similar ones of other builders). Such a module contains its
    # paths as literals.
    paths: list[Path] = []
    for path in prefix.glob("lib/python3*/site-packages/*.pth"):
        for line in _text(path).splitlines():
            if line.startswith("/"):
                paths.append(Path(line))
            elif imported := re.match(r"import\s+(\w+)", line):
                paths += _named_in(path.with_name(f"{imported[1]}.py"))
    return paths


def _named_in(module: Path) -> list[Path]:
    """Return the existing absolute paths in a module's string literals.

    An ``__init__.py`` among them is replaced by the directory of its package.
    """
    # The module is parsed, not imported: its code belongs to the notebook's environment.
    try:
        tree = ast.parse(_text(module))
    except (SyntaxError, ValueError, RecursionError):
        return []
    literals = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    paths = [
        Path(word)
        for word in literals
        if word.startswith("/") and "\0" not in word and os.path.exists(word)
    ]
    return [path.parent if path.name == "__init__.py" else path for path in paths]


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


# --- the keeper's part ----------------------------------------------------------------------------


class PlannedKernel(Struct, frozen=True, kw_only=True):
    """A kernel that is about to be started, with its plan and its directories."""

    plan: SpawnPlan
    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: Path
    runtime: Path

    @property
    def folder(self) -> Path:
        """The folder without links; only such a path can be mounted over."""
        return self.cwd.resolve()

    @property
    def owner(self) -> int | None:
        """The id of the user that the kernel runs as; ``None`` if it is the runner's own."""
        return (
            OTHER_UID
            if self.plan.isolation.other_user and self.plan.enclosed and os.geteuid() == 0
            else None
        )


class Enclosure(Struct, frozen=True, kw_only=True):
    """The keeper's part of the walls, the kernel's environment, and facts for the user."""

    setup: WallSetup
    env: Mapping[str, str]
    cwd: str
    facts: IsolationFacts
    warnings: tuple[str, ...] = ()


def enclose(kernel: PlannedKernel) -> Enclosure:
    """Plan the walls of one kernel. Raises IsolationError if a wall is impossible."""
    requested = kernel.plan.isolation
    kernel = replace(kernel, plan=replace(kernel.plan, isolation=settled(requested)))
    demand_narrow(kernel.folder, requested)
    hideable = homes()
    paths = KernelPaths(
        folder=kernel.folder,
        runtime=kernel.runtime,
        homes=hideable,
        readable=visible(kernel.argv, kernel.env),
        interpreters=interpreters(kernel.argv, kernel.env),
        kernel_home=kernel.env.get("HOME"),
        repository=repository_access(
            kernel.plan.isolation,
            kernel.folder,
            homes=hideable,
            has_disk_limit=LimitName.DISK in kernel.plan.enforcement,
        ),
    )
    # Landlock cannot give the kernel a /tmp of its own. TMPDIR puts its temporary files into a
    # directory that is removed with the run.
    own_tmp = (
        {"TMPDIR": str(kernel.runtime)}
        if kernel.plan.landlock and kernel.plan.isolation.read_only_system
        else {}
    )
    program = kernel.plan.enclosed
    setup = WallSetup(
        bwrap=_bubblewrap(kernel, paths, program) if program else None,
        walls=_own_walls(kernel, paths),
        owner=kernel.owner,
        discarded=outside_places(kernel.plan, paths),
    )
    return Enclosure(
        setup=setup,
        env={**kernel.env, **own_tmp},
        # The path that the user gave may contain a link in a hidden directory. Use the real path.
        cwd=str(kernel.folder),
        facts=facts_of(kernel.plan, paths),
        warnings=(paths.repository.warning,) if paths.repository.warning else (),
    )


def demand_narrow(folder: Path, isolation: Isolation) -> None:
    """Raise IsolationError if a place that must be closed lies in the notebook's folder."""
    # The folder and everything in it stays open, so it must not contain a home or /usr.
    closed = [
        *(homes() if isolation.hide_home else ()),
        *(SYSTEM if isolation.read_only_system else ()),
    ]
    for path in closed:
        if path.is_relative_to(folder):
            kind = "a home" if path not in SYSTEM else "a part of the system"
            raise IsolationError(
                f"the notebook's folder {folder} is, or holds, {kind} that is to be walled "
                f"off ({path})"
            )


def settled(isolation: Isolation) -> Isolation:
    """Return ``isolation`` with its paths resolved on this machine. Raises IsolationError.

    Paths to hide that do not exist are dropped.
    """
    settings: dict[str, Any] = {
        name: tuple(map(_without_links, getattr(isolation, name))) for name in _PATHS
    }
    # A link in a hidden place cannot be followed inside. So open both the link's path and its
    # target.
    for name in _OPENED:
        settings[name] = tuple(
            dict.fromkeys(form for path in getattr(isolation, name) for form in _both_forms(path))
        )
    for name in (*_OPENED, "devices"):
        for path in settings[name]:
            if not os.path.exists(path):
                raise IsolationError(f"isolation: {name}: {path}: no such file or directory")
    for path in settings["devices"]:
        if not path.startswith("/dev/"):
            raise IsolationError(f"isolation: devices: {path} is not below /dev")
    if "/" in (*settings["writable"], *settings["show"], *settings["hide"]):
        raise IsolationError("isolation: / itself can be neither writable, nor shown, nor hidden")
    settings["hide"] = tuple(path for path in settings["hide"] if os.path.exists(path))
    return replace(isolation, **settings)


_PATHS = ("hide", "devices")
_OPENED = ("writable", "show")


def _without_links(path: str) -> str:
    return os.path.realpath(os.path.expanduser(path))


def _both_forms(path: str) -> tuple[str, str]:
    """Return a path with its parent's links resolved, and the same path with all links resolved."""
    plain = os.path.abspath(os.path.expanduser(path))
    return os.path.join(
        os.path.realpath(os.path.dirname(plain)), os.path.basename(plain)
    ), os.path.realpath(plain)


def written_repository(isolation: Isolation, folder: Path, *, has_disk_limit: bool) -> Path | None:
    """Return the repository around a folder, if isolation lets a notebook there write to it."""
    try:
        access = repository_access(
            settled(isolation), folder.resolve(), homes=homes(), has_disk_limit=has_disk_limit
        )
    except IsolationError:
        # The run itself reports this error.
        return None
    return access.root if access.use is RepositoryUse.WRITE else None


def _bubblewrap(kernel: PlannedKernel, paths: KernelPaths, program: str) -> BwrapSetup:
    disk, isolation = _disk(kernel), kernel.plan.isolation
    sandbox_paths = bubblewrap.SandboxPaths(
        folder=kernel.folder,
        runtime=kernel.runtime,
        homes=paths.homes,
        visible=paths.readable,
        files=frozenset(path for path in map(Path, isolation.hide) if not path.is_dir()),
        read_only=tuple(path for path in kernel.runtime.glob("*") if path.is_file()),
        disk=Path(disk.base) if disk else None,
        repository=paths.repository.root if paths.repository.is_visible else None,
        repository_is_writable=paths.repository.use is RepositoryUse.WRITE,
        interpreters=paths.interpreters,
        links=frozenset(
            path for path in map(Path, (*isolation.writable, *isolation.show)) if path.is_symlink()
        ),
    )
    is_root = os.geteuid() == 0
    devices = bubblewrap.shared_devices(isolation, root=is_root)
    return BwrapSetup(
        argv=tuple(
            bubblewrap.arguments(
                program, isolation, sandbox_paths, shm_bytes=kernel.plan.shm, root=is_root
            )
        ),
        python=sys.executable,
        package_root=str(Path(safe_exec.__file__).parent.parent),
        sockets=str(kernel.runtime),
        disk=disk,
        discarded=inside_places(kernel.plan, paths),
        devices=tuple(path for path in devices if os.path.exists(path)),
    )


def _disk(kernel: PlannedKernel) -> LimitedDisk | None:
    """Return the file system of limited size, if a limit or a copy of the folder needs one."""
    isolation = kernel.plan.isolation
    if kernel.plan.disk is None and isolation.folder is not FolderUse.COPY:
        return None
    size = kernel.plan.disk if kernel.plan.disk is not None else bubblewrap.TMP_BYTES
    return LimitedDisk(
        base=str(kernel.runtime / "disk"),
        folder=str(kernel.folder),
        size=size,
        inodes=max(LEAST_INODES, size // INODE_BYTES),
        write_back=isolation.write_back and isolation.folder is FolderUse.WRITE,
        owner=kernel.owner,
    )


def _own_walls(kernel: PlannedKernel, paths: KernelPaths) -> Walls | None:
    """Return the restrictions that the kernel's process applies to itself, if any."""
    isolation = kernel.plan.isolation
    drop_capabilities = bubblewrap.drops_capabilities(isolation, root=os.geteuid() == 0)
    landlock = _landlock(kernel, paths) if kernel.plan.landlock else None
    filter_program = _system_call_filter(kernel.plan)
    if kernel.owner is None and not drop_capabilities and not landlock and not filter_program:
        return None
    return Walls(
        uid=kernel.owner,
        drop_capabilities=drop_capabilities,
        landlock=landlock,
        seccomp=filter_program,
    )


def _system_call_filter(plan: SpawnPlan) -> str | None:
    if plan.walls.get(Wall.SYSTEM_CALLS, NO_WALL).by is not Mechanism.SECCOMP:
        return None
    from safe_exec.sandbox.host import seccomp_policy

    refuses = plan.isolation.system_calls is SystemCalls.REFUSE
    return base64.b64encode(seccomp_policy.load("errno" if refuses else "kill")).decode()


def _landlock(kernel: PlannedKernel, paths: KernelPaths) -> LandlockRules:
    """Return the paths that Landlock leaves readable and writable."""
    # A directory opened for writing can be read too, so no hidden place may lie in one.
    isolation = kernel.plan.isolation
    folder, repository = str(kernel.folder), paths.repository
    roots = [str(repository.root)] if repository.is_visible else []
    extra = [
        str(kernel.runtime),
        *isolation.writable,
        *(roots if repository.use is RepositoryUse.WRITE else []),
    ]
    hidden = [*(map(str, paths.homes) if isolation.hide_home else ()), *isolation.hide]
    # Landlock cannot make a copy of the folder, so FolderUse.COPY only closes it to writes.
    closed = hidden if isolation.folder is FolderUse.WRITE else [*hidden, folder]
    # Programs must write to /dev/null and terminals. The permissions of other devices still apply.
    writable = ["/tmp", "/dev"] if isolation.read_only_system else _all_but(closed)  # noqa: S108
    writable += [*([folder] if isolation.folder is FolderUse.WRITE else []), *extra]
    readable = [*map(str, paths.readable), *isolation.show, *roots, folder]
    opened = [part for path in readable for part in parts_beside(path, hidden)]
    return LandlockRules(
        readable=(*_all_but(hidden), *opened),
        writable=tuple(part for path in writable for part in parts_beside(path, closed)),
        tcp=None if isolation.network else False,
    )


def _all_but(closed: Sequence[str]) -> list[str]:
    from safe_exec.keeper import landlock

    return landlock.all_but(closed) if closed else ["/"]


def parts_beside(path: str, hidden: Sequence[str]) -> list[str]:
    """Return the parts of a tree that can be opened without opening a hidden one."""
    # A Landlock rule opens everything below its path and has no exceptions (landlock(7)). So open
    # the siblings of each hidden part instead.
    inner = [other for other in hidden if other != path and Path(other).is_relative_to(path)]
    if not inner:
        return [path]
    try:
        children = [os.path.join(path, name) for name in sorted(os.listdir(path))]
    except OSError:
        return []
    return [
        part
        for child in children
        if child not in inner and not os.path.islink(child)
        for part in parts_beside(child, inner)
    ]
