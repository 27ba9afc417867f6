"""What a container needs so that a process in it may make control groups. Pure.

May import model, machine, surroundings, ways. Sources:

- Docker mounts ``/sys/fs/cgroup`` read-only unless privileged; ``writable-cgroups`` came with Engine 28.0 (moby pull request
  48828; rootless Docker refuses it: issue 49333).
- Podman: podman-run(1), ``--security-opt unmask``, whose list of read-only paths ends with ``/sys/fs/cgroup``; version 2
  only (podman issues 8441 and 16840).
- With a namespace of its own, the container's topmost group holds its processes and therefore cannot hand controllers on
  (no internal processes, the kernel's admin-guide/cgroup-v2): they have to move one group down, as in moby's hack/dind.
"""

from __future__ import annotations

from safe_exec.sandbox.advice.fix import Fix, delegate_command
from safe_exec.sandbox.host.capabilities import V2_CONTROLLERS, HostCapabilities
from safe_exec.sandbox.host.facts import CgroupTree, Container, HostFacts

_PRIVILEGED = (
    "a privileged container can do to the host what root can: for notebooks that you trust"
)


def container_fixes(machine: HostCapabilities, around: HostFacts) -> tuple[Fix, ...]:
    """How to start this container so that it has groups of its own, and what to do in it then."""
    if around.tree is CgroupTree.V2 and not around.read_only:
        return (
            Fix(
                what="in the container, as root, before safe-exec",
                steps=_move_down(machine, around),
            ),
        )
    fixes = [
        _start(what, command, note, machine, around) for what, command, note in _starts(around)
    ]
    return tuple(fixes)


def _starts(around: HostFacts) -> tuple[tuple[str, str, str], ...]:
    """What to say, how to start the container, and what that costs; the gentlest first."""
    unified = around.tree is CgroupTree.V2
    in_workflow = "; in a workflow they belong under container: options:" if around.github else ""
    privileged = f"{_PRIVILEGED}{in_workflow}"
    if around.container is Container.PODMAN:
        rootless = "a rootless container gets the controllers that the host's systemd delegates to its user"
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
    if around.container is Container.DOCKER:
        old = ("or, with any Docker", "docker run --privileged IMAGE", privileged)
        refused = f"refused by rootless Docker{in_workflow}"
        new = (
            "with Docker 28 or later",
            "docker run --security-opt writable-cgroups=true IMAGE",
            refused,
        )
        return (new, old) if unified else (("start the container so", old[1], privileged),)
    if around.container is Container.KUBERNETES:
        return (
            ("in the container of the pod", "securityContext: {privileged: true}", _PRIVILEGED),
        )
    return (
        ("start the container with /sys/fs/cgroup writable", "# how is for its manager to say", ""),
    )


def _start(what: str, command: str, note: str, machine: HostCapabilities, around: HostFacts) -> Fix:
    if around.tree is CgroupTree.V2:
        then = ("# then in it, as root, before safe-exec:", *_move_down(machine, around))
    else:  # version 1 lets any group have both processes and children, but only root may make them
        then = () if machine.uid == 0 else ("# and run safe-exec in it as root",)
    return Fix(what=what, steps=(command, *then), note=note)


def _move_down(machine: HostCapabilities, around: HostFacts) -> tuple[str, ...]:
    top = around.mount
    wanted = [name for name in V2_CONTROLLERS if name in around.controllers] or V2_CONTROLLERS
    steps = (
        f"mkdir -p {top}/init",
        f"xargs -rn1 < {top}/cgroup.procs > {top}/init/cgroup.procs || :",
        delegate_command(top, wanted),
    )
    return steps if machine.uid == 0 else (*steps, f"chown {around.user} {top} {top}/cgroup.procs")
