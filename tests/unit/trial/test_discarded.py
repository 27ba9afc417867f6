"""Files that go with a sandbox: which are a loss, how a hostile tree is walked, and what the user is told."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safe_exec.keeper import discarded_files as rules
from safe_exec.keeper.discarded_files import Listing
from safe_exec.keeper.protocol import FOLDER, HOME, SHM, TMP, Discarded, DiscardedGroup
from safe_exec.model.evidence import IsolationFacts
from safe_exec.model.limits import FolderUse, Isolation, Limits
from safe_exec.sandbox.host.capabilities import HostCapabilities
from safe_exec.sandbox.isolation_facts import KernelPaths, inside_places, outside_places
from safe_exec.sandbox.planner import build_plan
from safe_exec.trial.discarded import discarded_warning

FILE, PRIVATE_FILE, DIRECTORY, PRIVATE_DIRECTORY = (
    stat.S_IFREG | 0o644,
    stat.S_IFREG | 0o600,
    stat.S_IFDIR | 0o755,
    stat.S_IFDIR | 0o700,
)


def listed(root: Path, kind: str = TMP, **options: Any) -> Discarded:
    """What the runner is told of one place."""
    bounds = {name: options.pop(name) for name in ("seconds", "entries") if name in options}
    listing = Listing(mode_tells=options.pop("mode_tells", True), **bounds)
    fd = os.open(root, os.O_PATH)
    try:
        listing.add("/tmp", kind, fd, **options)
    finally:
        os.close(fd)
    return listing.as_message()


def names(message: Discarded) -> set[str]:
    return {group.name for group in message.groups}


# --- what is a loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "mode"),
    [
        (TMP, "tmpab3_x9qz", PRIVATE_FILE),
        (TMP, "tmpabcdefgh.csv", PRIVATE_FILE),
        (TMP, "tmpab3_x9qz", DIRECTORY),
        (TMP, "demo_k2jd_83x", PRIVATE_DIRECTORY),
        (TMP, "report-qwmzxkvb_final.csv", PRIVATE_FILE),
        (TMP, "ccAb3dEf.s", PRIVATE_FILE),
        (TMP, "tmp.Xy12ZwQr90", PRIVATE_FILE),
        (TMP, "RtmpAb12Cd", PRIVATE_DIRECTORY),
        (TMP, "ipykernel_123", DIRECTORY),
        (TMP, "matplotlib-3f8d9a2b", DIRECTORY),
        (TMP, "hsperfdata_root", DIRECTORY),
        (TMP, "spark-1f0c2a3b-0000-4d5e-8f9a-123456789abc", DIRECTORY),
        (TMP, "libx12345678901234567.so", FILE),
        (TMP, ".X11-unix", DIRECTORY),
        (TMP, "ray", DIRECTORY),
        (HOME, ".ipython", DIRECTORY),
        (HOME, ".bash_history", FILE),
        (HOME, "nltk_data", DIRECTORY),
        (SHM, "psm_1a2b3c", FILE),
        (SHM, "mine", PRIVATE_FILE),
        (SHM, "sem.mp-abc", PRIVATE_FILE),
    ],
)
def test_what_programs_leave_is_no_loss(kind: str, name: str, mode: int) -> None:
    assert rules.is_passing_at_top(kind, name, mode, mode_tells=True)


@pytest.mark.parametrize(
    ("kind", "name", "mode"),
    [
        (TMP, "result.csv", FILE),
        (TMP, "result.csv", PRIVATE_FILE),
        (TMP, "export_20240115_123000.csv", FILE),
        (TMP, "torch_model.pt", FILE),
        (TMP, "ray", FILE),
        (TMP, "out", DIRECTORY),
        (TMP, "tmp", DIRECTORY),
        (TMP, "features8", FILE),
        (HOME, "summary-of-run.csv", FILE),
        (HOME, "results", DIRECTORY),
        (HOME, "tmpab3_x9qz", FILE),
        (SHM, "model.bin", FILE),
        (FOLDER, ".hidden", FILE),
    ],
)
def test_what_a_user_named_is_a_loss(kind: str, name: str, mode: int) -> None:
    assert not rules.is_passing_at_top(kind, name, mode, mode_tells=True)
    assert not rules.is_passing_name(name, is_directory=stat.S_ISDIR(mode))


@pytest.mark.parametrize("name", ["a.lock", "download.part", "x.tmp", "s.sock", "notes~"])
def test_some_endings_say_that_a_file_passes(name: str) -> None:
    assert rules.is_passing_name(name, is_directory=False)


def test_caches_are_directories() -> None:
    assert rules.is_passing_name("__pycache__", is_directory=True)
    assert rules.is_passing_name("hf_Cache", is_directory=True)
    assert not rules.is_passing_name("cache.csv", is_directory=False)


def test_where_nobody_else_may_read_anything_the_mode_says_nothing() -> None:
    assert not rules.is_passing_at_top(TMP, "summary_results.csv", PRIVATE_FILE, mode_tells=False)
    assert rules.is_passing_at_top(TMP, "tmpab3_x9qz", PRIVATE_FILE, mode_tells=False)


MAKERS: list[Callable[[str], object]] = [
    lambda top: tempfile.NamedTemporaryFile(dir=top, delete=False).close(),
    lambda top: tempfile.NamedTemporaryFile(
        dir=top, delete=False, suffix="_report.csv", prefix="daily_"
    ).close(),
    lambda top: os.close(tempfile.mkstemp(dir=top, prefix="x")[0]),
    lambda top: Path(tempfile.mkdtemp(dir=top, prefix="demo-"), "inner.csv").write_text("x"),
    lambda top: Path(tempfile.mkdtemp(dir=top), "a").mkdir(),
]


@pytest.mark.parametrize("make", MAKERS)
def test_nothing_of_tempfile_is_a_loss(tmp_path: Path, make: Callable[[str], object]) -> None:
    for _ in range(200):  # the names are random
        make(str(tmp_path))
    assert listed(tmp_path) == Discarded(groups=(), files=0, is_complete=True)


# --- walking ----------------------------------------------------------------------------------------------------


def test_a_directory_is_one_group_and_a_lone_file_has_its_path(tmp_path: Path) -> None:
    (tmp_path / "out" / "deep").mkdir(parents=True)
    for n in range(3):
        (tmp_path / "out" / "deep" / f"{n}.csv").write_text("x" * 100)
    (tmp_path / "one" / "inner").mkdir(parents=True)
    (tmp_path / "one" / "inner" / "a.txt").write_text("hello")
    (tmp_path / "b.txt").write_text("hi")
    (tmp_path / "empty").mkdir()
    assert listed(tmp_path) == Discarded(
        groups=(
            DiscardedGroup(place="/tmp", name="out", files=3, bytes=300),
            DiscardedGroup(place="/tmp", name="one/inner/a.txt", files=1, bytes=5),
            DiscardedGroup(place="/tmp", name="b.txt", files=1, bytes=2),
        ),
        files=5,
        is_complete=True,
    )


def test_no_link_is_followed_and_only_files_count(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("x")
    place = tmp_path / "place"
    place.mkdir()
    (place / "link").symlink_to(tmp_path / "secret")
    (place / "file-link").symlink_to(tmp_path / "secret" / "key")
    os.mkfifo(place / "pipe")
    assert listed(place).files == 0


def test_mount_points_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mounted").touch()
    (tmp_path / "a" / "own").touch()
    assert names(listed(tmp_path, skip=["a/mounted"])) == {"a/own"}


def test_what_was_there_before_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "old").touch()
    (tmp_path / "new").touch()
    assert names(listed(tmp_path, FOLDER, is_old=lambda name, _status: name == "old")) == {"new"}


def test_a_deep_tree_ends(tmp_path: Path) -> None:
    top = os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(3 * rules.MOST_DEPTH):
            os.mkdir("directory")
            os.chdir("directory")
        Path("lost").touch()
    finally:
        os.chdir(top)
    assert listed(tmp_path) == Discarded(groups=(), files=0, is_complete=False)


def test_a_flood_is_cut_off(tmp_path: Path) -> None:
    for n in range(60):
        (tmp_path / f"file{n}").touch()
    message = listed(tmp_path, entries=20)
    assert message.files == 20 and not message.is_complete
    assert len(listed(tmp_path).groups) == rules.MOST_GROUPS
    assert not listed(tmp_path, seconds=0.0).is_complete


def test_many_directories_take_few_descriptors(tmp_path: Path) -> None:
    for n in range(rules.MOST_DIRECTORIES + 5):
        (tmp_path / f"d{n}").mkdir()
        (tmp_path / f"d{n}" / "x").touch()
    before = os.listdir("/proc/self/fd")
    message = listed(tmp_path)
    assert message.files == rules.MOST_DIRECTORIES and not message.is_complete
    assert os.listdir("/proc/self/fd") == before


def test_a_name_may_be_anything(tmp_path: Path) -> None:
    for name in (b"bad\xff", b"\x1b[31mred", b"new\nline"):
        os.close(
            os.open(os.path.join(os.fsencode(tmp_path), name), os.O_CREAT | os.O_WRONLY, 0o644)
        )
    assert names(listed(tmp_path)) == {"bad\udcff", "\x1b[31mred", "new\nline"}


# --- which places -----------------------------------------------------------------------------------------------

BUBBLEWRAP = HostCapabilities(uid=1000, bubblewrap="/usr/bin/bwrap", bubblewrap_why_not="")
LANDLOCK = HostCapabilities(uid=1000, landlock=7)
CI = Isolation(hide_home=True, read_only_system=True)
PATHS = KernelPaths(
    folder=Path("/srv/nb"),
    runtime=Path("/tmp/run"),
    homes=(Path("/home/me"), Path("/root")),
    readable=(Path("/home/me/venv/pyvenv.cfg"), Path("/usr")),
    kernel_home="/home/me",
)


def places(machine: HostCapabilities, isolation: Isolation, **limits: Any) -> dict[str, str]:
    """The path of each place by the name that it is told by."""
    plan = build_plan(Limits(**limits), machine, "id", isolation)
    inside = inside_places(plan, PATHS) if plan.enclosed else []
    return {place.name: place.path for place in (*inside, *outside_places(plan, PATHS))}


DISK = {"~": "/tmp/run/disk/home", "/tmp": "/tmp/run/disk/tmp"}
MEMORY = {"~": "/home/me", "/tmp": "/tmp", "/dev/shm": "/dev/shm"}


@pytest.mark.parametrize(
    ("machine", "isolation", "limits", "expected"),
    [
        (BUBBLEWRAP, Isolation(network=False), {}, {}),
        (BUBBLEWRAP, CI, {}, MEMORY),
        (BUBBLEWRAP, Isolation(hide_home=True), {}, {"~": "/home/me"}),
        (BUBBLEWRAP, Isolation(), {"shm": 5}, {"/dev/shm": "/dev/shm"}),
        (BUBBLEWRAP, Isolation(), {"disk": 5}, {"/tmp": "/tmp/run/disk/tmp"}),
        (BUBBLEWRAP, CI, {"disk": 5}, {**MEMORY, **DISK}),
        (
            BUBBLEWRAP,
            Isolation(hide_home=True, folder=FolderUse.COPY),
            {},
            {**DISK, ".": "/tmp/run/disk/folder"},
        ),
        (
            BUBBLEWRAP,
            Isolation(write_back=False),
            {"disk": 5},
            {"/tmp": "/tmp/run/disk/tmp", ".": "/tmp/run/disk/folder"},
        ),
        (
            BUBBLEWRAP,
            Isolation(
                hide_home=True, read_only_system=True, writable=("/tmp",), show=("/home/me",)
            ),
            {},
            {"/dev/shm": "/dev/shm"},
        ),
        (LANDLOCK, CI, {}, {"~": "/tmp/run/home", "$TMPDIR": "/tmp/run"}),
        (LANDLOCK, Isolation(hide_home=True), {}, {"~": "/tmp/run/home"}),
        (HostCapabilities(uid=1000), CI, {}, {}),
    ],
)
def test_places(
    machine: HostCapabilities,
    isolation: Isolation,
    limits: dict[str, int],
    expected: dict[str, str],
) -> None:
    assert places(machine, isolation, **limits) == expected


def test_what_is_mounted_in_a_place_is_not_the_notebooks() -> None:
    plan = build_plan(Limits(), BUBBLEWRAP, "id", CI)
    home = next(place for place in inside_places(plan, PATHS) if place.name == "~")
    assert home.skip == ("venv/pyvenv.cfg",)


# --- what is said -----------------------------------------------------------------------------------------------

KEPT = IsolationFacts(folder="/r/nb", repository="/r", writable=("/r/nb", "/r"))


def said(
    *groups: DiscardedGroup,
    facts: IsolationFacts | None = KEPT,
    more: int = 0,
    is_complete: bool = True,
    **options: bool,
) -> str:
    found = Discarded(
        groups=groups, files=sum(group.files for group in groups) + more, is_complete=is_complete
    )
    return discarded_warning(found, facts, writable_helps=options.get("writable_helps", True)) or ""


def group(
    place: str = "/tmp", name: str = "a.csv", files: int = 1, size: int = 3
) -> DiscardedGroup:
    return DiscardedGroup(place=place, name=name, files=files, bytes=size)


def test_the_warning_names_files_and_ways_to_keep_them() -> None:
    assert said() == ""
    assert said(group("~", "summary.csv"), group("/tmp", "out", 3, 3000)) == (
        "files that were not kept: ~/summary.csv (3 B), /tmp/out/ (3 files, 2.9 KiB). The home and /tmp of this run were its own and are"
        " gone. To keep files, write into the notebook's folder or repository, or let it write to a directory of yours with --writable PATH"
    )
    assert said(group(), facts=None).endswith(
        "/tmp of this run was its own and is gone. To keep files, write into the notebook's folder"
    )


def test_advice_is_true_under_the_runs_isolation() -> None:
    copied = IsolationFacts(folder="/r/nb", repository="/r", discarded=("/r/nb",))
    assert "folder or" not in said(group(".", "x"), facts=copied) and "--writable" in said(
        group(".", "x"), facts=copied
    )
    other_user = said(group(".", "x"), facts=copied, writable_helps=False)
    assert other_user.endswith(
        "copy of its folder, of which nothing comes back. To keep files, name them with --keep-files PATTERN"
    )


def test_the_rest_is_counted() -> None:
    many = [group(name=f"{n}.csv") for n in range(7)]
    assert "4.csv (3 B) and 2 more." in said(*many)
    assert "4.csv (3 B) and 5 more." in said(*many, more=3)
    assert "a.csv (3 B) and more." in said(group(), is_complete=False)


@given(st.text(st.characters(codec=None), min_size=1, max_size=5000))
def test_a_name_stays_on_one_short_line(name: str) -> None:
    text = said(group(name=name.replace("/", "_")))
    assert text.isprintable() and len(text) < 500
