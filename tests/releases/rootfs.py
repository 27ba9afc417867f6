"""Root file systems of Debian releases, made with debootstrap and kept in a cache. Standard library only."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.releases.settings import PipSettings, apt_text

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PACKAGES = ("ca-certificates", "git", "make")
"""Beyond a minimal Debian: what somebody has who has cloned a repository and types `make`."""
CHECKOUT = "/src"
CACHE_SECONDS = 7 * 86400
"""Debian testing changes by the day."""


@contextlib.contextmanager
def locked(cache: Path) -> Iterator[None]:
    """One process at a time makes or copies the root of a release."""
    cache.mkdir(parents=True, exist_ok=True)
    lock = os.open(cache, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def fresh_root(release: str, cache: Path, mirror: str) -> Path:
    """A root of its own for one run, copied from the cache; the caller removes it."""
    with locked(cache):
        base = _base(release, cache, mirror)
        root = Path(tempfile.mkdtemp(prefix="run-", dir=cache))
        root.chmod(0o755)
        _run("cp", "-a", "--reflink=auto", f"{base}/.", str(root))
    return root


def _base(release: str, cache: Path, mirror: str) -> Path:
    base = cache / "base"
    if base.is_dir() and 0 <= time.time() - base.stat().st_mtime < CACHE_SECONDS:
        return base
    making = Path(tempfile.mkdtemp(prefix="making-", dir=cache))
    try:
        root = making / "root"
        _debootstrap(release, root, mirror)
        shutil.rmtree(base, ignore_errors=True)
        root.rename(base)
        os.utime(base)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return base


def _debootstrap(release: str, root: Path, mirror: str) -> None:
    """Make a minimal Debian. One download that fails, fails the whole: so it is tried once more."""
    packages = f"--include={','.join(PACKAGES)}"
    command = ["debootstrap", "--variant=minbase", packages, release, str(root), mirror]
    try:
        _run(*command, stdout=subprocess.DEVNULL)
    except subprocess.CalledProcessError:
        shutil.rmtree(root, ignore_errors=True)
        _run(*command)


def furnish(root: Path, pip: PipSettings) -> None:
    """Give a root this machine's network and package sources, and a fresh clone of the repository."""
    for name in ("hosts", "resolv.conf"):
        (root / "etc" / name).write_bytes(Path("/etc", name).read_bytes())
    (root / "etc/pip.conf").write_text(pip.text())
    for copy, original in pip.files.items():
        (root / copy.lstrip("/")).write_bytes(original.read_bytes())
    (root / "etc/apt/apt.conf.d/90host").write_text(
        # As in the host's own cache of packages: a file that is there is not downloaded again.
        apt_text()
        + 'Binary::apt-get::APT::Keep-Downloaded-Packages "true";\nAPT::Sandbox::User "root";\n'
    )
    # A root that is thrown away need not survive a loss of power.
    (root / "etc/dpkg/dpkg.cfg.d/unsafe-io").write_text("force-unsafe-io\n")
    checkout = root / CHECKOUT.lstrip("/")
    git = ("git", "-c", "safe.directory=*")
    _run(*git, "clone", "-q", "--no-local", str(ROOT), str(checkout))
    # The clone's origin is a path of the host, which is not there.
    _run(*git, "-C", str(checkout), "remote", "remove", "origin")
    _run("chown", "-R", "0:0", str(checkout))


def enter(root: Path, cache: Path, command: str, folders: tuple[Path, ...]) -> list[str]:
    """The command line that runs a shell command in a root, with the host's kernel and network."""
    for name in ("pip", "debs/partial"):
        (cache / name).mkdir(parents=True, exist_ok=True)
    return [
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "--ipc",
        "--uts",
        "--kill-child=SIGKILL",
        "sh",
        str(HERE / "enter.sh"),
        str(root),
        str(cache),
        command,
        *map(str, folders),
    ]


def _run(*argv: str, stdout: int | None = None) -> None:
    subprocess.run(argv, check=True, stdout=stdout, stdin=subprocess.DEVNULL)
