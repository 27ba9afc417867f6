"""Imports point one way; what runs beside or in a kernel needs nothing but Python; modules and functions stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import safe_exec

PACKAGE = Path(safe_exec.__file__).parent

# From the outside in: a module imports its own rank and those below it, never one above.
RANKS: tuple[tuple[str, ...], ...] = (
    ("safe_exec.__main__",),
    ("safe_exec.commands", "safe_exec.integrations", "safe_exec.batch"),
    ("safe_exec.api",),
    ("safe_exec.probing", "safe_exec.replaying"),
    ("safe_exec.aside",),
    ("safe_exec.pipeline",),
    ("safe_exec.searching",),
    ("safe_exec.conclude",),
    ("safe_exec.job",),
    ("safe_exec.reports", "safe_exec.culprit", "safe_exec.causes", "safe_exec.trial"),
    ("safe_exec.early",),
    ("safe_exec.kernel",),
    ("safe_exec.sandbox",),
    ("safe_exec.notebook", "safe_exec.nbcheck", "safe_exec.nbjson", "safe_exec.profiles", "safe_exec.project_file"),
    ("safe_exec.isolation",),
    ("safe_exec.limits_values", "safe_exec.limits_yaml"),
    ("safe_exec.files", "safe_exec.units"),
    ("safe_exec.events", "safe_exec.platforms"),
    ("safe_exec.model", "safe_exec.errors", "safe_exec"),
    ("safe_exec.records",),
)

INSIDE = "safe_exec.kernel.inside"

# What a keeper imports, itself among it: it has to start in milliseconds.
KEEPERS = ("become", "cgroupfs", "enclosed", "keeper", "lastwords", "mounts", "procfs", "trees")

# What each of these may import of ours at all; the rest of its rank or below is closed to it.
NARROW: dict[str, set[str]] = {
    "safe_exec.model": set(),
    "safe_exec.errors": set(),
    "safe_exec.records": set(),
    "safe_exec.platforms": {"safe_exec.errors"},
    "safe_exec.events": {"safe_exec.model"},
    "safe_exec.kernel.page": {"safe_exec.kernel.inside.layout"},
    "safe_exec.kernel.faults": {"safe_exec.model"},
    "safe_exec.sandbox.birth": set(),
    "safe_exec.sandbox.procfs": set(),
    "safe_exec.sandbox.become": {"safe_exec.sandbox.landlock", "safe_exec.sandbox.seccomp"},
    "safe_exec.sandbox.bubblewrap": {"safe_exec.model"},
    "safe_exec.sandbox.enclosed": {"safe_exec.sandbox.become", "safe_exec.sandbox.mounts", "safe_exec.sandbox.trees"},
    "safe_exec.sandbox.init": {"safe_exec.sandbox.become"},
    "safe_exec.sandbox.cgroupfs": set(),
    "safe_exec.sandbox.keeper": {f"safe_exec.sandbox.{name}" for name in KEEPERS if name != "keeper"},
    "safe_exec.sandbox.lastwords": {"safe_exec.sandbox.procfs"},
    "safe_exec.sandbox.landlock": set(),
    "safe_exec.sandbox.mounts": set(),
    "safe_exec.sandbox.nursery": {"safe_exec.sandbox.keeper"},
    "safe_exec.sandbox.seccomp": set(),
    "safe_exec.sandbox.trees": set(),
    "safe_exec.sandbox.leftovers": {"safe_exec.sandbox.procfs", "safe_exec.sandbox.trees", "safe_exec.errors"},
}

# Pieces of one layer that know nothing of each other.
APART = ("safe_exec.reports", "safe_exec.culprit", "safe_exec.causes")

# What answers the questions of the culprit search, which itself knows numbers only.
RUNS_TRIALS = tuple(f"safe_exec.culprit.{name}" for name in ("oracle", "investigate", "folder", "cache", "runs"))

STANDARD_ONLY = (
    "safe_exec.sandbox.become",
    "safe_exec.sandbox.birth",
    "safe_exec.sandbox.cgroupfs",
    "safe_exec.sandbox.enclosed",
    "safe_exec.sandbox.init",
    "safe_exec.sandbox.keeper",
    "safe_exec.sandbox.landlock",
    "safe_exec.sandbox.lastwords",
    "safe_exec.sandbox.mounts",
    "safe_exec.sandbox.nursery",
    "safe_exec.sandbox.procfs",
    "safe_exec.sandbox.seccomp",
    "safe_exec.sandbox.trees",
    "safe_exec.kernel.page",
)

# Longer than a screen or two, each with its reason.
LONG_MODULES = {
    "safe_exec.model": "one type after the other",
    "safe_exec.kernel.session": "a kernel from its start to its end",
    "safe_exec.kernel.wire": "one protocol, whole",
    "safe_exec.sandbox.keeper": "one sandbox from its start to its end",
}
LONG_FUNCTIONS = {
    "safe_exec.trial.gather.gather": "one field after the other",
}
MOST_LINES, MOST_FUNCTION_LINES = 400, 60

HEAVY = (
    "nbclient", "nbformat", "jupyter_client", "zmq", "psutil", "rich", "click", "yaml", "asyncio", "traitlets", "tornado",
    "jsonschema", "junitparser",
)  # fmt: skip


def name_of(path: Path) -> str:
    parts = ("safe_exec", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if "_limits" not in path.parts}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(node: ast.AST, package: str, *, deep: bool) -> Iterator[str]:
    """Full names that a module imports when it runs; with ``deep`` those within its functions too."""
    for child in ast.iter_child_nodes(node):
        if is_for_types_only(child):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            if child.level:
                base = ".".join([*package.split(".")[: len(package.split(".")) - child.level + 1], *filter(None, [base])])
            yield from (f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in child.names)
        elif deep or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(child, package, deep=deep)


def imported(name: str, *, deep: bool = True) -> set[str]:
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    return set(imports(TREES[name], package, deep=deep))


def ours(name: str) -> set[str]:
    return {found for found in imported(name) if found.partition(".")[0] == "safe_exec"} - {name}


def within(name: str, part: str) -> bool:
    return name == part or (part != "safe_exec" and name.startswith(part + "."))


def rank(name: str) -> int | None:
    return next((n for n, parts in enumerate(RANKS) if any(within(name, part) for part in parts)), None)


def test_every_module_has_a_rank() -> None:
    assert [name for name in MODULES if rank(name) is None] == []


@pytest.mark.parametrize("name", [name for name in MODULES if name != "safe_exec"])
def test_imports_point_one_way(name: str) -> None:
    mine = rank(name)
    assert mine is not None
    up = {other for other in ours(name) if (theirs := rank(other)) is None or theirs < mine}
    assert up == set()


@pytest.mark.parametrize("name", list(NARROW))
def test_what_may_know_little_knows_no_more(name: str) -> None:
    assert ours(name) <= NARROW[name] | {"safe_exec.records"}


@pytest.mark.parametrize("name", [name for name in MODULES if any(within(name, part) for part in APART)])
def test_reports_causes_and_the_search_know_nothing_of_each_other_nor_of_kernels(name: str) -> None:
    own = next(part for part in APART if within(name, part))
    kernels = () if name in RUNS_TRIALS else ("safe_exec.trial", "safe_exec.kernel", "safe_exec.sandbox")
    closed = {*APART, *kernels} - {own}
    assert {other for other in ours(name) if any(within(other, part) for part in closed)} == set()


def test_the_table_of_ranks_names_nothing_twice() -> None:
    names = [part for parts in RANKS for part in parts]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", STANDARD_ONLY)
def test_what_runs_beside_or_in_a_kernel_needs_the_standard_library_alone(name: str) -> None:
    foreign = {found.partition(".")[0] for found in imported(name)} - set(sys.stdlib_module_names)
    assert foreign <= {"safe_exec"}
    assert ours(name) <= NARROW[name] | {"safe_exec.records"}


@pytest.mark.parametrize("name", [name for name in MODULES if within(name, INSIDE)])
def test_what_runs_in_a_kernel_needs_the_standard_library_and_its_own_folder(name: str) -> None:
    # It patches the libraries of the kernel, from within its functions.
    foreign = {found.partition(".")[0] for found in imported(name, deep=False)} - set(sys.stdlib_module_names)
    assert foreign <= {"safe_exec"}
    assert {other for other in ours(name) if not within(other, INSIDE)} == set()
    # In there it has another name, which is forgotten once all is imported.
    nodes = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.ImportFrom)]
    assert all(node.level == 1 for node in nodes if node.level or (node.module or "").startswith("safe_exec"))
    assert all(node in TREES[name].body for node in nodes if node.level)


@pytest.mark.parametrize("statement", ["import safe_exec", "from safe_exec import __version__", "from safe_exec import model"])
def test_importing_the_package_is_cheap(statement: str) -> None:
    code = f"import sys; before = set(sys.modules); {statement}; print(*sorted(m for m in set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert loaded & set(HEAVY) == set()


def test_the_keeper_starts_without_anything_heavy() -> None:
    code = "import sys; import safe_exec.sandbox.keeper; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {name.partition(".")[0] for name in loaded} & set(HEAVY) == set()
    assert {name for name in loaded if name.startswith("safe_exec")} == {
        "safe_exec",
        "safe_exec.sandbox",
        *(f"safe_exec.sandbox.{name}" for name in KEEPERS),
    }, "what only walls take (landlock, seccomp) is imported where they are put up"


def test_what_starts_inside_bubblewrap_is_light() -> None:
    code = "import sys; import safe_exec.sandbox.init; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {name for name in loaded if name.startswith("safe_exec")} == {
        "safe_exec",
        "safe_exec.sandbox",
        "safe_exec.sandbox.init",
    }
    assert {name.partition(".")[0] for name in loaded} & {*HEAVY, "subprocess"} == set()


# --- size -------------------------------------------------------------------------------------------------------


def functions(tree: ast.Module, name: str) -> Iterator[tuple[str, int]]:
    """Each function's full name and how many lines it has."""
    stack: list[tuple[ast.AST, str]] = [(tree, name)]
    while stack:
        node, prefix = stack.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                full = f"{prefix}.{child.name}"
                if not isinstance(child, ast.ClassDef) and child.end_lineno is not None:
                    yield full, child.end_lineno - child.lineno + 1
                stack.append((child, full))


def test_modules_are_short() -> None:
    long = {name for name, path in MODULES.items() if len(path.read_text().splitlines()) > MOST_LINES}
    assert long - set(LONG_MODULES) == set()


def test_functions_are_short() -> None:
    long = {full for name, tree in TREES.items() for full, lines in functions(tree, name) if lines > MOST_FUNCTION_LINES}
    assert long - set(LONG_FUNCTIONS) == set()


def test_the_lists_of_long_ones_name_what_exists() -> None:
    every = {full for name, tree in TREES.items() for full, _ in functions(tree, name)}
    assert set(LONG_MODULES) <= set(MODULES) and set(LONG_FUNCTIONS) <= every


@pytest.mark.parametrize("name", list(MODULES))
def test_a_module_says_what_it_is_for(name: str) -> None:
    assert ast.get_docstring(TREES[name]) or not TREES[name].body
