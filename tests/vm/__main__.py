"""``python -m tests.vm [PYTEST ARGUMENTS]``: run tests on a Linux with the unified hierarchy, in qemu; its exit code is pytest's.

Nothing of the guest is trusted to say that all went well but pytest's own exit code and report: a guest that does not boot, or ends
without them, is a failure with the end of its console.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.vm.image import Image, image, source_disk

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "safe-exec-beds"
MEMORY = "3G"
SWAP_BYTES = 512 << 20
EXIT = re.compile(rb"^exit (\d+)\s*$", re.MULTILINE)


def main() -> int:
    """Build what is not there, boot, and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20, help="how long the guest may run [20]")
    parser.add_argument("--report", type=Path, help="write pytest's JUnit report there")
    parser.add_argument("arguments", nargs="*", help="for pytest in the guest")
    given = parser.parse_args()
    began = time.monotonic()
    made = image(CACHE)
    print(f"image: {time.monotonic() - began:.0f} s", flush=True)
    with tempfile.TemporaryDirectory(prefix="safe-exec-vm-") as name:
        return boot(made, Path(name), given.arguments, given.minutes * 60, given.report)


def boot(made: Image, work: Path, arguments: list[str], seconds: float, report: Path | None) -> int:
    """One boot; pytest's exit code, or 3 where it has none."""
    source, swap, console, junit = (
        work / name for name in ("source", "swap", "console", "junit.xml")
    )
    source_disk(source, " ".join(map(shlex.quote, arguments)))
    with open(swap, "wb") as file:
        file.truncate(SWAP_BYTES)
    began = time.monotonic()
    said = b""
    with subprocess.Popen(
        command(made, source, swap, console, junit),
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    ) as guest:
        assert guest.stdout is not None
        os.set_blocking(guest.stdout.fileno(), False)
        while guest.poll() is None:
            data = guest.stdout.read()
            if data:
                said += data
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
            elif time.monotonic() - began > seconds:
                guest.kill()
            else:
                time.sleep(0.2)
        rest = guest.stdout.read() or b""
        said += rest
        sys.stdout.buffer.write(rest)
    code = EXIT.search(said)
    print(f"guest: {time.monotonic() - began:.0f} s", flush=True)
    if report is not None and junit.exists():
        report.write_bytes(junit.read_bytes())
    if code is None:
        print(
            console.read_text(errors="replace")[-6000:]
            if console.exists()
            else "qemu wrote no console"
        )
        print(
            "the guest ended without an exit code of pytest"
            if time.monotonic() - began < seconds
            else "the guest took too long"
        )
        return 3
    return int(code[1])


def command(made: Image, source: Path, swap: Path, console: Path, junit: Path) -> list[str]:
    """qemu's command. The root disk is only read: what the guest writes goes into a temporary file."""
    argv = [
        "qemu-system-x86_64",
        "-M",
        "q35",
        "-accel",
        "tcg,thread=multi",
        "-cpu",
        "max",
        "-smp",
        "2",
        "-m",
        MEMORY,
    ]
    argv += [
        "-display",
        "none",
        "-no-reboot",
        "-nic",
        "none",
        "-kernel",
        str(made.kernel),
        "-initrd",
        str(made.initrd),
    ]
    argv += ["-append", "console=ttyS0 mitigations=off panic=-1 nokaslr systemd.show_status=false"]
    argv += ["-drive", f"file={made.disk},format=raw,if=virtio,snapshot=on"]
    argv += [
        "-drive",
        f"file={source},format=raw,if=virtio",
        "-drive",
        f"file={swap},format=raw,if=virtio",
    ]
    return [*argv, "-serial", f"file:{console}", "-serial", "stdio", "-serial", f"file:{junit}"]


if __name__ == "__main__":
    sys.exit(main())
