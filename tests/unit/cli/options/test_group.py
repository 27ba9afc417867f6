"""Groups of options: their decorators, and the values that commands get."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from msgspec import Struct

from safe_exec.cli.options.group import option_group
from safe_exec.cli.options.job import JobOptions, job_options
from safe_exec.cli.options.limits import WallOptions, limit_options, wall_options, walls_of
from safe_exec.limits import spec


class Inner(Struct, frozen=True, kw_only=True):
    size: int


class Outer(Struct, frozen=True, kw_only=True):
    inner: Inner
    name: str | None


inner = option_group("inner", Inner, [click.option("--size", type=int, default=1)])
outer = option_group("outer", Outer, [inner, click.option("--name")])


def test_a_group_in_a_group_arrives_as_one_value() -> None:
    values: list[object] = []

    @click.command()
    @click.option("--first")
    @outer
    @click.option("--last")
    def command(first: str | None, outer: Outer, last: str | None) -> None:
        """Help."""
        values.extend([first, outer, last])

    assert command.help == "Help."
    assert [parameter.name for parameter in command.params] == ["first", "size", "name", "last"]
    result = CliRunner().invoke(command, ["--name", "x", "--size", "3", "--last", "z"])
    assert result.exit_code == 0, result.output
    assert values == [None, Outer(inner=Inner(size=3), name="x"), "z"]


def test_limits_are_those_that_the_user_gave() -> None:
    values: list[object] = []

    @click.command()
    @limit_options(spec.OPTIONS[:2])
    def command(figures: object) -> None:
        values.append(figures)

    CliRunner().invoke(command, ["--cpus", "2"])
    assert values == [{"cpus": "2"}]


def test_every_option_of_a_job_has_its_field() -> None:
    values: list[JobOptions] = []

    @click.command()
    @job_options(kernel_help="", cwd_help="", budget_help="")
    def command(options: JobOptions) -> None:
        values.append(options)

    result = CliRunner().invoke(command, ["--memory", "1G", "--hide", "/etc", "--retries", "2"])
    assert result.exit_code == 0, result.output
    [options] = values
    assert (options.figures, options.walls.hide) == ({"memory": "1G"}, ("/etc",))
    assert options.retry.retries == 2


@pytest.mark.parametrize(
    "walls",
    [
        WallOptions(),
        WallOptions(network=True, env_names=("A", "B")),
        WallOptions(network=False, read_only=True, devices=("/dev/null",), show=("/etc", "/usr")),
        WallOptions(writable=("/tmp",), hide=("/srv",)),
    ],
)
def test_the_arguments_of_walls_mean_the_same_walls(walls: WallOptions) -> None:
    values: list[object] = []

    @click.command()
    @wall_options
    def command(walls: WallOptions) -> None:
        values.append(walls)

    CliRunner().invoke(command, walls.arguments())
    assert values == [walls]


def test_a_command_that_starts_elsewhere_has_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    walls = WallOptions(show=("data",), env_names=("TOKEN",)).absolute()
    assert walls == WallOptions(show=(str(tmp_path / "data"),), env_names=("TOKEN",))
    assert walls_of(walls)["show"] == (str(tmp_path / "data"),)
