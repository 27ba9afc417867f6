"""What files, notebooks and options say of isolation, and that a notebook's own word only ever adds walls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import fields, replace

from safe_exec.errors import LimitsError, UsageError
from safe_exec.limits import isolation
from safe_exec.limits.isolation import KEYS, apply, as_metadata, of_mapping, of_metadata, tighten
from safe_exec.limits.profiles import load_profile, resolve, shipped_profiles
from safe_exec.model.limits import FolderUse, Isolation, RepositoryUse, SystemCalls

FLAGS = tuple(f.name for f in fields(Isolation) if isinstance(f.default, bool))
MEMORY = 8 << 30
LISTS = ("env", "writable", "show", "hide", "devices")
CHOICES = ("folder", "repository", "system_calls")


@pytest.fixture(autouse=True)
def _in_empty_folder(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))


def read(text: str) -> Isolation:
    """What a file of one's own comes to."""
    Path("own.yaml").write_text(text)
    return load_profile("own.yaml", machine_memory=MEMORY).isolation


def error_of(text: str) -> str:
    with pytest.raises(LimitsError) as caught:
        read(text)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# --- files ------------------------------------------------------------------------------------------------------

EVERY_KEY = """\
isolation:
  hide-home: true
  read_only_system: yes
  folder: read
  repository: closed
  write_back: false
  network: no
  own_processes: true
  listed_environment: true
  system_calls: kill
  other_user: true
  required: true
  env: [TOKEN, HOME]
  writable: [/srv/out, ~/out]
  show: [~/models]
  hide: [/srv/data]
  devices: [/dev/nvidia0]
"""


def test_every_key_can_be_written() -> None:
    found = read(EVERY_KEY)
    assert found == Isolation(
        hide_home=True,
        read_only_system=True,
        folder=FolderUse.READ,
        repository=RepositoryUse.CLOSED,
        write_back=False,
        network=False,
        own_processes=True,
        listed_environment=True,
        system_calls=SystemCalls.KILL,
        other_user=True,
        required=True,
        env=("TOKEN", "HOME"),
        writable=("/srv/out", "~/out"),
        show=("~/models",),
        hide=("/srv/data",),
        devices=("/dev/nvidia0",),
    )
    assert all(getattr(found, name) != getattr(Isolation(), name) for name in KEYS), (
        "each key says something here"
    )


@pytest.mark.parametrize("text", ["", "isolation:\n", "isolation: {}\n", "limits: {memory: 1G}\n"])
def test_a_file_that_says_nothing_walls_nothing_off(text: str) -> None:
    assert read(text) == Isolation()


def test_files_are_laid_over_each_other_and_lists_are_added_to() -> None:
    Path("base.yaml").write_text("extends: ci\nisolation: {network: false, hide: [/a], env: [A]}\n")
    found = read("extends: base.yaml\nisolation: {network: true, hide: [/b], env: [B]}\n")
    assert (found.network, found.hide, found.env, found.hide_home) == (
        True,
        ("/a", "/b"),
        ("A", "B"),
        True,
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("hide_hom: true", "unknown key 'hide_hom' under isolation; did you mean hide_home?"),
        ("memory: 1G", "expected one of devices, env, folder, hide"),
        ("repository: hidden", "repository: expected one of write, read, closed, found 'hidden'"),
        ("show: [models]", "show: expected a path that begins with / or ~, found 'models'"),
        ("netwrok: false", "did you mean network?"),
        ("network: off-ish", "network: expected true or false, found text"),
        ("hide_home:", "hide_home: expected true or false, found nothing"),
        ("folder: burn", "folder: expected one of write, read, copy, found 'burn'"),
        ("folder: [read]", "folder: expected text, found a list"),
        ("system_calls: some", "system_calls: expected one of all, refuse, kill, found 'some'"),
        ("env: TOKEN", "env: expected a list, found text"),
        ("env: [A=b]", "env: expected the name of a variable, found 'A=b'"),
        ("hide: [[x]]", "hide: expected text, found a list"),
        ("hide: [data]", "hide: expected a path that begins with / or ~, found 'data'"),
        ("writable: [../x]", "writable: expected a path that begins with / or ~, found '../x'"),
        ("devices: [/etc/passwd]", "devices: expected a path below /dev, found '/etc/passwd'"),
    ],
)
def test_errors_name_file_line_and_the_nearest_name(line: str, said: str) -> None:
    text = f"description: x\nisolation:\n  own_processes: true\n  {line}\n"
    error = error_of(text)
    assert error.startswith("own.yaml:4: ") and said in error


def test_isolation_that_is_no_mapping() -> None:
    assert (
        error_of("isolation: [network]")
        == "own.yaml:1: isolation: expected a mapping of keys to values, found a list"
    )


# --- metadata and mappings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metadata",
    [{}, {"safe_exec": {}}, {"safe_exec": None}, {"safe_exec": "x"}, {"safe_exec": {"limits": {}}}],
)
def test_metadata_that_says_nothing(metadata: dict[str, object]) -> None:
    assert of_metadata(metadata, "nb.ipynb") == {}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([], "nb.ipynb: metadata.safe_exec.isolation: expected an object"),
        (
            {"netwrok": False},
            "nb.ipynb: metadata.safe_exec.isolation: unknown key 'netwrok'; did you mean network?",
        ),
        ({"network": "no"}, "network: expected true or false"),
        ({"folder": 3}, "folder: expected text, found a number"),
        ({"hide": "/x"}, "hide: expected a list, found text"),
        ({"hide": [1]}, "hide: expected text, found a number"),
        ({"hide": ["x"]}, "hide: expected a path that begins with / or ~"),
        ({1: True}, "unknown key '1'"),
    ],
)
def test_errors_of_metadata(found: object, said: str) -> None:
    with pytest.raises(LimitsError) as caught:
        of_metadata({"safe_exec": {"isolation": found}}, "nb.ipynb")
    assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_from_python_lists_may_be_tuples_and_words_may_be_of_the_model() -> None:
    given_walls = {
        "hide": ("/a",),
        "env": ["A"],
        "folder": FolderUse.COPY,
        "network": False,
        "hide-home": True,
    }
    found = apply(Isolation(), of_mapping(given_walls, "walls"))
    assert found == Isolation(
        hide=("/a",), env=("A",), folder=FolderUse.COPY, network=False, hide_home=True
    )
    with pytest.raises(UsageError, match=r"^walls: unknown key 'nework'; did you mean network"):
        of_mapping({"nework": False}, "walls")


# --- whose word counts ------------------------------------------------------------------------------------------

words = st.lists(st.sampled_from(["/a", "/b", "~/c"]), max_size=2).map(tuple)
changes = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(FLAGS, st.booleans()),
        "folder": st.sampled_from(FolderUse),
        "repository": st.sampled_from(RepositoryUse),
        "system_calls": st.sampled_from(SystemCalls),
        "env": st.lists(st.sampled_from(["A", "B"]), max_size=2).map(tuple),
        "writable": words,
        "show": words,
        "hide": words,
        "devices": st.lists(st.sampled_from(["/dev/x", "/dev/y"]), max_size=2).map(tuple),
    },
)
isolations = changes.map(lambda values: replace(Isolation(), **values))
ORDER: dict[str, list[Any]] = {
    **{name: [False, True] for name in FLAGS},
    "network": [True, False],
    "write_back": [True, False],
    "folder": [FolderUse.WRITE, FolderUse.COPY, FolderUse.READ],
    "repository": [RepositoryUse.WRITE, RepositoryUse.READ, RepositoryUse.CLOSED],
    "system_calls": [SystemCalls.ALL, SystemCalls.REFUSE, SystemCalls.KILL],
}


@given(isolations, changes)
def test_a_notebook_only_adds_walls(before: Isolation, wished: dict[str, Any]) -> None:
    after = tighten(before, wished)
    for name, order in ORDER.items():
        was, now = order.index(getattr(before, name)), order.index(getattr(after, name))
        assert now == max(was, order.index(wished.get(name, getattr(before, name))))
    assert set(before.hide) | set(wished.get("hide", ())) == set(after.hide)
    for name in ("env", "writable", "show", "devices"):
        assert getattr(after, name) == getattr(before, name), "what it wants opened is not heard"


@given(isolations, changes)
def test_apply_takes_all(before: Isolation, wished: dict[str, Any]) -> None:
    after = apply(before, wished)
    for name in KEYS:
        old = getattr(before, name)
        new = wished.get(name, () if name in LISTS else old)
        assert getattr(after, name) == ((*old, *new) if name in LISTS else new)


@given(isolations)
def test_walls_come_back_from_metadata(before: Isolation) -> None:
    carried = json.loads(json.dumps({"safe_exec": {"isolation": as_metadata(before)}}))
    assert apply(Isolation(), of_metadata(carried, "nb")) == before


def test_no_walls_leave_nothing_in_the_metadata() -> None:
    assert as_metadata(Isolation()) == {}


def test_every_source_beats_the_one_before() -> None:
    notebook = {
        "safe_exec": {
            "isolation": {"network": False, "hide_home": False, "folder": "read", "env": ["SECRET"]}
        }
    }
    found = resolve(chosen="ci", metadata=notebook, machine_memory=MEMORY).isolation
    ci = load_profile("ci", machine_memory=MEMORY).isolation
    assert found == replace(ci, network=False, folder=FolderUse.READ)
    opened = resolve(
        chosen="ci",
        metadata=notebook,
        machine_memory=MEMORY,
        walls={"network": True, "env": ("A",)},
    ).isolation
    assert opened == replace(ci, folder=FolderUse.READ, env=("A",)), "options win both ways"


@pytest.mark.parametrize("name", shipped_profiles())
def test_no_profile_lets_a_notebook_take_walls_down(name: str) -> None:
    bare = {
        "safe_exec": {
            "isolation": {name: getattr(Isolation(), name) for name in (*FLAGS, *CHOICES)}
        }
    }
    found = resolve(chosen=name, metadata=json.loads(json.dumps(bare)), machine_memory=MEMORY)
    assert found.isolation == load_profile(name, machine_memory=MEMORY).isolation


def test_the_keys_are_those_of_the_model() -> None:
    assert set(KEYS) == set(Isolation.__struct_fields__) == {*FLAGS, *LISTS, *CHOICES}
    assert set(isolation._ORDER) | {*FLAGS, *LISTS} == set(KEYS)


@pytest.mark.parametrize("name", ["hide", "show", "writable"])
@pytest.mark.parametrize("path", ["/", "//", "/usr/.."])
def test_the_root_of_all_is_neither_hidden_nor_opened(name: str, path: str) -> None:
    with pytest.raises(LimitsError, match=f"isolation: {name}: / itself"):
        isolation.apply(Isolation(), {name: ("/data", path)})
    assert getattr(isolation.apply(Isolation(), {name: ("/data",)}), name) == ("/data",)
