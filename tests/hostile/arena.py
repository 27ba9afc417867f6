"""Where hostile notebooks are let loose: canaries all around, and afterwards a look at whether anything got out or was left.

A test takes an arena, runs notebooks in it and leaves it; leaving checks the canaries and that nothing is left:

    with Arena("root") as arena:
        fight = arena.run("print(open('@HOME@/.ssh/id_test').read())", options=("--cell-timeout", "5"))
        assert fight.status == Status.CELL_ERROR, fight

``who`` is ``"root"`` or ``"user"`` (an ordinary user without any privilege; his bubblewrap works by a user namespace), ``profile`` one of
those that ship (``untrusted``), ``reaches`` the listeners outside that may be connected to, by name (none). Cells are text, or notebooks that
are there already (``run_notebook``). In cells these words are replaced:

    @HOME@      the user's home: .ssh/id_test and .config/token in it hold secrets
    @BESIDE@    a file with a secret in the folder above the notebook's, that anybody may read and write
    @SYSTEM@    a directory of the system that anybody may write to, with a file ``canary`` in it, and ``id``, a set-user-id program of root's
    @PID@       a process of the same user that runs outside
    @ABSTRACT@  the name of an abstract socket outside on which somebody listens, without the leading zero byte
    @SOCKET@    the path of a socket outside, in the user's home
    @PORT@      a TCP port on loopback outside on which somebody listens
    @OURS@      what a cell should begin the names of shared things with (/dev/shm, queues), so that what is left of them is found

Most tests are rows of a table, each an ``Attack``; ``rounds`` makes the parameters of a test out of them, and ``fight`` holds one.

The environment holds SECRET_TOKEN. Every run checks that no secret is in anything that it printed or wrote, that the runner took less than
200 MB, that its documents are valid, and that no process, control group, note, mount, socket or directory is left. What is left of a run all
the same is removed, so that it fails one test and not those after it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pty
import secrets
import select
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import nbformat
import pytest
from jsonschema import Draft202012Validator

from safe_exec.keeper import procfs
from safe_exec.model.verdict import Activity, CauseKind, Status
from safe_exec.reports.verdict_json import load_schema
from safe_exec.sandbox.enclosure import OTHER_UID
from tests.support import (
    EXECUTABLE,
    MARK,
    NOBODY,
    groups_of,
    left_behind,
    make_notebook,
    marked_processes,
    wait_until,
)
from tests.support import ordinary_user_with_namespaces as _ordinary_user

Who = Literal["root", "user"]

RUNNER_BYTES = 200 << 20
"""What the runner itself may take at its peak, whatever the notebook does."""
RUN_SECONDS = 120.0
NOT_PASSED = ("PYTEST_CURRENT_TEST", "XDG_RUNTIME_DIR")
GONE_SECONDS = 2.0
PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER = 36, 37
SYSTEM_FILES = (
    "/etc/passwd",
    "/etc/hosts",
    "/proc/sys/kernel/core_pattern",
    "/proc/sys/kernel/hostname",
)
SYSTEM_DIRECTORIES = ("/", "/etc", "/usr", "/usr/bin", "/tmp", "/var/tmp", "/dev/shm", "/root")


Ending = tuple[Status, CauseKind | None]

PLACES: tuple[tuple[Who, str], ...] = (("root", "default"), ("user", "ci"))
"""The two ends: with all rights and no walls, without any right and walled in."""


def in_turn(names: Iterable[str], *, both: Collection[str] = ()) -> list[Any]:
    """The parameters ``arena, name`` of a test: each name in one of the places, in turn, those in ``both`` in both.

    For what differs in what is sent, not in where: the runner, which takes it, is the same.
    """
    found = []
    for number, name in enumerate(names):
        places = PLACES if name in both else (PLACES[number % len(PLACES)],)
        found += [pytest.param(place, name, id=f"{'-'.join(place)}-{name}") for place in places]
    assert set(both) <= set(names), "no such name"
    return found


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One row of a table: what a notebook does, and all the ways in which it may end.

    ``says`` must stand in its outputs and ``warns`` in the warnings. ``reaches``: the listeners outside that it is known to reach.
    ``broken`` says why it is known to fail, for a row that waits for a repair.
    """

    name: str
    cells: str | tuple[str, ...]
    ends: tuple[Ending, ...]
    cell: int | None = None
    who: Who | Literal["both"] = "both"
    profile: str = "untrusted"
    options: tuple[str, ...] = ()
    says: tuple[str, ...] = ()
    warns: str | None = None
    activity: Activity | None = None
    exit_code: int | None = None
    seconds: float = RUN_SECONDS
    reaches: tuple[str, ...] = ()
    broken: str = ""


def rounds(attacks: Sequence[Attack]) -> list[Any]:
    """Each attack as each of those that make it: the parameters ``attack, who`` of a test."""
    found = []
    for attack in attacks:
        marks = [pytest.mark.xfail(reason=attack.broken, strict=True)] if attack.broken else []
        whos: tuple[Who, ...] = ("root", "user") if attack.who == "both" else (attack.who,)
        found += [pytest.param(attack, who, id=f"{attack.name}-{who}", marks=marks) for who in whos]
    return found


def fight(attack: Attack, who: Who) -> None:
    """Make one attack, and see that it ended as it may, behind walls that bubblewrap holds."""
    with Arena(who, attack.profile, reaches=attack.reaches) as arena:
        cells = (attack.cells,) if isinstance(attack.cells, str) else attack.cells
        seen = arena.run(*cells, options=("--cell-timeout", "30", *attack.options))
        report = f"{attack.name} as {who}: {seen}"
        walls = seen.verdict["environment"]["isolation"]
        assert {walls[wall]["by"] for wall in ("home", "system", "processes")} == {"bubblewrap"}, (
            f"no walls: {walls}\n{report}"
        )
        assert (seen.status, seen.cause) in attack.ends, report
        if attack.cell is not None:
            assert seen.cell == attack.cell, report
        for words in attack.says:
            assert words in seen.text, f"nowhere: {words!r}\n{report}"
        if attack.warns is not None:
            assert any(attack.warns in warning for warning in seen.verdict["warnings"]), (
                f"{seen.verdict['warnings']}\n{report}"
            )
        cause = seen.verdict["cause"] or {}
        if attack.activity is not None:
            assert cause["activity"] == attack.activity, report
        if attack.exit_code is not None:
            assert cause["exit_code"] == attack.exit_code and cause["signal"] is None, report
        assert seen.seconds < attack.seconds, f"it took {seen.seconds:.0f} s\n{report}"


@dataclass(frozen=True, kw_only=True)
class Fight:
    """One run: what was said, what was written, and what the runner took."""

    code: int
    stdout: str
    stderr: str
    verdict: Mapping[str, Any]
    notebook: Any
    peak: int
    seconds: float

    @property
    def status(self) -> str:
        """The verdict's status."""
        return str(self.verdict["status"])

    @property
    def cause(self) -> str | None:
        """The kind of cause, ``None`` without one."""
        return (self.verdict["cause"] or {}).get("kind")

    @property
    def cell(self) -> int | None:
        """The code cell in which it happened, counted from 0."""
        return (self.verdict["crash_cell"] or {}).get("code_index")

    @property
    def text(self) -> str:
        """All text in the outputs of code cells."""
        found = []
        for output in (o for c in self.notebook.cells for o in c.get("outputs", [])):
            found += [
                output.get("text", ""),
                *output.get("data", {}).values(),
                output.get("evalue", ""),
            ]
            found += output.get("traceback", [])
        return "\n".join(map(str, found))

    def __str__(self) -> str:
        """All that helps to see what went wrong."""
        said = json.dumps(self.verdict["cause"], indent=1)[:3000]
        return f"{self.status}, {self.cause}, cell {self.cell}\n{self.stdout}\n{self.stderr}\n{said}\n{self.text[:3000]}"


@dataclass
class Arena:
    """A place with canaries around it; see above. ``base`` is above ``folder``, in which notebooks are; ``home`` is elsewhere."""

    who: Who = "root"
    profile: str = "untrusted"
    reaches: Sequence[str] = ()
    folder: Path = field(init=False)
    base: Path = field(init=False)
    home: Path = field(init=False)
    system: Path = field(init=False)
    secrets: dict[str, str] = field(init=False)
    ours: str = field(init=False)

    def __enter__(self) -> Self:
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self._build(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._stack:
            if error is None:
                self.check()

    # --- building -----------------------------------------------------------------------------------------------

    def _build(self, stack: contextlib.ExitStack) -> None:
        self._runs = 0
        self.ours = f"hostile-{secrets.token_hex(6)}"
        self.secrets = {
            name: f"SECRET{name}{secrets.token_hex(8)}"
            for name in ("key", "token", "beside", "environment", "process")
        }
        self.base = stack.enter_context(_directory("/tmp", "h-"))
        self.folder = self.base / "nb"
        self.folder.mkdir()
        # Not in /tmp, which walls cover as a whole; /var/lib stays visible.
        self.system = stack.enter_context(_directory("/var/lib", "hostile-"))
        self.system.chmod(0o1777)
        self.home = stack.enter_context(_directory("/var/lib", "hostile-home-"))
        for path, text, mode in (
            (self.home / ".ssh" / "id_test", self.secrets["key"], 0o600),
            (self.home / ".config" / "token", self.secrets["token"], 0o644),
            (self.base / "beside.txt", self.secrets["beside"], 0o666),
            (self.system / "canary", "untouched", 0o666),
        ):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(mode)
        shutil.copy("/usr/bin/id", self.system / "id")
        (self.system / "id").chmod(0o4755)
        if self.who == "user":
            for path in (
                self.base,
                self.folder,
                *self.base.iterdir(),
                self.home,
                *self.home.rglob("*"),
            ):
                os.chown(path, NOBODY, NOBODY)
        self._listen(stack)
        self._process = self._stranger(stack)
        self._before = self._look()
        self._families = set(procfs.descendants(os.getpid()))
        self._shared = _shared_things()
        self._mounts = _mounts()

    def _listen(self, stack: contextlib.ExitStack) -> None:
        """Three sockets that nobody should connect to; whoever does is in the queue of the socket afterwards."""
        self.abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        self.abstract.bind(f"\0{self.ours}")
        self.path_socket = stack.enter_context(socket.socket(socket.AF_UNIX))
        self.path_socket.bind(str(self.home / "agent.sock"))
        (self.home / "agent.sock").chmod(0o666)
        self.tcp = stack.enter_context(socket.socket())
        self.tcp.bind(("127.0.0.1", 0))
        for listener in self._listeners().values():
            listener.listen(64)
            listener.setblocking(False)

    def _listeners(self) -> dict[str, socket.socket]:
        return {
            "abstract socket": self.abstract,
            "socket in the home": self.path_socket,
            "tcp port": self.tcp,
        }

    def _stranger(self, stack: contextlib.ExitStack) -> subprocess.Popen[bytes]:
        """A process of the same user that has nothing to do with it, with a secret in its environment."""
        argv = [*self._prefix(), "sleep", "600"]
        process = subprocess.Popen(
            argv,
            env={"PATH": os.environ["PATH"], "SECRET": self.secrets["process"]},
            start_new_session=True,
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        wait_until(
            lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n",
            10.0,
            "the process outside sleeps",
        )
        return process

    def _prefix(self) -> list[str]:
        return list(_user_prefix()) if self.who == "user" else []

    # --- running ------------------------------------------------------------------------------------------------

    def run(
        self,
        *cells: str,
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        bisect: bool = False,
    ) -> Fight:
        """Run a notebook of these cells; see the module for the words that are replaced in them."""
        self._runs += 1
        path = make_notebook(self.folder / f"nb{self._runs}.ipynb", *map(self.fill, cells))
        return self.run_notebook(path, options=options, env=env, bisect=bisect)

    def mkdir(self, name: str) -> Path:
        """A directory above the notebook's folder that anybody may write to; the one of before where there is one."""
        path = self.base / name
        path.mkdir(exist_ok=True)
        path.chmod(0o777)
        return path

    def run_notebook(
        self,
        path: Path,
        *,
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        bisect: bool = False,
        terminal: bool = False,
    ) -> Fight:
        """Run a notebook that is there, in our profile; ``options`` may say otherwise. All that holds for every run is checked."""
        done = self.launch(path, options=options, env=env, bisect=bisect, terminal=terminal)
        stem = path.with_suffix("")
        verdict_path, notebook_path = Path(f"{stem}.verdict.json"), Path(f"{stem}.out.ipynb")
        said = f"exit {done.code}\n{done.stdout}\n{done.stderr}"
        assert verdict_path.is_file(), f"no verdict; {said}"
        verdict = json.loads(verdict_path.read_text())
        Draft202012Validator(load_schema()).validate(verdict)
        node = nbformat.read(notebook_path, as_version=4)
        nbformat.validate(node)
        assert verdict["exit_code"] == done.code, said
        fight = Fight(
            code=done.code,
            stdout=done.stdout,
            stderr=done.stderr,
            verdict=verdict,
            notebook=node,
            peak=done.peak,
            seconds=done.seconds,
        )
        self.check_nothing_left(verdict["run_id"], str(fight))
        return fight

    def launch(
        self,
        path: Path,
        *,
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        bisect: bool = False,
        timeout: float = RUN_SECONDS,
        terminal: bool = False,
    ) -> Launched:
        """Run the command alone, whatever it writes; memory, secrets and processes are checked, documents are not.

        At a ``terminal`` all that it writes there is in ``stdout``.
        """
        bisected = ("--bisect", "always" if bisect else "never")
        argv = ("run", str(path), "--limits", self.profile, *bisected, *options)
        return self.command(*argv, env=env, timeout=timeout, terminal=terminal)

    def command(
        self,
        *words: str,
        env: Mapping[str, str] | None = None,
        timeout: float = RUN_SECONDS,
        terminal: bool = False,
    ) -> Launched:
        """Run a command of ours with these words after its name, in the notebook's folder; the same is checked."""
        mark = secrets.token_hex(8)
        argv = [*self._prefix(), str(EXECUTABLE), *words]
        full = {name: value for name, value in os.environ.items() if name not in NOT_PASSED}
        full |= {
            "HOME": str(self.home),
            "XDG_CACHE_HOME": str(self.base / "cache"),
            "SECRET_TOKEN": self.secrets["environment"],
            MARK: mark,
        }
        with _subreaper():
            done = _launch(
                argv,
                cwd=self.folder,
                env=full | dict(env or {}),
                timeout=timeout,
                terminal=terminal,
            )
            self._check_processes(mark)
        said = f"exit {done.code}\n{done.stdout[:3000]}\n{done.stderr[-3000:]}"
        left = _noted(done.pid)
        for lies in left:
            subprocess.run(["rm", "-rf", "--one-file-system", str(lies)], check=False)
        assert left == [], f"left behind, and removed now; {said}"
        assert done.peak < RUNNER_BYTES, f"the runner took {done.peak >> 20} MiB; {said}"
        for stream in (done.stdout, done.stderr):
            self.check_no_secret(stream.encode(), said)
        return done

    def fill(self, cell: str) -> str:
        """The words that stand for canaries, replaced."""
        words = {
            "@HOME@": self.home,
            "@BESIDE@": self.base / "beside.txt",
            "@SYSTEM@": self.system,
            "@PID@": self._process.pid,
            "@ABSTRACT@": self.ours,
            "@SOCKET@": self.home / "agent.sock",
            "@PORT@": self.tcp.getsockname()[1],
            "@OURS@": self.ours,
        }
        for word, value in words.items():
            cell = cell.replace(word, str(value))
        return cell

    # --- what must hold afterwards ------------------------------------------------------------------------------

    def check(self) -> None:
        """The canaries are as they were, and no secret of theirs is in anything that was written."""
        assert self._process.poll() is None, "the process outside was killed"
        found = procfs.stat(self._process.pid)
        assert found is not None and found.state == "S", (
            f"the process outside is in state {found and found.state}"
        )
        now = self._look()
        changed = {
            name: (self._before.get(name), now.get(name))
            for name in now | self._before
            if now.get(name) != self._before.get(name)
        }
        assert changed == {}, f"before and now: {changed}"
        reached = sorted(
            name for name, listener in self._listeners().items() if _was_reached(listener)
        )
        assert reached == sorted(self.reaches), f"reached from inside: {reached}"
        for path in self.base.rglob("*"):
            if path.is_file() and not path.is_symlink() and path.name != "beside.txt":
                self.check_no_secret(path.read_bytes(), str(path))

    def check_no_secret(self, data: bytes, where: str) -> None:
        """No secret of a canary stands in what was written, plainly or backwards."""
        found = [
            name
            for name, secret in self.secrets.items()
            if secret.encode() in data or secret[::-1].encode() in data
        ]
        assert found == [], f"secrets {found} in: {where}"

    def check_nothing_left(self, run_id: str, said: str) -> None:
        """Nothing of a run is left on this machine."""
        assert left_behind(run_id) == [], said
        assert groups_of(run_id) == [], said
        traces = [
            str(path)
            for path in (Path("/tmp"), Path("/run"), self.home)
            for path in path.glob(f"*{run_id}*")
        ]
        assert traces == [], said
        assert run_id not in Path("/proc/net/unix").read_text(errors="replace"), said
        assert {line for line in _mounts() - self._mounts if run_id in line} == set(), said
        assert {
            thing
            for thing in _shared_things() - self._shared
            if self.ours in thing or "uid" in thing
        } == set(), said

    def _check_processes(self, mark: str) -> None:
        """Whatever came from the run has gone; orphans would have come to us by now."""
        deadline = time.monotonic() + GONE_SECONDS
        while True:
            left = set(procfs.descendants(os.getpid())) - self._families
            for pid in left:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            if not left and not marked_processes(mark):
                return
            if time.monotonic() > deadline:
                commands = {pid: _command(pid) for pid in left | set(marked_processes(mark))}
                for pid in commands:
                    with contextlib.suppress(OSError):
                        os.kill(pid, signal.SIGKILL)
                assert commands == {}, "processes are left"
            time.sleep(0.01)

    def _look(self) -> dict[str, object]:
        """All about the canaries that could have been changed: content, modes, owners, names."""
        seen: dict[str, object] = {}
        for path in (
            *self.home.rglob("*"),
            *self.system.rglob("*"),
            self.home,
            self.system,
            self.base,
            self.base / "beside.txt",
        ):
            if path == self.home / ".ipython":
                continue  # the runner's own libraries make it, empty
            status = path.lstat()
            seen[str(path)] = (
                status.st_mode,
                status.st_uid,
                path.read_bytes() if stat.S_ISREG(status.st_mode) else None,
            )
        for name in SYSTEM_FILES:
            with contextlib.suppress(OSError):
                seen[name] = Path(name).read_bytes()
        for name in SYSTEM_DIRECTORIES:
            with contextlib.suppress(OSError):
                seen[name] = (os.stat(name).st_mode, os.stat(name).st_uid)
        return seen


@dataclass(frozen=True, kw_only=True)
class Launched:
    """The command's end. ``pid`` was its process, ``peak`` is the resident memory of the runner alone at its highest, in bytes."""

    code: int
    stdout: str
    stderr: str
    pid: int
    peak: int
    seconds: float


def _launch(
    argv: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout: float, terminal: bool
) -> Launched:
    """Start, watch the runner's peak, wait.

    The system's ru_maxrss would not do: it counts the children that were waited for, the kernel among them, and what the process was before
    it executed the command. VmHWM never sinks: looked at often enough its last value is the peak.
    """
    began = time.monotonic()
    ours, theirs = pty.openpty() if terminal else (-1, subprocess.PIPE)
    stdin = theirs if terminal else None
    process = subprocess.Popen(
        argv,
        cwd=cwd,
        env=dict(env),
        stdin=stdin,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    peaks = [0]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            peaks.append(procfs.status_bytes(process.pid, "VmHWM") or 0)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        if terminal:
            os.close(theirs)
            out, err = _shown_at(ours, began + timeout), b""
            process.wait(began + timeout - time.monotonic())
        else:
            out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=20)
        process.kill()
        raise
    finally:
        ended.set()
        watcher.join()
    return Launched(
        code=process.returncode,
        stdout=out.decode("utf-8", "replace"),
        stderr=err.decode("utf-8", "replace"),
        pid=process.pid,
        peak=max(peaks),
        seconds=time.monotonic() - began,
    )


def _shown_at(terminal: int, deadline: float) -> bytes:
    """All that is written to a terminal until nobody has it open any more (EIO), or time is up; closes our end."""
    seen = b""
    with open(terminal, "rb", buffering=0) as screen, contextlib.suppress(OSError):
        while select.select([screen], [], [], max(0.0, deadline - time.monotonic()))[0] and (
            data := screen.read(65536)
        ):
            seen += data
    return seen


@cache
def _user_prefix() -> tuple[str, ...]:
    return tuple(_ordinary_user())


@contextlib.contextmanager
def _directory(parent: str, prefix: str) -> Iterator[Path]:
    """A directory that others may enter, removed afterwards."""
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _subreaper() -> Iterator[None]:
    """Orphans of what is started meanwhile become our children: what outlives a run, even twice forked in a session of its own, is found."""
    libc = ctypes.CDLL(None)
    before = ctypes.c_int()
    libc.prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(before))
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, before.value)


def _noted(pid: int) -> list[Path]:
    """Notes of the runs of a process that are still there, and the directories of those runs that are."""
    found: list[Path] = []
    # Their own directories alone: in those of runs that go on a notebook may have left something that blocks whoever opens it.
    for path in (
        note for user in (0, NOBODY) for note in Path(f"/tmp/safe-exec-{user}").glob("*.json")
    ):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            note = json.loads(path.read_text())
            if note["owner"] == pid:
                found += [
                    path,
                    *(there for name in note["directories"] if (there := Path(name)).exists()),
                ]
    return found


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")[:300]
    return ""


def _mounts() -> set[str]:
    return set(Path("/proc/self/mountinfo").read_text().splitlines())


def _shared_things() -> set[str]:
    """Entries of /dev/shm; shared memory, semaphores and queues of System V that belong to one whom only a sandbox makes."""
    found = {f"/dev/shm/{name}" for name in os.listdir("/dev/shm")}
    for kind in ("shm", "sem", "msg"):
        for line in Path(f"/proc/sysvipc/{kind}").read_text().splitlines()[1:]:
            if {str(OTHER_UID), str(NOBODY)} & set(line.split()):
                found.add(f"{kind} uid {line}")
    return found


def _was_reached(listener: socket.socket) -> bool:
    try:
        listener.accept()[0].close()
    except BlockingIOError:
        return False
    return True
