"""Says why walls (``model.limits.Wall``) are weak here, and which commands fix it. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from safe_exec.model.limits import Enforcement, LimitName, Mechanism, Wall
from safe_exec.sandbox.advice.fix import Fix
from safe_exec.sandbox.host.bwrap_probe import NOT_INSTALLED
from safe_exec.sandbox.host.capabilities import HostCapabilities
from safe_exec.sandbox.host.facts import Container, HostFacts

# The walls that bubblewrap enforces.
BY_NAMESPACES = (Wall.HOME, Wall.SYSTEM, Wall.FOLDER, Wall.HIDDEN, Wall.NETWORK, Wall.PROCESSES)
SIZES = (LimitName.DISK, LimitName.SHM)


class WallRemedy(Struct, frozen=True, kw_only=True):
    """The reason why some walls or file system limits are weak, and its fixes.

    The best is first.
    """

    walls: tuple[Wall, ...]
    limits: tuple[LimitName, ...]
    reason: str
    fixes: tuple[Fix, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the weak walls and limits."""
        return (*(wall.value for wall in self.walls), *(name.value for name in self.limits))


def advise_walls(
    machine: HostCapabilities,
    host: HostFacts,
    walls: Mapping[Wall, Enforcement],
    enforcement: Mapping[LimitName, Enforcement],
) -> tuple[WallRemedy, ...]:
    """Return remedies for weak walls; none if all are enforced as well as possible."""
    if not machine.platform.startswith("linux"):
        # The advice on limits tells that safe-exec runs on Linux only.
        return ()
    weak = [
        wall
        for wall in BY_NAMESPACES
        if wall in walls and walls[wall].by is not Mechanism.BUBBLEWRAP
    ]
    sizes = [name for name in SIZES if name in enforcement and not enforcement[name].hard]
    remedies: list[WallRemedy] = []
    if weak or sizes:
        allowed = machine.allows(Mechanism.BUBBLEWRAP)
        reason = (
            f"bubblewrap: {machine.bubblewrap_why_not}"
            if allowed
            else "bubblewrap is not among the mechanisms allowed"
        )
        fixes = _fixes(machine, host) if allowed else (_ALLOW,)
        remedies.append(
            WallRemedy(walls=tuple(weak), limits=tuple(sizes), reason=reason, fixes=fixes)
        )
    if not machine.allows(Mechanism.SECCOMP) and Wall.SYSTEM_CALLS in walls:
        calls = tuple(wall for wall in (Wall.SYSTEM_CALLS, Wall.PRIVILEGES) if wall in walls)
        remedies.append(
            WallRemedy(
                walls=calls,
                limits=(),
                reason="seccomp is not among the mechanisms allowed",
                fixes=(_ALLOW,),
            )
        )
    return tuple(remedies)


_ALLOW = Fix(title="leave --mechanisms away", steps=())


def _fixes(machine: HostCapabilities, host: HostFacts) -> tuple[Fix, ...]:
    if machine.bubblewrap_why_not == NOT_INSTALLED or machine.bubblewrap_version is None:
        return (_install(machine, host),)
    if host.container is not Container.NONE:
        return _in_container(host)
    sudo = "" if machine.uid == 0 else "sudo "
    fixes: list[Fix] = []
    # Ubuntu 23.10 and later forbid user namespaces to ordinary programs (release notes of 24.04,
    # "unprivileged user namespace restrictions"). A profile with ``userns,`` exempts one program.
    if host.apparmor_userns and machine.uid != 0:
        fixes += [
            _apparmor_profile(),
            _sysctl(sudo, "kernel.apparmor_restrict_unprivileged_userns", "0"),
        ]
    # Debian 10 and older, and hardened kernels, have this sysctl.
    if host.no_userns_clone and machine.uid != 0:
        fixes.append(_sysctl(sudo, "kernel.unprivileged_userns_clone", "1"))
    # This sysctl exists everywhere (namespaces(7)); hardened machines set it to 0.
    if host.no_user_namespaces:
        fixes.append(_sysctl(sudo, "user.max_user_namespaces", "10000"))
    return tuple(fixes) or (_newer(machine, host),)


def _install(machine: HostCapabilities, host: HostFacts) -> Fix:
    commands = {
        "debian": "apt-get install bubblewrap",
        "fedora": "dnf install bubblewrap",
        "suse": "zypper install bubblewrap",
        "arch": "pacman -S bubblewrap",
        "alpine": "apk add bubblewrap",
    }
    sudo = "" if machine.uid == 0 else "sudo "
    package = next(
        (command for name, command in commands.items() if name in host.distribution),
        commands["debian"],
    )
    inside = (
        "; then ask doctor again: a container may have to be started otherwise"
        if host.container is not Container.NONE
        else ""
    )
    return Fix(title=f"install it{inside}", steps=(f"{sudo}{package}",))


def _newer(machine: HostCapabilities, host: HostFacts) -> Fix:
    """Return the fix for a bubblewrap that fails without a known reason: a newer version."""
    return Fix(
        title="see what bubblewrap itself says, or install a newer one",
        steps=(
            "bwrap --ro-bind / / --dev /dev --proc /proc --unshare-pid --unshare-net true",
            *_install(machine, host).steps,
        ),
    )


def _apparmor_profile() -> Fix:
    """Return the fix that installs an AppArmor profile for bwrap, like those that Ubuntu ships."""
    program = "/usr/bin/bwrap"
    profile = (
        rf"abi <abi/4.0>,\ninclude <tunables/global>\nprofile bwrap {program} flags=(unconfined) "
        rf"{{\n  userns,\n}}\n"
    )
    return Fix(
        title="let bubblewrap make user namespaces (Ubuntu 23.10 and later forbid it)",
        steps=(
            f"printf '{profile}' | sudo tee /etc/apparmor.d/bwrap",
            "sudo systemctl reload apparmor",
        ),
        note="any program can then make them by way of bwrap; sandboxes of browsers and Flatpak "
        "are exempted likewise",
    )


def _sysctl(sudo: str, name: str, value: str) -> Fix:
    return Fix(
        title="let every program make them",
        steps=(
            f"{sudo}sysctl -w {name}={value}",
            f"echo {name}={value} | {sudo}tee /etc/sysctl.d/60-user-namespaces.conf",
        ),
        note="the second line keeps it over the next boot",
    )


def _in_container(host: HostFacts) -> tuple[Fix, ...]:
    wider = (
        "what runs in the container then sees more of the host's kernel; safe-exec's own filter "
        "of system calls is still there"
    )
    workflow = "; in a workflow they belong under container: options:" if host.github else ""
    # podman-run(1): --security-opt seccomp=unconfined, unmask=ALL.
    if host.container is Container.PODMAN:
        start = (
            "podman run --security-opt seccomp=unconfined --security-opt unmask=ALL "
            "--security-opt label=disable IMAGE"
        )
        return (
            Fix(title="start the container so", steps=(start, *_on_the_host(host)), note=wider),
        )
    # Docker's default filter forbids namespaces and mounts without CAP_SYS_ADMIN (its
    # documentation, "Seccomp security profiles"). Its AppArmor profile forbids mounts. And a new
    # /proc must not show paths that the container's own /proc hides, hence systempaths=unconfined.
    if host.container is Container.DOCKER:
        options = " ".join(
            f"--security-opt {name}=unconfined" for name in ("seccomp", "apparmor", "systempaths")
        )
        title = (
            "start the container so (Docker's own filter forbids namespaces); safe-exec in it as "
            "an ordinary user"
        )
        gentle = Fix(
            title=title,
            steps=(f"docker run {options} IMAGE", *_on_the_host(host)),
            note=f"{wider}{workflow}",
        )
        trusted = (
            "a privileged container can do to the host what root can: for notebooks that you "
            f"trust{workflow}"
        )
        return (
            gentle,
            Fix(title="or, as root in it", steps=("docker run --privileged IMAGE",), note=trusted),
        )
    if host.container is Container.KUBERNETES:
        unconfined = (
            "securityContext: "
            "{seccompProfile: {type: Unconfined}, appArmorProfile: {type: Unconfined}, "
            "procMount: Unmasked}"
        )
        return (
            Fix(
                title="in the container of the pod",
                steps=(unconfined,),
                note=f"procMount takes hostUsers: false; {wider}",
            ),
        )
    return (
        Fix(
            title="start the container so that a process in it may make namespaces",
            steps=("# how is for its manager to say",),
        ),
    )


def _on_the_host(host: HostFacts) -> tuple[str, ...]:
    """Return steps for the host, whose AppArmor confines the container too."""
    setting = "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"
    return ("# and on the host:", setting) if host.apparmor_userns else ()
