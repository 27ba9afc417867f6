"""What is in the way of a need: facts of isolation on one side, what exists outside on the other."""

from __future__ import annotations

import errno
import os
import stat
from typing import Any

import msgspec.structs
import pytest

from safe_exec.diagnosis.rules.isolation import advice
from safe_exec.model.evidence import Access, IsolationFacts, NeedKind
from safe_exec.model.limits import Mechanism
from safe_exec.trial import conflicts as module
from safe_exec.trial.conflicts import Lookup, Reach, Sight, conflicts
from safe_exec.trial.needs import Need

HOME, WORK = "/home/me", "/home/me/repo/work"
BWRAP = IsolationFacts(
    by=Mechanism.BUBBLEWRAP,
    home=HOME,
    folder=WORK,
    hidden_homes=(HOME, "/root"),
    hidden=("/srv/secret",),
    readable=("/home/me/venv",),
    writable=(WORK, "/srv/out"),
    discarded=("/tmp", "/dev/shm", HOME),
    read_only=True,
    removed_variables=("MY_TOKEN",),
    network=False,
)
LANDLOCK = msgspec.structs.replace(
    BWRAP,
    by=Mechanism.LANDLOCK,
    home="/run/se/home",
    writable=(WORK, "/srv/out", "/tmp", "/dev"),
    discarded=("/run/se",),
)
FILES = {
    "/home/me/data": 0o040755,
    "/home/me/data/d.csv": 0o100644,
    "/home/me/data/private.csv": 0o100600,
    "/home/me/repo": 0o040755,
    "/home/me/repo/src": 0o040755,
    "/home/me/repo/src/mymod.py": 0o100644,
    "/home/me/repo/src/pkg": 0o040755,
    "/home/me/repo/src/pkg/part.py": 0o100644,
    "/home/me/repo/results": 0o040755,
    WORK: 0o040755,
    f"{WORK}/here.csv": 0o100644,
    "/home/me/bin/mytool": 0o100755,
    "/home/me/bin/notes": 0o100644,
    "/opt/data": 0o040755,
    "/opt/data/x.csv": 0o100600,
    "/srv/secret/key": 0o100600,
    "/tmp/d.csv": 0o100644,
    "/dev/ttyUSB0": 0o020660,
    "/home/me/venv/lib/python3.12/site-packages": 0o040755,
}
LINKS = {
    f"{WORK}/linked": "/home/me/data",
    "/home/me/out": "/opt/data",
    f"{WORK}/away.py": "/home/me/repo/src/mymod.py",
}


class Fake(Lookup):
    """A machine with these files, which belong to us; ``closed`` are those that we may not write to either."""

    def __init__(self, *, closed: tuple[str, ...] = ("/",), route: bool = True) -> None:
        super().__init__()
        self.closed, self.route = closed, route

    def real(self, path: str) -> str:
        path = os.path.normpath(path)
        for link, target in LINKS.items():
            if path == link or path.startswith(link + "/"):
                return target + path[len(link) :]
        return path

    def may(self, path: str, how: int) -> bool:
        if how == os.X_OK:
            return bool((self._mode(path) or 0) & 0o100)
        return how == os.R_OK or path not in self.closed

    def has_route(self) -> bool:
        return self.route

    def listens(self, port: int) -> bool:
        return port == 5000

    def _mode(self, path: str) -> int | None:
        path = self.real(path)
        is_parent = path == "/" or any(other.startswith(path + "/") for other in FILES)
        return FILES.get(path, stat.S_IFDIR | 0o755 if is_parent else None)


def find(
    kind: NeedKind,
    name: str,
    facts: IsolationFacts = BWRAP,
    lookup: Lookup | None = None,
    **changes: Any,
) -> Any:
    sight = {
        key: changes.pop(key)
        for key in ("cwd", "sys_path", "search", "other_user")
        if key in changes
    }
    need = Need(
        kind=kind, name=name, line="x", **{"number": errno.ENOENT, "exact": True, **changes}
    )
    found = conflicts(
        [need],
        Sight(facts=facts, env={"HOME": HOME, "PATH": "/usr/bin:/home/me/bin"}, **sight),
        lookup or Fake(),
    )
    return found[0] if found else None


P = NeedKind.PATH


@pytest.mark.parametrize(
    ("name", "allow"),
    [
        ("../../data/d.csv", "/home/me/data/d.csv"),
        ("/home/me/data/d.csv", "/home/me/data/d.csv"),
        ("~/data/d.csv", "/home/me/data/d.csv"),
        ("/home/me/data", "/home/me/data"),
        ("/home/me/data/*.csv", "/home/me/data"),
        ("linked/d.csv", "/home/me/data/d.csv"),
        ("/srv/secret/key", "/srv/secret/key"),
        ("/tmp/d.csv", "/tmp/d.csv"),
    ],
)
def test_a_hidden_file_that_exists_is_in_the_way(name: str, allow: str) -> None:
    conflict = find(P, name)
    assert (conflict.access, conflict.allow, conflict.writes) == (Access.HIDDEN, (allow,), False)


@pytest.mark.parametrize(
    "name",
    [
        "/home/me/data/none.csv",  # exists nowhere
        "../../data/none.csv",
        "here.csv",  # in sight
        "none.csv",
        "/opt/data/x.csv",
        "/home/me/venv/lib/python3.12/site-packages",
        "",
        "a\0b",
        "x" * 5000,
    ],
)
def test_what_exists_nowhere_or_is_in_sight_is_no_conflict(name: str) -> None:
    assert find(P, name) is None


def test_what_we_may_not_read_ourselves_is_no_conflict() -> None:
    class Unreadable(Fake):
        def may(self, path: str, how: int) -> bool:
            return how != os.R_OK and super().may(path, how)

    assert find(P, "/home/me/data/d.csv", lookup=Unreadable()) is None


def test_a_hidden_link_to_what_is_in_sight() -> None:
    conflict = find(P, "/home/me/out/x.csv")
    assert (conflict.path, conflict.allow) == ("/opt/data/x.csv", ())


@pytest.mark.parametrize(
    ("name", "number", "allow"),
    [
        ("/opt/data/new.csv", errno.EROFS, "/opt/data"),
        ("/opt/data/new/deep/x.csv", errno.EROFS, "/opt/data"),
        ("/opt/data/x.csv", errno.EROFS, "/opt/data"),
        ("/opt/data", errno.EROFS, "/opt/data"),
        ("../results/t.csv", errno.EROFS, "/home/me/repo/results"),
    ],
)
def test_a_place_that_is_read_only_in_there(name: str, number: int, allow: str) -> None:
    conflict = find(P, name, number=number)
    assert (conflict.allow, conflict.writes) == ((allow,), True)


def test_a_place_that_is_hidden_and_was_to_be_written() -> None:
    conflict = find(P, "../results/t.csv", writes=True)
    assert (conflict.access, conflict.allow, conflict.writes) == (
        Access.HIDDEN,
        ("/home/me/repo/results",),
        True,
    )
    assert find(P, "../results/t.csv", writes=False) is None
    assert find(P, "../results/t.csv", writes=None) is None
    assert find(P, "../missing/t.csv", writes=True) is None, "outside its directory is missing, too"


@pytest.mark.parametrize("name", ["/opt/data/new.csv", "/new.csv"])
def test_what_we_may_not_write_ourselves_is_no_conflict(name: str) -> None:
    assert find(P, name, number=errno.EROFS, lookup=Fake(closed=("/", "/opt/data"))) is None


@pytest.mark.parametrize(
    ("name", "number", "access", "writes"),
    [
        ("/home/me/data/d.csv", errno.EACCES, Access.HIDDEN, False),
        ("/run/se/home/data/d.csv", errno.ENOENT, Access.HIDDEN, False),
        ("/opt/data/new.csv", errno.EACCES, Access.READ_ONLY, True),
        ("/opt/data/x.csv", errno.EACCES, Access.READ_ONLY, True),
        ("../results/t.csv", errno.EACCES, None, None),
        ("/tmp/d.csv", errno.ENOENT, None, None),
        ("/home/me/data/none.csv", errno.EACCES, None, None),
    ],
)
def test_landlock_refuses(
    name: str, number: int, access: Access | None, writes: bool | None
) -> None:
    conflict = find(P, name, LANDLOCK, number=number)
    assert (conflict and conflict.access, conflict and conflict.writes) == (access, writes)


def test_the_kernels_home_is_not_the_users() -> None:
    assert find(P, "/run/se/home/data/d.csv", LANDLOCK).moved
    assert find(P, "~/data/d.csv", LANDLOCK).moved
    assert not find(P, "/home/me/data/d.csv", LANDLOCK).moved
    assert find(P, "/run/se/home/data/d.csv", LANDLOCK).name == "~/data/d.csv"


def test_what_is_shown_is_not_in_the_kernels_own_home() -> None:
    shown = msgspec.structs.replace(LANDLOCK, readable=("/home/me/data",))
    conflict = find(P, "/run/se/home/data/d.csv", shown)
    assert (conflict.path, conflict.allow, conflict.moved) == ("/home/me/data/d.csv", (), True)
    assert find(P, "/home/me/data/d.csv", shown) is None
    assert find(NeedKind.MODULE, "mymod", shown, sys_path=("/run/se/home/repo/src",)).moved


def test_a_user_that_owns_nothing() -> None:
    refused: dict[str, Any] = {"number": errno.EACCES, "other_user": True}
    assert not find(P, "/opt/data/x.csv", **refused).usable
    assert find(P, f"{WORK}/here.csv", **refused) is None, "others may read it"
    assert not find(P, "/home/me/data/private.csv", other_user=True).usable
    assert find(P, "/home/me/data/d.csv", other_user=True).usable


def test_variables() -> None:
    assert find(NeedKind.VARIABLE, "MY_TOKEN").access is Access.HIDDEN
    assert find(NeedKind.VARIABLE, "NOT_SET") is None


@pytest.mark.parametrize(
    ("name", "more", "path", "allow"),
    [
        ("mymod", {"sys_path": ("../src",)}, "/home/me/repo/src/mymod.py", ("/home/me/repo/src",)),
        ("pkg", {"sys_path": ("../src",)}, "/home/me/repo/src/pkg", ("/home/me/repo/src",)),
        (
            "pkg.part",
            {"sys_path": ("../src",)},
            "/home/me/repo/src/pkg/part.py",
            ("/home/me/repo/src",),
        ),
        (
            "mymod",
            {"cwd": "/home/me/repo/src"},
            "/home/me/repo/src/mymod.py",
            ("/home/me/repo/src",),
        ),
        (
            "away",
            {"sys_path": ("",)},
            "/home/me/repo/src/mymod.py",
            ("/home/me/repo/src/mymod.py",),
        ),
    ],
)
def test_modules(name: str, more: dict[str, Any], path: str, allow: tuple[str, ...]) -> None:
    conflict = find(NeedKind.MODULE, name, **more)
    assert (conflict.path, conflict.allow) == (path, allow)


@pytest.mark.parametrize("name", ["numpy", "here", "pkg.other", "../src/mymod", "data"])
def test_modules_that_are_nowhere(name: str) -> None:
    assert find(NeedKind.MODULE, name, sys_path=("/usr/lib/python3", "")) is None


def test_programs() -> None:
    conflict = find(NeedKind.PROGRAM, "mytool")
    assert (conflict.path, conflict.allow) == ("/home/me/bin/mytool", ("/home/me/bin",))
    assert find(NeedKind.PROGRAM, "notes") is None, "it cannot be executed"
    assert find(NeedKind.PROGRAM, "nothing") is None


@pytest.mark.parametrize("route", [True, False])
def test_hosts(*, route: bool) -> None:
    assert find(NeedKind.HOST, "example.org", lookup=Fake(route=route)).usable is route
    assert find(NeedKind.HOST, "example.org", msgspec.structs.replace(BWRAP, network=True)) is None


def test_a_service_of_this_machine() -> None:
    conflict = find(NeedKind.HOST, "127.0.0.1:5000", number=errno.ECONNREFUSED)
    assert conflict.local
    assert find(NeedKind.HOST, "127.0.0.1:5001", number=errno.ECONNREFUSED) is None, "nobody there"


def test_devices_and_the_places_of_other_programs() -> None:
    assert find(P, "/dev/ttyUSB0").access is Access.HIDDEN
    assert Reach(BWRAP).to("/dev/null") is Access.OPEN
    assert Reach(BWRAP).to("/run/docker.sock") is Access.HIDDEN
    assert (
        Reach(msgspec.structs.replace(BWRAP, read_only=False)).to("/run/docker.sock") is Access.OPEN
    )


def test_without_walls_around_files_all_is_in_reach() -> None:
    bare = IsolationFacts(removed_variables=("MY_TOKEN",))
    assert find(P, "/home/me/data/d.csv", bare) is None
    assert find(NeedKind.VARIABLE, "MY_TOKEN", bare) is not None


@pytest.mark.parametrize(
    ("uid", "gid", "mode", "may"),
    [
        (0, 0, 0o100200, True),
        (7, 0, 0o100720, True),
        (7, 7, 0o100772, True),
        (7, 7, 0o100770, False),
        (0, 7, 0o100577, False),
    ],
)
def test_root_without_capabilities_goes_by_the_mode(
    monkeypatch: pytest.MonkeyPatch, uid: int, gid: int, mode: int, *, may: bool
) -> None:
    status = os.stat_result((mode, 1, 1, 1, uid, gid, 0, 0, 0, 0))
    monkeypatch.setattr("safe_exec.trial.conflicts.os.access", lambda _path, _how: True)
    monkeypatch.setattr("safe_exec.trial.conflicts.os.stat", lambda _path: status)
    assert Lookup(bare_root=True).may("/x", os.W_OK) is may
    assert Lookup().may("/x", os.W_OK)


def test_lookups_are_counted() -> None:
    lookup = Lookup()
    needs = [Need(kind=P, name=f"/nowhere/{n}", line="x", number=errno.ENOENT) for n in range(1000)]
    assert conflicts(needs, Sight(facts=BWRAP, env={"HOME": HOME}), lookup) == ()
    assert lookup.remaining_lookups <= 0
    assert not lookup.exists("/")


def test_a_lookup_that_does_not_come_back_claims_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    over = threading.Event()

    class Stuck(Fake):
        def real(self, path: str) -> str:
            over.wait(20)
            return super().real(path)

    monkeypatch.setattr(module, "SECONDS", 0.05)
    try:
        assert find(P, "/home/me/data/d.csv", lookup=Stuck()) is None
    finally:
        over.set()


def test_two_slashes_at_the_beginning_are_one() -> None:
    assert Reach(BWRAP).to("//home/me/data/d.csv") is Reach(BWRAP).to("/home/me/data/d.csv")
    assert Reach(BWRAP).to("//www.example.org/data.html") is Reach(BWRAP).to("/www.example.org")


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        # Its directory is read-only, and a new file would be refused with EROFS.
        ("/opt/new.txt", False),
        ("/opt/data/new.txt", False),
        # So is a directory that leads to the notebook's folder.
        ("/home/me/repo/new.csv", False),
        # A hidden directory is missing inside.
        ("/home/me/repo/results/new.csv", True),
        ("/srv/secret/new.csv", True),
    ],
)
def test_a_new_file_is_missing_only_where_its_directory_is(name: str, hidden: bool) -> None:
    lookup = Fake(closed=())
    row = find(P, name, lookup=lookup, may_write=True, says_missing=True)
    assert (row is not None) is hidden
    # A library's "cannot open" may stand for EROFS.
    assert find(P, name, lookup=lookup, may_write=True) is not None


def test_a_folder_that_is_read_only_is_no_place_to_write_to() -> None:
    closed = msgspec.structs.replace(LANDLOCK, writable=("/tmp", "/dev"))
    row = find(
        NeedKind.PATH, f"{WORK}/new.csv", closed, Fake(closed=()), number=errno.EACCES, writes=True
    )
    assert (row.writes, row.in_folder, row.allow) == (True, True, (WORK,))
    assert "notebook's folder" not in advice(row)
    assert f"--writable {WORK}" in advice(row)
    elsewhere = find(
        NeedKind.PATH, "/srv/new.csv", closed, Fake(closed=()), number=errno.EACCES, writes=True
    )
    assert "notebook's folder" in advice(elsewhere)


def test_a_link_that_nobody_may_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    """readlink(2) of /proc/1/root is refused even to root in some containers."""

    def refuse(path: str) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os.path, "realpath", refuse)
    assert Lookup().real("/proc/1/root/.") == "/proc/1/root"
