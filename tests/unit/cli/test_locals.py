"""``--locals`` reaches the job of every notebook: from ``batch``, Python and pytest."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import safe_exec.workflows.retry
from safe_exec import api
from safe_exec.cli import batch
from safe_exec.cli.options.job import JobOptions, job_of
from safe_exec.integrations import pytest_options, pytest_plugin
from tests.support import make_notebook


class StopError(Exception):
    """Ends the command before it runs anything."""


@pytest.mark.parametrize("arguments", [(), ("--locals",)])
def test_batch(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: list[bool] = []

    def note(options: JobOptions, _jobs: int) -> None:
        given.append(job_of(Path(), options).with_locals)
        raise StopError

    monkeypatch.setattr(batch, "_template", note)
    path = make_notebook(tmp_path / "nb.ipynb", "1")
    with pytest.raises(StopError):
        batch.command.main(
            [str(path), f"--out={tmp_path / 'out'}", *arguments], standalone_mode=False
        )
    assert given == [bool(arguments)]


def test_python(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Any] = []

    async def note(job: Any, *_: object, **__: object) -> None:
        jobs.append(job)

    monkeypatch.setattr(api, "run_with_retries", note)
    asyncio.run(api.run_async("nb.ipynb", with_locals=True))
    api.run("nb.ipynb")
    assert [job.with_locals for job in jobs] == [True, False]


def test_pytest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    jobs: list[Any] = []

    async def note(job: Any, *_: object, **__: object) -> None:
        jobs.append(job)

    monkeypatch.setattr(safe_exec.workflows.retry, "run_with_retries", note)
    parser = pytest.Parser(_ispytest=True)
    pytest_options.add_options(parser)
    options = parser.parse(["--safe-exec-locals", f"--safe-exec-out={tmp_path}"])
    config: Any = SimpleNamespace(
        getoption=partial(getattr, options), invocation_params=SimpleNamespace(dir=tmp_path)
    )
    item: Any = SimpleNamespace(
        _settings=pytest_options.settings_of(config),
        _stem=lambda: tmp_path / "nb",
        _environment=dict,
        path=tmp_path / "nb.ipynb",
    )
    pytest_plugin.NotebookItem._verdict(item)
    assert jobs[0].with_locals is True
