"""Whole runs on a machine with the unified hierarchy: as root, as a user who was given a group, in a container, in a login session."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cases.catalogue import read_all
from tests.cases.test_cases import check_cause
from tests.integration.kills import HOG, SPIN, THREADS, WORKER
from tests.integration.unified import (
    DAEMON,
    TOP,
    as_container,
    as_nobody,
    bare,
    delegated,
    in_session,
    lingering_uid,
    scopes,
)
from tests.support import (
    EXECUTABLE,
    MARK,
    NOBODY,
    Outcome,
    make_notebook,
    marked_processes,
    ordinary_user,
    run_notebook,
    safe_exec,
    wait_until,
)

MIB = 1 << 20
SLOW = ("--cell-timeout", "120", "--start-timeout", "120")
"""Such machines are emulated as a rule."""
SMALL = (*SLOW, "--memory", "200M", "--no-bisect")
NO_SYSTEMD = ("--mechanisms", "cgroup-v2,rlimit,watchdog,bubblewrap,landlock,seccomp")
SCOPE_SECONDS = 60
RUN_SECONDS = 280


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short name that any user may write to."""
    made = Path("/tmp") / f"v2-{os.getpid()}-{time.monotonic_ns()}"
    made.mkdir(mode=0o777)
    made.chmod(0o777)
    yield made
    shutil.rmtree(made)


def hog(
    folder: Path, *options: str, prefix: list[str], cells: tuple[str, ...] = ("x = 1", HOG)
) -> Outcome:
    return run_notebook(
        make_notebook(folder / "nb.ipynb", *cells),
        *SMALL,
        *options,
        prefix=prefix,
        cwd=folder,
        env={"HOME": str(folder)},
        timeout=RUN_SECONDS,
    )


def check_killed(outcome: Outcome, by: str) -> None:
    verdict = outcome.verdict
    said = f"{outcome.stdout}\n{outcome.stderr}\n{verdict['cause']}"
    assert verdict["status"] == "kernel_died", said
    assert (verdict["cause"]["kind"], verdict["cause"]["confidence"]) == (
        "out_of_memory",
        "certain",
    ), said
    assert {
        name: held["by"]
        for name, held in verdict["enforcement"].items()
        if name in ("memory", "processes")
    } == {
        "memory": by,
        "processes": by,
    }
    assert verdict["crash_cell"]["code_index"] == 1 and verdict["crash_cell"]["line"] in (3, 4), (
        said
    )
    assert verdict["usage"]["oom_kills"] == 1
    # Page tables and the like are charged too: it never gets quite there.
    assert 0.9 * 200 * MIB <= verdict["usage"]["memory_peak"] <= 200 * MIB


def doctor(prefix: list[str], *options: str) -> dict[str, Any]:
    done = safe_exec("doctor", "--json", *options, prefix=prefix, cwd=Path("/"))
    assert done.returncode in (0, 1), done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def held_by(found: dict[str, Any]) -> dict[str, str]:
    return {name: found["limits"][name]["by"] for name in ("memory", "processes", "cpus")}


def all_by(mechanism: str) -> dict[str, str]:
    return dict.fromkeys(("memory", "processes", "cpus"), mechanism)


# --- a group that was given -------------------------------------------------------------------------------------


@pytest.mark.bed("cgroup2-user")
def test_a_user_with_a_delegated_group(folder: Path) -> None:
    with delegated(owner=NOBODY) as place:
        found = doctor(as_nobody(place))
        assert held_by(found) == all_by("cgroup-v2") and found["groups"] == {
            "v2": str(place.group),
            "scope": None,
        }
        outcome = hog(folder, prefix=as_nobody(place))
    check_killed(outcome, "cgroup-v2")
    assert outcome.verdict["environment"]["cgroup"].startswith(str(place.group))


@pytest.mark.bed("cgroup2-root")
def test_a_container_with_a_smaller_limit(folder: Path) -> None:
    """Its own namespace of control groups: what is above cannot be seen, and its limit stands at the root of what can."""
    with bare(memory=260 * MIB) as group:
        found = doctor(as_container(group))
        assert held_by(found) == all_by("cgroup-v2") and found["groups"] == {
            "v2": "/sys/fs/cgroup",
            "scope": None,
        }
        outcome = hog(folder, "--memory", "400M", prefix=as_container(group))
    verdict = outcome.verdict
    said = f"{outcome.stdout}\n{outcome.stderr}\n{verdict['cause']}"
    assert (verdict["status"], verdict["cause"]["kind"], verdict["cause"]["confidence"]) == (
        "kernel_died",
        "out_of_memory",
        "certain",
    ), said
    assert verdict["enforcement"]["memory"]["by"] == "cgroup-v2"
    assert (
        "not by this run's limit: the limit of 260 MiB on /sys/fs/cgroup,"
        in verdict["cause"]["summary"]
    )


@pytest.mark.bed("cgroup2-root")
def test_a_container_with_room_for_fewer_processes(folder: Path) -> None:
    path = make_notebook(folder / "nb.ipynb", "x = 1", THREADS)
    with bare(processes=50) as group:
        outcome = run_notebook(
            path,
            *SLOW,
            "--no-bisect",
            "--processes",
            "200",
            prefix=as_container(group),
            cwd=folder,
            timeout=RUN_SECONDS,
        )
    cause = outcome.verdict["cause"]
    assert (outcome.verdict["status"], cause["kind"]) == ("cell_error", "too_many_processes"), (
        f"{outcome.stdout}\n{outcome.stderr}"
    )
    assert "not by this run's limit: 50 are allowed in /sys/fs/cgroup," in cause["summary"], cause


# --- systemd ----------------------------------------------------------------------------------------------------


def gone(prefix_of: str) -> bool:
    return not [path for path in scopes() if path.name.startswith(prefix_of)]


@pytest.mark.bed("systemd-root", "cgroup2-root")
def test_root_gets_a_scope_by_itself(folder: Path) -> None:
    found = doctor([])
    assert held_by(found) == all_by("systemd") and found["groups"]["scope"].endswith(".slice")
    outcome = hog(folder, prefix=[])
    check_killed(outcome, "systemd")
    assert "a scope of the system's systemd" in outcome.verdict["enforcement"]["memory"]["note"]
    assert f"safe-exec-{outcome.run_id}.scope/" in outcome.verdict["environment"]["cgroup"]
    wait_until(
        lambda: gone(f"safe-exec-{outcome.run_id}"),
        SCOPE_SECONDS,
        "systemd has collected the scope",
    )


@pytest.mark.bed("systemd-user")
def test_a_login_session_gets_a_scope_by_itself(folder: Path) -> None:
    """The session's own group is root's, and no process can be moved out of it: the keeper is born in the scope."""
    found = doctor(in_session())
    assert held_by(found) == all_by("systemd") and found["exit_code"] == 0
    assert f"user@{lingering_uid()}.service/app.slice" in found["groups"]["scope"]
    outcome = hog(folder, prefix=in_session())
    check_killed(outcome, "systemd")
    assert "a scope of the user's systemd" in outcome.verdict["enforcement"]["memory"]["note"]
    wait_until(
        lambda: gone(f"safe-exec-{outcome.run_id}"),
        SCOPE_SECONDS,
        "systemd has collected the scope",
    )


@pytest.mark.bed("systemd-user")
def test_in_a_scope_a_killed_worker_does_not_end_the_kernel(folder: Path) -> None:
    """systemd ends a whole unit for one process that was killed for memory (OOMPolicy=), but none that is delegated."""
    outcome = hog(folder, prefix=in_session(), cells=("x = 1", WORKER, "print('after')"))
    assert (outcome.verdict["status"], outcome.verdict["cause"]["kind"]) == (
        "cell_error",
        "worker_out_of_memory",
    ), outcome.stdout


@pytest.mark.bed("systemd-user")
def test_by_hand_in_a_scope_whose_limit_is_smaller(folder: Path) -> None:
    """The way that is documented; what runs in it stays in that scope, below its limit."""
    by_hand = [*in_session(), "systemd-run", "--user", "--scope", "--quiet", "-p", "Delegate=yes"]
    # The runner is in it as well; with swap it would be swapped out, page by page, before anything is killed.
    by_hand += ["-p", "MemoryMax=260M", "-p", "MemorySwapMax=0"]
    outcome = hog(folder, "--memory", "400M", prefix=by_hand)
    verdict = outcome.verdict
    assert verdict["enforcement"]["memory"]["by"] == "cgroup-v2", verdict["enforcement"]
    assert "the limit of 260 MiB on /sys/fs/cgroup/user.slice/" in verdict["cause"]["summary"], (
        verdict["cause"]
    )


@pytest.mark.bed("systemd-user")
def test_two_at_a_time_and_a_killed_runner(folder: Path) -> None:
    """A scope for each; one whose runner is killed goes as well, with all that was in it."""
    paths = [
        make_notebook(folder / f"{name}.ipynb", "import time\ntime.sleep(600)")
        for name in ("one", "two")
    ]
    marks = [f"v2-{os.urandom(8).hex()}" for _ in paths]
    argv = [*in_session(), str(EXECUTABLE), "run"]
    runs = [
        subprocess.Popen(
            [*argv, str(path), *SLOW, "--no-bisect"],
            env={**os.environ, MARK: mark},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for path, mark in zip(paths, marks, strict=True)
    ]
    try:
        wait_until(lambda: len(_scopes_of(marks)) == 2, 180, "both kernels stand")
        ours = _scopes_of(marks)
        for mark in marks:
            wait_until(lambda mark=mark: _runner(mark) is not None, 60, "the runner is there")  # type: ignore[misc]
            runner = _runner(mark)
            assert runner is not None
            os.kill(runner, signal.SIGKILL)
        wait_until(lambda: not ours & set(scopes()), SCOPE_SECONDS, f"no scope is left: {ours}")
        for mark in marks:
            wait_until(
                lambda mark=mark: marked_processes(mark) == [],  # type: ignore[misc]
                SCOPE_SECONDS,
                "no process is left",
            )
    finally:
        for run in runs:
            run.kill()
            run.wait()


def _scopes_of(marks: list[str]) -> set[Path]:
    """The scopes in which kernels of these runs are; other tests have theirs."""
    found = set()
    for pid in (pid for mark in marks for pid in marked_processes(mark)):
        with contextlib.suppress(OSError):
            group = TOP / Path(f"/proc/{pid}/cgroup").read_text().partition("0::/")[2].strip()
            if group.name.startswith("safe-exec-") and group.parent.suffix == ".scope":
                found.add(group.parent)
    return found


def _runner(mark: str) -> int | None:
    """The command itself: neither what was put in front of it, nor the keeper or the kernel."""
    for pid in marked_processes(mark):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if (
            len(words) > 2
            and words[0].rpartition(b"/")[2].startswith(b"python")
            and words[1] == os.fsencode(EXECUTABLE)
        ):
            return pid
    return None


# --- the other limits -------------------------------------------------------------------------------------------

ROOT_IN_A_SCOPE = pytest.param(
    "root in a scope", marks=pytest.mark.bed("systemd-root", "cgroup2-root")
)
USER_IN_A_GROUP = pytest.param("user in a group", marks=pytest.mark.bed("cgroup2-user"))
USER_IN_A_SESSION = pytest.param("user in a session", marks=pytest.mark.bed("systemd-user"))

REFUSED = (
    """
import errno
def refused(what, number, step):
    made = []
    try:
        while True:
            made.append(step(len(made)))
    except OSError as error:
        assert error.errno == number, (what, error)
        print(what, "refused")
    made.clear()
refused("open files", errno.EMFILE, lambda n: open("/dev/null"))
""",
    """
import os
def write(name, size):
    with open(name, "wb", buffering=0) as file:
        while size:  # the last that fits may be a part
            size -= file.write(bytes(size))
big = open("big", "wb", buffering=0)
refused("file size", errno.EFBIG, lambda n: big.write(bytes(300 << 10)))
""",
    """refused("shm", errno.ENOSPC, lambda n: write(f"/dev/shm/{n}", 1 << 20))""",
    """refused("disk", errno.ENOSPC, lambda n: write(f"file-{n}", 1 << 20))""",
    """
import threading
over = threading.Event()
threads = []
try:
    while True:
        threads.append(threading.Thread(target=over.wait))
        threads[-1].start()
except RuntimeError as error:
    print("processes", "refused")
over.set()
for thread in threads[:-1]:
    thread.join()
""",
    """
import signal
group = "/sys/fs/cgroup" + next(line.split("::")[1].strip() for line in open("/proc/self/cgroup") if line.startswith("0::"))
def throttled():
    return int(dict(line.split() for line in open(group + "/cpu.stat"))["nr_throttled"])
others = []
for _ in range(2):
    others.append(os.fork())
    if not others[-1]:
        while True: pass
before = throttled()
while throttled() < before + 3: pass
for pid in others:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
print("cpus", open(group + "/cpu.max").read().split())
""",
)
"""A cell for each limit that refuses or slows down; what it says shows that it did."""
SAID = [
    "open files refused",
    "file size refused",
    "shm refused",
    "disk refused",
    "processes refused",
    "cpus ['80000', '100000']",
]
FEW = (
    "--open-files",
    "128",
    "--file-size",
    "2M",
    "--shm",
    "8M",
    "--disk",
    "12M",
    "--processes",
    "60",
    "--cpus",
    "0.8",
)


@contextlib.contextmanager
def place_of(name: str) -> Iterator[tuple[list[str], str]]:
    """What is put in front of a command so that it runs there, and who holds memory, processes and cpus there."""
    if name == "user in a group":
        with delegated(owner=NOBODY) as place:
            yield as_nobody(place), "cgroup-v2"
    else:
        yield (in_session() if name == "user in a session" else []), "systemd"


def run_in(name: str, folder: Path, *options: str, cells: tuple[str, ...]) -> tuple[Outcome, str]:
    path = make_notebook(folder / "nb.ipynb", *cells)
    with place_of(name) as (prefix, by):
        outcome = run_notebook(
            path,
            *SLOW,
            "--no-bisect",
            *options,
            prefix=prefix,
            cwd=folder,
            env={"HOME": str(folder)},
            timeout=RUN_SECONDS,
        )
    return outcome, by


@pytest.mark.parametrize("name", [ROOT_IN_A_SCOPE, USER_IN_A_GROUP, USER_IN_A_SESSION])
def test_limits_that_refuse(name: str, folder: Path) -> None:
    outcome, by = run_in(name, folder, *FEW, cells=REFUSED)
    # In one go: a print may come in two messages on a machine so slow.
    said = "".join(
        o["text"] for cell in outcome.notebook.cells for o in cell.get("outputs", []) if "text" in o
    ).splitlines()
    report = f"{outcome.stdout}\n{outcome.stderr}\n{outcome.verdict['cause']}"
    assert (outcome.verdict["status"], said) == ("passed", SAID), report
    held = {
        limit: held["by"] for limit, held in outcome.verdict["enforcement"].items() if held["hard"]
    }
    wanted = {
        "open_files": "rlimit",
        "file_size": "rlimit",
        "shm": "bubblewrap",
        "disk": "bubblewrap",
        "processes": by,
        "cpus": by,
    }
    assert {limit: held.get(limit) for limit in wanted} == wanted
    assert outcome.verdict["usage"]["processes_peak"] in (None, 60)  # pids.peak came with Linux 6.5


@pytest.mark.parametrize("name", [ROOT_IN_A_SCOPE, USER_IN_A_GROUP])
def test_processor_time(name: str, folder: Path) -> None:
    # An emulated processor that has to wait for a real one counts that as used: the start alone has taken 15 s of it.
    outcome, _ = run_in(name, folder, "--cpu-time", "30s", cells=(SPIN,))
    verdict = outcome.verdict
    assert (verdict["status"], verdict["cause"]["kind"]) == ("kernel_died", "cpu_time"), (
        f"{outcome.stdout}\n{outcome.stderr}"
    )
    assert verdict["enforcement"]["cpu_time"]["by"] == "rlimit"


@pytest.mark.parametrize("name", [ROOT_IN_A_SCOPE, USER_IN_A_GROUP])
def test_wall_time_and_a_daemon(name: str, folder: Path) -> None:
    """The daemon has a session of its own and obeys no SIGTERM; that nothing lives on is seen after every run here."""
    outcome, _ = run_in(
        name, folder, "--cell-timeout", "20", cells=(DAEMON, "import time\ntime.sleep(600)")
    )
    verdict = outcome.verdict
    assert (verdict["status"], verdict["cause"]["kind"]) == ("timeout", "cell_timeout"), (
        f"{outcome.stdout}\n{outcome.stderr}"
    )
    assert verdict["crash_cell"]["code_index"] == 1


@pytest.mark.parametrize("name", [ROOT_IN_A_SCOPE, USER_IN_A_GROUP])
def test_output(name: str, folder: Path) -> None:
    flood = "while True:\n    print('flood' * 2000)"
    outcome, _ = run_in(name, folder, "--cell-output", "200k", cells=("x = 1", flood))
    verdict = outcome.verdict
    found = (verdict["status"], verdict["cause"]["kind"])
    assert found == ("limit_exceeded", "output_flood"), f"{outcome.stdout}\n{outcome.stderr}"


@pytest.mark.bed("cgroup2-user")
def test_a_batch_of_a_user_two_at_a_time(folder: Path) -> None:
    """A group for each: one is killed for memory, and the other does not notice."""
    make_notebook(folder / "hog.ipynb", "x = 1", HOG)
    make_notebook(folder / "fine.ipynb", "x = bytearray(120 << 20)", "print(len(x))")
    with delegated(owner=NOBODY) as place:
        options = ["-j", "2", "--memory", "200M", "--no-bisect", *SLOW, "--out", "out"]
        done = safe_exec(
            "batch",
            *options,
            ".",
            prefix=as_nobody(place),
            cwd=folder,
            env={"HOME": str(folder)},
            timeout=RUN_SECONDS,
        )
        assert [path.name for path in place.group.iterdir() if path.is_dir()] == ["leaf"], (
            "the groups are gone"
        )
    said = f"{done.stdout}\n{done.stderr}"
    verdicts = {
        name: json.loads((folder / "out" / f"{name}.verdict.json").read_text())
        for name in ("hog", "fine")
    }
    assert {name: verdict["status"] for name, verdict in verdicts.items()} == {
        "hog": "kernel_died",
        "fine": "passed",
    }, said
    assert (
        verdicts["hog"]["cause"]["kind"] == "out_of_memory"
        and verdicts["fine"]["usage"]["oom_kills"] == 0
    )
    groups = {verdict["environment"]["cgroup"] for verdict in verdicts.values()}
    assert len(groups) == 2 and all(group.startswith(str(place.group)) for group in groups)


# --- doctor elsewhere -------------------------------------------------------------------------------------------


@pytest.mark.bed("cgroup2-user", "systemd-root")
def test_doctor_of_a_user_without_a_systemd() -> None:
    found = doctor(ordinary_user())
    assert found["limits"]["memory"]["by"] != "cgroup-v2" and found["groups"] == {
        "v2": None,
        "scope": None,
    }
    steps = [
        step for remedy in found["remedies"] for way in remedy["ways"] for step in way["steps"]
    ]
    assert "sudo loginctl enable-linger nobody" in steps


# --- the search -------------------------------------------------------------------------------------------------


SEARCH_SECONDS = 400


@pytest.mark.timeout(SEARCH_SECONDS + 60)
@pytest.mark.bed("systemd-root", "cgroup2-root")
def test_bisect_as_root_in_scopes(folder: Path) -> None:
    search("a4-bytes-join", folder, [])


@pytest.mark.timeout(SEARCH_SECONDS + 60)
@pytest.mark.bed("cgroup2-user")
def test_bisect_as_a_user_with_a_delegated_group(folder: Path) -> None:
    with delegated(owner=NOBODY) as place:
        search("b5-gc-disabled", folder, as_nobody(place))


def search(name: str, base: Path, prefix: list[str]) -> None:
    """A case of tests/cases: its cause, and its culprits."""
    case = next(case for case in read_all() if case.id == name)
    path = Path(shutil.copy(case.notebook, base / "case.ipynb"))
    options = [*case.options, *SLOW, "--bisect-budget", str(SEARCH_SECONDS)]
    outcome = run_notebook(path, *options, prefix=prefix, cwd=base, timeout=SEARCH_SECONDS)
    check_cause(case, outcome)
    culprits = outcome.verdict["culprits"]
    assert culprits is not None, (name, outcome.verdict["warnings"])
    assert [cell["code_index"] for cell in culprits["cells"]] in case.expected["culprits"], (
        name,
        culprits,
    )
