"""Mounts of a kernel's own: which calls are made in which order, and two real views that nobody else sees."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safe_exec.keeper import mounts
from tests.support import NOBODY, ROOT, ordinary_user

BIND = {"kind": "bind", "source": "/a/b", "target": "/c"}
TMPFS = {"kind": "tmpfs", "target": "/dev/shm", "options": "mode=1777"}
OVERLAY = {"kind": "overlay", "lower": "/l", "upper": "/s/u", "work": "/s/w", "target": "/l"}
SLAVE = ("mount", b"none", b"/", b"", 0x4000 | 0x80000, b"")


# --- what is called -----------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What would be called, in order, and what would be written."""
    made: list[tuple[Any, ...]] = []

    def call(name: str, *arguments: Any, action: str) -> None:
        assert action
        made.append(
            (
                name,
                *(part.value if isinstance(part, ctypes.c_ulong) else part for part in arguments),
            )
        )

    def write(path: Path, text: str) -> int:
        made.append((str(path), text))
        return len(text)

    monkeypatch.setattr(mounts, "_call", call)
    monkeypatch.setattr(Path, "write_text", write)
    return made


def test_as_root_a_mount_namespace_is_all(calls: list[tuple[Any, ...]]) -> None:
    mounts.enter([BIND, OVERLAY, TMPFS], user_namespace=False)
    assert calls == [
        ("unshare", 0x20000),
        SLAVE,
        ("mount", b"/a/b", b"/c", b"", 0x1000 | 0x4000, b""),
        ("mount", b"overlay", b"/l", b"overlay", 0, b"lowerdir=/l,upperdir=/s/u,workdir=/s/w"),
        ("mount", b"tmpfs", b"/dev/shm", b"tmpfs", 0x2 | 0x4, b"mode=1777"),
    ]


@pytest.mark.parametrize(
    ("uid", "refused", "tried"),
    [(0, (), [False]), (0, (False,), [False, True]), (1000, (), [True])],
    ids=["root", "root that may not mount", "anybody else"],
)
def test_a_namespace_of_our_own_is_had_the_way_that_works(
    monkeypatch: pytest.MonkeyPatch, uid: int, refused: tuple[bool, ...], tried: list[bool]
) -> None:
    found: list[bool] = []

    def enter(made: list[mounts.Mount], *, user_namespace: bool) -> None:
        assert made == []
        found.append(user_namespace)
        if user_namespace in refused:
            raise PermissionError(1, "no")

    monkeypatch.setattr(mounts, "enter", enter)
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    mounts.enter_own()
    assert found == tried


def test_anybody_else_stays_who_he_is(
    calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The maps are written once the namespace is there, setgroups before the groups (user_namespaces(7))."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "getegid", lambda: 100)
    mounts.enter([TMPFS], user_namespace=True)
    assert calls == [
        ("unshare", 0x20000 | 0x10000000),
        ("/proc/self/setgroups", "deny"),
        ("/proc/self/uid_map", "1000 1000 1"),
        ("/proc/self/gid_map", "100 100 1"),
        SLAVE,
        ("mount", b"tmpfs", b"/dev/shm", b"tmpfs", 0x2 | 0x4, b"mode=1777"),
    ]


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_the_first_that_fails_ends_it(monkeypatch: pytest.MonkeyPatch, wrong: int) -> None:
    made = []

    def call(name: str, *_: object, action: str) -> None:
        made.append(action)
        if len(made) == wrong + 1:
            raise OSError(errno.EPERM, f"cannot make {action}")

    monkeypatch.setattr(mounts, "_call", call)
    with pytest.raises(OSError, match="cannot make"):
        mounts.enter([BIND, TMPFS], user_namespace=False)
    assert (
        made == ["a mount namespace of its own", "bind mount on /", "bind mount on /c"][: wrong + 1]
    )


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EPERM])
@pytest.mark.parametrize("optional", [True, False])
def test_only_what_may_be_gone_may_be_missing(
    monkeypatch: pytest.MonkeyPatch, number: int, optional: bool
) -> None:
    made: list[str] = []

    def call(name: str, *_: object, action: str) -> None:
        made.append(action)
        if action.endswith("/c"):
            raise OSError(number, "cannot make it")

    monkeypatch.setattr(mounts, "_call", call)
    mount = BIND | {"optional": "yes"} if optional else BIND
    if optional and number == errno.ENOENT:
        mounts.enter([mount, TMPFS], user_namespace=False)
        assert made[-1] == "tmpfs mount on /dev/shm"
    else:
        with pytest.raises(OSError, match="cannot make it"):
            mounts.enter([mount, TMPFS], user_namespace=False)


def test_an_error_says_what_could_not_be_made() -> None:
    with pytest.raises(OSError, match="cannot make tea: No such file or directory") as error:
        mounts._call("chdir", b"/nowhere/at/all", action="tea")
    assert error.value.errno == errno.ENOENT
    mounts._call("chdir", os.fsencode(os.getcwd()), action="tea")


@pytest.mark.parametrize(
    ("path", "escaped"),
    [
        ("/a/b c", "/a/b c"),
        ("/a:b", "/a\\:b"),
        ("/a,b", "/a\\,b"),
        ("/a\\b", "/a\\\\b"),
        ("/a\\:,", "/a\\\\\\:\\,"),
        ("/a=b", "/a=b"),
        ("/caf\udce9", "/caf\udce9"),
    ],
)
def test_escaping(path: str, escaped: str) -> None:
    assert mounts._escaped(path) == escaped


@given(st.lists(st.text("a\\,:= /", min_size=1), min_size=1, max_size=3))
def test_what_is_escaped_is_one_option_and_reads_as_it_was(paths: list[str]) -> None:
    """Read as the kernel does: a backslash takes the next sign as it is, a comma ends an option."""
    text = ",".join(map(mounts._escaped, paths))
    found, signs = [""], iter(text)
    for sign in signs:
        if sign == ",":
            found.append("")
        else:
            found[-1] += next(signs) if sign == "\\" else sign
    assert found == paths


def test_names_that_are_no_text_go_through(calls: list[tuple[Any, ...]]) -> None:
    name = os.fsdecode(b"/caf\xe9")
    mounts.enter([BIND | {"source": name}, OVERLAY | {"lower": name}], user_namespace=False)
    assert calls[2][1] == b"/caf\xe9"
    assert calls[3][-1].startswith(b"lowerdir=/caf\xe9,")


# --- what can be had ----------------------------------------------------------------------------------------------------


class Tried:
    """Stands for the process that tries: a return code, or what it raises."""

    def __init__(self, *ends: int | Exception) -> None:
        self.ends = iter(ends)
        self.asked: list[tuple[str, Any]] = []

    def __call__(self, argv: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        self.asked.append((argv[-2], eval(argv[-1])))
        end = next(self.ends)
        if isinstance(end, Exception):
            raise end
        return subprocess.CompletedProcess(argv, end)


TIMEOUT = subprocess.TimeoutExpired("python", 10)


@pytest.mark.parametrize(
    ("uid", "ends", "way", "asked"),
    [
        (0, (0,), "root", ["root"]),
        (0, (1, 0), "user", ["root", "user"]),
        (0, (1, 1), None, ["root", "user"]),
        (1000, (0,), "user", ["user"]),
        (1000, (1,), None, ["user"]),
        (1000, (TIMEOUT,), None, ["user"]),
        (1000, (OSError("no processes left"),), None, ["user"]),
        (0, (TIMEOUT, 0), "user", ["root", "user"]),
    ],
)
def test_namespaces_are_tried(
    *,
    monkeypatch: pytest.MonkeyPatch,
    uid: int,
    ends: tuple[Any, ...],
    way: str | None,
    asked: list[str],
) -> None:
    tried = Tried(*ends)
    monkeypatch.setattr(subprocess, "run", tried)
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    assert mounts.namespaces.__wrapped__() == way
    assert [who for who, _ in tried.asked] == asked


def test_elsewhere_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert mounts.namespaces.__wrapped__() is None


def test_an_overlay_is_tried_with_layers_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = Tried(0, 1)
    monkeypatch.setattr(subprocess, "run", tried)
    lower, scratch = tmp_path / "lower", tmp_path / "scratch"
    scratch.mkdir()
    assert mounts.overlays(lower, scratch, "user")
    assert not mounts.overlays(lower, scratch, "user"), "twice in the same place"
    layers = {
        "upper": str(scratch / "upper"),
        "work": str(scratch / "work"),
        "target": str(scratch / "merged"),
    }
    assert tried.asked[0] == ("user", [{"kind": "overlay", "lower": str(lower), **layers}])
    assert all((scratch / name).is_dir() for name in ("upper", "work", "merged"))


# --- for real -----------------------------------------------------------------------------------------------------------

INSIDE = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from safe_exec.experiments import workspace as folder
from safe_exec.keeper import mounts
top = Path(sys.argv[2])
way = mounts.namespaces()
if way is None:
    print(json.dumps(None))
    sys.exit()
make = {"bind": folder.COPY_BYTES, "overlay": 3}
folder.COPY_BYTES = make[sys.argv[3]]
folder.TMP = top / "tmp"
work, runtime = top / "wo,r:k \\\\d=", top / "tmp" / "safe-exec-abc"
scratch = top / "s,c:r \\\\x"
scratch.mkdir()
snapshot = folder.take(work, scratch)
runtime.mkdir()
(runtime / "socket").touch()
(work / "added").write_text("by the first run")
(top / "tmp" / "added").touch()
views = folder.workspace_factory(snapshot, ours=frozenset())
view = views.make("a", runtime)
before = os.getuid(), os.getgid()
mounts.enter([*view.mounts], user_namespace=view.user_namespace)
os.chdir(view.cwd)
(work / "data").write_text("changed inside")
Path("new").write_text("inside")
Path("/dev/shm/safe-exec-new").touch()
(top / "tmp" / "new").touch()
print(json.dumps({
    "kinds": [mount["kind"] for mount in view.mounts],
    "way": way,
    "same user": before == (os.getuid(), os.getgid()),
    "folder": sorted(os.listdir()),
    "by name": sorted(os.listdir(work)),
    "data": Path("data").read_text(),
    "tmp": sorted(os.listdir(top / "tmp")),
    "socket": (runtime / "socket").exists(),
    "shm": os.listdir("/dev/shm"),
}))
"""


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A folder that any user may write in, with names full of signs that mean something to mount."""
    with tempfile.TemporaryDirectory(prefix="safe-exec-test-") as name:
        top = Path(name)
        top.chmod(0o777)
        for folder in (top / "wo,r:k \\d=", top / "tmp"):
            folder.mkdir()
            folder.chmod(0o777)
        (top / "wo,r:k \\d=" / "data").write_text("as it was")
        (top / "wo,r:k \\d=" / "data").chmod(0o666)
        (top / "tmp" / "old").touch()
        if os.geteuid() == 0:  # in a user namespace only one's own files can be copied up
            for path in (top / "wo,r:k \\d=", top / "wo,r:k \\d=" / "data"):
                os.chown(path, NOBODY, NOBODY)
        yield top


def as_root() -> list[str]:
    return []


@pytest.mark.bed("user-namespaces")
@pytest.mark.parametrize(
    "who", [as_root, pytest.param(ordinary_user, marks=pytest.mark.bed("ordinary-user"))]
)
@pytest.mark.parametrize("kind", ["bind", "overlay"])
def test_a_view_is_seen_inside_and_not_outside(
    who: Callable[[], list[str]], kind: str, open_to_all: Path
) -> None:
    argv = [*who(), sys.executable, "-c", INSIDE, str(ROOT), str(open_to_all), kind]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen == {
        "kinds": ["bind", "bind", "bind", kind, "tmpfs"],
        "way": "root" if os.geteuid() == 0 and who is as_root else "user",
        "same user": True,
        "folder": ["data", "new"],
        "by name": ["data", "new"],
        "data": "changed inside",
        "tmp": ["new", "old", "safe-exec-abc"],
        "socket": True,
        "shm": ["safe-exec-new"],
    }
    work = open_to_all / "wo,r:k \\d="
    assert sorted(os.listdir(work)) == ["added", "data"]
    assert (work / "data").read_text() == "as it was"
    assert sorted(os.listdir(open_to_all / "tmp")) == ["added", "old", "safe-exec-abc"]
    assert not os.path.exists("/dev/shm/safe-exec-new")
    assert "safe-exec-test-" not in Path("/proc/self/mountinfo").read_text()
