"""What the documentation names exists in the code, and the other way round."""

from __future__ import annotations

import ast
import inspect
import json
import re
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import click
import msgspec.structs
import pytest
import yaml

import safe_exec
from safe_exec import api
from safe_exec.cli.main import COMMANDS
from safe_exec.integrations.pytest_options import ISOLATION
from safe_exec.limits import isolation
from safe_exec.model import events
from safe_exec.model.limits import Isolation, LimitName, Limits, Mechanism, Wall
from safe_exec.model.verdict import (
    Activity,
    CauseKind,
    CellStatus,
    Confidence,
    Role,
    Status,
    Stopped,
)
from safe_exec.reports.verdict_json import load_schema
from safe_exec.sandbox.plan import REQUIRE_ALL
from safe_exec.sandbox.planner import CHOOSABLE

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [
    *sorted(DOCS.glob("*.md")),
    *(ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY")),
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)\)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
MACHINE_PATH = re.compile(r"(?<![\w.~/$])/(?:root|home|work|Users|mnt|opt)/")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


OF_OTHER_TOOLS = {
    "docs/cluster.md": {
        *("--scheduler-file", "--nworkers", "--nthreads", "--memory-limit", "--resources"),
        *("--array", "--cpus-per-task", "--mem", "--wait"),
    },
    "docs/limits.md": {"--user", "--scope"},
    "docs/migrating.md": {
        *("--engine", "--execute", "--execution-timeout", "--help-notebook", "--inplace", "--to"),
        *("--log-output", "--nbmake", "--nbmake-find-import-errors", "--nbmake-kernel"),
        *("--nbmake-timeout", "--nbval", "--nbval-cell-timeout", "--nbval-lax", "--overwrite"),
        *("--nbval-sanitize-with", "--safe-exec", "--cov", "--prepare-only", "--report-mode"),
        *("--inject-paths", "--nbval-current-env", "--nbval-kernel-name"),
        *(
            f"--safe-exec-{name}"
            for name in (
                *("cell-timeout", "compare", "compare-lax", "coverage", "in-place", "kernel"),
                *("sanitize-with", "show"),
            )
        ),
    },
    "docs/coverage.md": {
        *("--cov", "--cov-branch", "--cov-config", "--keep", "--show-contexts"),
        *("--safe-exec", "--safe-exec-coverage"),
    },
    "docs/debug.md": {"--existing"},
    "docs/integrations.md": {
        *(f"--safe-exec-{name.value.replace('_', '-')}" for name in LimitName),
        *(
            "--safe-exec",
            *(
                f"--safe-exec-{name}"
                for name in (
                    *("limits", "kernel", "require", "keep-going", "locals"),
                    *("no-bisect", "bisect-budget", "out"),
                )
            ),
            *(f"--safe-exec-{name}" for name, _ in ISOLATION),
            *(f"--safe-exec-{name}" for name in ("network", "no-network", "read-only", "cwd")),
        ),
        *(
            "--junitxml",
            "--lf",
            "--nbmake",
            "--nbmake-kernel",
            "--engine",
            "--log-output",
            "--stdout-file",
            "--execution-timeout",
        ),
        *("--to", "--execute", "--kernel", "--executor"),
    },
}
"""Tested where these tools are run."""


def page(name: str) -> str:
    return (ROOT / name).read_text()


def section(text: str, title: str) -> str:
    """The part under one heading, what is below it included."""
    found = re.search(rf"^(#+) {re.escape(title)}$", text, re.MULTILINE)
    assert found, f"no heading {title!r}"
    rest = text[found.end() :]
    end = re.search(rf"^#{{1,{len(found[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def rows(text: str) -> Iterator[list[str]]:
    """The rows of every table in a text, without heads and rules."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        head = number + 1 < len(lines) and re.fullmatch(r"\|[-|: ]+\|", lines[number + 1])
        if line.startswith("|") and not head and not re.fullmatch(r"\|[-|: ]+\|", line):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def named(text: str) -> set[str]:
    """All names in backticks."""
    return {word for code in CODE.findall(text) for word in re.findall(r"[A-Za-z_][\w-]*", code)}


def first_column(text: str) -> list[str]:
    return [name for row in rows(text) for name in CODE.findall(row[0])]


def paragraph(text: str, start: str) -> str:
    return next(part for part in text.split("\n\n") if part.startswith(start))


# --- every page -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_no_path_of_a_machine(name: str) -> None:
    # A short path of the checkout may be the end of a relative one: `../src`.
    checkout = re.compile(rf"(?<![\w.]){re.escape(str(ROOT))}\b")
    found = [
        line
        for line in page(name).splitlines()
        if MACHINE_PATH.search(line) or checkout.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("name", NAMES)
def test_relative_links_resolve(name: str) -> None:
    text = re.sub(r"```.*?```", "", page(name), flags=re.DOTALL)
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert anchor in {
                re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles
            }, target


@pytest.mark.parametrize("name", NAMES)
def test_tables_are_whole(name: str) -> None:
    for number, line in enumerate(page(name).splitlines(), 1):
        if line.startswith("|"):
            assert line.endswith("|"), f"line {number}"


def options_of(command: click.Command) -> set[str]:
    if isinstance(command, click.Group) and hasattr(command, "commands"):
        return {option for inner in command.commands.values() for option in options_of(inner)}
    return {
        option
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }


def commands() -> dict[str, click.Command]:
    return {name: import_module(f"safe_exec.cli.{name}").command for name in COMMANDS}


@pytest.mark.parametrize(
    "name", [str(path.relative_to(ROOT)) for path in sorted(DOCS.glob("*.md"))]
)
def test_every_option_named_exists(name: str) -> None:
    known = {option for command in commands().values() for option in options_of(command)} | {
        "--help",
        "--version",
    }
    known |= OF_OTHER_TOOLS.get(name, set())
    assert set(OPTION.findall(page(name))) - known == set()


def test_every_option_of_run_is_named() -> None:
    text = "\n".join(path.read_text() for path in DOCS.glob("*.md"))
    keys = {f"--{name.value.replace('_', '-')}" for name in LimitName}
    wanted = {option for option in options_of(commands()["run"]) if option.startswith("--")} - keys
    assert wanted - set(OPTION.findall(text)) == set()


def test_every_command_named_exists() -> None:
    groups = {name: getattr(command, "commands", {}) for name, command in commands().items()}
    for name in NAMES:
        for command, inner in re.findall(
            r"`?safe-exec (run|doctor|limits|[a-z]+)(?: ([a-z]+))?`?",
            "\n".join(CODE.findall(page(name))),
        ):
            assert command in COMMANDS, (name, command)
            if command == "limits" and inner:
                assert inner in groups["limits"], (name, inner)
    assert set(COMMANDS) <= {
        word for name in NAMES for word in re.findall(r"safe-exec ([a-z]+)", page(name))
    }


# --- the verdict ------------------------------------------------------------------------------------------------


def test_causes() -> None:
    names = first_column(section(page("docs/verdict.md"), "Causes"))
    assert sorted(set(names)) == sorted(CauseKind)


def test_statuses_and_exit_codes() -> None:
    table = {
        row[1].strip("`"): int(row[0])
        for row in rows(section(page("docs/verdict.md"), "Status and exit code"))
    }
    assert table.pop("") == 2
    assert table == {status.value: status.exit_code for status in Status}


def test_activities() -> None:
    assert sorted(first_column(section(page("docs/verdict.md"), "Activity"))) == sorted(Activity)


def test_confidence() -> None:
    text = paragraph(
        section(page("docs/verdict.md"), "Evidence, origin, confidence"), "`confidence`"
    )
    assert named(text) - {"confidence"} == {str(word) for word in Confidence}


def test_statuses_of_cells() -> None:
    text = paragraph(page("docs/verdict.md"), "**`cells`**")
    assert {str(status) for status in CellStatus} <= named(text)


def test_fields_of_the_verdict() -> None:
    text = section(page("docs/verdict.md"), "Fields")
    assert sorted(first_column(text)) == sorted(load_schema()["properties"])


def test_fields_within_the_verdict() -> None:
    text = section(page("docs/verdict.md"), "Fields") + section(
        page("docs/verdict.md"), "Evidence, origin, confidence"
    )
    schema = load_schema()
    wanted: set[str] = set()
    for name in (
        "Cause",
        "CrashCell",
        "CellRecord",
        "Frame",
        "Fact",
        "NotebookInfo",
        "Usage",
        "Environment",
        "Timeline",
    ):
        wanted |= set(schema["$defs"][name]["properties"])
    assert wanted - named(text) == set()


def test_culprits() -> None:
    text = section(page("docs/verdict.md"), "Culprits")
    schema = load_schema()["$defs"]
    keys, roles, ends = (
        text.split("\n| `role`")[0],
        *re.split(r"\n\| `(?:role|stopped)` \| meaning", text)[1:],
    )
    assert sorted(first_column(keys)) == sorted(schema["Culprits"]["properties"])
    assert set(schema["Culprit"]["properties"]) <= named(keys)
    assert first_column(roles) == [str(role) for role in Role]
    assert first_column(ends) == [str(end) for end in Stopped]


def test_the_example_is_a_part_of_a_verdict() -> None:
    example = next(
        json.loads(body)
        for language, body in FENCE.findall(page("docs/verdict.md"))
        if language == "json"
    )
    schema = load_schema()
    assert set(example) <= set(schema["properties"])
    assert set(example["cause"]) == set(schema["$defs"]["Cause"]["properties"])
    assert set(example["crash_cell"]) == set(schema["$defs"]["CrashCell"]["properties"])
    assert all(
        set(cell) == set(schema["$defs"]["CellRecord"]["properties"]) for cell in example["cells"]
    )
    assert set(example["usage"]) == set(schema["$defs"]["Usage"]["properties"])
    assert Status(example["status"]).exit_code == example["exit_code"]


def test_events() -> None:
    kinds = {str(kind.__struct_config__.tag): kind for kind in events.Event.__subclasses__()}
    table = {
        CODE.findall(row[0])[0]: row[1]
        for row in rows(section(page("docs/verdict.md"), "The event log"))
    }
    assert sorted(table) == sorted(kinds)
    for name, kind in kinds.items():
        fields = set(kind.__struct_fields__) - {"time", "message"}
        assert fields <= named(table[name]), name


# --- the limits -------------------------------------------------------------------------------------------------


def test_limits() -> None:
    table = list(rows(section(page("docs/limits.md"), "The limits").partition("\n### ")[0]))
    assert [row[0].strip("`") for row in table] == list(Limits.__struct_fields__)
    kinds = {name for row in table for name in CODE.findall(row[4])}
    assert kinds <= {str(kind) for kind in CauseKind}
    statuses = {found for row in table for found in re.findall(r"status `(\w+)`", row[3])}
    assert statuses <= {str(status) for status in Status}


def test_profiles_are_as_their_files_say() -> None:
    text = section(page("docs/limits.md"), "Profiles")
    head = next(line for line in text.splitlines() if line.startswith("| key"))
    names = [cell.strip() for cell in head.strip("|").split("|")][1:]
    assert sorted(names) == sorted(path.stem for path in (ROOT / "limits").glob("*.yaml"))
    table = {row[0].strip("`"): row[1:] for row in rows(text)}
    for column, name in enumerate(names):
        document: dict[str, Any] = yaml.safe_load((ROOT / "limits" / f"{name}.yaml").read_text())
        said = {
            key: "null" if value is None else str(value)
            for key, value in document["limits"].items()
        }
        assert {key: row[column] for key, row in table.items()} == said, name


def said_of(value: object) -> str:
    return "true" if value is True else "false" if value is False else str(value)


def test_keys_of_isolation() -> None:
    text = section(page("docs/limits.md"), "Isolation").partition("\n### ")[0]
    keys, profiles = text.split("\n| key | default | ci |")
    table = list(rows(keys))
    assert [row[0].strip("`") for row in table] == list(Isolation.__struct_fields__)
    assert {wall for row in table for wall in CODE.findall(row[4])} == {str(wall) for wall in Wall}
    bare = {
        field.name: said_of(field.default)
        for field in msgspec.structs.fields(Isolation)
        if field.default != ()
    }
    assert {row[0].strip("`"): row[2].strip("`") for row in table if row[2]} == bare
    lines = list(rows("| key | default | ci |" + profiles))
    assert [row[0].strip("`") for row in lines] == list(bare)
    for column, name in enumerate(("default", "ci", "strict", "untrusted"), 1):
        document = yaml.safe_load((ROOT / "limits" / f"{name}.yaml").read_text())
        found = bare | {
            key: said_of(value)
            for key, value in document.get("isolation", {}).items()
            if value != []
        }
        assert {row[0].strip("`"): row[column] for row in lines} == found, name


def test_the_key_of_isolation_in_the_metadata_of_a_notebook() -> None:
    text = section(page("docs/limits.md"), "Isolation")
    path = re.search(r"in its\s+metadata \(`(\w+)\.(\w+)`", text)
    assert path
    metadata = {path[1]: {path[2]: {"network": False}}}
    assert isolation.of_metadata(metadata, "a.ipynb") == {"network": False}


def test_mechanisms() -> None:
    names = first_column(section(page("docs/limits.md"), "Enforcement").partition("\n### ")[0])
    assert sorted(set(names)) == sorted(Mechanism)


def test_require_all() -> None:
    text = section(page("docs/limits.md"), "`--require`")
    said = re.search(r"`--require\s+all`\s+stands\s+for\s+(.*?),\s+those", text, re.DOTALL)
    assert said and CODE.findall(said[1]) == [str(name) for name in REQUIRE_ALL]


def test_mechanisms_that_can_be_chosen() -> None:
    text = section(page("docs/limits.md"), "`--mechanisms`")
    said = re.search(r"uses\s+only\s+these\s+of\s+(.*?)\.\s+It", text, re.DOTALL)
    assert said
    assert CODE.findall(said[1]) == [str(mechanism) for mechanism in CHOOSABLE]
    # The help of `run` has no room for all; an unknown one is an error that lists them.
    option = next(p for p in commands()["doctor"].params if p.name == "mechanisms")
    assert isinstance(option, click.Option) and option.help
    assert all(mechanism in option.help for mechanism in CHOOSABLE)


def test_a_place_for_the_overshoot() -> None:
    assert page("docs/limits.md").count("<!-- overshoot -->") == 1


# --- python, architecture, contributing ---------------------------------------------------------------------------


def test_examples_in_python_compile() -> None:
    for name in NAMES:
        for language, body in FENCE.findall(page(name)):
            if language == "python":
                tree = ast.parse(body)
                for node in ast.walk(tree):
                    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                        "safe_exec"
                    ):
                        module = import_module(str(node.module))
                        assert all(hasattr(module, alias.name) for alias in node.names), (
                            ast.unparse(node)
                        )
            if language == "json":
                json.loads(body)
            if language == "yaml":
                yaml.safe_load(body)


def test_parameters_of_run() -> None:
    documented = first_column(section(page("docs/python.md"), "`safe_exec.run`"))
    parameters = list(inspect.signature(api.run).parameters)
    assert sorted(documented) == sorted(parameters[1:])
    assert parameters == list(inspect.signature(api.run_async).parameters)


def test_public_names() -> None:
    text = page("docs/python.md")
    for name in safe_exec.__all__:
        if name not in ("__version__", "Cause"):
            assert re.search(rf"\b{name}\b", text), name


def test_modules_named_exist() -> None:
    files = [
        str(path.relative_to(ROOT))
        for path in (*ROOT.glob("safe_exec/**/*"), *ROOT.glob("tests/**/*"))
        if path.is_file()
    ]
    for name in (
        "docs/architecture.md",
        "docs/verdict.md",
        "docs/limits.md",
        "docs/python.md",
        "CONTRIBUTING.md",
    ):
        for module in re.findall(
            r"[\w./]+\.(?:py|schema\.json)\b", "\n".join(CODE.findall(page(name)))
        ):
            assert any(file == module or file.endswith(f"/{module}") for file in files), (
                name,
                module,
            )


def test_messages_of_the_control_socket() -> None:
    from safe_exec.keeper import protocol

    row = next(row for row in rows(page("docs/architecture.md")) if row[0] == "control socket")
    to_keeper, _, back = row[2].partition("Back:")
    assert set(CODE.findall(to_keeper)) == set(protocol.TO_KEEPER)
    assert set(CODE.findall(back)) == set(protocol.TO_RUNNER)


def test_figures_of_the_architecture() -> None:
    from safe_exec.agent import layout, sampler
    from safe_exec.keeper import crash_output, keeper
    from safe_exec.sandbox import sandbox
    from safe_exec.sandbox.mechanisms import watchdog

    text = re.sub(r"\s+", " ", page("docs/architecture.md"))
    assert (
        f"{keeper.NEAR * 100:.0f} % of it" in text
        and f"further {keeper.STACK_STEP * 100:.0f} %" in text
    )
    assert 2 * layout.SEGMENT_BYTES == 8 << 20 and layout.PAGE_BYTES == 136 << 10
    assert crash_output.TAIL_BYTES == 64 << 10
    assert watchdog.PERIOD_SECONDS == 0.02 and sampler.SAMPLE_SECONDS == 0.02
    asked = {
        f"{reason.value.replace('_', ' ').replace('cpu', 'processor')}"
        for reason in sandbox.STACK_BEFORE
    }
    said = re.search(r"safe-exec kills for (.*?), it\s", text, re.DOTALL)
    assert said and set(re.split(r",\s+|\s+or\s+", said[1])) == asked


def test_picture() -> None:
    root = ET.parse(DOCS / "architecture.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    assert root.find(f"{space}title") is not None and root.find(f"{space}desc") is not None
    assert re.search(r"!\[[^\]]{40,}\]\(architecture\.svg\)", page("docs/architecture.md"))


def test_targets_of_make() -> None:
    targets = re.findall(r"^([a-z][a-z0-9-]*):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    table = first_column(page("CONTRIBUTING.md").partition("## Tests")[0])
    assert sorted(table) == sorted(targets)


def test_markers() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    markers = {re.split(r"\W", line)[0] for line in settings["markers"]}
    text = page("CONTRIBUTING.md")
    for marker in markers:
        assert f"`{marker}` (" in text, marker


def test_folders_of_tests() -> None:
    folders = {
        f"tests/{path.name}"
        for path in (ROOT / "tests").iterdir()
        if (path / "__init__.py").exists()
    }
    assert folders == {
        name
        for name in first_column(section(page("CONTRIBUTING.md"), "Tests"))
        if name.startswith("tests/")
    }


# --- security ---------------------------------------------------------------------------------------------------


def hostile() -> set[str]:
    """What the hostile notebooks are called: attacks by name, and tests of their own."""
    text = "\n".join(path.read_text() for path in (ROOT / "tests" / "hostile").glob("test_*.py"))
    return set(re.findall(r'Attack\(\s*name="([^"]+)"', text)) | set(
        re.findall(r"^def (test_\w+)", text, re.MULTILINE)
    )


def test_each_promise_is_shown_by_tests_that_exist() -> None:
    text = page("docs/security.md")
    tables = [
        *rows(section(text, "Walls")),
        *rows(section(text, "Limits")),
        *rows(section(text, "The verdict")),
    ]
    assert len(tables) > 20
    for row in tables:
        shown = CODE.findall(row[-1])
        assert shown and set(shown) <= hostile(), row[0]


def test_each_promise_of_what_is_outside_is_shown_by_tests_that_exist() -> None:
    tests = hostile() | {
        name
        for path in (ROOT / "tests" / "unit").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    table = [*rows(section(page("docs/security.md"), "Outside the walls"))]
    assert len(table) >= 3
    for promise, shown in table:
        names = CODE.findall(shown)
        assert names and set(names) <= tests, promise


def test_each_wall_is_promised_to_the_profiles_that_have_it() -> None:
    found = {row[0]: row[1] for row in rows(section(page("docs/security.md"), "Profiles"))}
    assert {name.strip("`") for name in found} == {
        path.stem for path in (ROOT / "limits").glob("*.yaml")
    }


# --- docs/platforms.md ------------------------------------------------------------------------------------------

TESTS = ROOT / "tests"
TABLES = {"kills": "tests.integration.kills.KILLS", "languages": "tests.integration.languages.ROWS"}


def test_platforms_names_tests_that_there_are() -> None:
    text = page("docs/platforms.md")
    rows = re.findall(r"`(kills|languages)\[([^\]`]+)\]`", text)
    functions = re.findall(r"`([a-z_]+/test_\w+\.py)::(test_\w+)`", text)
    assert len(rows) > 15 and len(functions) > 10
    for table, name in rows:
        module, _, variable = TABLES[table].rpartition(".")
        assert name in {row.id for row in getattr(import_module(module), variable)}, (
            f"{table}[{name}]"
        )
    for path, name in functions:
        defined = {
            node.name
            for node in ast.parse((TESTS / path).read_text()).body
            if isinstance(node, ast.FunctionDef)
        }
        assert name in defined, f"{path}::{name}"


def test_platforms_says_of_each_limit_what_holds_it_where_and_by_which_test() -> None:
    text = page("docs/platforms.md")
    _, _, rest = text.partition("<!-- platforms:")
    lines = [
        line
        for line in rest.partition("<!-- /platforms -->")[0].splitlines()
        if line.startswith("| `")
    ]
    named = {name for line in lines for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert named == {name.value for name in LimitName}
    for line in lines:
        _, _, *cells, _ = line.split("|")
        assert len(cells) == 5, line
        for cell in cells:
            assert "untested" in cell or re.search(r"`kills\[|::test_", cell), cell
