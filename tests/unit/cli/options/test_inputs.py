from __future__ import annotations

from pathlib import Path

import pytest

from safe_exec.cli.options.inputs import (
    InputOptions,
    environment_with,
    inputs_of,
    read_env_file,
    variables_of,
    walls_with,
)
from safe_exec.errors import UsageError

NOTHING = InputOptions()


def test_the_command_line_wins_over_files_and_later_ones_over_earlier_ones(tmp_path: Path) -> None:
    one, two = tmp_path / "1.yaml", tmp_path / "2.yaml"
    one.write_text("a: 1\nb: 1\nc: 1\n")
    two.write_text("b: 2\nc: 2\n")
    options = InputOptions(
        parameter_files=(one, two),
        parameters=(("c", "3"), ("d", "4"), ("d", "5")),
        raw_parameters=(("e", "6"),),
    )
    assert inputs_of(options).parameters == {"a": 1, "b": 2, "c": 3, "d": 5, "e": "6"}


def test_nothing_is_false() -> None:
    assert not inputs_of(NOTHING)
    assert inputs_of(InputOptions(until="1"))


def test_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASE", "/data")
    path = tmp_path / ".env"
    path.write_text("# c\nexport A=1\nB='x y'  # c\nC=${BASE}/c\nD=\n\n")
    options = InputOptions(env_files=(path,), set_env=("A=2", "E=a=b"))
    assert variables_of(options) == {"A": "2", "B": "x y", "C": "/data/c", "D": "", "E": "a=b"}


@pytest.mark.parametrize(("text", "line"), [("A=1\nB\n", 2), ("A='x\n", 1), ("=x\n", 1)])
def test_a_file_of_variables_that_is_wrong_names_the_line(
    tmp_path: Path, text: str, line: int
) -> None:
    path = tmp_path / ".env"
    path.write_text(text)
    with pytest.raises(UsageError, match=rf"\.env:{line}: expected NAME=VALUE"):
        read_env_file(path)


@pytest.mark.parametrize("text", ["A", "=1", ""])
def test_a_variable_without_a_value_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected NAME=VALUE"):
        variables_of(InputOptions(set_env=(text,)))


def test_isolation_lets_a_kernel_see_the_variables_that_it_is_given() -> None:
    assert walls_with({"env": ("X",), "network": False}, {"A": "1"}) == {
        "env": ("X", "A"),
        "network": False,
    }
    assert walls_with({"network": False}, {}) == {"network": False}


def test_our_own_environment_is_used_as_it_is_if_there_are_no_variables() -> None:
    assert environment_with({}) is None
    assert (environment_with({"A_NEW_ONE": "1"}) or {})["A_NEW_ONE"] == "1"
