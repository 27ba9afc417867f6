"""The places that walls are built around: homes to hide, and what a kernel needs to read.

A kernel needs its interpreter with all packages, and never a whole home for it.
"""

from __future__ import annotations

import ast
import contextlib
import os
import pwd
import re
import shutil
import site
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import safe_exec

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
