"""A service of this machine, which a notebook behind walls cannot reach on its own loopback; real kernels."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import (
    make_notebook,
    ordinary_user_with_namespaces,
    private_directory,
    run_notebook,
)

OPTIONS = ("--limits", "ci", "--no-network", "--no-bisect")
CELL = """
import urllib.request
urllib.request.urlopen("http://127.0.0.1:{port}/").read()
"""
USERS = [
    pytest.param("root", id="root"),
    pytest.param("user", id="user", marks=pytest.mark.bed("ordinary-user", "user-namespaces")),
]


@pytest.fixture
def folder() -> Iterator[Path]:
    with private_directory() as path:
        yield path


@pytest.mark.bed("bubblewrap")
@pytest.mark.parametrize("user", USERS)
def test_a_service_outside_is_named_with_the_option_that_reaches_it(
    folder: Path, user: str
) -> None:
    prefix = ordinary_user_with_namespaces() if user == "user" else []
    home, work = folder / "home", folder / "work"
    for path in (home, work):
        path.mkdir()
        path.chmod(0o777)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        notebook = make_notebook(work / "a.ipynb", CELL.format(port=port).strip())
        outcome = run_notebook(notebook, *OPTIONS, prefix=prefix, env={"HOME": str(home)})
    cause = outcome.verdict["cause"]
    assert (cause["kind"], cause["confidence"]) == ("network_blocked", "certain")
    assert f"127.0.0.1:{port}" in cause["summary"]
    assert "--network" in cause["advice"]
    assert outcome.verdict["crash_cell"]["line"] == 2


@pytest.mark.bed("bubblewrap")
def test_a_port_that_nobody_listens_on_is_an_error_like_any_other(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    notebook = make_notebook(folder / "a.ipynb", CELL.format(port=port).strip())
    cause = run_notebook(notebook, *OPTIONS).verdict["cause"]
    assert cause["kind"] == "exception"
    assert "--network" not in cause["advice"]
