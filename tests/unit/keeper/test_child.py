"""The last steps of a process that becomes the kernel, taken by processes of their own: they end in an execution or not at all."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from safe_exec.keeper import child
from tests.support import ROOT

SHOW = """
import json, os, resource, signal, sys
print(json.dumps({
    "argv": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd(), "core": resource.getrlimit(resource.RLIMIT_CORE),
    "files": resource.getrlimit(resource.RLIMIT_NOFILE), "fsize": resource.getrlimit(resource.RLIMIT_FSIZE),
    "int": signal.getsignal(signal.SIGINT) == signal.default_int_handler, "pipe": str(int(signal.getsignal(signal.SIGUSR1))),
    "nnp": [l.split()[1] for l in open("/proc/self/status") if l.startswith("NoNewPrivs")],
}))
"""
BECOME = """
import json, os, sys
from safe_exec.keeper import child as become
r, w = os.pipe2(os.O_CLOEXEC)
if os.fork() == 0:
    become.run(become.command_from(json.loads(sys.argv[1])), 4242, w)
os.close(w)
said = os.read(r, 4000).decode()
_, status = os.wait()
print(said, file=sys.stderr)
sys.exit(os.waitstatus_to_exitcode(status))
"""
PLACE = """
import json, os, sys
from safe_exec.keeper import child as become
argv = ("x", "{page}:{facts}", "{page}", "{other}")
r, w = os.pipe()
first, second = os.open("/", os.O_RDONLY), os.open("/dev", os.O_RDONLY)
out = os.dup(1)
argv, placed = become.place_descriptors(argv, w, {"page": first, "facts": second})
os.write(2, b"to the pipe")
found = {
    "placed": placed, "argv": argv, "null": os.readlink("/proc/self/fd/0"), "said": os.read(r, 100).decode(),
    "to": {name: os.readlink(f"/proc/self/fd/{fd}") for name, fd in placed.items()},
    "kept": [os.get_inheritable(fd) for fd in placed.values()],
}
os.write(out, json.dumps(found).encode())
"""


def python(code: str, *arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60, **more
    )


def plan(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    bare = {
        "argv": [sys.executable, "-c", SHOW, "a", "b"],
        "env": {"PATH": os.defpath, "MINE": "yes"},
        "cwd": str(tmp_path),
        "rlimits": [],
        "open_files_soft": None,
        "walls": None,
    }
    return {**bare, **changes}


def walls(**changes: Any) -> dict[str, Any]:
    bare = {"uid": None, "drop_capabilities": False, "landlock": None, "seccomp": None}
    return {**bare, **changes}


def became(found: dict[str, Any], **more: Any) -> dict[str, Any]:
    done = python(BECOME, json.dumps(found), **more)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_the_kernel_gets_its_command_folder_and_environment(tmp_path: Path) -> None:
    told = became(plan(tmp_path))
    assert (told["argv"], told["cwd"], told["int"]) == (["a", "b"], str(tmp_path), True)
    assert {k: v for k, v in told["env"].items() if k != "LC_CTYPE"} == {
        "PATH": os.defpath,
        "MINE": "yes",
        "JPY_PARENT_PID": "4242",
    }


def test_limits_are_taken_and_the_soft_one_on_files_is_no_higher_than_the_hard_one(
    tmp_path: Path,
) -> None:
    rows = [[resource.RLIMIT_FSIZE, 1000, 2000], [resource.RLIMIT_NOFILE, 64, 64]]
    told = became(plan(tmp_path, rlimits=rows, open_files_soft=128))
    assert (told["fsize"], told["files"]) == ([1000, 2000], [64, 64])
    assert became(
        plan(tmp_path, rlimits=[[resource.RLIMIT_NOFILE, 256, 256]], open_files_soft=100)
    )["files"] == [100, 256]


def test_signals_that_the_keeper_ignores_are_the_kernels_own(tmp_path: Path) -> None:
    ignoring = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGUSR1, signal.SIG_IGN)\n"
        + BECOME
    )
    told = json.loads(python(ignoring, json.dumps(plan(tmp_path))).stdout)
    assert told["int"] is True and told["pipe"] == str(int(signal.SIG_DFL))


def test_without_walls_nothing_is_given_up(tmp_path: Path) -> None:
    own = list(resource.getrlimit(resource.RLIMIT_CORE))
    told = became(plan(tmp_path, walls=None))
    assert (told["core"], told["nnp"]) == (own, ["0"])


def test_with_walls_there_are_no_core_dumps(tmp_path: Path) -> None:
    assert became(plan(tmp_path, walls=walls()))["core"] == [0, 0]


def test_a_filter_takes_the_way_to_new_privileges(tmp_path: Path) -> None:
    import base64

    allow = base64.b64encode(
        b"\x06\x00\x00\x00\x00\x00\xff\x7f"
    ).decode()  # BPF_RET | BPF_K, SECCOMP_RET_ALLOW
    assert became(plan(tmp_path, walls=walls(seccomp=allow)))["nnp"] == ["1"]


@pytest.mark.bed("root")
@pytest.mark.parametrize("uid", [None, 65534])
def test_no_set_of_capabilities_is_left(tmp_path: Path, uid: int | None) -> None:
    raised = (
        "import ctypes\nfrom safe_exec.keeper.capabilities import _Header, _Sets\nfull = 1 << 21 | 1 << 8 | 1 << 7 | 1 << 6\n"
        "sets = (_Sets * 2)(_Sets(full, full, full), _Sets(0, 0, 0))\n"
        "assert ctypes.CDLL(None).capset(ctypes.byref(_Header(0x20080522, 0)), sets) == 0\n"
        "assert ctypes.CDLL(None).prctl(47, 2, 21, 0, 0) == 0\n"  # PR_CAP_AMBIENT_RAISE, CAP_SYS_ADMIN
    )
    root_walls = walls(drop_capabilities=True, uid=uid)
    done = python(
        raised + BECOME,
        json.dumps(
            plan(tmp_path, cwd="/", argv=["/bin/cat", "/proc/self/status"], walls=root_walls)
        ),
    )
    assert done.returncode == 0, done.stderr
    status = dict(line.split(":\t") for line in done.stdout.splitlines() if ":\t" in line)
    sets = {name: int(value, 16) for name, value in status.items() if name.startswith("Cap")}
    assert sets == dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), 0)
    assert status["Uid"].split() == [str(uid or 0)] * 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"argv": ["/nonesuch/python"]}, "command FileNotFoundError: "),
        ({"argv": ["/etc"]}, "command PermissionError: "),
        ({"cwd": "/nonesuch"}, "sandbox FileNotFoundError: "),
        ({"rlimits": [[999, 1, 1]]}, "sandbox ValueError: "),
        ({"walls": walls(seccomp="AAAA")}, "sandbox OSError: "),
        ({"walls": walls(seccomp="!")}, "sandbox "),
    ],
)
def test_what_went_wrong_is_told_with_its_stage(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    done = python(BECOME, json.dumps(plan(tmp_path, **changes)))
    assert done.returncode == 127 and done.stderr.startswith(said)


def test_descriptors_are_high_up_and_stay_open() -> None:
    found = json.loads(
        python(
            PLACE, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 4096))
        ).stdout
    )
    assert all(fd >= 4096 - child.ROOM for fd in found["placed"].values())
    page, facts = found["placed"]["page"], found["placed"]["facts"]
    assert found["argv"] == ["x", f"{page}:{facts}", str(page), "{other}"]
    assert found["to"] == {"page": "/", "facts": "/dev"} and found["kept"] == [True, True]
    assert (found["null"], found["said"]) == ("/dev/null", "to the pipe")


def test_where_few_descriptors_are_allowed_they_are_as_high_as_they_go() -> None:
    found = json.loads(
        python(
            PLACE, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
        ).stdout
    )
    assert all(child.BASE_DESCRIPTORS <= fd < 40 for fd in found["placed"].values())


def test_a_failed_setup_says_whose_fault_it_is() -> None:
    refused = child.SetupFailed("command", "no such file")
    assert (refused.stage, refused.message, str(refused)) == (
        "command",
        "no such file",
        "no such file",
    )
