"""Explains each weakly enforced limit on this host and lists commands that fix it."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from safe_exec.model.limits import LimitName, Mechanism
from safe_exec.sandbox.advice.containers import container_fixes
from safe_exec.sandbox.advice.fix import Fix, delegate_command
from safe_exec.sandbox.host.capabilities import V1_CONTROLLERS, V2_CONTROLLERS, HostCapabilities
from safe_exec.sandbox.host.facts import CgroupTree, Container, HostFacts
from safe_exec.sandbox.plan import REQUIRE_ALL, SpawnPlan

# Pure: derives advice from host capabilities, host facts and a plan. Nothing here is executed; the
# commands are for the user's own shell. Each fix names its source.

NOTEBOOK = "safe-exec run NOTEBOOK"
# The limits that cgroups enforce for all processes together, with their controllers.
BY_GROUPS = {LimitName.MEMORY: "memory", LimitName.CPUS: "cpu", LimitName.PROCESSES: "pids"}


class Remedy(Struct, frozen=True, kw_only=True):
    """The reason why some limits are weak here, and the fixes, best first."""

    limits: tuple[LimitName, ...]
    reason: str
    fixes: tuple[Fix, ...]


def weak_limits(plan: SpawnPlan) -> tuple[LimitName, ...]:
    """Return the limits of a plan that Linux could enforce but does not enforce here."""
    return tuple(
        name for name in REQUIRE_ALL if name in plan.enforcement and not plan.enforcement[name].hard
    )


def advise(machine: HostCapabilities, host: HostFacts, plan: SpawnPlan) -> tuple[Remedy, ...]:
    """Return remedies for weak limits, most important first; empty if there are none."""
    weak = weak_limits(plan)
    if not machine.platform.startswith("linux"):
        return (
            Remedy(
                limits=weak,
                reason=f"safe-exec runs notebooks on Linux only, not on {machine.platform}",
                fixes=_ELSEWHERE,
            ),
        )
    grouped = tuple(name for name in weak if name in BY_GROUPS)
    others = tuple(name for name in weak if name not in BY_GROUPS)
    remedies: list[Remedy] = []
    if grouped:
        remedies.append(
            Remedy(
                limits=grouped,
                reason=_why(machine, host, grouped),
                fixes=_fixes(machine, host, grouped),
            )
        )
    if others:
        remedies.append(
            Remedy(
                limits=others, reason="rlimit is not among the mechanisms allowed", fixes=(_ALLOW,)
            )
        )
    if _cpu_not_delegated(machine, host) and LimitName.CPUS in grouped and not _has_groups(machine):
        reason = f"the systemd of user {host.user} was given no cpu controller to hand on"
        remedies.append(
            Remedy(limits=(LimitName.CPUS,), reason=reason, fixes=(_delegate_cpu(machine),))
        )
    if _swap_extends(machine, plan):
        reason = "this kernel does not account for swap, which extends the memory limit"
        remedies.append(Remedy(limits=(LimitName.MEMORY,), reason=reason, fixes=_SWAP))
    return tuple(remedies)


def swap_state(machine: HostCapabilities, plan: SpawnPlan) -> str:
    """Describe the swap and whether it extends the memory limit."""
    if not machine.swap_total:
        return "none on this machine"
    enforcement = plan.enforcement.get(LimitName.MEMORY)
    if enforcement is None:
        return "no memory limit is set"
    if enforcement.by in (Mechanism.CGROUP_V1, Mechanism.CGROUP_V2, Mechanism.SYSTEMD):
        return (
            "may extend the memory limit"
            if _swap_extends(machine, plan)
            else "kept from extending the memory limit"
        )
    return "not counted: what was swapped out goes past the memory limit"


def _swap_extends(machine: HostCapabilities, plan: SpawnPlan) -> bool:
    enforcement = plan.enforcement.get(LimitName.MEMORY)
    if not machine.swap_total or enforcement is None or enforcement.by is not Mechanism.CGROUP_V1:
        return False
    return not any(path.endswith("/memory.memsw.limit_in_bytes") for path, _ in plan.cgroup.writes)


# --- control groups -------------------------------------------------------------------------------


def _has_groups(machine: HostCapabilities) -> bool:
    """Whether we can make cgroups in the unified tree, even if some controllers are missing."""
    return machine.v2 is not None or machine.scope is not None


def _may_use_groups(machine: HostCapabilities) -> bool:
    return any(
        machine.allows(mechanism)
        for mechanism in (Mechanism.SYSTEMD, Mechanism.CGROUP_V1, Mechanism.CGROUP_V2)
    )


def _why(machine: HostCapabilities, host: HostFacts, weak: tuple[LimitName, ...]) -> str:
    missing = " and ".join(BY_GROUPS[name] for name in weak)
    if not _may_use_groups(machine):
        return "control groups are not among the mechanisms allowed"
    if _switched_off(host, weak):
        return f"the {missing} controller is switched off on the kernel's command line"
    if machine.scope is not None:
        owner = (
            "the system's systemd"
            if machine.scope.runtime is None
            else f"the systemd of user {host.user}"
        )
        return f"{owner} was given no {missing} controller to hand on"
    if machine.v2 is not None:
        return f"{machine.v2} does not hand on {missing}"
    if machine.v1:
        return f"no group of ours can be made for {missing}"
    state = (
        machine.v2_why_not if host.tree in (CgroupTree.V2, CgroupTree.NONE) else machine.v1_why_not
    )
    if host.tree is CgroupTree.V2 and host.systemd and machine.scope_why_not:
        state += f"; systemd gives no scope: {machine.scope_why_not}"
    return state if machine.uid == 0 else f"no control group is {host.user}'s to use ({state})"


def _switched_off(host: HostFacts, weak: tuple[LimitName, ...]) -> bool:
    return all(BY_GROUPS[name] in host.disabled for name in weak)


def _fixes(
    machine: HostCapabilities, host: HostFacts, weak: tuple[LimitName, ...]
) -> tuple[Fix, ...]:
    if not _may_use_groups(machine):
        return (_ALLOW,)
    if _switched_off(host, weak):
        return (
            (_switch_on(BY_GROUPS[name] for name in weak),)
            if host.container is Container.NONE
            else (_ON_THE_HOST,)
        )
    if _has_groups(machine):
        return (_delegate_the_rest(machine, host),)
    if _engine_in_charge(host):
        return container_fixes(machine, host)
    if host.wsl is not None and (host.tree is not CgroupTree.V2 or not host.systemd):
        return _wsl_ways(machine, host)
    return _root_fixes(host) if machine.uid == 0 else _user_fixes(machine, host)


def _engine_in_charge(host: HostFacts) -> bool:
    """Whether the container's engine has to provide cgroups."""
    # Otherwise the container's own systemd or root can.
    if host.container is Container.NONE or host.systemd:
        return False
    return host.read_only or host.tree in (CgroupTree.V2, CgroupTree.NONE)


def _delegate_the_rest(machine: HostCapabilities, host: HostFacts) -> Fix:
    if machine.uid != 0:
        return (
            _delegate_cpu(machine) if _cpu_not_delegated(machine, host) else _scope(machine, host)
        )
    return Fix(title="hand the rest on", steps=(delegate_command(machine.v2, V2_CONTROLLERS),))


def _root_fixes(host: HostFacts) -> tuple[Fix, ...]:
    """Return the fixes for root if it has no usable cgroup."""
    # Root lacks a cgroup for one of three reasons: the hierarchy is not mounted, it is mounted
    # read-only, or the root cgroup does not delegate controllers.
    if host.tree is CgroupTree.NONE:
        mount = f"mount -t cgroup2 none {host.mount}"
        return (
            Fix(
                title="mount the tree",
                steps=(
                    f"mkdir -p {host.mount}",
                    mount,
                    delegate_command(host.mount, V2_CONTROLLERS),
                ),
            ),
        )
    if host.read_only:
        return (Fix(title="make the tree writable", steps=(f"mount -o remount,rw {host.mount}",)),)
    if host.tree is CgroupTree.V2:
        controllers = [
            name for name in V2_CONTROLLERS if name in host.controllers
        ] or V2_CONTROLLERS
        return (
            Fix(
                title="hand the controllers on", steps=(delegate_command(host.mount, controllers),)
            ),
        )
    steps = tuple(
        f"mkdir -p /sys/fs/cgroup/{name} && mount -t cgroup -o {name} cgroup /sys/fs/cgroup/{name}"
        for name in V1_CONTROLLERS
    )
    return (
        Fix(
            title="mount the controllers that are missing (a line that fails is there already)",
            steps=steps,
        ),
        _UNIFIED,
    )


def _user_fixes(machine: HostCapabilities, host: HostFacts) -> tuple[Fix, ...]:
    """Return the fixes that give an ordinary user a cgroup: by a systemd scope, or by root."""
    # In order of privileges: a scope of the user's own systemd, a cgroup that root gives to the
    # user, running as root.
    if host.tree is CgroupTree.V2 and host.systemd and host.systemd_run:
        own: tuple[Fix, ...] = (_scope(machine, host),)
    elif host.tree is CgroupTree.V2:
        own = (_given_v2(host),)
    elif host.tree in (CgroupTree.V1, CgroupTree.HYBRID):
        own = (_given_v1(host), _UNIFIED) if host.systemd else (_given_v1(host),)
    else:
        own = ()
    # Hosted runners of GitHub allow sudo without a password, so there it is the shortest way.
    return (_sudo(host), *own) if host.github else (*own, _sudo(host))


def _scope(machine: HostCapabilities, host: HostFacts) -> Fix:
    """Return the fix for a scope below the user's own systemd."""
    # safe-exec starts a scope by itself if it can reach that systemd (systemd-run(1), Delegate=).
    prefix = "" if host.runtime_dir else f"XDG_RUNTIME_DIR=/run/user/{machine.uid} "
    run = f"{prefix}systemd-run --user --scope -p Delegate=yes {NOTEBOOK}"
    linger = f"sudo loginctl enable-linger {host.user}"
    if not host.user_manager:
        title = (
            "have your own systemd run without a login too; safe-exec then gets its scopes from it"
        )
        return Fix(title=title, steps=(linger,))
    note = "" if host.linger else f"where you are not logged in (cron, a service), once: {linger}"
    return Fix(title="in a scope of your own systemd", steps=(run,), note=note)


def _cpu_not_delegated(machine: HostCapabilities, host: HostFacts) -> bool:
    usable = host.tree is CgroupTree.V2 and host.systemd and machine.uid != 0
    return usable and host.user_controllers is not None and "cpu" not in host.user_controllers


def _delegate_cpu(machine: HostCapabilities) -> Fix:
    """Return the fix for a systemd that does not delegate cpu to users."""
    # Since version 252 systemd delegates cpu by default (its pull request 23887).
    folder = "/etc/systemd/system/user@.service.d"
    return Fix(
        title="have systemd delegate cpu to users",
        steps=(
            f"sudo mkdir -p {folder}",
            (
                r"printf '[Service]\nDelegate=cpu cpuset io memory pids\n' | sudo tee "
                rf"{folder}/delegate.conf"
            ),
            "sudo systemctl daemon-reload",
        ),
        note="holds from your next login on, or after sudo systemctl restart "
        f"user@{machine.uid}.service, which ends "
        "what runs under it",
    )


def _given_v2(host: HostFacts) -> Fix:
    """Return the fix in which root delegates a cgroup by hand."""
    # The shell moves into a child cgroup, since a cgroup with processes cannot delegate controllers
    # (admin-guide/cgroup-v2, "Delegation").
    group = host.mount / f"safe-exec-{host.user}"
    controllers = [name for name in V2_CONTROLLERS if name in host.controllers] or V2_CONTROLLERS
    as_root = (
        f"mkdir -p {group}/shell",
        delegate_command(host.mount, controllers),
        delegate_command(group, controllers),
        f"chown {host.user} {group} {group}/cgroup.procs {group}/shell {group}/shell/cgroup.procs",
    )
    return Fix(
        title="have root give you a group, and move this shell into it",
        steps=(
            *(f"sudo sh -c '{step}'" for step in as_root),
            f"echo $$ | sudo tee {group}/shell/cgroup.procs > /dev/null",
        ),
        note="until the next boot",
    )


def _given_v1(host: HostFacts) -> Fix:
    """Return the fix in which root gives away a cgroup of each v1 controller."""
    # systemd has no safe delegation for version 1 (systemd.resource-control(5)).
    give = (
        f"sudo mkdir -p $g && sudo chown -R {host.user} $g && echo $$ | sudo tee $g/cgroup.procs "
        "> /dev/null"
    )
    return Fix(
        title="have root give you a group of each controller, and move this shell into them",
        steps=(
            f"for c in {' '.join(V1_CONTROLLERS)}; do",
            f"  g=/sys/fs/cgroup/$c/safe-exec-{host.user}",
            f"  {give}",
            "done",
        ),
        note="until the next boot",
    )


def _sudo(host: HostFacts) -> Fix:
    on_github = "; hosted runners ask for no password" if host.github else ""
    return Fix(
        title="as root",
        steps=(f'sudo -E env "PATH=$PATH" {NOTEBOOK}',),
        note=f"the notebook then runs as root, and what it writes belongs to root{on_github}",
    )


# --- WSL ------------------------------------------------------------------------------------------


def _wsl_ways(machine: HostCapabilities, host: HostFacts) -> tuple[Fix, ...]:
    if host.wsl == 1:
        steps = ("wsl --list", "wsl --set-version NAME-OF-THIS-DISTRIBUTION 2")
        return (
            Fix(
                title="WSL 1 has no control groups; in PowerShell, make this distribution one of "
                "WSL 2",
                steps=steps,
            ),
        )
    systemd = _wsl_systemd() if not host.systemd else None
    unified = _WSL_UNIFIED if host.tree is not CgroupTree.V2 else None
    fixes = [fix for fix in (unified, systemd) if fix is not None]
    return (*fixes, _sudo(host)) if machine.uid != 0 else tuple(fixes)


def _wsl_systemd() -> Fix:
    """Return the fix that turns systemd on in WSL.

    Source: Microsoft, "Advanced settings configuration in WSL", ``[boot] systemd`` in wsl.conf.
    """
    return Fix(
        title="have WSL start systemd, which gives each user groups; then ask doctor again",
        steps=(
            r"printf '[boot]\nsystemd=true\n' | sudo tee -a /etc/wsl.conf",
            "wsl.exe --shutdown",
        ),
        note="ends all that runs in WSL; where /etc/wsl.conf has a [boot] section, put the line "
        "there instead",
    )


_WSL_UNIFIED = Fix(
    title="have WSL mount control groups version 2 alone; then ask doctor again",
    steps=(
        "wsl.exe --update",
        r"# if that is not enough, in %UserProfile%\.wslconfig of Windows:",
        "[wsl2]",
        "kernelCommandLine=cgroup_no_v1=all",
        "# and then",
        "wsl.exe --shutdown",
    ),
    note="ends all that runs in WSL",
)

# --- what is the same everywhere ------------------------------------------------------------------

_GRUB = "in /etc/default/grub add to GRUB_CMDLINE_LINUX"
_ALLOW = Fix(title="leave --mechanisms away", steps=())
_ON_THE_HOST = Fix(title="only the host of this container can switch it on", steps=())
_UNIFIED = Fix(
    title="boot with control groups version 2 alone; then ask doctor again",
    steps=(f"# {_GRUB}: systemd.unified_cgroup_hierarchy=1", "sudo update-grub && sudo reboot"),
)
_SWAP = (
    Fix(
        title="account for swap",
        steps=(f"# {_GRUB}: swapaccount=1", "sudo update-grub && sudo reboot"),
    ),
    Fix(title="or do without swap until the next boot", steps=("sudo swapoff -a",)),
)
_ELSEWHERE = (Fix(title="run it on Linux: in a virtual machine, or in WSL 2 on Windows", steps=()),)


def _switch_on(controllers: Iterable[str]) -> Fix:
    names = " ".join(f"cgroup_enable={name}" for name in controllers)
    return Fix(
        title="switch it on",
        steps=(
            f"# {_GRUB} (on a Raspberry Pi: to /boot/firmware/cmdline.txt): {names}",
            "sudo update-grub && sudo reboot",
        ),
        note="and take any cgroup_disable= for it away",
    )
