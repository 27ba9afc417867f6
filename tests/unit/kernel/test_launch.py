"""What is started without jupyter_client is what jupyter_client would start."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning import LocalProvisioner

from safe_exec.kernel.launch import command, environment_of, extra_arguments, find_spec

ARGV = [
    "python3",
    "-Xfrozen_modules=off",
    "-m",
    "ipykernel_launcher",
    "-f",
    "{connection_file}",
    "--x={resource_dir}",
    "{other}",
]


def install(folder: Path, name: str, **document: Any) -> Path:
    directory = folder / "kernels" / name
    directory.mkdir(parents=True)
    (directory / "kernel.json").write_text(
        json.dumps({"argv": ARGV, "display_name": name, "language": "python"} | document)
    )
    return directory


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    monkeypatch.setenv("JUPYTER_PATH", os.pathsep.join(map(str, folders)))
    return folders


def theirs(name: str) -> AsyncKernelManager:
    manager = AsyncKernelManager(kernel_name=name)
    assert manager.kernel_spec is not None
    return manager


@pytest.mark.parametrize("name", ["plain", "MiXed", "both"])
def test_the_same_spec(places: list[Path], name: str) -> None:
    install(places[0], "Plain")
    install(places[1], "mixed", env={"A": "1"})
    for place in places:
        install(place, "both", env={"WHERE": place.name})
    found = find_spec(name)
    assert found is not None
    known = KernelSpecManager().get_kernel_spec(name)
    assert (found.directory, found.argv, found.document.get("env", {})) == (
        known.resource_dir,
        known.argv,
        known.env,
    )


def test_the_kernel_at_hand_is_known() -> None:
    found = find_spec("python3")
    assert found is not None
    assert found.argv == KernelSpecManager().get_kernel_spec("python3").argv


@pytest.mark.parametrize(
    "document",
    [
        {"argv": ["bash_kernel", "-f", "{connection_file}"]},  # not ipykernel's
        {"argv": "python -m ipykernel_launcher"},
        {"argv": [1]},
        {"env": ["A"]},
        {"metadata": {"kernel_provisioner": {"provisioner_name": "other"}}},
    ],
)
def test_what_is_left_to_jupyter_client(places: list[Path], document: dict[str, Any]) -> None:
    install(places[0], "odd", **document)
    assert find_spec("odd") is None


def test_a_spec_that_cannot_be_read_is_left_to_jupyter_client(places: list[Path]) -> None:
    (install(places[0], "torn") / "kernel.json").write_text('{"argv": ["pyth')
    assert find_spec("torn") is None
    assert find_spec("there-is-none") is None


@pytest.mark.parametrize("program", ["python", "python3", "/usr/bin/python3", "python2"])
def test_the_same_command(places: list[Path], tmp_path: Path, program: str) -> None:
    install(places[0], "mine", argv=[program, *ARGV[1:]])
    manager = theirs("mine")
    manager.connection_file = str(tmp_path / "c.json")
    manager._launch_args = {}
    extra = extra_arguments("python3")
    spec = find_spec("mine")
    assert spec is not None
    assert command(spec, manager.connection_file, extra) == manager.format_kernel_cmd(
        extra_arguments=extra
    )


@pytest.mark.parametrize("name", ["python", "python2", "python3", "other"])
def test_history_as_nbclient_keeps_it(name: str) -> None:
    assert bool(extra_arguments(name)) == AsyncKernelManager(kernel_name=name).ipykernel


async def _environment(env: dict[str, str], manager: AsyncKernelManager) -> dict[str, str]:
    provisioner = LocalProvisioner(kernel_id="x", kernel_spec=manager.kernel_spec, parent=manager)
    made = await super(LocalProvisioner, provisioner).pre_launch(env=env, cmd=[])
    result: dict[str, str] = made["env"]
    return result


@pytest.mark.parametrize("language", ["python", "Python3", "R"])
def test_the_same_environment(places: list[Path], language: str) -> None:
    install(places[0], "mine", language=language, env={"NEW": "x${HOME}:$NONE", "HOME": "/else"})
    env = {"HOME": "/home/me", "PYTHONEXECUTABLE": "/x", "PATH": "/bin"}
    spec = find_spec("mine")
    assert spec is not None
    assert environment_of(spec, env) == asyncio.run(_environment(env, theirs("mine")))
    assert env["HOME"] == "/home/me"
