"""Advice on starting a container so that processes in it can make cgroups. Pure."""

from __future__ import annotations

from safe_exec.sandbox.advice.fix import Fix, delegate_command
from safe_exec.sandbox.host.capabilities import V2_CONTROLLERS, HostCapabilities
from safe_exec.sandbox.host.facts import CgroupTree, Container, HostFacts

_PRIVILEGED = (
    "a privileged container can do to the host what root can: for notebooks that you trust"
)


def container_fixes(machine: HostCapabilities, host: HostFacts) -> tuple[Fix, ...]:
    """Return the fixes for a container: start it with its own cgroups, and delegate them inside."""
    if host.tree is CgroupTree.V2 and not host.read_only:
        return (
            Fix(
                title="in the container, as root, before safe-exec",
                steps=_move_down(machine, host),
            ),
        )
    fixes = [_start(title, command, note, machine, host) for title, command, note in _starts(host)]
    return tuple(fixes)


def _starts(host: HostFacts) -> tuple[tuple[str, str, str], ...]:
    """Return title, command and cost of each way to start the container; the safest is first."""
    unified = host.tree is CgroupTree.V2
    in_workflow = "; in a workflow they belong under container: options:" if host.github else ""
    privileged = f"{_PRIVILEGED}{in_workflow}"
    # podman-run(1): --security-opt unmask, whose list of read-only paths includes /sys/fs/cgroup.
    # It works for version 2 only (podman issues 8441 and 16840).
    if host.container is Container.PODMAN:
        rootless = (
            "a rootless container gets the controllers that the host's systemd delegates to its "
            "user"
        )
        unmask = (
            "start the container so",
            "podman run --security-opt unmask=/sys/fs/cgroup IMAGE",
            rootless,
        )
        return (
            (unmask,)
            if unified
            else (("start the container so", "sudo podman run --privileged IMAGE", privileged),)
        )
    # Docker mounts /sys/fs/cgroup read-only unless the container is privileged. writable-cgroups
    # came with Engine 28.0 (moby pull request 48828); rootless Docker refuses it (moby issue
    # 49333).
    if host.container is Container.DOCKER:
        old = ("or, with any Docker", "docker run --privileged IMAGE", privileged)
        refused = f"refused by rootless Docker{in_workflow}"
        new = (
            "with Docker 28 or later",
            "docker run --security-opt writable-cgroups=true IMAGE",
            refused,
        )
        return (new, old) if unified else (("start the container so", old[1], privileged),)
    if host.container is Container.KUBERNETES:
        return (
            ("in the container of the pod", "securityContext: {privileged: true}", _PRIVILEGED),
        )
    return (
        ("start the container with /sys/fs/cgroup writable", "# how is for its manager to say", ""),
    )


def _start(title: str, command: str, note: str, machine: HostCapabilities, host: HostFacts) -> Fix:
    if host.tree is CgroupTree.V2:
        next_steps = ("# then in it, as root, before safe-exec:", *_move_down(machine, host))
    else:
        # In version 1 a cgroup can have both processes and children, but only root can make them.
        next_steps = () if machine.uid == 0 else ("# and run safe-exec in it as root",)
    return Fix(title=title, steps=(command, *next_steps), note=note)


def _move_down(machine: HostCapabilities, host: HostFacts) -> tuple[str, ...]:
    # In a cgroup namespace of its own, the container's topmost cgroup contains its processes, so it
    # cannot delegate controllers ("no internal processes", admin-guide/cgroup-v2). The processes
    # must move one cgroup down, as in moby's hack/dind.
    top = host.mount
    controllers = [name for name in V2_CONTROLLERS if name in host.controllers] or V2_CONTROLLERS
    steps = (
        f"mkdir -p {top}/init",
        f"xargs -rn1 < {top}/cgroup.procs > {top}/init/cgroup.procs || :",
        delegate_command(top, controllers),
    )
    return steps if machine.uid == 0 else (*steps, f"chown {host.user} {top} {top}/cgroup.procs")
