"""A jupyter_client kernel provisioner that starts kernels in a sandbox.

``safe-exec run`` passes in its plan and sandbox. Other Jupyter tools select the provisioner with
``JUPYTER_DEFAULT_PROVISIONER_NAME=safe-exec``, or with ``metadata.kernel_provisioner`` of a
kernelspec and ``config: {"limits": "ci", "memory": "2G"}``. It then reads its limits from that
configuration and from ``SAFE_EXEC_LIMITS``.
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
from safe_exec.sandbox.mechanisms import rlimits
from safe_exec.sandbox.mechanisms.watchdog import Watchdog
from safe_exec.sandbox.plan import SpawnPlan
from safe_exec.sandbox.planner import build_plan
from safe_exec.sandbox.priority import PriorityGuard
from safe_exec.sandbox.sandbox import Sandbox
from safe_exec.sandbox.usage.meter import has_memory_group
from safe_exec.sandbox.usage.process_tree import ProcessTree
from safe_exec.units import format_size

if TYPE_CHECKING:
    from safe_exec.kernel.coverage_file import CoverageFile
    from safe_exec.sandbox.mechanisms.disk_watchdog import DiskWatch

log = logging.getLogger("safe_exec")


class SandboxProvisioner(KernelProvisionerBase):  # type: ignore[misc]
    """Starts kernels through a keeper, keeps their raw exit status, and kills whole trees."""

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
        self.strict_shell = False
        self.coverage: CoverageFile | None = None
        self.ports_cached = False
        self.pid: int | None = None
        self.pgid: int | None = None
        self.ip: str | None = None
        self.cwd: str | None = None
        self.stdout: IO[bytes] | None = None
        self.stderr: IO[bytes] | None = None

    def prepare(self, *, limits: Limits, plan: SpawnPlan, sandbox: Sandbox) -> None:
        """Use the plan and sandbox of ``safe-exec run`` instead of making them here."""
        self._prepared = self.headless = True
        self.limits, self.plan, self.sandbox = limits, plan, sandbox
        self.run_id = sandbox.run_id

    # --- jupyter_client's provisioner interface ---------------------------------------------------

    @property
    def has_process(self) -> bool:
        """Whether a kernel was started and not cleaned up."""
        return self.sandbox is not None and self.sandbox.kernel_pid is not None

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """Write the connection file and build the command; nothing runs yet.

        Like jupyter_client's own provisioner, raises RuntimeError if the address belongs to another
        machine, or if encryption is required but not available.
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
        # All managers of this process share one cache, so that two kernels which start at the same
        # time do not get the same port.
        if km.cache_ports and not self.ports_cached:
            cache = LocalPortCache.instance()
            for name in PORTS:
                setattr(km, name, cache.find_available_port(km.ip))
            self.ports_cached = True

    async def _build_for_others(self) -> None:
        # Imported only for other tools: `run` has resolved its limits before.
        from safe_exec.limits.profiles import resolve_simple

        # A manager that is started a second time replaces its kernel.
        if self.sandbox is not None:
            await self.kill()
            await self.cleanup(restart=True)
        # Clean up after servers that were killed together with their keepers.
        stale_runs.sweep()
        # A restarted kernel gets a fresh sandbox, since charges and files outlive processes.
        self.run_id = keeper_process.new_run_id()
        self._is_end_reported = False
        machine = detect()
        profile = os.environ.get("SAFE_EXEC_LIMITS")
        self.limits = resolve_simple(self._config, profile, machine_memory=machine.memory_total)
        self.plan = build_plan(self.limits, machine, self.run_id)
        self.sandbox = Sandbox(self.run_id, delegation=self.plan.cgroup.delegation)

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> Any:
        """Start the kernel inside its limits.

        ``stdout`` and ``stderr`` are as for subprocess.Popen: by default the kernel inherits those
        of this process, and attributes of these names hold the read ends of pipes. Raises
        FileNotFoundError for a command or directory that does not exist.
        """
        assert self.sandbox is not None and self.plan is not None
        env, cwd = kwargs.get("env", os.environ), str(kwargs.get("cwd") or os.getcwd())
        config = inside_config(
            self.limits,
            headless=self.headless,
            marks=self._prepared,
            strict_shell=self.strict_shell,
            coverage=self.coverage,
        )
        if self._prepared:
            self.channels, self.instrumented = spawn(
                self.sandbox,
                self.plan,
                cmd,
                env=env,
                cwd=cwd,
                config=config,
                coverage=self.coverage,
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
        """Return the absolute path of an existing file.

        Relative paths start at the kernel's directory.
        """
        path = Path(path_str).expanduser()
        if not path.is_absolute() and self.cwd is not None:
            path = (Path(self.cwd) / path).resolve()
        return path.as_posix() if path.exists() else None

    async def get_provisioner_info(self) -> dict[str, Any]:
        """Return the facts by which another process of the same tool can recognise this kernel."""
        info: dict[str, Any] = await super().get_provisioner_info()
        return info | {"pid": self.pid, "pgid": self.pgid, "ip": self.ip}

    async def load_provisioner_info(self, provisioner_info: dict[str, Any]) -> None:
        """Load the ``get_provisioner_info`` of a kernel that another process started.

        The keeper stays with that process.
        """
        await super().load_provisioner_info(provisioner_info)
        self.pid, self.pgid = provisioner_info["pid"], provisioner_info["pgid"]
        self.ip = provisioner_info["ip"]

    def adopt(self, launched: LaunchedKernel) -> None:
        """Take over a kernel that was started in advance."""
        self.channels, self.instrumented = launched.channels, launched.instrumented
        self.connection_info, self.cwd = launched.connection, launched.cwd
        self._start_watchdog(launched.cwd)

    def begin_again(self) -> None:
        """Watch the limits again, after a copy of the kernel has taken over in the sandbox."""
        self.stop_watching()
        self.watchdog = self._diskwatch = None
        assert self.sandbox is not None and self.cwd is not None
        self.pid = self.pgid = self.sandbox.kernel_pid
        self._start_watchdog(self.cwd)

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
            tasks = rlimits.process_limit(self.plan, self.limits, tree)
            self.watchdog = Watchdog(
                tree,
                self.limits,
                self.plan.watch,
                self._limit_passed,
                guard=guard,
                refuse_more=None if tasks is None else tasks.refuse_more,
            )
            self.watchdog.start()

    def _limit_passed(self, name: LimitName, used: float) -> None:
        """Kill the sandbox for a limit; called on the watchdog's thread."""
        # A message to the keeper is one small write of a whole line, so another thread may send it.
        if self.sandbox is not None:
            self.sandbox.kill(TerminationReason(name.value))
        if self.on_limit is not None:
            self.on_limit(name, used)

    @property
    def watches(self) -> bool:
        """Whether a watchdog of safe-exec enforces limits."""
        return self.watchdog is not None or self._diskwatch is not None

    def check_last(self) -> None:
        """Check the watched limits once more; takes up to 50 ms."""
        # A cell can exceed a limit just before the end of the run, between two regular checks.
        for watch in (self.watchdog, self._diskwatch):
            if watch is not None:
                watch.check(last=True)

    def stop_watching(self) -> None:
        """Stop the watchdogs."""
        # Call this before the tree is killed: a watchdog could misread the dying processes.
        for watch in (self.watchdog, self._diskwatch):
            if watch is not None:
                watch.stop()

    async def poll(self) -> int | None:
        """Return the kernel's return code as subprocess does, ``None`` while it runs."""
        # jupyter_client's local provisioner forgets the status after wait(); ours keeps it.
        if self.sandbox is None:
            return 0
        if self.sandbox.exit is None and self.on_limit is None:
            self.sandbox.process_messages()
        ended = self.sandbox.exit
        if ended is None:
            return None
        self._log_ending()
        if ended.status is None:
            return -signal.SIGKILL
        return -ended.status.signal if ended.status.signal is not None else ended.status.exit_code

    async def wait(self) -> int | None:
        """Wait for the kernel process to end; return its return code."""
        # Poll the keeper: other tools may run event loops that do not support add_reader.
        while (code := await self.poll()) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        return code

    async def send_signal(self, signum: int) -> None:
        """Send a signal to the kernel's process group."""
        # Like jupyter_client's own provisioner, signal the whole group: an interrupt is meant for
        # the kernel's children too.
        if getattr(self.parent, "shutting_down", False):
            # A shutdown begins with an interrupt, and SIGINT ends a kernel that is still starting.
            # That end was requested, so it must not be logged as a death.
            self._asked_for()
        if self.sandbox is not None:
            self.sandbox.signal(signum, group=True)

    async def kill(self, restart: bool = False) -> None:  # noqa: ARG002 - as jupyter_client
        """Kill the process tree as part of a shutdown."""
        self._asked_for()
        if self.sandbox is not None:
            self.sandbox.kill(TerminationReason.SHUTDOWN)

    async def terminate(self, restart: bool = False) -> None:  # noqa: ARG002 - as jupyter_client
        """Ask the kernel process to end."""
        self._asked_for()
        if self.sandbox is not None:
            self.sandbox.signal(signal.SIGTERM)

    async def cleanup(self, restart: bool = False) -> None:
        """Remove the sandbox; give the ports back to jupyter_client unless a restart follows."""
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
        self._log_ending()
        if self.channels is not None:
            self.channels.close()
        for stream in (self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        self.sandbox = self.stdout = self.stderr = None

    async def shutdown_requested(self, restart: bool = False) -> None:  # noqa: ARG002
        """Record that the kernel was asked to end; its end is then not logged."""
        self._asked_for()

    def _asked_for(self) -> None:
        """Treat an end of the kernel from now on as requested."""
        # A death before the request may still be unread in the keeper's socket. Report that one.
        if self.sandbox is not None and self.sandbox.exit is None and self.on_limit is None:
            self.sandbox.process_messages()
        self._log_ending()
        self._is_end_reported = True

    def _log_ending(self) -> None:
        """Log, once, the end of a kernel that was not asked to end."""
        # The log is the only place where users of other tools see the cause.
        ended = self.sandbox.exit if self.sandbox else None
        if ended is None or self._is_end_reported or self.on_limit is not None:
            return
        self._is_end_reported = True
        if ended.status is not None and ended.status.raw == 0 and not ended.reason:
            # A client can send a shutdown request to the kernel without our knowledge, and the
            # kernel then ends with status 0.
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
        # Use the application's log if there is an application. The default logger of traitlets
        # discards messages.
        (self.log if Application.initialized() else log).error(
            "kernel ended with %s%s", status, reason
        )
