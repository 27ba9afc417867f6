"""``safe-exec limits``, and the limits of kernels that other tools start."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from safe_exec.cli.limits import command, errors_of
from safe_exec.errors import LimitsError
from safe_exec.limits.profiles import LIMIT_NAMES, load_profile, resolve_simple, shipped_profiles
from safe_exec.model.limits import Isolation, Limits

M = 2**20


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(command, list(arguments), standalone_mode=False)


def write(name: str, text: str) -> Path:
    Path(name).write_text(text)
    return Path(name)


# --- show and list ----------------------------------------------------------------------------------------------


def test_show_has_every_limit_with_figure_and_source() -> None:
    write("own.yaml", "description: mine\nextends: ci\nlimits:\n  memory: 512M\n")
    lines = call("show", "own.yaml").stdout.splitlines()
    assert lines[0] == "own.yaml: mine"
    lines = lines[: lines.index("")]
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in lines[1:]}
    assert tuple(rows) == LIMIT_NAMES
    assert rows["memory"].startswith("512 MiB")
    assert rows["memory"].endswith("own.yaml:4")
    assert rows["cell_timeout"] == "5m · runner profile ci"
    assert rows["cpus"] == "unlimited profile ci"
    assert rows["interrupt_grace"] == "2.0 s profile ci"


def test_show_without_a_name_is_the_default_profile() -> None:
    assert call("show").stdout.startswith("default: ")


def test_show_as_json_is_in_bytes_and_seconds() -> None:
    document = json.loads(call("show", "strict", "--json").stdout)
    assert document["limits"]["memory"] == 512 * M
    assert document["limits"]["cell_timeout"] == 60.0
    assert document["sources"]["memory"] == "profile strict"
    assert document["enforcement"]["cell_timeout"]["by"] == "runner"
    assert set(document["limits"]) == set(LIMIT_NAMES)


def test_show_has_the_walls_and_what_holds_them_here() -> None:
    write(
        "own.yaml",
        "extends: ci\nisolation:\n  hide: [/srv/data, ~/x]\n  network: no\n  env: [TOKEN]\n",
    )
    shown = call("show", "own.yaml").stdout
    _, _, walls = shown.partition("\nisolation\n")
    asked, _, held = walls.partition("\n\n")
    assert {line.split()[0]: " ".join(line.split()[1:]) for line in asked.splitlines()} == {
        "hide_home": "true",
        "read_only_system": "true",
        "network": "false",
        "own_processes": "true",
        "listed_environment": "true",
        "system_calls": "refuse",
        "repository": "write",
        "env": "TOKEN",
        "hide": "/srv/data, ~/x",
    }
    marks = re.findall(r"^  ([✓~✗])  (\w+) ", held, re.MULTILINE)
    assert [name for _, name in marks] == [
        "home", "system", "hidden", "network", "processes", "environment", "system_calls", "privileges",
    ]  # fmt: skip


def test_show_says_how_to_mend_what_nothing_holds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    shown = call("show", "ci").stdout
    assert re.search(
        r"^  ✗  processes +nothing +no bubblewrap: it is not installed", shown, re.MULTILINE
    )
    assert "to fix" in shown and "install it" in shown


def test_show_of_a_profile_without_walls() -> None:
    shown = call("show").stdout
    assert "isolation: none, the notebook may reach what you may" in shown
    assert "to fix" not in shown.partition("isolation: none")[2]


def test_show_as_json_has_the_walls() -> None:
    document = json.loads(call("show", "strict", "--json").stdout)
    assert document["isolation"]["folder"] == "copy" and document["isolation"]["hide"] == []
    assert set(document["isolation"]) == set(Isolation.__struct_fields__)
    assert {"home", "system", "folder", "network"} <= set(document["walls"])
    assert json.loads(call("show", "--json").stdout)["walls"] == {}


def test_show_of_what_is_not_there() -> None:
    assert isinstance(call("show", "stritc").exception, LimitsError)


def test_list_names_and_describes_what_ships() -> None:
    lines = call("list").stdout.splitlines()
    assert (
        tuple(line.split()[0] for line in lines if not line.startswith("   ")) == shipped_profiles()
    )
    assert "Tight limits for small notebooks" in "\n".join(lines)


# --- check ------------------------------------------------------------------------------------------------------

BAD = """\
extends: ci
limits:
  memory: 5Q
  cpu: 3
  cpus: 2
  processes: -1
"""
BAD_WALLS = """\
extends: ci
isolation:
  hide_hom: true
"""
BAD_PROJECT = """\
limits:
  - path: "a.ipynb"
    memory: 5Q
  - path: "b.ipynb"
    profile: ci
    cpus: x
"""


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("own.yaml", "limits:\n  memory: 1G\n", []),
        ("ci", "limits:\n  memory: 1G\n", []),
        ("own.yaml", BAD, [3, 4, 6]),
        ("ci", BAD, [3, 4, 6]),
        ("own.yaml", "extends: nonesuch\nlimits:\n  memory: 5Q\n", [3]),
        ("own.yaml", "limits:\n  memory: [1\n", [3]),
        ("own.yaml", "memory: 1G\n", [1]),
        ("own.yaml", BAD_WALLS, [3]),
        ("safe-exec.yaml", 'limits:\n  - path: "a"\n    memory: 1G\n', []),
        ("safe-exec.yaml", BAD_PROJECT, [3, 6]),
        ("other-name.yaml", BAD_PROJECT, [3, 6]),
        ("safe-exec.yaml", "limits:\n  - memory: 1G\n", [2]),
        ("safe-exec.yaml", "limits:\n  memory: 1G\n", [1]),
    ],
)
def test_check_finds_every_error(name: str, text: str, lines: list[int]) -> None:
    found = errors_of(write(name, text))
    assert [int(error.split(":")[1]) for error in found] == lines, found
    assert all(error.startswith(f"{name}:") for error in found)


def test_check_prints_a_line_for_each_and_says_so() -> None:
    write("own.yaml", BAD)
    result = call("check", "own.yaml")
    assert result.return_value == 2
    assert len(result.stderr.splitlines()) == 3
    assert result.stdout == ""


def test_check_of_what_is_right() -> None:
    write("own.yaml", "extends: ci\n")
    result = call("check", "own.yaml")
    assert (result.return_value, result.stdout, result.stderr) == (0, "own.yaml: right\n", "")


def test_check_of_what_cannot_be_read() -> None:
    assert errors_of(Path("nonesuch.yaml")) == ["nonesuch.yaml: no such file"]
    Path("folder").mkdir()
    assert len(errors_of(Path("folder"))) == 1


# --- limits of kernels that other tools start -------------------------------------------------------------------


def profile(name: str) -> Limits:
    return load_profile(name, machine_memory=2**33).limits


def test_without_a_word_the_default_profile_holds() -> None:
    assert (
        resolve_simple({}, None, machine_memory=16 << 30).cell_timeout
        == profile("default").cell_timeout
    )
    assert resolve_simple({}, "", machine_memory=16 << 30) == resolve_simple(
        {}, None, machine_memory=16 << 30
    )


def test_the_configuration_is_stronger_than_the_environment() -> None:
    assert resolve_simple({}, "strict", machine_memory=16 << 30) == profile("strict")
    assert resolve_simple({"limits": "ci"}, "strict", machine_memory=16 << 30) == profile("ci")


def test_figures_of_the_configuration_win_in_any_unit() -> None:
    found = resolve_simple(
        {"limits": "ci", "memory": "256M", "cell-timeout": "90s", "cpus": 2, "timeout": None},
        None,
        machine_memory=16 << 30,
    )
    assert (found.memory, found.cell_timeout, found.cpus, found.timeout) == (
        256 * M,
        90.0,
        2.0,
        None,
    )
    assert found.processes == profile("ci").processes


def test_a_file_may_be_named() -> None:
    write("own.yaml", "limits:\n  memory: 100M\n")
    assert resolve_simple({"limits": "own.yaml"}, None, machine_memory=16 << 30).memory == 100 * M


def test_a_share_is_of_this_machine() -> None:
    half = resolve_simple({"memory": "50%"}, None, machine_memory=16 << 30).memory
    whole = resolve_simple({"memory": "100%"}, None, machine_memory=16 << 30).memory
    assert half is not None
    assert whole is not None
    assert abs(whole - 2 * half) <= 1


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"memory": "5Q"}, "kernel provisioner: memory: '5Q' is not a size"),
        ({"memroy": "5G"}, "did you mean memory?"),
        ({"limits": 3}, "kernel provisioner: limits: expected the name of a profile"),
        ({"limits": "nonesuch"}, "unknown profile 'nonesuch'"),
    ],
)
def test_errors_name_the_provisioner(config: dict[str, object], said: str) -> None:
    with pytest.raises(LimitsError) as caught:
        resolve_simple(config, None, machine_memory=16 << 30)
    assert said in str(caught.value)
