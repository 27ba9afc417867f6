"""An agent names notebooks in the server's folder, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from safe_exec.errors import UsageError
from safe_exec.mcp_server.settings import Settings


def test_notebooks_in_the_folder(tmp_path: Path) -> None:
    settings = Settings(folder=tmp_path, limits="untrusted")
    assert settings.notebook("a/b.ipynb") == tmp_path / "a" / "b.ipynb"
    assert settings.notebook(str(tmp_path / "c.ipynb")) == tmp_path / "c.ipynb"


@pytest.mark.parametrize("path", ["../b.ipynb", "/etc/b.ipynb", "link/b.ipynb", "b.py", "."])
def test_what_is_refused(tmp_path: Path, path: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(UsageError):
        Settings(folder=folder, limits="untrusted").notebook(path)
