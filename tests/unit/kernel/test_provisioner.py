"""Which kernel commands are taken over, and how."""

from __future__ import annotations

import json
import os

import pytest

from safe_exec.agent import bootstrap
from safe_exec.kernel.launch import speaks_ipc, wrap_command

CONFIG = {"cut": 5, "message": None}
OURS = [os.path.abspath(bootstrap.__file__), "{page}", "{facts}", "{fault}", json.dumps(CONFIG)]
LAUNCH = ["-m", "ipykernel_launcher", "-f", "{connection_file}"]


@pytest.mark.parametrize(
    ("cmd", "wrapped"),
    [
        (["/usr/bin/python", *LAUNCH], ["/usr/bin/python", *OURS, *LAUNCH]),
        (["python3.11", *LAUNCH], ["python3.11", *OURS, *LAUNCH]),
        (
            ["/opt/a b/python3", "-m", "ipykernel", "-f", "c"],
            ["/opt/a b/python3", *OURS, "-m", "ipykernel", "-f", "c"],
        ),
        (
            ["python", "-Xfrozen_modules=off", *LAUNCH],
            ["python", "-Xfrozen_modules=off", *OURS, *LAUNCH],
        ),
        (["python", "-I", "-E", *LAUNCH], ["python", "-I", "-E", *OURS, *LAUNCH]),
        # Not ours to wrap.
        (["bash", "-m", "ipykernel_launcher"], None),
        (["python", "-m", "bash_kernel", "-f", "c"], None),
        (["python", "script.py", *LAUNCH], None),
        (["python", "-c", "import x", *LAUNCH], None),
        (["python", "-m"], None),
        (["python", "kernel.py"], None),
        (["conda", "run", "python", *LAUNCH], None),
        (["/usr/lib/R/bin/R", "--slave", "-e", "IRkernel::main()", "--args", "c"], None),
        (["env", "A=1", "python", *LAUNCH], None),
        (["pythonw.sh", "-W", "ignore", *LAUNCH], None),
    ],
)
def test_commands(cmd: list[str], wrapped: list[str] | None) -> None:
    before = list(cmd)
    assert wrap_command(cmd, CONFIG) == wrapped
    assert cmd == before


def test_the_configuration_cannot_be_taken_for_a_place_holder() -> None:
    wrapped = wrap_command(["python", *LAUNCH], {"cut": None})
    assert wrapped is not None
    filled = [
        part.replace("{page}", "7").replace("{facts}", "8").replace("{fault}", "9")
        for part in wrapped
    ]
    assert filled[2:6] == ["7", "8", "9", '{"cut": null}']


@pytest.mark.parametrize(
    ("cmd", "ipc"),
    [
        (["python", *LAUNCH], True),
        (["python", "-m", "ipykernel"], True),
        (["python", "-m", "bash_kernel"], False),
        (["R", "-e", "IRkernel::main()"], False),
        (["ipykernel"], False),
    ],
)
def test_kernels_that_are_known_to_speak_over_sockets_of_the_file_system(
    cmd: list[str], ipc: bool
) -> None:
    assert speaks_ipc(cmd) is ipc
