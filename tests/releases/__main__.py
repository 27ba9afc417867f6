"""``python -m tests.releases RELEASE [TARGET ...]``: run make targets on a fresh Debian of a release.

The root file system is a minimal Debian with git and make and a fresh clone of the repository;
whatever else the targets need, they install themselves. Exit code: that of the first target that
fails, 124 if time is up.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.releases.rootfs import CHECKOUT, ROOT, enter, fresh_root, furnish
from tests.releases.settings import debian_mirror, pip_settings

CACHE = (
    Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "safe-exec-beds" / "releases"
)
TIME_IS_UP = 124
PASSED_ON = (
    "CI",
    "TERM",
    "PYTEST_ADDOPTS",
    "SAFE_EXEC_BEDS",
    "SAFE_EXEC_ANSWERS_MINUTES",
    "SAFE_EXEC_CASES_MINUTES",
    "SAFE_EXEC_CASES_SEED",
)
"""Variables of this process that the targets see; they see no others."""


def main() -> int:
    """Make a root, run the targets in it, and remove it."""
    given = _arguments()
    if os.geteuid() != 0:
        raise SystemExit("making and entering a root file system takes root: use sudo")
    changed = subprocess.run(
        ["git", "-c", "safe.directory=*", "-C", str(ROOT), "status", "--porcelain"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    if changed:
        print("changes that are not committed are not tested: the root gets a clone", flush=True)
    began = time.monotonic()
    cache = CACHE / given.release
    pip = pip_settings()
    root = given.root or fresh_root(given.release, cache, given.mirror or debian_mirror())
    try:
        if not given.root:
            furnish(root, pip)
        print(f"root file system of {given.release}: {time.monotonic() - began:.0f} s", flush=True)
        argv = enter(root, cache, _command(given.targets, given.command), pip.folders)
        return _supervise(argv, given.minutes * 60)
    finally:
        if given.keep or given.root:
            print(f"kept: {root} (run in it again with --root, remove it with rm -r)")
        else:
            shutil.rmtree(root)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("release", help="a release of Debian: bookworm, trixie, testing, ...")
    parser.add_argument("targets", nargs="*", default=["run", "test"], help="of make [run test]")
    parser.add_argument("--command", help="run this shell command in the checkout instead")
    parser.add_argument("--minutes", type=float, default=60, help="how long it may take [60]")
    parser.add_argument("--mirror", help="URL of a Debian archive [the one that apt uses here]")
    parser.add_argument("--keep", action="store_true", help="keep the root file system")
    parser.add_argument("--root", type=Path, help="use a root that was kept")
    return parser.parse_args()


def _command(targets: list[str], command: str | None) -> str:
    """The shell command for the root. It says the time that each target took."""
    environment = {
        "HOME": "/root",
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "DEBIAN_FRONTEND": "noninteractive",
        **{name: os.environ[name] for name in PASSED_ON if name in os.environ},
    }
    words = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())
    steps = [command] if command else [f"make {shlex.quote(target)}" for target in targets]
    lines = ["set -e", f"cd {CHECKOUT}"]
    for step in steps:
        lines += [
            f"echo {shlex.quote('== ' + step)}",
            "began=$(date +%s)",
            step,
            f"echo {shlex.quote(step)}: $(($(date +%s) - began)) s",
        ]
    return f"exec env -i {words} /bin/sh -c {shlex.quote(chr(10).join(lines))}"


def _supervise(argv: list[str], seconds: float) -> int:
    """Wait for a command, at most so long. Its processes end with it: they have a pid namespace."""
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            print(f"it took longer than {seconds / 60:g} minutes", flush=True)
            return TIME_IS_UP
        finally:
            process.kill()


if __name__ == "__main__":
    sys.exit(main())
