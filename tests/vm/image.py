"""A disk image with a Linux whose control groups are all in the unified hierarchy, made from Debian's packages.

What goes in: Debian of this machine's own release (so that its Python is the same), systemd as init, the project's dependencies in
``/opt/venv``; a small initial RAM disk with the modules that the root disk needs. The project itself comes on a second disk, made anew
each time. Runs as root: Debian's own tools want that.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PYTHON = "/usr/bin/python3"
PACKAGES = (
    "systemd", "systemd-sysv", "dbus", "dbus-user-session", "libpam-systemd", "python3", "libstdc++6", "bubblewrap", "util-linux",
    "login", "mount", "attr",
)  # fmt: skip
WHEELS = (
    "numpy",
    "pytest>=8",
    "pytest-timeout",
    "pytest-xdist",
    "pytest-rerunfailures",
    "jsonschema>=4",
    "hypothesis>=6",
)
"""What the tests in there need beside what safe-exec and its kernel do."""
MODULES = ("virtio_pci", "virtio_blk", "ext4", "overlay")
DISK_BYTES = 3 << 30
VENV = "/opt/venv"


@dataclass(frozen=True, kw_only=True)
class Image:
    """What qemu boots: a kernel, an initial RAM disk, and the root disk, which it must not write to."""

    kernel: Path
    initrd: Path
    disk: Path


def image(cache: Path) -> Image:
    """The image, from the cache where one of this very content is there. One process makes one at a time."""
    cache.mkdir(parents=True, exist_ok=True)
    lock = os.open(cache, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = cache / _key()
        if not found.is_dir():
            # The lists may be older than what the archive still has.
            _run("apt-get", "update", "-q")
            found = cache / _key()
        if not found.is_dir():
            _fill(cache, found)
    finally:
        os.close(lock)
    return Image(kernel=found / "kernel", initrd=found / "initrd", disk=found / "disk")


def _fill(cache: Path, found: Path) -> None:
    """Make the image, in the place of whatever else lies there."""
    for old in cache.iterdir():
        if old.name != "releases":  # roots of tests/releases
            shutil.rmtree(old, ignore_errors=True)
    making = Path(tempfile.mkdtemp(prefix="making-", dir=cache))
    try:
        _make(making)
        making.rename(found)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def source_disk(path: Path, arguments: str) -> None:
    """The project as it is now, as a disk of its own, with the arguments for pytest."""
    with tempfile.TemporaryDirectory(prefix="safe-exec-source-") as name:
        top = Path(name)
        top.chmod(0o755)
        listed = _said("git", "-C", str(ROOT), "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached", "--others",
                       "--exclude-standard")  # fmt: skip
        for file in listed.split("\0"):
            if file and (ROOT / file).is_file():
                (top / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / file, top / file)
        (top / ".arguments").write_text(arguments + "\n")
        _run(
            PYTHON,
            "-m",
            "compileall",
            "-q",
            "-j0",
            "-s",
            name,
            "-p",
            "/src",
            str(top / "safe_exec"),
            str(top / "tests"),
        )
        _run("mkfs.ext4", "-q", "-F", "-E", "root_owner=0:0", "-d", name, str(path), "64M")


def _key() -> str:
    """Of all that an image is made from, but for the versions of the packages: a cache is for hours or days."""
    parts = [_codename(), _kernel_package(), *_dependencies(), Path(__file__).read_text()]
    parts += [(HERE / "guest" / name).read_text() for name in ("init", "tests", "tests.service")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _codename() -> str:
    rows = dict(
        line.split("=", 1)
        for line in Path("/etc/os-release").read_text().splitlines()
        if "=" in line
    )
    if rows.get("ID") != "debian":
        raise SystemExit(
            "the image is made from this machine's own Debian, and this is none: run it on Debian"
        )
    return rows["VERSION_CODENAME"]


def _kernel_package() -> str:
    """The package of the kernel that ``linux-image-amd64`` stands for now."""
    said = _said("apt-cache", "depends", "linux-image-amd64")
    found = re.search(r"Depends: (linux-image-\S+)", said)
    if not found:
        raise SystemExit("apt knows no linux-image-amd64: run `apt-get update`")
    return found[1]


def _dependencies() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["kernel"], *WHEELS]


def _mirror() -> str:
    """Where apt has this release from."""
    for line in _said(
        "apt-get", "indextargets", "--format", "$(SITE) $(CODENAME) $(ARCHITECTURE)"
    ).splitlines():
        site, _, rest = line.partition(" ")
        if rest.split()[:1] == [_codename()]:
            return site
    return "http://deb.debian.org/debian"


def _make(place: Path) -> None:
    root, work = place / "root", place / "work"
    work.mkdir()
    with ThreadPoolExecutor() as pool:
        venv = pool.submit(_make_venv, work / "venv")
        kernel = pool.submit(_make_kernel, work, place)
        _run(
            "debootstrap",
            "--variant=minbase",
            f"--include={','.join(PACKAGES)}",
            _codename(),
            str(root),
            _mirror(),
        )
        kernel.result()
        venv.result()
    shutil.copytree(work / "venv", root / VENV.lstrip("/"), symlinks=True)
    _furnish(root)
    _run(
        "mkfs.ext4",
        "-q",
        "-F",
        "-O",
        "^has_journal",
        "-d",
        str(root),
        str(place / "disk"),
        str(DISK_BYTES >> 20) + "M",
    )
    shutil.rmtree(root)
    shutil.rmtree(work)


def _make_venv(venv: Path) -> None:
    """The dependencies, compiled, where the guest will have them; the project itself is found on its own disk."""
    _run(PYTHON, "-m", "venv", str(venv))
    _run(str(venv / "bin" / "pip"), "install", "-q", "--no-compile", *_dependencies())
    _run(str(venv / "bin" / "pip"), "install", "-q", "--no-compile", "--no-deps", "-e", str(ROOT))
    site = next((venv / "lib").glob("python3*/site-packages"))
    for path in (*site.glob("*.pth"), *site.glob("*safe_exec*.py")):
        if str(ROOT) in path.read_text():
            path.unlink()
    (site / "project.pth").write_text("/src\n")
    for name in ("pip", "setuptools"):
        shutil.rmtree(site / name, ignore_errors=True)
    for script in (venv / "bin").iterdir():
        if script.is_file() and not script.is_symlink():
            script.write_text(script.read_text().replace(str(venv), VENV))
    for spec in venv.glob("share/jupyter/kernels/*/kernel.json"):
        spec.write_text(spec.read_text().replace(str(venv), VENV))
    _run(PYTHON, "-m", "compileall", "-q", "-j0", "-s", str(venv), "-p", VENV, str(venv / "lib"))


def _make_kernel(work: Path, place: Path) -> None:
    """The kernel, and an initial RAM disk that loads modules and mounts the root disk: a tenth of what Debian's own takes to unpack."""
    _run(
        "apt-get",
        "-q",
        "-o",
        "APT::Sandbox::User=root",
        "download",
        _kernel_package(),
        "busybox-static",
        cwd=work,
    )
    for package in work.glob("*.deb"):
        _run("dpkg-deb", "-x", str(package), str(work / "packages"))
    packages = work / "packages"
    shutil.move(next((packages / "boot").glob("vmlinuz-*")), place / "kernel")
    version = next((packages / "lib" / "modules").iterdir()).name
    _run("depmod", "-b", str(packages), version)
    tree = work / "initrd"
    for name in ("bin", "proc", "sys", "dev", "root", "modules"):
        (tree / name).mkdir(parents=True)
    shutil.copy2(packages / "bin" / "busybox", tree / "bin" / "busybox")
    order: list[str] = []
    for module in MODULES:
        said = _said("modprobe", "-d", str(packages), "-S", version, "--show-depends", module)
        for line in said.splitlines():
            kind, _, path = line.partition(" ")
            if kind == "insmod" and path.strip() not in order:
                order.append(path.strip())
    for number, path in enumerate(order):
        shutil.copy2(path, tree / "modules" / f"{number:02}.ko")
    shutil.copy2(HERE / "guest" / "init", tree / "init")
    (tree / "init").chmod(0o755)
    with open(place / "initrd", "wb") as out:
        files = "\n".join(sorted(str(path.relative_to(tree)) for path in tree.rglob("*")))
        subprocess.run(
            [str(tree / "bin" / "busybox"), "cpio", "-o", "-H", "newc"],
            input=files.encode(),
            stdout=out,
            cwd=tree,
            check=True,
        )


def _furnish(root: Path) -> None:
    """The unit that runs the tests, the user that they need, and nothing else that starts at boot."""
    shutil.copy2(HERE / "guest" / "tests.service", root / "etc/systemd/system/tests.service")
    shutil.copy2(HERE / "guest" / "tests", root / "usr/local/bin/tests")
    (root / "usr/local/bin/tests").chmod(0o755)
    (root / "src").mkdir()
    (root / "etc/hostname").write_text("guest\n")
    (root / "etc/fstab").write_text("")
    # Fixed, so that systemd does not take this for a first boot.
    (root / "etc/machine-id").write_text("5afe" * 8 + "\n")
    _run("chroot", str(root), "useradd", "--create-home", "--shell", "/bin/bash", "notebooks")
    lingering = root / "var/lib/systemd/linger"
    lingering.mkdir(parents=True, exist_ok=True)
    (lingering / "notebooks").touch()
    wants = root / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / "tests.service").symlink_to("/etc/systemd/system/tests.service")
    for unit in ("getty@tty1.service", "serial-getty@ttyS0.service", "getty.target", "apt-daily.timer", "apt-daily-upgrade.timer",
                 "dpkg-db-backup.timer", "fstrim.timer", "e2scrub_all.timer", "e2scrub_reap.service", "systemd-timesyncd.service",
                 "systemd-networkd.service", "systemd-resolved.service", "systemd-pcrphase.service", "man-db.timer"):  # fmt: skip
        place = root / "etc/systemd/system" / unit
        place.unlink(missing_ok=True)
        place.symlink_to("/dev/null")


def _run(*command: str, cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
                          env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"})  # fmt: skip
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)}: exit code {done.returncode}\n"
            + "\n".join(done.stdout.splitlines()[-20:])
        )


def _said(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
