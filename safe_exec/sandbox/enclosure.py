"""What the walls of one kernel go around on this machine: folder, homes and interpreters.

May import sandbox and model. What the keeper is told is plain data (see enclosed.py and become.py).
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

import safe_exec
from safe_exec.errors import SandboxError
from safe_exec.model.evidence import IsolationFacts
from safe_exec.model.limits import Enforcement, FolderUse, Isolation, Mechanism, SystemCalls, Wall
from safe_exec.records import dataclass, replace
from safe_exec.sandbox.isolation_facts import KernelPaths, facts_of
from safe_exec.sandbox.mechanisms import bubblewrap
from safe_exec.sandbox.plan import SpawnPlan

OTHER_UID = 1_060_660
"""The user that owns nothing: no distribution hands out ids up here (systemd, UIDs-GIDs.md), and no file is theirs."""
INODE_BYTES = 4096
LEAST_INODES = 1024
NO_WALL = Enforcement(by=Mechanism.NONE, hard=False)


def homes() -> tuple[Path, ...]:
    """Home directories: the user's own first, then where those of others are."""
    own = [Path(os.environ["HOME"])] if os.path.isabs(os.environ.get("HOME", "")) else []
    with contextlib.suppress(KeyError):  # a user without an entry
        own.append(Path(pwd.getpwuid(os.geteuid()).pw_dir))
    found = [path for path in (*own, Path("/root"), Path("/home")) if path.is_dir() and path != Path("/")]
    resolved = list(dict.fromkeys(path.resolve() for path in found))
    return tuple(p for n, p in enumerate(resolved) if not any(p != q and p.is_relative_to(q) for q in resolved[:n]))


# --- what must stay readable ------------------------------------------------------------------------------------


def visible(argv: Sequence[str], env: Mapping[str, str]) -> tuple[Path, ...]:
    """Directories that a kernel needs to run at all: interpreters, packages, ours. Never a whole home."""
    ours = [Path(sys.prefix), Path(sys.base_prefix), Path(sys.exec_prefix)]
    theirs = _prefixes(shutil.which(argv[0], path=env.get("PATH", os.defpath)) or "")
    linked = [found for prefix in (Path(sys.prefix), *theirs) for found in _linked(prefix)]
    search = [Path(part) for name in ("PYTHONPATH", "JUPYTER_PATH", "R_LIBS", "LD_LIBRARY_PATH") for part in _parts(env, name)]
    users = [Path(site.getusersitepackages()), Path("~/.local/share/jupyter").expanduser(), Path("~/.local/lib").expanduser()]
    wide = _wide()
    prefixes = [found for prefix in (*ours, *theirs) for found in _narrowed(prefix, wide)]
    paths = [*prefixes, Path(safe_exec.__file__).parent, *linked, *search, *users]
    both = [form for path in paths for form in (path, path.resolve())]
    return tuple(dict.fromkeys(path for path in both if path.is_absolute() and path not in wide and path.exists()))


PARTS = ("bin", "lib", "lib64", "libexec", "include", "share/jupyter", "etc/jupyter", "pyvenv.cfg", "conda-meta")
"""What makes an environment of a directory that is more than one."""


def _wide() -> frozenset[Path]:
    """Directories that hold more than an environment: a ``~/bin/python`` must not open the home around it."""
    narrow = [*homes(), *(home / ".local" for home in homes()), Path("/tmp"), Path("/var/tmp"), Path("/run")]  # noqa: S108
    return frozenset(wide for path in narrow for wide in (path, *path.parents))


def _narrowed(prefix: Path, wide: frozenset[Path]) -> list[Path]:
    return [prefix / part for part in PARTS] if prefix in wide or prefix.resolve() in wide else [prefix]


def _parts(env: Mapping[str, str], name: str) -> list[str]:
    return [part for part in env.get(name, "").split(os.pathsep) if part]


def _prefixes(program: str) -> list[Path]:
    """Where the program's environment lies: beside its ``bin``, what its links lead to, and the base of a virtual environment."""
    found: list[Path] = []
    path = Path(program)
    if not path.is_absolute():  # no such program: a path relative to us would say nothing of it
        return []
    for _ in range(10):
        prefix = path.parent.parent
        found.append(prefix)
        config = prefix / "pyvenv.cfg"
        if config.is_file():
            base = re.search(r"^home\s*=\s*(.+)$", config.read_text(errors="replace"), re.MULTILINE)
            found += [Path(base[1].strip()).parent] if base else []
        if not path.is_symlink():
            break
        path = path.parent / os.readlink(path)
    real = Path(os.path.realpath(program)).parent.parent
    return [*found, real]


def _linked(prefix: Path) -> list[Path]:
    """What a Python environment has elsewhere by ``.pth`` files: packages installed for development.

    A line is a folder for the path, or imports a module that finds packages (setuptools' ``__editable___NAME_finder``, and the like of other
    builders): what that one names in its text.
    """
    found: list[Path] = []
    for path in prefix.glob("lib/python3*/site-packages/*.pth"):
        for line in _text(path).splitlines():
            if line.startswith("/"):
                found.append(Path(line))
            elif imported := re.match(r"import\s+(\w+)", line):
                found += _named_in(path.with_name(f"{imported[1]}.py"))
    return found


def _named_in(module: Path) -> list[Path]:
    """Absolute paths that stand in the source of a module, and that are there; of a package's first file the package."""
    try:
        tree = ast.parse(_text(module))
    except (SyntaxError, ValueError, RecursionError):
        return []
    words = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    paths = [Path(word) for word in words if word.startswith("/") and "\0" not in word and os.path.exists(word)]
    return [path.parent if path.name == "__init__.py" else path for path in paths]


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


# --- what the keeper is told ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Birth:
    """A kernel that is about to be started: its plan, command, environment and folder, and the directory of its sockets."""

    plan: SpawnPlan
    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: Path
    runtime: Path

    @property
    def folder(self) -> Path:
        """The folder without links: what can be mounted over."""
        return self.cwd.resolve()

    @property
    def owner(self) -> int | None:
        """The other user that it is to be, if it is."""
        return OTHER_UID if self.plan.isolation.other_user and self.plan.enclosed and os.geteuid() == 0 else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Enclosure:
    """The part of the keeper's request that puts up the walls, and the facts of what they take away."""

    request: dict[str, Any]
    facts: IsolationFacts


def enclose(birth: Birth) -> Enclosure:
    """Plan the walls of one kernel. Raises SandboxError for what can be walled off in no way."""
    asked = birth.plan.isolation
    birth = replace(birth, plan=replace(birth.plan, isolation=settled(asked)))
    demand_narrow(birth.folder, asked)
    paths = KernelPaths(
        folder=birth.folder,
        runtime=birth.runtime,
        homes=homes(),
        readable=visible(birth.argv, birth.env),
        kernel_home=birth.env.get("HOME"),
    )
    # Where there is no /tmp of its own, what it writes for a while is to go with the run all the same.
    own_tmp = {"TMPDIR": str(birth.runtime)} if birth.plan.landlock and birth.plan.isolation.read_only_system else {}
    request = {
        "enclosure": _bubblewrap(birth, paths, birth.plan.enclosed) if birth.plan.enclosed else None,
        "walls": _own_walls(birth, paths),
        "owner": birth.owner,
        "env": {**birth.env, **own_tmp},
        # A link on the way to it may lie in what is hidden.
        "cwd": str(birth.folder),
    }
    return Enclosure(request=request, facts=facts_of(birth.plan, paths))


SYSTEM = tuple(map(Path, ("/tmp", "/var/tmp", "/run", "/dev", "/proc", "/sys", "/etc", "/usr")))  # noqa: S108


def demand_narrow(folder: Path, isolation: Isolation) -> None:
    """The folder stays open whatever lies in it. Raises SandboxError where that would be what is to be closed."""
    closed = [*(homes() if isolation.hide_home else ()), *(SYSTEM if isolation.read_only_system else ())]
    for path in closed:
        if path.is_relative_to(folder):
            what = "a home" if path not in SYSTEM else "a part of the system"
            raise SandboxError(
                f"the notebook's folder {folder} is, or holds, {what} that is to be walled off ({path}): run it in a folder of its own"
            )


def settled(isolation: Isolation) -> Isolation:
    """Its paths as they are here, without links; what is to be hidden and is not there needs no hiding. Raises SandboxError."""
    found: dict[str, Any] = {
        name: tuple(os.path.realpath(os.path.expanduser(path)) for path in getattr(isolation, name)) for name in _PATHS
    }
    for name in ("writable", "devices"):
        for path in found[name]:
            if not os.path.exists(path):
                raise SandboxError(f"isolation: {name}: {path}: no such file or directory")
    for path in found["devices"]:
        if not path.startswith("/dev/"):
            raise SandboxError(f"isolation: devices: {path} is not below /dev")
    if "/" in (*found["writable"], *found["hide"]):
        raise SandboxError("isolation: / itself can be neither writable nor hidden")
    found["hide"] = tuple(path for path in found["hide"] if os.path.exists(path))
    return replace(isolation, **found)


_PATHS = ("writable", "hide", "devices")


def _bubblewrap(birth: Birth, paths: KernelPaths, program: str) -> dict[str, Any]:
    disk = _disk(birth)
    around = bubblewrap.Surroundings(
        folder=birth.folder,
        runtime=birth.runtime,
        homes=paths.homes,
        visible=paths.readable,
        files=frozenset(path for path in map(Path, birth.plan.isolation.hide) if not path.is_dir()),
        given=tuple(path for path in birth.runtime.glob("*") if path.is_file()),
        disk=Path(disk["base"]) if disk else None,
    )
    is_root = os.geteuid() == 0
    return {
        "argv": bubblewrap.arguments(program, birth.plan.isolation, around, shm_bytes=birth.plan.shm, root=is_root),
        "python": sys.executable,
        "root": str(Path(safe_exec.__file__).parent.parent),
        "sockets": str(birth.runtime),
        "disk": disk,
        "devices": [path for path in bubblewrap.shared_devices(birth.plan.isolation, root=is_root) if os.path.exists(path)],
    }


def _disk(birth: Birth) -> dict[str, Any] | None:
    """The file system of limited size: asked for by a limit, or since the run is to work in a copy."""
    isolation = birth.plan.isolation
    if birth.plan.disk is None and isolation.folder is not FolderUse.COPY:
        return None
    size = birth.plan.disk if birth.plan.disk is not None else bubblewrap.TMP_BYTES
    return {
        "base": str(birth.runtime / "disk"),
        "folder": str(birth.folder),
        "size": size,
        "inodes": max(LEAST_INODES, size // INODE_BYTES),
        "write_back": isolation.write_back and isolation.folder is FolderUse.WRITE,
        "owner": birth.owner,
    }


def _own_walls(birth: Birth, paths: KernelPaths) -> dict[str, Any]:
    """What the kernel's process gives up by itself before it executes the kernel."""
    isolation = birth.plan.isolation
    walls: dict[str, Any] = {} if birth.owner is None else {"uid": birth.owner}
    if bubblewrap.drops_capabilities(isolation, root=os.geteuid() == 0):
        walls["capabilities_dropped"] = True
    if birth.plan.landlock:
        walls["landlock"] = _landlock(birth, paths)
    if birth.plan.walls.get(Wall.SYSTEM_CALLS, NO_WALL).by is Mechanism.SECCOMP:
        from safe_exec.keeper import seccomp

        program = seccomp.load("errno" if isolation.system_calls is SystemCalls.REFUSE else "kill")
        walls["seccomp"] = base64.b64encode(program).decode()
    return walls


def _landlock(birth: Birth, paths: KernelPaths) -> dict[str, Any]:
    """Where it may read and write; to Landlock a directory that may be written may be read too, so nothing hidden lies in one."""
    isolation = birth.plan.isolation
    folder, extra = str(birth.folder), [str(birth.runtime), *isolation.writable]
    hidden = [*(map(str, paths.homes) if isolation.hide_home else ()), *isolation.hide]
    # Nobody makes a copy here.
    closed = hidden if isolation.folder is FolderUse.WRITE else [*hidden, folder]
    # /dev too: to write to /dev/null or a terminal changes nothing; who may do what to a device is the system's affair.
    writable = ["/tmp", "/dev"] if isolation.read_only_system else _all_but(closed)  # noqa: S108
    writable += [*([folder] if isolation.folder is FolderUse.WRITE else []), *extra]
    readable = [*map(str, paths.readable), folder]
    return {
        "readable": [*_all_but(hidden), *(part for path in readable for part in parts_beside(path, hidden))],
        "writable": [part for path in writable for part in parts_beside(path, closed)],
        "tcp": None if isolation.network else False,
    }


def _all_but(closed: Sequence[str]) -> list[str]:
    from safe_exec.keeper import landlock

    return landlock.all_but(closed) if closed else ["/"]


def parts_beside(path: str, hidden: Sequence[str]) -> list[str]:
    """What to open of a tree in which something is to be hidden: a rule opens all that is below. Without such, the tree."""
    inner = [other for other in hidden if other != path and Path(other).is_relative_to(path)]
    if not inner:
        return [path]
    try:
        children = [os.path.join(path, name) for name in sorted(os.listdir(path))]
    except OSError:
        return []
    return [part for child in children if child not in inner and not os.path.islink(child) for part in parts_beside(child, inner)]
