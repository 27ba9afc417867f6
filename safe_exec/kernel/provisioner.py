"""A jupyter_client kernel provisioner whose kernels are born in a sandbox; other Jupyter tools can use it too.

``safe-exec run`` hands in what it has built. Elsewhere (``JUPYTER_DEFAULT_PROVISIONER_NAME=safe-exec``, or
``metadata.kernel_provisioner`` of a kernelspec with ``config: {"limits": "ci", "memory": "2G"}``) it reads its limits from
that configuration and from ``SAFE_EXEC_LIMITS``. May import sandbox, profiles, jupyter_client.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jupyter_client.provisioning import KernelProvisionerBase

from safe_exec.errors import SafeExecError, SandboxError
from safe_exec.kernel import inside
from safe_exec.kernel.environment import listed_environment
from safe_exec.kernel.page import Page
from safe_exec.model import LimitName, Limits, TerminationReason
from safe_exec.sandbox.build import build_plan
from safe_exec.sandbox.handle import Sandbox
from safe_exec.sandbox.machine import detect
from safe_exec.sandbox.plan import SpawnPlan, require_walls
from safe_exec.sandbox.watchdog import Watchdog

log = logging.getLogger("safe_exec")

DROPPED_VARIABLES = ("JPY_PARENT_PID", "JPY_INTERRUPT_EVENT")
"""ipykernel would watch for the death of a parent that is not its parent: the keeper is."""

MODULES = ("ipykernel_launcher", "ipykernel")
MESSAGE_SLACK = 1 << 20
LONGEST_BASE = 60


class Channels:
    """The page and the facts socket of one kernel, ours and theirs."""

    def __init__(self) -> None:
        self.page = Page()
        self.facts, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.facts.setblocking(False)

    @property
    def pass_fds(self) -> dict[str, int]:
        """What the kernel gets, by the name that stands in its command."""
        return {"page": self.page.fd, "facts": self._theirs.fileno()}

    def handed_over(self) -> None:
        """Close the kernel's end here, so that its end is seen."""
        self._theirs.close()

    def close(self) -> None:
        """Close all."""
        self._theirs.close()
        self.facts.close()
        self.page.close()


def wrap_command(cmd: Sequence[str], config: Mapping[str, object]) -> list[str] | None:
    """The kernel's command with ``inside.py`` in front, ``None`` for a command that is not ipykernel's.

    ``python [flags] -m ipykernel_launcher ...`` becomes ``python [flags] inside.py PAGE FACTS FAULT CONFIG -m ...``.
    """
    if "-m" not in cmd or not os.path.basename(cmd[0]).startswith("python"):
        return None
    at = list(cmd).index("-m")
    if at + 1 >= len(cmd) or cmd[at + 1] not in MODULES or any(not part.startswith("-") for part in cmd[1:at]):
        return None
    ours = [os.path.abspath(inside.__file__), "{page}", "{facts}", "{fault}", json.dumps(dict(config))]
    return [*cmd[:at], *ours, *cmd[at:]]


def speaks_ipc(cmd: Sequence[str]) -> bool:
    """Whether a kernel is known to name its ipc sockets as jupyter_client does; others get TCP on loopback."""
    return "-m" in cmd and any(part in MODULES for part in cmd)


class SandboxProvisioner(KernelProvisionerBase):  # type: ignore[misc]
    """Starts kernels through a keeper, holds their raw exit status, and kills whole trees."""

    def __init__(self, **kwargs: Any) -> None:
        config = {key: kwargs.pop(key) for key in list(kwargs) if key == "limits" or key in LimitName._value2member_map_}
        super().__init__(**kwargs)
        self._config: dict[str, object] = config
        self.limits = Limits()
        self.plan: SpawnPlan | None = None
        self.run_id = secrets.token_hex(6)
        self.sandbox: Sandbox | None = None
        self.channels: Channels | None = None
        self.fitted = False
        self.watchdog: Watchdog | None = None
        self.on_limit: Callable[[LimitName, float], None] | None = None

    def prepare(self, *, limits: Limits, plan: SpawnPlan, sandbox: Sandbox) -> None:
        """Use what ``safe-exec run`` has built already instead of building it here."""
        self.limits, self.plan, self.sandbox = limits, plan, sandbox
        self.run_id = sandbox.run_id

    # --- the life of a kernel, as jupyter_client asks for it ------------------------------------------------------

    @property
    def has_process(self) -> bool:
        """Whether a kernel was started and has not been waited for."""
        return self.sandbox is not None and self.sandbox.kernel_pid is not None

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """Write the connection file and make up the command; nothing runs yet."""
        kwargs = await super().pre_launch(**kwargs)
        km = self.parent
        extra = kwargs.pop("extra_arguments", [])
        if self.plan is None:
            self._build_for_others()
        km.write_connection_file()
        self.connection_info = km.get_connection_info()
        kwargs["cmd"] = km.format_kernel_cmd(extra_arguments=extra)
        return kwargs

    def _build_for_others(self) -> None:
        from safe_exec.profiles import resolve_simple  # only other tools come this way

        machine = detect()
        profile = os.environ.get("SAFE_EXEC_LIMITS")
        self.limits = resolve_simple(self._config, profile, machine_memory=machine.memory_total)
        self.plan = build_plan(self.limits, machine, self.run_id)
        self.sandbox = Sandbox(self.run_id)

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> Any:
        """Have the keeper start the kernel inside its limits."""
        assert self.sandbox is not None and self.plan is not None
        self.channels = Channels()
        wrapped = wrap_command(cmd, self._inside_config())
        self.fitted = wrapped is not None
        env = {k: v for k, v in kwargs.get("env", os.environ).items() if k not in DROPPED_VARIABLES}
        cwd = str(kwargs.get("cwd") or os.getcwd())
        argv = wrapped or cmd
        if self.plan.isolation.listed_environment:
            env = listed_environment(env, self.plan.isolation.env)
        if self.plan.landlock and self.plan.isolation.hide_home and self.sandbox.directory is not None:
            # Landlock refuses what it hides: a home that cannot be listed is worse than another, empty one.
            env["HOME"] = str(self.sandbox.directory / "home")
            os.mkdir(env["HOME"], 0o700)
        try:
            self.sandbox.spawn(
                self.plan,
                argv=argv,
                env=env,
                cwd=cwd,
                walls=self._walls(argv, env, cwd),
                pass_fds=self.channels.pass_fds if wrapped else {},
                dump_signal=int(inside.DUMP_SIGNAL) if wrapped else None,
            )
        except SafeExecError:
            self.channels.close()
            raise
        self.channels.handed_over()
        self._start_watchdog()
        return self.connection_info

    def _walls(self, argv: Sequence[str], env: Mapping[str, str], cwd: str) -> Mapping[str, object] | None:
        """What walls the kernel off, for the keeper; most runs have no walls."""
        assert self.plan is not None and self.sandbox is not None
        if not self.plan.walls and not self.plan.enclosed:
            return None
        from safe_exec.kernel.enclosure import Birth, enclose

        require_walls(self.plan)  # whoever made the plan: nothing starts without a wall that must stand
        if self.sandbox.directory is None:
            raise SandboxError("walls need a directory for the kernel's sockets; only `safe-exec run` makes one")
        return enclose(Birth(plan=self.plan, argv=argv, env=env, cwd=Path(cwd), runtime=self.sandbox.directory))

    def _inside_config(self) -> dict[str, object]:
        # Where other tools run the kernel nobody would mark what is missing: then nothing is held back.
        cap = self.limits.cell_output if self.on_limit is not None else None
        cut = None if cap is None else cap + MESSAGE_SLACK
        return {
            "cut": cut,
            "message": None if cut is None else cut + MESSAGE_SLACK,
            "headless": self.on_limit is not None,  # elsewhere somebody may want to debug
        }

    def _start_watchdog(self) -> None:
        assert self.plan is not None and self.sandbox is not None and self.sandbox.keeper_pid is not None
        if self.plan.watch - {LimitName.CPU_TIME} or (LimitName.CPU_TIME in self.plan.watch and self.on_limit is None):
            self.watchdog = Watchdog(self.sandbox.keeper_pid, self.limits, self.plan.watch, self._limit_passed)
            self.watchdog.start()

    def _limit_passed(self, name: LimitName, used: float) -> None:
        """On the watchdog's thread: the keeper's socket takes whole lines, so a kill from here is safe."""
        if self.sandbox is not None:
            self.sandbox.kill(TerminationReason(name.value))
        if self.on_limit is not None:
            self.on_limit(name, used)

    async def poll(self) -> int | None:
        """``None`` while the kernel runs; then its return code as subprocess gives it, which stays."""
        if self.sandbox is None:
            return 0
        if self.sandbox.exit is None and self.on_limit is None:
            self.sandbox.pump()
        ended = self.sandbox.exit
        if ended is None:
            return None
        if ended.status is None:
            return -signal.SIGKILL
        return -ended.status.signal if ended.status.signal is not None else ended.status.exit_code

    async def wait(self) -> int | None:
        """Wait for the kernel process to end. The keeper is asked in turns: other tools run loops that we know nothing of."""
        while (code := await self.poll()) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        return code

    async def send_signal(self, signum: int) -> None:
        """Send a signal to the kernel process."""
        if self.sandbox is not None:
            self.sandbox.signal(signum)

    async def kill(self, restart: bool = False) -> None:  # noqa: ARG002 - jupyter_client's signature
        """Kill the whole tree."""
        if self.sandbox is not None:
            self.sandbox.kill(TerminationReason.SHUTDOWN)

    async def terminate(self, restart: bool = False) -> None:  # noqa: ARG002 - jupyter_client's signature
        """Ask the kernel process to end."""
        await self.send_signal(signal.SIGTERM)

    async def cleanup(self, restart: bool = False) -> None:
        """Take the sandbox down. Other tools learn here what became of their kernel: it is logged."""
        if self.sandbox is None:
            return
        if self.watchdog is not None:
            self.watchdog.stop()
        departure = self.sandbox.leave()
        if departure.alive or departure.left:
            log.warning("left behind: processes %s, paths %s", departure.alive, departure.left)
        if self.on_limit is None:
            self._log_ending()
        if self.channels is not None:
            self.channels.close()
        self.sandbox = None
        if restart:
            self.plan = None

    def _log_ending(self) -> None:
        ended = self.sandbox.exit if self.sandbox else None
        if ended is None or ended.reason is TerminationReason.SHUTDOWN or ended.status is None or ended.status.raw == 0:
            return
        why = f", killed by safe-exec for its limit: {ended.reason}" if ended.reason else ""
        killed = ended.counters.oom_kills or 0
        memory = f", {killed} process(es) killed for memory in its control group" if killed else ""
        log.error("kernel ended with %s%s%s", ended.status, why, memory)


def runtime_directory(run_id: str) -> Path:
    """A path, short since a socket's may have 108 bytes (unix(7)), for the directory that the keeper makes."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    usable = base and len(base) < LONGEST_BASE and os.access(base, os.W_OK)
    return Path(base if usable else "/tmp") / f"safe-exec-{run_id}"  # noqa: S108
