"""The command line of bubblewrap: what is mounted where, in which order, and that nothing of the machine can be written by mistake."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
from msgspec.structs import replace

from safe_exec.model.limits import FolderUse, Isolation
from safe_exec.sandbox.mechanisms.bubblewrap import (
    OLDEST,
    PARENT_BYTES,
    TMP_BYTES,
    SandboxPaths,
    arguments,
    is_needed,
)

FOLDER, RUNTIME, HOME = Path("/srv/project/nb"), Path("/tmp/safe-exec-1"), Path("/home/ann")
VENV, BASE = Path("/home/ann/venv"), Path("/usr")
AROUND = SandboxPaths(
    folder=FOLDER, runtime=RUNTIME, homes=(HOME, Path("/root"), Path("/home")), visible=(VENV, BASE)
)
DISK = RUNTIME / "disk"
WALLED = Isolation(hide_home=True, read_only_system=True, own_processes=True)

# How many words follow each option (bwrap(1)); those of --perms and --size belong to the next one.
WORDS: Mapping[str, int] = {
    **dict.fromkeys(("--ro-bind", "--ro-bind-try", "--bind", "--dev-bind"), 2),
    **dict.fromkeys(
        ("--dev", "--proc", "--tmpfs", "--dir", "--remount-ro", "--chdir", "--perms", "--size"), 1
    ),
    **dict.fromkeys(("--cap-add", "--cap-drop", "--hostname"), 1),
}
FROM_OUTSIDE = ("--ro-bind", "--ro-bind-try", "--bind", "--dev-bind")
WRITABLE = ("--bind", "--dev-bind")


class Step(NamedTuple):
    """An option that makes something: its words, the last of which is where, and what --perms and --size said of it."""

    option: str
    words: tuple[str, ...]
    perms: str | None = None
    size: str | None = None

    @property
    def place(self) -> str:
        return self.words[-1]


def steps(argv: list[str]) -> Iterator[Step]:
    assert argv[0] == "/usr/bin/bwrap" and argv[-1] == "--"
    said: dict[str, str] = {}
    at = 1
    while at < len(argv) - 1:
        option, count = argv[at], WORDS.get(argv[at], 0)
        words = tuple(argv[at + 1 : at + 1 + count])
        assert option.startswith("--") and not any(word.startswith("--") for word in words)
        at += 1 + count
        if option in ("--perms", "--size"):
            said[option] = words[0]
        else:
            yield Step(option, words, said.get("--perms"), said.get("--size"))
            said = {}
    assert said == {}


def made(
    isolation: Isolation,
    around: SandboxPaths = AROUND,
    *,
    shm: int | None = None,
    root: bool = False,
) -> list[Step]:
    return list(steps(arguments("/usr/bin/bwrap", isolation, around, shm_bytes=shm, root=root)))


def at(found: list[Step], place: object) -> list[Step]:
    """What is mounted or made at a place, in order."""
    return [
        step
        for step in found
        if step.words
        and step.place == str(place)
        and step.option not in ("--chdir", "--remount-ro")
    ]


def position(found: list[Step], option: str, place: object) -> int:
    return next(
        n
        for n, step in enumerate(found)
        if step.option == option and step.words and step.place == str(place)
    )


# --- what holds whatever is asked for ---------------------------------------------------------------------------

EVERY = [
    (
        Isolation(
            hide_home=home, read_only_system=system, folder=folder, network=network, own_processes=processes,
            other_user=other, hide=hide, writable=writable, devices=devices,
        ),
        replace(AROUND, folder=place, disk=disk),
    )
    for home, system, network, processes, other in product((False, True), repeat=5)
    for folder, disk in ((FolderUse.WRITE, None), (FolderUse.WRITE, DISK), (FolderUse.READ, None), (FolderUse.COPY, DISK))
    for place in (FOLDER, HOME / "nb")
    for hide, writable, devices in (((), (), ()), (("/srv/project/nb/secret", "/opt/x"), ("/srv/out",), ("/dev/fuse",)))
]  # fmt: skip


def test_every_path_is_absolute() -> None:
    for isolation, around in EVERY:
        for step in made(isolation, around, shm=5):
            if step.option not in ("--cap-add", "--cap-drop", "--hostname"):
                assert all(word.startswith("/") for word in step.words), step


def test_nothing_of_the_machine_is_writable_but_what_is_said_so() -> None:
    for isolation, around in EVERY:
        if not isolation.read_only_system:
            continue
        allowed = {*isolation.writable, *isolation.devices}
        if isolation.folder is FolderUse.WRITE and around.disk is None:
            allowed.add(str(around.folder))
        found = {step.words[0] for step in made(isolation, around) if step.option in WRITABLE}
        assert {path for path in found if not path.startswith(f"{DISK}/")} == allowed


def test_a_mount_from_outside_is_where_it_was_but_for_what_is_on_the_disk() -> None:
    for isolation, around in EVERY:
        for step in made(isolation, around):
            if (
                step.option in FROM_OUTSIDE
                and not step.words[0].startswith(f"{DISK}/")
                and step.words[0] != "/dev/null"
            ):
                assert step.words[0] == step.words[1]


def test_each_tmpfs_has_a_size() -> None:
    for isolation, around in EVERY:
        assert all(
            step.size and int(step.size) > 0
            for step in made(isolation, around)
            if step.option == "--tmpfs"
        )


def test_no_mount_covers_the_folder_the_sockets_or_the_interpreter_again() -> None:
    for isolation, around in EVERY:
        found = made(isolation, around)
        for path in (around.folder, VENV):
            shown = [
                n
                for n, step in enumerate(found)
                if step.option in FROM_OUTSIDE and path.is_relative_to(step.words[1])
            ]
            over = [
                n
                for n, step in enumerate(found)
                if step.option == "--tmpfs" and path.is_relative_to(step.place)
            ]
            assert max(shown) > max(over, default=-1), (path, isolation)
        mounted = [step for step in found if step.option in (*FROM_OUTSIDE, "--tmpfs")]
        covering = [step for step in mounted if around.runtime.is_relative_to(step.place)]
        assert covering[-1].place == str(around.runtime)


def test_it_starts_where_everybody_may_be_and_ends_with_its_parent() -> None:
    for isolation, around in EVERY:
        found = made(isolation, around)
        assert found[0].option == "--die-with-parent"
        assert found[-1] == Step("--chdir", ("/",))


def test_nothing_hidden_comes_back() -> None:
    """What is mounted last over a hidden path, or over what is above it, hides it."""
    for isolation, around in EVERY:
        hidden = [
            *map(str, isolation.hide),
            *(map(str, around.homes) if isolation.hide_home else ()),
        ]
        found = [
            step for step in made(isolation, around) if step.option in (*FROM_OUTSIDE, "--tmpfs")
        ]
        for path in hidden:
            last = [step for step in found if Path(path).is_relative_to(step.place)][-1]
            assert last.option == "--tmpfs" or last.words[0] == str(DISK / "home"), (path, last)


# --- single walls -----------------------------------------------------------------------------------------------


def test_without_walls_all_is_there() -> None:
    found = made(Isolation())
    assert [step.option for step in found] == [
        "--die-with-parent",
        "--dev-bind",
        "--bind",
        "--tmpfs",
        "--chdir",
    ]
    assert found[1].words == ("/", "/")


def test_a_system_that_cannot_be_written() -> None:
    found = made(Isolation(read_only_system=True))
    assert found[1] == Step("--ro-bind", ("/", "/")) and found[2] == Step("--dev", ("/dev",))
    assert at(found, "/tmp") == [Step("--tmpfs", ("/tmp",), "1777", str(TMP_BYTES))]
    assert (
        at(found, "/dev/shm")[0].option
        == at(found, "/run")[0].option
        == at(found, "/var/tmp")[0].option
        == "--tmpfs"
    )
    assert {step.place for step in found if step.option == "--ro-bind-try" and step.place.startswith("/proc")} == {
        "/proc/sys", "/proc/sysrq-trigger", "/proc/irq", "/proc/bus",
    }  # fmt: skip


def test_a_proc_of_its_own_comes_before_what_is_closed_in_it() -> None:
    found = made(WALLED)
    assert position(found, "--proc", "/proc") < position(found, "--ro-bind-try", "/proc/sys")


@pytest.mark.parametrize("network", [True, False])
def test_names_of_hosts_can_be_asked_for_where_there_is_a_network(network: bool) -> None:
    found = made(replace(WALLED, network=network))
    assert any(step.option == "--unshare-net" for step in found) is not network
    assert bool(at(found, "/run/systemd/resolve")) is network
    if network:
        assert position(found, "--tmpfs", "/run") < position(
            found, "--ro-bind-try", "/run/systemd/resolve"
        )


def test_processes_of_its_own() -> None:
    options = {step.option for step in made(Isolation(own_processes=True))}
    assert {
        "--unshare-pid",
        "--unshare-ipc",
        "--unshare-uts",
        "--unshare-cgroup-try",
        "--proc",
    } <= options
    assert not {"--unshare-pid", "--unshare-ipc", "--proc"} & {
        step.option for step in made(Isolation(network=False))
    }


def test_homes_are_empty_outer_ones_first_and_the_own_one_can_be_written() -> None:
    found = made(WALLED)
    homes = [
        step
        for step in found
        if step.option == "--tmpfs" and step.place in ("/home", "/home/ann", "/root")
    ]
    assert [step.place for step in homes][:1] != ["/home/ann"]
    assert position(found, "--tmpfs", "/home") < position(found, "--tmpfs", "/home/ann")
    assert {step.perms for step in homes} == {"0755"}
    closed = {step.place for step in found if step.option == "--remount-ro"}
    assert {"/home", "/root", "/dev", "/run", "/var/tmp"} <= closed and "/home/ann" not in closed
    assert {
        step.perms
        for step in made(replace(WALLED, other_user=True))
        if step.option == "--tmpfs" and step.place == "/home/ann"
    } == {"1777"}


def test_what_is_needed_stays_readable_in_an_empty_home() -> None:
    inner = VENV / "lib"
    found = made(WALLED, replace(AROUND, visible=(VENV, inner, BASE)))
    assert at(found, VENV)[-1] == Step("--ro-bind-try", (str(VENV), str(VENV)))
    assert at(found, inner) == [], "it lies in one that is shown"
    assert at(found, BASE) == [], "nothing hides it"
    assert position(found, "--tmpfs", HOME) < position(found, "--ro-bind-try", VENV)


REPOSITORY = HOME / "code" / "repo"
IN_REPOSITORY = replace(
    AROUND, folder=REPOSITORY / "nb", repository=REPOSITORY, repository_is_writable=True
)


def last_mount(found: list[Step], path: Path) -> Step:
    """The mount that a path lies on in the end."""
    mounted = [
        step
        for step in found
        if step.option in (*FROM_OUTSIDE, "--tmpfs") and path.is_relative_to(step.place)
    ]
    return max(mounted, key=lambda step: (len(Path(step.place).parts), mounted.index(step)))


@pytest.mark.parametrize(
    "top", [HOME / "code", Path("/tmp/x"), Path("/var/tmp/x"), Path("/srv"), Path("/dev/shm/x")]
)
@pytest.mark.parametrize("is_writable", [True, False])
def test_a_repository_is_open_wherever_it_is(top: Path, *, is_writable: bool) -> None:
    root = top / "repo"
    found = made(
        WALLED,
        replace(
            IN_REPOSITORY, folder=root / "nb", repository=root, repository_is_writable=is_writable
        ),
    )
    mount = last_mount(found, root / "src")
    assert (mount.option, mount.place) == ("--bind" if is_writable else "--ro-bind", str(root))
    assert last_mount(found, root / "nb" / "x") == Step("--bind", (str(root / "nb"),) * 2)
    assert last_mount(found, top / "beside").place != str(root)


@pytest.mark.parametrize(
    ("cover", "deep"),
    [(HOME, "code/repo/nb"), (Path("/tmp"), "a/b/nb"), (Path("/dev/shm"), "a/nb")],
)
def test_what_only_leads_to_the_folder_cannot_be_written(cover: Path, deep: str) -> None:
    folder = cover / deep
    found = made(WALLED, replace(AROUND, folder=folder))
    first = cover / Path(deep).parts[0]
    assert last_mount(found, first / "table.csv") == Step(
        "--tmpfs", (str(first),), "0755", str(PARENT_BYTES)
    )
    assert position(found, "--remount-ro", first) > max(
        n for n, step in enumerate(found) if step.option in FROM_OUTSIDE
    )
    assert ("--remount-ro", (str(cover),)) not in [(step.option, step.words) for step in found]


def test_a_folder_right_in_a_cover_needs_no_way() -> None:
    found = made(WALLED, replace(AROUND, folder=HOME / "nb"))
    assert at(found, HOME / "nb") == [Step("--bind", (f"{HOME}/nb",) * 2)]


def test_where_programs_keep_settings_a_way_can_be_written() -> None:
    found = made(WALLED, replace(AROUND, visible=(HOME / ".local/share/jupyter",)))
    assert at(found, HOME / ".local") == [Step("--dir", (f"{HOME}/.local",), "0755")]
    assert ("--remount-ro", (f"{HOME}/.local",)) not in [
        (step.option, step.words) for step in found
    ]


def test_a_home_within_tmp_is_there_though_the_way_to_the_folder_is_beside_it() -> None:
    home, folder = Path("/tmp/x/home"), Path("/tmp/x/nb")
    found = made(WALLED, replace(AROUND, homes=(home, Path("/root")), folder=folder))
    assert last_mount(found, home / ".ipython").place == str(home)
    assert last_mount(found, folder / "a").place == str(folder)
    assert position(found, "--remount-ro", "/tmp/x")


def test_interpreters_in_a_repository_stay_read_only() -> None:
    venv = REPOSITORY / ".venv"
    found = made(WALLED, replace(IN_REPOSITORY, visible=(venv,), interpreters=(venv,)))
    assert last_mount(found, venv / "lib").option == "--ro-bind-try"
    opened = made(
        replace(WALLED, writable=(str(venv),)),
        replace(IN_REPOSITORY, visible=(venv,), interpreters=(venv,)),
    )
    assert last_mount(opened, venv / "lib").option == "--bind"
    of_folder = made(
        WALLED, replace(AROUND, visible=(FOLDER / "env",), interpreters=(FOLDER / "env",))
    )
    assert last_mount(of_folder, FOLDER / "env/lib").option == "--ro-bind-try"


@pytest.mark.parametrize(
    ("isolation", "around"),
    [
        (Isolation(network=False), IN_REPOSITORY),
        (replace(WALLED, folder=FolderUse.COPY), replace(AROUND, folder=REPOSITORY, disk=DISK)),
    ],
)
def test_interpreters_can_be_written_where_the_system_can_and_in_a_copy(
    isolation: Isolation, around: SandboxPaths
) -> None:
    venv = REPOSITORY / ".venv"
    found = made(isolation, replace(around, visible=(venv,), interpreters=(venv,)))
    assert last_mount(found, venv / "lib").option in WRITABLE


def test_a_folder_that_is_an_environment_can_be_written() -> None:
    found = made(WALLED, replace(AROUND, interpreters=(FOLDER, FOLDER.parent)))
    assert last_mount(found, FOLDER / "x").option == "--bind"


def test_what_is_shown_can_be_read_where_all_around_is_hidden() -> None:
    isolation = replace(
        WALLED,
        show=(f"{HOME}/data/models", "/opt/x", f"{FOLDER}/inner"),
        hide=(f"{HOME}/data/models/secret",),
    )
    found = made(isolation)
    assert last_mount(found, HOME / "data/models/a") == Step(
        "--ro-bind", (f"{HOME}/data/models",) * 2
    )
    assert last_mount(found, HOME / "data/models/secret/a").option == "--tmpfs"
    assert at(found, "/opt/x") == [], "it is seen anyway"
    assert at(found, FOLDER / "inner") == [], "nor does it close a part of the folder"


def test_a_link_is_mounted_only_where_it_would_not_be_there() -> None:
    link, inner, plain = HOME / "way", REPOSITORY / "way", Path("/srv/way")
    names = (str(link), str(inner), str(plain), "/mnt/disk")
    around = replace(IN_REPOSITORY, links=frozenset({link, inner, plain}))
    found = made(replace(WALLED, writable=names), around)
    assert [bool(at(found, name)) for name in names] == [True, False, False, True]


def test_the_way_to_what_is_shown_can_be_gone_by_others() -> None:
    deep = HOME / "a" / "b" / "venv"
    found = made(WALLED, replace(AROUND, visible=(deep,), folder=HOME / "a" / "c" / "nb"))
    ways = {
        step.place: (step.option, step.perms)
        for step in found
        if step.words and step.place.startswith(f"{HOME}/a")
    }
    assert ways[str(HOME / "a")] == ("--remount-ro", None), "what is written to it would be gone"
    assert ways[str(HOME / "a" / "b")] == ways[str(HOME / "a" / "c")] == ("--dir", "0755")
    assert [(step.option, step.perms) for step in at(found, HOME / "a")] == [("--tmpfs", "0755")]


@pytest.mark.parametrize(
    ("use", "disk", "wanted"),
    [
        (FolderUse.WRITE, None, Step("--bind", (str(FOLDER), str(FOLDER)))),
        (FolderUse.WRITE, DISK, Step("--bind", (str(DISK / "folder"), str(FOLDER)))),
        (FolderUse.COPY, DISK, Step("--bind", (str(DISK / "folder"), str(FOLDER)))),
        (FolderUse.READ, None, Step("--ro-bind", (str(FOLDER), str(FOLDER)))),
        (FolderUse.READ, DISK, Step("--ro-bind", (str(FOLDER), str(FOLDER)))),
    ],
)
def test_the_folder(use: FolderUse, disk: Path | None, wanted: Step) -> None:
    assert at(made(replace(WALLED, folder=use), replace(AROUND, disk=disk)), FOLDER) == [wanted]


def test_a_disk_holds_folder_tmp_and_home_and_is_not_seen_itself() -> None:
    found = made(WALLED, replace(AROUND, disk=DISK))
    assert at(found, "/tmp") == [Step("--bind", (str(DISK / "tmp"), "/tmp"))]
    assert [step for step in at(found, HOME) if step.option != "--dir"] == [
        Step("--bind", (str(DISK / "home"), str(HOME)))
    ]
    assert at(found, "/root")[-1].option == "--tmpfs", "of the others only the emptiness is needed"
    assert at(found, RUNTIME) == [Step("--bind", (str(DISK / "sockets"), str(RUNTIME)))], (
        "the disk lies below it"
    )
    bare = made(Isolation(), replace(AROUND, disk=DISK))
    assert (
        at(bare, "/tmp") == [Step("--bind", (str(DISK / "tmp"), "/tmp"))] and at(bare, HOME) == []
    )


def test_the_directory_of_the_sockets_is_its_own_with_what_is_to_be_read_there() -> None:
    given = RUNTIME / "c.json"
    found = made(Isolation(network=False), replace(AROUND, read_only=(given,)))
    assert [step.option for step in at(found, RUNTIME)] == ["--tmpfs"]
    assert at(found, given) == [Step("--ro-bind", (str(given), str(given)))]
    assert position(found, "--tmpfs", RUNTIME) < position(found, "--ro-bind", given)


@pytest.mark.parametrize(
    ("shm", "isolation", "size"),
    [(5, Isolation(), "5"), (5, WALLED, "5"), (None, WALLED, str(1 << 30))],
)
def test_the_size_of_shm(shm: int | None, isolation: Isolation, size: str) -> None:
    assert at(made(isolation, shm=shm), "/dev/shm") == [
        Step("--tmpfs", ("/dev/shm",), "1777", size)
    ]


def test_shm_stays_the_machines_where_nobody_said_otherwise() -> None:
    assert at(made(Isolation(hide_home=True)), "/dev/shm") == []


def test_what_is_hidden_in_the_folder_is_hidden_after_the_folder_is_shown() -> None:
    secret, inner = FOLDER / "secret", FOLDER / "secret" / "out"
    found = made(replace(WALLED, hide=(str(secret),), writable=(str(inner),)))
    assert (
        position(found, "--bind", FOLDER)
        < position(found, "--tmpfs", secret)
        < position(found, "--bind", inner)
    )
    outside = made(replace(WALLED, hide=("/srv",)))
    assert position(outside, "--tmpfs", "/srv") < position(outside, "--bind", FOLDER)
    assert at(outside, "/srv/project")[0] == Step("--dir", ("/srv/project",), "0755")


def test_what_is_hidden_in_an_interpreter_is_hidden_after_it_is_shown() -> None:
    found = made(replace(WALLED, hide=(str(VENV / "etc"),)))
    assert position(found, "--ro-bind-try", VENV) < position(found, "--tmpfs", VENV / "etc")


def test_a_file_is_hidden_by_an_empty_one() -> None:
    token = FOLDER / "token"
    found = made(replace(WALLED, hide=(str(token),)), replace(AROUND, files=frozenset({token})))
    assert at(found, token) == [Step("--ro-bind", ("/dev/null", str(token)))]
    assert not any(step.option == "--remount-ro" and step.place == str(token) for step in found)


def test_devices_are_asked_for_one_by_one() -> None:
    found = made(replace(WALLED, devices=("/dev/nvidia0",)))
    assert position(found, "--dev", "/dev") < position(found, "--dev-bind", "/dev/nvidia0")
    assert at(made(Isolation(devices=("/dev/nvidia0",))), "/dev/nvidia0") == [], "all are there"


@pytest.mark.parametrize(
    ("isolation", "root", "wanted"),
    [
        (WALLED, False, []),
        (replace(WALLED, other_user=True), False, []),
        (WALLED, True, ["ALL", "CAP_SETPCAP"]),
        (Isolation(own_processes=True), True, ["ALL", "CAP_SETPCAP"]),
        (
            replace(WALLED, other_user=True),
            True,
            ["ALL", "CAP_SETPCAP", "CAP_SETUID", "CAP_SETGID"],
        ),
        (Isolation(network=False), True, []),
    ],
)
def test_capabilities(isolation: Isolation, root: bool, wanted: list[str]) -> None:
    assert [
        step.words[0] for step in made(isolation, root=root) if step.option.startswith("--cap-")
    ] == wanted


def test_none_of_it_is_newer_than_the_oldest_that_will_do() -> None:
    assert OLDEST >= (0, 5, 0), "--perms and --size"
    known = {
        *WORDS,
        "--as-pid-1",
        "--die-with-parent",
        "--unshare-pid",
        "--unshare-ipc",
        "--unshare-uts",
        "--unshare-cgroup-try",
        "--unshare-net",
    }
    assert {
        step.option
        for isolation, around in EVERY
        for step in made(isolation, around, shm=1, root=True)
    } <= known


def test_what_takes_namespaces() -> None:
    assert not is_needed(Isolation(), disk=False, shm=False)
    assert is_needed(Isolation(), disk=True, shm=False) and is_needed(
        Isolation(), disk=False, shm=True
    )
