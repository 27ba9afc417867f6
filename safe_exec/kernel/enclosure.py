"""What the walls of one kernel go around on this machine: folder, homes and interpreters.

May import sandbox and model. What the keeper is told is plain data (see enclosed.py and become.py).
"""

from __future__ import annotations

import base64
import contextlib
import os
import pwd
import re
import site
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safe_exec
from safe_exec.model import FolderUse, Isolation, SystemCalls
from safe_exec.sandbox import bubblewrap, mounts
from safe_exec.sandbox.plan import SpawnPlan

OTHER_UID = 1_060_660
"""The user that owns nothing: no distribution hands out ids up here (systemd, UIDs-GIDs.md), and no file is theirs."""
INODE_BYTES = 4096
LEAST_INODES = 1024


def homes() -> tuple[Path, ...]:
    """Home directories: the user's own first, then where those of others are."""
    own = [Path(os.environ["HOME"])] if os.environ.get("HOME", "/") != "/" else []
    with contextlib.suppress(KeyError):  # a user without an entry
        own.append(Path(pwd.getpwuid(os.geteuid()).pw_dir))
    found = [path for path in (*own, Path("/root"), Path("/home")) if path.is_dir() and path != Path("/")]
    resolved = list(dict.fromkeys(path.resolve() for path in found))
    return tuple(p for n, p in enumerate(resolved) if not any(p != q and p.is_relative_to(q) for q in resolved[:n]))


# --- what must stay readable ------------------------------------------------------------------------------------


def visible(argv: Sequence[str], env: Mapping[str, str]) -> tuple[Path, ...]:
    """Directories that a kernel needs to run at all: interpreters, packages, ours."""
    ours = [Path(sys.prefix), Path(sys.base_prefix), Path(sys.exec_prefix), Path(safe_exec.__file__).parent.parent / "safe_exec"]
    theirs = [found for prefix in _prefixes(argv[0]) for found in (prefix, *_linked(prefix))]
    search = [Path(part) for name in ("PYTHONPATH", "JUPYTER_PATH", "R_LIBS", "LD_LIBRARY_PATH") for part in _parts(env, name)]
    users = [Path(site.getusersitepackages()), Path("~/.local/share/jupyter").expanduser(), Path("~/.local/lib").expanduser()]
    own = [found for prefix in (Path(sys.prefix),) for found in _linked(prefix)]
    paths = [*ours, *theirs, *search, *users, *own]
    both = [form for path in paths for form in (path, path.resolve())]
    return tuple(dict.fromkeys(path for path in both if path.is_absolute() and path != Path("/") and path.exists()))


def _parts(env: Mapping[str, str], name: str) -> list[str]:
    return [part for part in env.get(name, "").split(os.pathsep) if part]


def _prefixes(program: str) -> list[Path]:
    """Where the program's environment lies: beside its ``bin``, what its links lead to, and the base of a virtual environment."""
    found: list[Path] = []
    path = Path(program)
    for _ in range(10):
        if not path.is_absolute():
            break
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
    """Folders that a Python environment has on its path by ``.pth`` files: packages installed for development."""
    found: list[Path] = []
    for path in prefix.glob("lib/python3*/site-packages/*.pth"):
        try:
            lines = path.read_text(errors="replace").splitlines()
        except OSError:
            continue
        found += [Path(line) for line in lines if line.startswith("/")]
    return found


# --- what the keeper is told ------------------------------------------------------------------------------------


def enclose(
    plan: SpawnPlan, *, argv: Sequence[str], env: Mapping[str, str], cwd: str, runtime: Path
) -> dict[str, Any]:
    """The part of the keeper's request that puts up the walls."""
    other = OTHER_UID if plan.isolation.other_user and os.geteuid() == 0 else None
    return {
        "enclosure": _bubblewrap(plan, argv, env, Path(cwd), runtime, other) if plan.enclosed else None,
        "walls": _own_walls(plan, argv, env, Path(cwd), runtime, other),
        "owner": other,
    }


def _bubblewrap(
    plan: SpawnPlan, argv: Sequence[str], env: Mapping[str, str], cwd: Path, runtime: Path, owner: int | None
) -> dict[str, Any]:
    assert plan.enclosed is not None
    disk = _disk(plan, cwd.resolve(), runtime, owner)
    around = bubblewrap.Surroundings(
        folder=cwd.resolve(),
        runtime=runtime,
        homes=homes(),
        visible=visible(argv, env),
        disk=Path(disk["base"]) if disk else None,
    )
    return {
        "argv": bubblewrap.arguments(plan.enclosed, plan.isolation, around, shm_bytes=plan.shm, root=os.geteuid() == 0),
        "python": sys.executable,
        "root": str(Path(safe_exec.__file__).parent.parent),
        "disk": disk,
    }


def _disk(plan: SpawnPlan, folder: Path, runtime: Path, owner: int | None) -> dict[str, Any] | None:
    """The file system of limited size: asked for by a limit, or since the run is to work in a copy."""
    if plan.disk is None and plan.isolation.folder is not FolderUse.COPY:
        return None
    size = plan.disk if plan.disk is not None else bubblewrap.TMP_BYTES
    return {
        "base": str(runtime / "disk"),
        "folder": str(folder),
        "size": size,
        "inodes": max(LEAST_INODES, size // INODE_BYTES),
        "write_back": plan.isolation.write_back and plan.isolation.folder is FolderUse.WRITE,
        "owner": owner,
        "user_namespace": mounts.namespaces() == "user",
    }


def _own_walls(
    plan: SpawnPlan, argv: Sequence[str], env: Mapping[str, str], cwd: Path, runtime: Path, uid: int | None
) -> dict[str, Any]:
    """What the kernel's process gives up by itself before it executes the kernel."""
    isolation = plan.isolation
    walls: dict[str, Any] = {}
    if uid is not None:
        walls["uid"] = uid
    if plan.landlock:
        walls["landlock"] = _landlock(isolation, argv, env, cwd.resolve(), runtime)
    if isolation.system_calls is not SystemCalls.ALL:
        from safe_exec.sandbox import seccomp

        refusal = "errno" if isolation.system_calls is SystemCalls.REFUSE else "kill"
        walls["seccomp"] = base64.b64encode(seccomp.load(refusal)).decode()
    return walls


def _landlock(isolation: Isolation, argv: Sequence[str], env: Mapping[str, str], cwd: Path, runtime: Path) -> dict[str, Any]:
    from safe_exec.sandbox import landlock

    hidden = [*(map(str, homes()) if isolation.hide_home else ()), *isolation.hide]
    readable = landlock.all_but(hidden, listdir=os.listdir) if hidden else ["/"]
    readable += [str(path) for path in visible(argv, env)]
    folder = [] if isolation.folder is FolderUse.READ else [str(cwd)]
    # /dev too: to write to /dev/null or a terminal changes nothing; who may do what to a device is the system's affair.
    writable = [*folder, str(runtime), "/tmp", "/dev", *isolation.writable] if isolation.read_only_system else ["/"]  # noqa: S108
    return {"readable": [*readable, str(cwd)], "writable": writable, "tcp": None if isolation.network else False}


