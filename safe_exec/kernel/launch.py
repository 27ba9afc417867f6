"""Starts a kernel process: its kernelspec, connection file, command, and keeper."""

from __future__ import annotations

import json
import os
import re
import socket
import string
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec as find_spec_of_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import asdict, replace

from safe_exec.agent import layout
from safe_exec.errors import SafeExecError, SandboxError
from safe_exec.keeper.protocol import DiscardedPlace
from safe_exec.kernel.env_allowlist import listed_environment
from safe_exec.kernel.shared_page import Page
from safe_exec.model.limits import LimitName, Limits
from safe_exec.sandbox.plan import SpawnPlan, require_walls
from safe_exec.sandbox.sandbox import Sandbox, WallSetup

if TYPE_CHECKING:
    from safe_exec.kernel.coverage_file import CoverageFile
    from safe_exec.sandbox.enclosure import Enclosure

# Imports only Jupyter's search path: importing jupyter_client takes longer than building a sandbox,
# and the kernel can start meanwhile. A test compares the results with those of jupyter_client.

# With JPY_PARENT_PID ipykernel watches that process as its parent. Here the keeper is the parent,
# and inside a pid namespace ipykernel sees parent 1 and exits with status 1.
DROPPED_VARIABLES = ("JPY_PARENT_PID", "JPY_INTERRUPT_EVENT")

MODULES = ("ipykernel_launcher", "ipykernel")
# The scripts there run in other processes: they are passed by path, and not imported here.
_AGENT = os.path.dirname(os.path.abspath(layout.__file__))
MESSAGE_SLACK = 1 << 20


class AgentChannels:
    """The shared page and both ends of the facts socket of one kernel."""

    def __init__(self) -> None:
        """Create the page and the socket. Raises SandboxError if there can be no page."""
        try:
            self.page = Page()
        except OSError as error:
            raise SandboxError(
                "the memory that kernel and runner share cannot be made: memfd_create(2) "
                f"with seals: {error.strerror}; the system is too"
                " old (Linux 3.17 has it), or a filter around safe-exec refuses it"
            ) from error
        self.facts, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.facts.setblocking(False)

    @property
    def pass_fds(self) -> dict[str, int]:
        """Return the kernel's descriptors by placeholder in the command."""
        return {"page": self.page.fd, "facts": self._theirs.fileno()}

    def handed_over(self) -> None:
        """Close our copy of the kernel's end, so that the socket ends when the kernel does."""
        self._theirs.close()

    def close(self) -> None:
        """Close the page and both ends of the facts socket."""
        self._theirs.close()
        self.facts.close()
        self.page.close()


def wrap_command(cmd: Sequence[str], config: Mapping[str, object]) -> list[str] | None:
    """Put our bootstrap in front of an ipykernel command; ``None`` for other commands."""
    # ``python [flags] -m ipykernel_launcher ...`` becomes ``python [flags] start.py PAGE FACTS
    # FAULT CONFIG -m ...``.
    if "-m" not in cmd or not os.path.basename(cmd[0]).startswith("python"):
        return None
    at = list(cmd).index("-m")
    if (
        at + 1 >= len(cmd)
        or cmd[at + 1] not in MODULES
        or any(not part.startswith("-") for part in cmd[1:at])
    ):
        return None
    ours = [
        os.path.join(_AGENT, "bootstrap.py"),
        "{page}",
        "{facts}",
        "{fault}",
        json.dumps(dict(config)),
    ]
    return [*cmd[:at], *ours, *cmd[at:]]


def speaks_ipc(cmd: Sequence[str]) -> bool:
    """Whether a kernel names its ipc sockets as jupyter_client does.

    Other kernels get TCP on loopback.
    """
    return "-m" in cmd and any(part in MODULES for part in cmd)


def forwarded(argv: Sequence[str], prefix: str, ports: Sequence[int]) -> list[str]:
    """Put the forwarder in front of the command of a kernel that listens on these TCP ports.

    Its Unix sockets are ``prefix-PORT``.
    """
    # The interpreter of the sandbox's init: the kernel's own environment may have no Python.
    ours = [sys.executable, "-I", "-S", os.path.join(_AGENT, "tcp_forwarder.py"), prefix]
    return [*ours, *map(str, ports), "--", *argv]


class Spec(Struct, frozen=True, kw_only=True):
    """A kernelspec: its ``kernel.json``, and the directory of that file."""

    directory: str
    document: Mapping[str, Any]

    @property
    def argv(self) -> list[str]:
        """The kernel's command with its placeholders."""
        return list(self.document["argv"])


class LaunchedKernel(Struct, frozen=True, kw_only=True):
    """A kernel process in its sandbox, with its connection."""

    spec: Spec
    connection: Mapping[str, Any]
    channels: AgentChannels
    instrumented: bool
    cwd: str


class Launch(Struct, frozen=True, kw_only=True):
    """The parameters of a kernel's start.

    An interactive kernel has the ``key`` of its client's connection file, and the client's
    ``arguments`` after its command. With ``strict_shell`` a failing ``!command`` raises.
    """

    spec: Spec
    kernel_name: str
    plan: SpawnPlan
    limits: Limits
    cwd: str
    env: Mapping[str, str]
    key: str | None = None
    arguments: tuple[str, ...] = ()
    strict_shell: bool = False
    # Takes more time for each census of the memory.
    thorough: bool = False
    coverage: CoverageFile | None = None
    # Answers the culprit search in forks of itself.
    forks: bool = False
    # Leaves a sleeping copy of itself before each cell, for --keep-going.
    snapshots: bool = False
    # The same for an interactive kernel, with --restore.
    restorable: bool = False

    def __repr__(self) -> str:
        # Without the environment and the key: both are secrets.
        secret = ("env", "key")
        fields = (f"{n}={getattr(self, n)!r}" for n in self.__struct_fields__ if n not in secret)
        return f"{type(self).__name__}({', '.join(fields)})"


# --- the kernelspec -------------------------------------------------------------------------------


def find_spec(name: str) -> Spec | None:
    """Return the spec that jupyter_client would choose, if it is an ordinary ipykernel's."""
    from jupyter_core.paths import jupyter_path

    for directory in jupyter_path("kernels"):
        try:
            entries = os.listdir(directory)
        except OSError:
            continue
        for entry in entries:
            path = os.path.join(directory, entry)
            if entry.lower() == name.lower() and os.path.isfile(os.path.join(path, "kernel.json")):
                return _read_spec(path)
    return None


def _read_spec(directory: str) -> Spec | None:
    try:
        document = json.loads(Path(directory, "kernel.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # jupyter_client reads the file again and reports the error.
        return None
    argv = document.get("argv") if isinstance(document, dict) else None
    if (
        not isinstance(argv, list)
        or not all(isinstance(part, str) for part in argv)
        or not speaks_ipc(argv)
    ):
        return None
    environment = document.get("env", {})
    metadata = document.get("metadata", {})
    if (
        not isinstance(environment, dict)
        or not isinstance(metadata, dict)
        or "kernel_provisioner" in metadata
    ):
        return None
    return Spec(directory=directory, document=document)


def command(spec: Spec, connection_file: str, extra: Sequence[str]) -> list[str]:
    """Return the kernel's command with its placeholders filled in."""
    argv = [*spec.argv, *extra]
    major, minor = sys.version_info[:2]
    # Like jupyter_client, replace a bare "python" by the interpreter that runs us.
    if argv[0] in ("python", f"python{major}", f"python{major}.{minor}"):
        argv[0] = sys.executable
    place_holders = {
        "connection_file": os.path.realpath(connection_file),
        "prefix": sys.prefix,
        "resource_dir": spec.directory,
    }
    return [
        re.sub(r"\{([A-Za-z0-9_]+)\}", lambda match: place_holders.get(match[1], match[0]), part)
        for part in argv
    ]


def environment_of(spec: Spec, env: Mapping[str, str]) -> dict[str, str]:
    """Return the environment with the spec's additions."""
    added = {
        name: string.Template(value).safe_substitute(env)
        for name, value in spec.document.get("env", {}).items()
    }
    result = {**env, **added}
    if str(spec.document.get("language", "")).lower().startswith("python"):
        result.pop("PYTHONEXECUTABLE", None)
    return result


def extra_arguments(kernel_name: str) -> list[str]:
    """Return arguments that keep a run out of the user's IPython history, as nbclient does."""
    return (
        ["--HistoryManager.hist_file=:memory:"]
        if kernel_name in ("python", "python2", "python3")
        else []
    )


# --- the start ------------------------------------------------------------------------------------


def launch(sandbox: Sandbox, request: Launch) -> LaunchedKernel:
    """Start a kernel over ipc and wait until its process has been executed.

    Raises KernelStartError and SandboxError.
    """
    launched = begin_launch(sandbox, request)
    await_kernel(sandbox, launched.channels)
    return launched


def begin_launch(sandbox: Sandbox, request: Launch) -> LaunchedKernel:
    """Begin to start a kernel over ipc; ``await_kernel`` waits for the result.

    Raises SandboxError.
    """
    assert sandbox.directory is not None
    sandbox.wait_ready()
    connection = {
        **{
            f"{name}_port": number
            for number, name in enumerate(("shell", "iopub", "stdin", "control", "hb"), 1)
        },
        "ip": str(sandbox.directory / "k"),
        "key": request.key or os.urandom(20).hex(),
        "transport": "ipc",
        "signature_scheme": "hmac-sha256",
        "kernel_name": request.kernel_name,
    }
    path = sandbox.directory / "c.json"
    # The file holds the kernel's key. So it is created unreadable for others, and never through a
    # link that somebody put in its place.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(connection, file)
    channels, instrumented = begin_spawn(
        sandbox,
        request.plan,
        command(
            request.spec,
            str(path),
            extra_arguments(request.kernel_name) if request.key is None else request.arguments,
        ),
        env=environment_of(request.spec, request.env),
        cwd=request.cwd,
        config=inside_config(
            request.limits,
            headless=request.key is None,
            marks=True,
            strict_shell=request.strict_shell,
            thorough=request.thorough,
            coverage=request.coverage,
            forks=request.forks,
            snapshots=request.snapshots,
            restorable=request.restorable,
        ),
        coverage=request.coverage,
        restorable=request.restorable,
    )
    return LaunchedKernel(
        spec=request.spec,
        connection=connection,
        channels=channels,
        instrumented=instrumented,
        cwd=request.cwd,
    )


def spawn(
    sandbox: Sandbox,
    plan: SpawnPlan,
    cmd: list[str],
    *,
    env: Mapping[str, str],
    cwd: str,
    config: Mapping[str, object],
    streams: Mapping[str, int] | None = None,
    coverage: CoverageFile | None = None,
) -> tuple[AgentChannels, bool]:
    """Spawn the kernel; return our channels to it and whether it is instrumented.

    ``streams`` are descriptors for the process's own ``stdout`` and ``stderr``; without them the
    keeper reads both. Raises KernelStartError and SandboxError.
    """
    channels, instrumented = begin_spawn(
        sandbox, plan, cmd, env=env, cwd=cwd, config=config, streams=streams, coverage=coverage
    )
    await_kernel(sandbox, channels)
    return channels, instrumented


def has_pystack() -> bool:
    """Whether pystack is installed, so that native stacks can be read."""
    return sys.platform == "linux" and find_spec_of_module("pystack") is not None


def await_kernel(sandbox: Sandbox, channels: AgentChannels) -> None:
    """Wait until the kernel's command has been executed.

    If that fails, closes the channels and raises KernelStartError or SandboxError.
    """
    try:
        sandbox.await_kernel()
    except SafeExecError:
        channels.close()
        raise


def begin_spawn(
    sandbox: Sandbox,
    plan: SpawnPlan,
    cmd: list[str],
    *,
    env: Mapping[str, str],
    cwd: str,
    config: Mapping[str, object],
    streams: Mapping[str, int] | None = None,
    coverage: CoverageFile | None = None,
    restorable: bool = False,
) -> tuple[AgentChannels, bool]:
    """Ask the keeper to spawn the kernel, without waiting. Raises SandboxError."""
    channels = AgentChannels()
    wrapped = wrap_command(cmd, config)
    if wrapped is not None and coverage is not None:
        coverage.send(channels.facts)
    whole_environment = {k: v for k, v in env.items() if k not in DROPPED_VARIABLES}
    environment = dict(whole_environment)
    argv = wrapped or cmd
    if plan.isolation.listed_environment:
        environment = listed_environment(environment, plan.isolation.env)
        # Python 3.14 runs code that another process of the user injects (sys.remote_exec).
        # A user may still ask for it by naming the variable.
        environment.setdefault("PYTHON_DISABLE_REMOTE_DEBUG", "1")
    removed = tuple(sorted(whole_environment.keys() - environment.keys()))
    if plan.landlock and plan.isolation.hide_home and sandbox.directory is not None:
        # Landlock cannot hide a home, only refuse access to it. Many programs fail with a home that
        # they cannot list, so give the kernel an empty one.
        environment["HOME"] = str(sandbox.directory / "home")
        os.mkdir(environment["HOME"], 0o700)
    discarded: tuple[DiscardedPlace, ...] = ()
    if LimitName.DISK in plan.watch and sandbox.directory is not None:
        # Temporary files belong in a place that the disk watchdog measures and that is removed with
        # the run.
        environment["TMPDIR"] = str(sandbox.directory / "tmp")
        os.mkdir(environment["TMPDIR"], 0o700)
        discarded = (DiscardedPlace(name="$TMPDIR", kind="tmp", path=environment["TMPDIR"]),)
    try:
        enclosure = _enclose(sandbox, plan, argv, environment, cwd, removed=removed)
        sandbox.spawn(
            plan,
            argv=argv,
            env=environment if enclosure is None else enclosure.env,
            cwd=cwd if enclosure is None else enclosure.cwd,
            walls=WallSetup() if enclosure is None else enclosure.setup,
            pass_fds={**(channels.pass_fds if wrapped else {}), **(streams or {})},
            dump_signal=int(layout.DUMP_SIGNAL) if wrapped else None,
            # The process that reads the native stack of a crash is our child.
            tracer=os.getpid() if wrapped and has_pystack() else None,
            discarded=discarded,
            restorable=restorable and wrapped is not None,
        )
    except SafeExecError:
        channels.close()
        raise
    # As long as our copy of the kernel's end is open, the socket does not end with the kernel.
    channels.handed_over()
    return channels, wrapped is not None


def _enclose(
    sandbox: Sandbox,
    plan: SpawnPlan,
    argv: Sequence[str],
    env: Mapping[str, str],
    cwd: str,
    *,
    removed: tuple[str, ...],
) -> Enclosure | None:
    """Return the setup of the walls, ``None`` if there are none; set ``sandbox.isolation``.

    ``removed`` are the names of variables that the kernel does not get.
    """
    if not plan.walls and not plan.enclosed:
        return None
    from safe_exec.sandbox.enclosure import PlannedKernel, enclose

    # Checked here again, since every start passes through this function: nothing runs without a
    # required wall.
    require_walls(plan)
    if sandbox.directory is None:
        raise SandboxError(
            "walls need a directory for the kernel's sockets; only `safe-exec run` makes one"
        )
    enclosure = enclose(
        PlannedKernel(plan=plan, argv=argv, env=env, cwd=Path(cwd), runtime=sandbox.directory)
    )
    sandbox.isolation = replace(enclosure.facts, removed_variables=removed)
    sandbox.troubles += enclosure.warnings
    return enclosure


def inside_config(
    limits: Limits,
    *,
    headless: bool,
    marks: bool,
    strict_shell: bool = False,
    thorough: bool = False,
    coverage: CoverageFile | None = None,
    forks: bool = False,
    snapshots: bool = False,
    restorable: bool = False,
) -> dict[str, object]:
    """Return the agent's settings.

    The agent cuts output at its caps only if the client ``marks`` the missing part. With
    ``strict_shell`` a failing ``!command`` raises. ``thorough`` is true if the run only looks for
    the holders of memory, so that a census may take longer. ``forks`` is true if the kernel runs no
    cells itself, ``snapshots`` if it leaves a copy of itself before each cell, ``restorable`` if an
    interactive kernel does.
    """
    cap = limits.cell_output if marks else None
    cut = None if cap is None else cap + MESSAGE_SLACK
    return {
        "cut": cut,
        "message": None if cut is None else cut + MESSAGE_SLACK,
        "headless": headless,
        "strict_shell": strict_shell,
        "memory": limits.memory,
        "thorough": thorough,
        "coverage": None if coverage is None else asdict(coverage.settings),
        "forks": forks,
        "snapshots": snapshots,
        "restorable": restorable,
    }
