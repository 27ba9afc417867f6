"""A jupyter_client kernel provisioner that starts kernels in a sandbox.

Other Jupyter tools can use it too.

``safe-exec run`` hands in what it has built. Elsewhere
(``JUPYTER_DEFAULT_PROVISIONER_NAME=safe-exec``, or ``metadata.kernel_provisioner`` of a kernelspec
with ``config: {"limits": "ci", "memory": "2G"}``) it reads its limits from that configuration and
from ``SAFE_EXEC_LIMITS``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from jupyter_client.connect import LocalPortCache
from jupyter_client.provisioning import KernelProvisionerBase
from traitlets.config import Application

from safe_exec.kernel.launch import AgentChannels, LaunchedKernel, inside_config, spawn
from safe_exec.kernel.local_parity import (
    PORTS,
    demand_command,
    give_keys,
    refuse_other_machines,
    standard_streams,
)
from safe_exec.model.ending import TerminationReason
from safe_exec.model.limits import LimitName, Limits
from safe_exec.sandbox import keeper_process, stale_runs
from safe_exec.sandbox.host.capabilities import detect
from safe_exec.sandbox.mechanisms.watchdog import Watchdog
from safe_exec.sandbox.plan import SpawnPlan
from safe_exec.sandbox.planner import build_plan
from safe_exec.sandbox.priority import PriorityGuard
from safe_exec.sandbox.sandbox import Sandbox
from safe_exec.sandbox.usage.meter import has_memory_group
from safe_exec.sandbox.usage.process_tree import ProcessTree
from safe_exec.units import format_size

if TYPE_CHECKING:
    from safe_exec.sandbox.mechanisms.disk_watchdog import DiskWatch

log = logging.getLogger("safe_exec")


class SandboxProvisioner(KernelProvisionerBase):  # type: ignore[misc]
    """Starts kernels through a keeper, holds their raw exit status, and kills whole trees."""

    def __init__(self, **kwargs: Any) -> None:
        config = {
            key: kwargs.pop(key)
            for key in list(kwargs)
            if key == "limits" or key in LimitName._value2member_map_
        }
        super().__init__(**kwargs)
        self._config: dict[str, object] = config
        self.limits = Limits()
        self.plan: SpawnPlan | None = None
        self.run_id = keeper_process.new_run_id()
        self.sandbox: Sandbox | None = None
        self.channels: AgentChannels | None = None
        self.instrumented = False
        self.watchdog: Watchdog | None = None
        self._diskwatch: DiskWatch | None = None
        self.on_limit: Callable[[LimitName, float], None] | None = None
        self._is_end_reported = False
        self._prepared = self.headless = False
        self.ports_cached = False
        self.pid: int | None = None
        self.pgid: int | None = None
        self.ip: str | None = None
        self.cwd: str | None = None
        self.stdout: IO[bytes] | None = None
        self.stderr: IO[bytes] | None = None

    def prepare(self, *, limits: Limits, plan: SpawnPlan, sandbox: Sandbox) -> None:
        """Use what ``safe-exec run`` has built already instead of building it here."""
        self._prepared = self.headless = True
        self.limits, self.plan, self.sandbox = limits, plan, sandbox
        self.run_id = sandbox.run_id

    # --- the life of a kernel, as jupyter_client asks for it --------------------------------------

    @property
    def has_process(self) -> bool:
        """Whether a kernel was started and has not been waited for."""
        return self.sandbox is not None and self.sandbox.kernel_pid is not None

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """Write the connection file and make up the command; nothing runs yet.

        Raises RuntimeError, as jupyter_client's own provisioner does, for an address that is not
        this machine's and for encryption that is required and cannot be had.
        """
        encryption = kwargs.pop("transport_encryption", None)
        kwargs = await super().pre_launch(**kwargs)
        km = self.parent
        extra = kwargs.pop("extra_arguments", [])
        if not self._prepared:
            await self._build_for_others()
            refuse_other_machines(km)
            self._cache_ports(km)
            give_keys(km, encryption)
        session = kwargs["env"].get("JPY_SESSION_NAME", "")
        km.write_connection_file(**({"jupyter_session": session} if session else {}))
        self.connection_info = km.get_connection_info()
        kwargs["cmd"] = km.format_kernel_cmd(extra_arguments=extra)
        return kwargs

    def _cache_ports(self, km: Any) -> None:
        """Take the ports from the cache that all managers of this process share."""
        if km.cache_ports and not self.ports_cached:
            cache = LocalPortCache.instance()
            for name in PORTS:
                setattr(km, name, cache.find_available_port(km.ip))
            self.ports_cached = True

    async def _build_for_others(self) -> None:
        # Only other tools come this way.
        from safe_exec.limits.profiles import resolve_simple

        # A manager that is started twice has one kernel, the last.
        if self.sandbox is not None:
            await self.kill()
            await self.cleanup(restart=True)
        # Of servers that were killed together with their keepers.
        stale_runs.sweep()
        # A restarted kernel's sandbox is another one.
        self.run_id = keeper_process.new_run_id()
        self._is_end_reported = False
        machine = detect()
        profile = os.environ.get("SAFE_EXEC_LIMITS")
        self.limits = resolve_simple(self._config, profile, machine_memory=machine.memory_total)
        self.plan = build_plan(self.limits, machine, self.run_id)
        self.sandbox = Sandbox(self.run_id, delegation=self.plan.cgroup.delegation)

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> Any:
        """Have the keeper start the kernel inside its limits.

        ``stdout`` and ``stderr`` are as for subprocess.Popen: the kernel process inherits ours
        without them, and the reading ends of pipes stand in attributes of these names. Raises
        FileNotFoundError for a command or directory that does not exist.
        """
        assert self.sandbox is not None and self.plan is not None
        env, cwd = kwargs.get("env", os.environ), str(kwargs.get("cwd") or os.getcwd())
        config = inside_config(self.limits, headless=self.headless, marks=self._prepared)
        if self._prepared:
            self.channels, self.instrumented = spawn(
                self.sandbox, self.plan, cmd, env=env, cwd=cwd, config=config
            )
        else:
            self._spawn_for_others(cmd, env, cwd, config, kwargs)
        self._start_watchdog(cwd)
        # The kernel leads a session of its own.
        self.pid = self.pgid = self.sandbox.kernel_pid
        self.cwd, self.ip = cwd, getattr(self.parent, "ip", None)
        return self.connection_info

    def _spawn_for_others(
        self,
        cmd: list[str],
        env: Mapping[str, str],
        cwd: str,
        config: Mapping[str, object],
        wishes: Mapping[str, Any],
    ) -> None:
        assert self.sandbox is not None and self.plan is not None
        try:
            demand_command(cmd, env, cwd)
            with standard_streams(wishes.get("stdout"), wishes.get("stderr")) as streams:
                self.channels, self.instrumented = spawn(
                    self.sandbox,
                    self.plan,
                    cmd,
                    env=env,
                    cwd=cwd,
                    config=config,
                    streams=streams.descriptors,
                )
                self.stdout, self.stderr = streams.readers()
        except BaseException:
            self.sandbox.shutdown()
            self.sandbox = None
            raise

    def resolve_path(self, path_str: str) -> str | None:
        """The absolute path of a file that exists, taken from the kernel's directory."""
        path = Path(path_str).expanduser()
        if not path.is_absolute() and self.cwd is not None:
            path = (Path(self.cwd) / path).resolve()
        return path.as_posix() if path.exists() else None

    async def get_provisioner_info(self) -> dict[str, Any]:
        """The facts by which another process of the same tool knows this kernel again."""
        info: dict[str, Any] = await super().get_provisioner_info()
        return info | {"pid": self.pid, "pgid": self.pgid, "ip": self.ip}

    async def load_provisioner_info(self, provisioner_info: dict[str, Any]) -> None:
        """Take over the facts of ``get_provisioner_info``; the kernel's keeper stays another's."""
        await super().load_provisioner_info(provisioner_info)
        self.pid, self.pgid = provisioner_info["pid"], provisioner_info["pgid"]
        self.ip = provisioner_info["ip"]

    def adopt(self, launched: LaunchedKernel) -> None:
        """Take over a kernel that was started ahead of everything else."""
        self.channels, self.instrumented = launched.channels, launched.instrumented
        self.connection_info = launched.connection
        self._start_watchdog(launched.cwd)

    def _start_watchdog(self, cwd: str) -> None:
        assert (
            self.plan is not None
            and self.sandbox is not None
            and self.sandbox.keeper_pid is not None
        )
        if LimitName.DISK in self.plan.watch and self.limits.disk is not None:
            from safe_exec.sandbox.mechanisms.disk_watchdog import DiskWatch  # seldom needed

            places = (
                cwd,
                *([str(self.sandbox.directory)] if self.sandbox.directory else []),
                *self.plan.directories,
            )
            passed = partial(self._limit_passed, LimitName.DISK)
            self._diskwatch = DiskWatch(self.sandbox.keeper_pid, places, self.limits.disk, passed)
            self._diskwatch.start()
        if self.plan.watch - {LimitName.CPU_TIME, LimitName.DISK} or (
            LimitName.CPU_TIME in self.plan.watch and self.on_limit is None
        ):
            shared = not has_memory_group(self.plan)
            tree = ProcessTree(
                self.sandbox.keeper_pid, self.sandbox.kernel_pid, counts_shared=shared
            )
            guard = PriorityGuard(self.sandbox.keeper_pid)
            self.watchdog = Watchdog(tree, self.limits, self.plan.watch, self._limit_passed, guard)
            self.watchdog.start()

    def _limit_passed(self, name: LimitName, used: float) -> None:
        """Kill the sandbox for a limit; called on the watchdog's thread."""
        # The keeper's socket takes whole lines, so a kill from here is safe.
        if self.sandbox is not None:
            self.sandbox.kill(TerminationReason(name.value))
        if self.on_limit is not None:
            self.on_limit(name, used)

    @property
    def watches(self) -> bool:
        """Whether limits are watched here."""
        return self.watchdog is not None or self._diskwatch is not None

    def check_last(self) -> None:
        """Look at the limits that are watched once more, before the kernel is asked to end.

        May take some 50 ms.
        """
        for watch in (self.watchdog, self._diskwatch):
            if watch is not None:
                watch.check(last=True)

    def stop_watching(self) -> None:
        """End the watches; before the tree is killed, or they would see it go."""
        for watch in (self.watchdog, self._diskwatch):
            if watch is not None:
                watch.stop()

    async def poll(self) -> int | None:
        """``None`` while the kernel runs.

        Then its return code as subprocess gives it, which stays.
        """
        if self.sandbox is None:
            return 0
        if self.sandbox.exit is None and self.on_limit is None:
            self.sandbox.process_messages()
        ended = self.sandbox.exit
        if ended is None:
            return None
        self._tell_ending()
        if ended.status is None:
            return -signal.SIGKILL
        return -ended.status.signal if ended.status.signal is not None else ended.status.exit_code

    async def wait(self) -> int | None:
        """Wait for the kernel process to end."""
        # The keeper is asked in turns: other tools run loops that we know nothing of.
        while (code := await self.poll()) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        return code

    async def send_signal(self, signum: int) -> None:
        """Send a signal to the kernel's process group."""
        # jupyter_client's own provisioner does the same: an interrupt is for the children too.
        if getattr(self.parent, "shutting_down", False):
            # A shutdown begins with an interrupt, which ends a kernel that is not up yet.
            self._asked_for()
        if self.sandbox is not None:
            self.sandbox.signal(signum, group=True)

    async def kill(self, restart: bool = False) -> None:  # noqa: ARG002 - as jupyter_client
        """Kill the process tree; the kernel's end is a shutdown."""
        self._asked_for()
        if self.sandbox is not None:
            self.sandbox.kill(TerminationReason.SHUTDOWN)

    async def terminate(self, restart: bool = False) -> None:  # noqa: ARG002 - as jupyter_client
        """Ask the kernel process to end."""
        self._asked_for()
        if self.sandbox is not None:
            self.sandbox.signal(signal.SIGTERM)

    async def cleanup(self, restart: bool = False) -> None:
        """Take the sandbox down, and give ports back unless a restart follows."""
        if self.ports_cached and not restart:
            for name in PORTS:
                LocalPortCache.instance().return_port(self.connection_info[name])
            self.ports_cached = False
        if self.sandbox is None:
            return
        self.stop_watching()
        cleanup = self.sandbox.shutdown()
        if cleanup.surviving_pids or cleanup.remaining_paths:
            log.warning(
                "left behind: processes %s, paths %s",
                cleanup.surviving_pids,
                cleanup.remaining_paths,
            )
        self._tell_ending()
        if self.channels is not None:
            self.channels.close()
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        self.sandbox = self.stdout = self.stderr = None

    async def shutdown_requested(self, restart: bool = False) -> None:  # noqa: ARG002
        """Somebody asked the kernel to end: how it does is not news."""
        self._asked_for()

    def _asked_for(self) -> None:
        """The end is wanted from now on."""
        # One that came before, and was not looked at yet, was not.
        if self.sandbox is not None and self.sandbox.exit is None and self.on_limit is None:
            self.sandbox.process_messages()
        self._tell_ending()
        self._is_end_reported = True

    def _tell_ending(self) -> None:
        """Log once how a kernel ended that nobody asked to."""
        # People of other tools learn of the cause here, and nowhere else.
        ended = self.sandbox.exit if self.sandbox else None
        if ended is None or self._is_end_reported or self.on_limit is not None:
            return
        self._is_end_reported = True
        if ended.status is not None and ended.status.raw == 0 and not ended.reason:
            # A client's own shutdown request goes past us.
            return
        reason = f", killed by safe-exec for its limit: {ended.reason}" if ended.reason else ""
        killed = ended.counters.oom_kills or 0
        if killed:
            limit = (
                f" at its limit of {format_size(self.limits.memory)}"
                if self.limits.memory is not None
                else ""
            )
            reason += f", {killed} process(es) killed for memory in its control group{limit}"
        status = ended.status if ended.status is not None else "its keeper"
        # An application's own log where there is one: traitlets' other logger says nothing to
        # anybody.
        (self.log if Application.initialized() else log).error(
            "kernel ended with %s%s", status, reason
        )
