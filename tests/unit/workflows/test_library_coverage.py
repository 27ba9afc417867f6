"""The configuration of coverage that applies to a notebook, and the data file of its run."""

from __future__ import annotations

from pathlib import Path

import pytest

from safe_exec.errors import UsageError
from safe_exec.kernel.coverage_file import CoverageSettings
from safe_exec.workflows.library_coverage import CoverageRequest, find_config, open_coverage


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """A folder in a repository."""
    (tmp_path / "repo" / ".git").mkdir(parents=True)
    docs = tmp_path / "repo" / "docs"
    docs.mkdir()
    return docs


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (".coveragerc", ""),
        ("setup.cfg", "[coverage:run]\nbranch = true\n"),
        ("tox.ini", "[coverage:report]\n"),
        ("pyproject.toml", "[tool.coverage.run]\n"),
    ],
)
def test_the_configuration_lies_between_notebook_and_root(docs: Path, name: str, text: str) -> None:
    outside, root = docs.parent.parent / ".coveragerc", docs.parent / name
    outside.write_text("")
    assert find_config(docs) is None
    root.write_text(text)
    assert find_config(docs) == root
    (docs / ".coveragerc").write_text("")
    assert find_config(docs) == docs / ".coveragerc"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("setup.cfg", "[metadata]\nname = coverage\n"),
        ("tox.ini", "not an ini file"),
        ("pyproject.toml", "[tool.black]\n"),
        ("pyproject.toml", "not = toml = at all"),
    ],
)
def test_a_file_without_a_section_for_coverage_is_passed_over(
    docs: Path, name: str, text: str
) -> None:
    (docs / name).write_text(text)
    assert find_config(docs) is None


def test_relative_paths_start_at_the_configuration(docs: Path) -> None:
    root = docs.parent
    (root / "lib").mkdir()
    (root / ".coveragerc").write_text(
        "[run]\nbranch = true\nsource =\n  lib\n  pandas\nomit =\n  lib/old/*\n  */tests/*\n"
        "data_file = data/.cov\nconcurrency = multiprocessing, thread\n"
    )
    run = open_coverage(CoverageRequest(folder=Path("/elsewhere")), docs / "nb.ipynb")
    assert run.file.settings == CoverageSettings(
        branch=True,
        source=(str(root / "lib"), "pandas"),
        omit=(str(root / "lib/old/*"), "*/tests/*"),
        concurrency=("thread",),
    )
    assert run.data_file == root / "data" / ".cov" and run.context == "docs/nb.ipynb"


def test_without_a_configuration_data_go_to_the_folder_of_the_command(
    docs: Path, tmp_path: Path
) -> None:
    run = open_coverage(CoverageRequest(folder=tmp_path, source=("repo",)), docs / "nb.ipynb")
    assert run.data_file == tmp_path / ".coverage"
    assert run.file.settings.source == (str(tmp_path / "repo"),)


def test_a_configuration_that_coverage_refuses_is_a_usage_error(docs: Path) -> None:
    (docs / ".coveragerc").write_text("[run]\nbranch = perhaps\n")
    with pytest.raises(UsageError, match="perhaps"):
        open_coverage(CoverageRequest(folder=docs), docs / "nb.ipynb")
