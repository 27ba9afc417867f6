"""The attributes of exceptions, as the code in the kernel tells them and as the runner takes them."""

from __future__ import annotations

import errno
import json
import os
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from safe_exec.agent import attributes
from safe_exec.kernel.agent_facts import reported_errors
from safe_exec.model.evidence import Raised

errors: Any = attributes
"""Code of the kernel's process carries no types."""


def new_inside() -> SimpleNamespace:
    return SimpleNamespace(opened=deque(), database=None, dialled=None, dialled_port=None)


def rows_of(action: Any) -> list[dict[str, Any]]:
    """What is told of the exception that an action raises, after its way through JSON."""
    with pytest.raises(BaseException) as caught:
        action()
    rows: list[dict[str, Any]] = json.loads(
        json.dumps(errors.attributes_of(new_inside(), caught.value))
    )
    return rows


def stat_missing() -> None:
    os.stat("/nowhere/x.csv")


def rename_missing() -> None:
    os.rename(b"/nowhere/a", "/nowhere/b")


def test_an_operating_system_error_tells_number_and_files() -> None:
    assert rows_of(stat_missing) == [
        {
            "type": "FileNotFoundError",
            "remote": False,
            "errno": errno.ENOENT,
            "files": ["/nowhere/x.csv"],
            "writes": None,
        }
    ]
    assert rows_of(rename_missing)[0]["files"] == ["/nowhere/a", "/nowhere/b"]


def raise_with_path() -> None:
    raise FileNotFoundError(errno.ENOENT, "no", Path("/nowhere/x"))


def test_a_path_object_is_told_as_text() -> None:
    assert rows_of(raise_with_path)[0]["files"] == ["/nowhere/x"]


def test_a_module_that_was_not_found() -> None:
    def action() -> None:
        import no_such_module_here  # type: ignore[import-not-found]  # noqa: F401

    assert rows_of(action)[0]["module"] == "no_such_module_here"


@pytest.mark.parametrize(
    "action", [lambda: os.environ["NOT_SET_X"], lambda: os.environ.pop("NOT_SET_X")]
)
def test_a_variable_that_is_not_set(action: Any) -> None:
    assert rows_of(action)[0]["variable"] == "NOT_SET_X"


def test_a_key_of_another_dictionary_is_no_variable() -> None:
    assert "variable" not in rows_of(lambda: dict[str, str]()["NOT_SET_X"])[0]


def chained() -> None:
    try:
        os.stat("/nowhere/x")
    except OSError as error:
        raise ValueError("bad") from error


def handled() -> None:
    try:
        os.stat("/nowhere/x")
    except OSError:
        raise ValueError("bad")  # noqa: B904 - as a notebook does


def test_the_chain_is_told_and_what_was_only_being_handled_is_marked() -> None:
    assert [(row["type"], row["remote"]) for row in rows_of(chained)] == [
        ("ValueError", False),
        ("FileNotFoundError", False),
    ]
    assert [(row["type"], row["remote"]) for row in rows_of(handled)] == [
        ("ValueError", False),
        ("FileNotFoundError", True),
    ]


def test_a_group_tells_its_parts() -> None:
    def action() -> None:
        raise ExceptionGroup("several", [OSError(errno.EROFS, "no", f"/srv/{n}") for n in range(9)])

    assert [row.get("files") for row in rows_of(action)] == [
        None,
        ["/srv/0"],
        ["/srv/1"],
        ["/srv/2"],
    ]


def test_a_chain_in_a_circle_ends() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert len(errors.attributes_of(new_inside(), first)) == 2


class HostileError(FileNotFoundError):
    """Its properties are the notebook's code, which must not run on our account."""

    @property
    def _forbidden(self) -> Any:
        raise AssertionError("this was asked for")

    errno = filename = filename2 = args = __cause__ = __context__ = __traceback__ = __class__ = (
        _forbidden
    )


def test_no_code_of_the_exception_is_run() -> None:
    assert errors.attributes_of(new_inside(), HostileError(2, "no", "/x"))[0]["files"] == ["/x"]


class Text(str):
    """No plain text: it might have methods of its own."""

    __slots__ = ()


def test_objects_of_the_notebook_are_neither_asked_nor_kept() -> None:
    inside = new_inside()
    errors.note_file(inside, "open", (Text("/x"), "w", os.O_WRONLY))
    assert not inside.opened
    assert errors.attributes_of(new_inside(), OSError(2, "no", Text("/x")))[0]["files"] == []


def told(action: Any, **more: Any) -> Raised:
    inside = new_inside()
    fact = {
        "raised": rows_of(action),
        **json.loads(json.dumps(errors.surroundings(inside))),
        **more,
    }
    return reported_errors(fact).errors[0]


@pytest.mark.parametrize(
    ("event", "args", "writes"),
    [
        ("open", ("/nowhere/x.csv", "r", os.O_RDONLY), False),
        ("open", ("/nowhere/x.csv", "w", os.O_WRONLY | os.O_CREAT), True),
        ("open", ("/nowhere/other", "w", os.O_WRONLY), None),
        ("os.mkdir", ("/nowhere/x.csv", 0o777, -1), True),
    ],
)
def test_whether_a_file_was_to_be_written(
    event: str, args: tuple[Any, ...], writes: bool | None
) -> None:
    inside = new_inside()
    errors.note_file(inside, event, args)
    errors.note_file(inside, "open", ("/usr/lib/shown.py", "r", os.O_RDONLY))
    with pytest.raises(FileNotFoundError) as caught:
        stat_missing()
    assert errors.attributes_of(inside, caught.value)[0]["writes"] is writes


def test_sqlite_does_not_say_which_file() -> None:
    import sqlite3

    def action() -> None:
        sqlite3.connect("/nowhere/x.db")

    assert told(action, database="/nowhere/x.db").files == ("/nowhere/x.db",)
    assert told(action).files == ()


@pytest.mark.parametrize(
    ("address", "files", "host"),
    [
        ("/run/docker.sock", ("/run/docker.sock",), None),
        (b"/run/docker.sock", ("/run/docker.sock",), None),
        (("example.org", 80), (), "example.org"),
        (("::1", 80, 0, 0), (), "::1"),
        (7, (), None),
    ],
)
def test_a_refused_connection_does_not_say_to_whom(
    address: Any, files: tuple[str, ...], host: str | None
) -> None:
    def action() -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    inside = new_inside()
    errors.note_file(inside, "socket.connect", (object(), address))
    found = told(action, dialled=inside.dialled)
    assert (found.files, found.host) == (files, host)


@pytest.mark.parametrize(
    "fact",
    [
        {"raised": 1},
        {"raised": [{}], "sys_path": [], "search": ""},
        {"raised": [{"type": "x", "files": 3}], "sys_path": [], "search": ""},
        {"raised": [], "search": ""},
    ],
)
def test_what_is_no_fact_is_refused(fact: dict[str, Any]) -> None:
    with pytest.raises((TypeError, KeyError, ValueError)):
        reported_errors(fact)
