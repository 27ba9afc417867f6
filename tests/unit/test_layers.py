"""Imports go down the layers (import-linter, pyproject.toml), and processes beside and in the kernel load little."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import safe_exec

PACKAGE = Path(safe_exec.__file__).parent
ROOT = PACKAGE.parent

KEEPER = {
    "bwrap",
    "cgroupfs",
    "child",
    "crash_output",
    "file_tree",
    "keeper",
    "mounts",
    "procfs",
    "protocol",
    "signal_frame",
}
"""Modules of ``safe_exec.keeper`` that a keeper loads at its start; it has to start in milliseconds."""

STANDARD_LIBRARY_ONLY = (
    "safe_exec.keeper",
    "safe_exec.agent",
    "safe_exec.sandbox.keeper_process",
)
"""Packages and modules that run beside or in a kernel, or before anything else is imported."""

HEAVY = (
    "nbclient", "nbformat", "jupyter_client", "zmq", "psutil", "rich", "click", "yaml", "asyncio", "traitlets", "tornado",
    "jsonschema", "junitparser",
)  # fmt: skip


def name_of(path: Path) -> str:
    parts = ("safe_exec", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    name_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if "_limits" not in path.parts
}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in (
        "TYPE_CHECKING",
        "typing.TYPE_CHECKING",
    )


def imports(node: ast.AST, *, deep: bool) -> Iterator[str]:
    """Top-level packages that a module imports when it runs; with ``deep`` those within its functions too."""
    for child in ast.iter_child_nodes(node):
        if is_for_types_only(child):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield "" if child.level else (child.module or "").partition(".")[0]
        elif deep or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(child, deep=deep)


def within(name: str, parts: tuple[str, ...]) -> bool:
    return any(name == part or name.startswith(part + ".") for part in parts)


def test_imports_go_down_the_layers() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", [name for name in MODULES if within(name, STANDARD_LIBRARY_ONLY)])
def test_processes_beside_the_kernel_need_the_standard_library_alone(name: str) -> None:
    # The agent patches the libraries of the kernel from within its functions.
    deep = not within(name, ("safe_exec.agent",))
    assert set(imports(TREES[name], deep=deep)) - set(sys.stdlib_module_names) <= {"", "safe_exec"}


@pytest.mark.parametrize("name", [name for name in MODULES if within(name, ("safe_exec.agent",))])
def test_the_agent_imports_its_own_folder_by_relative_names(name: str) -> None:
    # In the kernel the package has another name, which is forgotten once everything is imported.
    nodes = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.ImportFrom)]
    assert all(
        node.level == 1
        for node in nodes
        if node.level or (node.module or "").startswith("safe_exec")
    )
    assert all(node in TREES[name].body for node in nodes if node.level)


def loaded_by(statement: str) -> set[str]:
    """Modules that a fresh interpreter loads for a statement, those of its own start left out."""
    code = f"import sys; before = set(sys.modules); {statement}; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.partition(".")[0] == "safe_exec"}


@pytest.mark.parametrize(
    "statement",
    [
        "import safe_exec",
        "from safe_exec import __version__",
        "from safe_exec import Limits, Verdict",
    ],
)
def test_importing_the_package_is_cheap(statement: str) -> None:
    assert {name.partition(".")[0] for name in loaded_by(statement)} & set(HEAVY) == set()


def test_the_keeper_starts_without_anything_heavy() -> None:
    loaded = loaded_by("import safe_exec.keeper.keeper")
    assert {name.partition(".")[0] for name in loaded} & set(HEAVY) == set()
    wanted = {"safe_exec", "safe_exec.keeper", *(f"safe_exec.keeper.{name}" for name in KEEPER)}
    assert ours(loaded) == wanted, (
        "Landlock and seccomp are imported only when a sandbox needs them"
    )


def test_the_init_inside_bubblewrap_is_light() -> None:
    loaded = loaded_by("import safe_exec.keeper.bwrap_init")
    assert ours(loaded) == {"safe_exec", "safe_exec.keeper", "safe_exec.keeper.bwrap_init"}
    assert {name.partition(".")[0] for name in loaded} & {*HEAVY, "subprocess"} == set()
