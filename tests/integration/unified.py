"""Places in the unified hierarchy from which a command is run: groups made by hand as an administrator would, containers, sessions."""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support import MARK, ordinary_user, wait_until

TOP = Path("/sys/fs/cgroup")
CONTROLLERS = "+memory +pids +cpu"
LINGERING = "notebooks"
"""The user of the image whose systemd runs without a login."""
DAEMON = """
import os, signal, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True: time.sleep(60)
    os._exit(0)
os.wait()
"""
"""Leaves a process that has forked twice, in a session of its own, and takes no SIGTERM."""


@dataclass(frozen=True, kw_only=True)
class Delegated:
    """A group with room for others below it; whoever works in it stands in ``leaf``, since a group that hands on has no processes."""

    group: Path
    leaf: Path

    def prefix(self, *more: str) -> list[str]:
        """What is put in front of a command so that it runs in the leaf."""
        return ["sh", "-c", f'echo $$ > {self.leaf}/cgroup.procs && exec "$@"', "sh", *more]


@contextlib.contextmanager
def delegated(
    *, owner: int = 0, memory: int | None = None, controllers: str = CONTROLLERS
) -> Iterator[Delegated]:
    """A group below the root's, which systemd knows nothing of, given to a user; ``memory`` bytes are all that it may use."""
    (TOP / "cgroup.subtree_control").write_text(CONTROLLERS)
    group = TOP / f"safe-exec-test-{secrets.token_hex(4)}"
    made = Delegated(group=group, leaf=group / "leaf")
    try:
        group.mkdir()
        if memory is not None:
            (group / "memory.max").write_text(str(memory))
            (group / "memory.swap.max").write_text("0")
        (group / "cgroup.subtree_control").write_text(controllers)
        made.leaf.mkdir()
        for path in (
            group,
            group / "cgroup.procs",
            made.leaf,
            made.leaf / "cgroup.procs",
            group / "cgroup.subtree_control",
        ):
            os.chown(path, owner, owner)
        yield made
    finally:
        _remove(group)


@contextlib.contextmanager
def bare(
    *, owner: int = 0, memory: int | None = None, processes: int | None = None
) -> Iterator[Path]:
    """A group that is a user's, and hands nothing on yet; ``memory`` bytes are all that it may use, and so many processes."""
    group = TOP / f"safe-exec-test-{secrets.token_hex(4)}"
    (TOP / "cgroup.subtree_control").write_text(CONTROLLERS)
    try:
        group.mkdir()
        if memory is not None:
            (group / "memory.max").write_text(str(memory))
            (group / "memory.swap.max").write_text("0")
        if processes is not None:
            (group / "pids.max").write_text(str(processes))
        for path in (group, group / "cgroup.procs", group / "cgroup.subtree_control"):
            os.chown(path, owner, owner)
        yield group
    finally:
        _remove(group)


def _remove(group: Path) -> None:
    """It stays busy for a moment after its last process."""
    for path in (*group.glob("*/"), group):
        with contextlib.suppress(FileNotFoundError):
            wait_until(
                lambda path=path: _gone(path),  # type: ignore[misc]
                10,
                f"{path} is empty: {(path / 'cgroup.procs').read_text()}",
            )


def _gone(path: Path) -> bool:
    try:
        path.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


@contextlib.contextmanager
def inside(place: Delegated) -> Iterator[None]:
    """This very process in the leaf of a delegated group, and back."""
    own = next(
        line.split("::")[1].strip()
        for line in Path("/proc/self/cgroup").read_text().splitlines()
        if line.startswith("0::")
    )
    (place.leaf / "cgroup.procs").write_text("0")
    try:
        yield
    finally:
        (TOP / own.lstrip("/") / "cgroup.procs").write_text("0")


def as_container(group: Path) -> list[str]:
    """As a container engine does it: a namespace of control groups whose root is that group, the tree mounted anew, no systemd in sight."""
    hide = "mount -t tmpfs none /run/systemd && umount -l /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup"
    enter = f'echo $$ > {group}/cgroup.procs && exec unshare --cgroup --mount --propagation private sh -c \'{hide} && exec "$@"\' sh "$@"'
    return ["sh", "-c", enter, "sh"]


def in_session() -> list[str]:
    """In a login session of the user who has a systemd of his own; variables that tests need go along."""
    run = f'cd "$PWD_WANTED"; unset PWD_WANTED; exec {shlex.quote("/usr/bin/env")} "$@"'
    return [
        "env",
        f"PWD_WANTED={LINGERING_HOME}",
        "su",
        "--login",
        "-w",
        f"{MARK},XDG_CACHE_HOME,PWD_WANTED",
        "-c",
        run,
        "--",
        LINGERING,
        "sh",
    ]


LINGERING_HOME = f"/home/{LINGERING}"


def as_nobody(place: Delegated) -> list[str]:
    """An ordinary user in the leaf of a group that was given to him."""
    return place.prefix(*ordinary_user())


def scopes() -> list[Path]:
    """Scopes of sandboxes that still stand."""
    return [
        Path(top) / name
        for top, names, _ in os.walk(TOP)
        for name in names
        if name.startswith("safe-exec-") and name.endswith(".scope")
    ]


def lingering_uid() -> int:
    """The number of that user."""
    return int(
        subprocess.run(["id", "-u", LINGERING], capture_output=True, text=True, check=True).stdout
    )
