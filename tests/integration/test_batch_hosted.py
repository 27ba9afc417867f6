"""A real batch as a CI system sees it: annotations at the very line, the summary, JUnit XML, GitLab's report; and the last line stays the last."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree as ET

import nbformat
import pytest
import xmlschema

from tests.integration.test_batch import Place, place
from tests.support import ROOT, make_notebook
from tests.unit.reports.batch.ci.test_github import read
from tests.unit.reports.batch.ci.test_gitlab import SCHEMA as CODE_QUALITY

pytestmark = [pytest.mark.kills]
__all__ = ["place"]


def line_of(path: Path, number: int) -> str:
    line: str = json.loads(path.read_text().splitlines()[number - 1].strip().rstrip(","))
    return line.rstrip("\n")


def test_a_batch_on_github_and_gitlab(place: Place) -> None:
    from jsonschema import Draft202012Validator

    docs = place.folder / "repository" / "docs"
    docs.mkdir(parents=True)
    make_notebook(docs / "fine.ipynb", "print('fine')")
    make_notebook(docs / "dies.ipynb", "x = 1", "y = 2\nimport os\nos.abort()")
    raising = make_notebook(docs / "raises.ipynb", "z = 3\nraise ValueError('100%, no')")
    raising.write_text(
        json.dumps(json.loads(nbformat.writes(nbformat.read(raising, as_version=4))))
    )  # on one line
    (docs / "broken.ipynb").write_text("{")
    summary = place.folder / "summary.md"
    summary.write_text("before\n")
    checkout = str(place.folder / "repository")
    place.env |= {
        "GITHUB_ACTIONS": "true",
        "GITHUB_WORKSPACE": checkout,
        "GITHUB_STEP_SUMMARY": str(summary),
    }
    place.env |= {"GITLAB_CI": "true", "CI_PROJECT_DIR": checkout}

    done = place.run("repository", "--no-bisect", "-j", "2")

    found = [read(line) for line in done.stdout.splitlines() if line.startswith("::")]
    errors = {
        properties["file"]: (int(properties["line"]), message)
        for name, properties, message in found
        if name == "error"
    }
    assert set(errors) == {"docs/dies.ipynb", "docs/raises.ipynb", "docs/broken.ipynb"}
    assert line_of(docs / "dies.ipynb", errors["docs/dies.ipynb"][0]) == "os.abort()"
    assert errors["docs/raises.ipynb"][0] == errors["docs/broken.ipynb"][0] == 1
    assert "ValueError: 100%, no" in errors["docs/raises.ipynb"][1]
    text = summary.read_text()
    assert text.startswith("before\n### ") and "docs/dies.ipynb" in text and "os.abort()" in text

    problems = json.loads((place.out / "codequality.json").read_text())
    Draft202012Validator(CODE_QUALITY).validate(problems)
    assert {
        problem["location"]["path"]: problem["location"]["lines"]["begin"] for problem in problems
    } == {path: line for path, (line, _) in errors.items()}
    xmlschema.XMLSchema(ROOT / "tests" / "unit" / "reports" / "batch" / "junit.xsd").validate(
        place.out / "junit.xml"
    )
    cases = {
        suite.attrib["name"]: [child.tag for child in suite.iterfind("testcase/*")]
        for suite in ET.parse(place.out / "junit.xml").getroot()
    }
    assert cases == {
        "repository/docs/broken.ipynb": ["error"],
        "repository/docs/dies.ipynb": ["failure"],
        "repository/docs/fine.ipynb": [],
        "repository/docs/raises.ipynb": ["failure"],
    }

    again = place.run("repository", "--no-bisect", "--resume", "--no-github", "--no-gitlab", "-q")
    assert len(again.stdout.splitlines()) == 1
    assert summary.read_text() == text, "nobody asked"
    assert again.statuses() == done.statuses()
