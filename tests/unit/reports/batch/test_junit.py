"""JUnit XML: valid for the readers there are, the right result for each status, whatever text is in it."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

import junitparser
import pytest
import xmlschema
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from safe_exec.model.verdict import Status
from safe_exec.reports.batch import junit
from safe_exec.reports.batch.results import BatchResult
from tests.unit.batches import every_entry, make_batch, make_entry
from tests.unit.builders import GIB, make_cause, make_culprits, make_verdict

SCHEMA = xmlschema.XMLSchema(Path(__file__).with_name("junit.xsd"))


def written(batch: BatchResult) -> ET.Element:
    path = batch.out / "junit.xml"
    junit.write(batch, path)
    SCHEMA.validate(path)
    return ET.parse(path).getroot()


def result(suite: ET.Element) -> ET.Element | None:
    return next(suite.iterfind("testcase/*"), None)


def properties(suite: ET.Element) -> dict[str, str]:
    return {
        found.attrib["name"]: found.attrib["value"]
        for found in suite.iterfind("properties/property")
    }


def test_every_notebook_is_a_case_in_a_suite_that_every_reader_takes(tmp_path: Path) -> None:
    batch = make_batch(tmp_path, every_entry(tmp_path))
    root = written(batch)
    assert [suite.attrib["name"] for suite in root] == [entry.path for entry in batch.results]
    parsed = junitparser.JUnitXml.fromfile(str(batch.out / "junit.xml"))
    parsed.update_statistics()
    kinds = [found.tag if found is not None else "passed" for found in map(result, root)]
    assert parsed.tests == len(batch.results)
    assert (parsed.failures, parsed.errors, parsed.skipped) == (
        kinds.count("failure"),
        kinds.count("error"),
        2,
    )


def test_no_notebooks(tmp_path: Path) -> None:
    assert len(written(make_batch(tmp_path, []))) == 0


@pytest.mark.parametrize(
    ("status", "tag"),
    [
        (Status.PASSED, None),
        (Status.CELL_ERROR, "failure"),
        (Status.KERNEL_DIED, "failure"),
        (Status.TIMEOUT, "failure"),
        (Status.LIMIT_EXCEEDED, "failure"),
        (Status.START_FAILED, "error"),
        (Status.INTERNAL_ERROR, "error"),
        (Status.CANCELLED, "error"),
    ],
)
def test_results(tmp_path: Path, status: Status, tag: str | None) -> None:
    suite = written(
        make_batch(tmp_path, [make_entry(tmp_path, "a/b/c.ipynb", make_verdict(status))])
    )[0]
    found = result(suite)
    assert (found.tag if found is not None else None) == tag
    case = suite.find("testcase")
    assert case is not None and case.attrib == {
        "name": "c.ipynb",
        "classname": "a/b",
        "time": "14.2",
    }
    assert properties(suite)["status"] == status.value


@pytest.mark.parametrize(
    ("changes", "tag", "message"),
    [
        ({"status": "not_run"}, "skipped", "not run"),
        (
            {"status": "unchanged"},
            "skipped",
            "unchanged · passed before, and nothing it depends on has changed",
        ),
        (
            {"status": "refused", "error": "a.ipynb: not JSON"},
            "error",
            "refused · a.ipynb: not JSON",
        ),
    ],
)
def test_results_without_a_verdict(
    tmp_path: Path, changes: dict[str, str], tag: str, message: str
) -> None:
    entry = replace(make_entry(tmp_path, "a.ipynb", None), **changes)
    suite = written(make_batch(tmp_path, [entry]))[0]
    found = result(suite)
    assert found is not None and (found.tag, found.attrib["message"]) == (tag, message)
    assert suite.attrib["package"] == junit.TOP_FOLDER


def test_what_a_failure_says(tmp_path: Path) -> None:
    verdict = make_verdict(culprits=make_culprits(), stderr_tail="last words\n")
    suite = written(make_batch(tmp_path, [make_entry(tmp_path, "a.ipynb", verdict, attempts=3)]))[0]
    found = result(suite)
    assert found is not None and found.text is not None
    assert found.attrib["type"] == "out_of_memory"
    assert found.attrib["message"].startswith(
        "kernel died in code cell 2 · out of memory · limit 1.0 GiB, peak 1.0 GiB · caused by"
    )
    for words in (
        'joined = frame.merge(big, on="k")',
        "big = load_everything()",
        "+612 MiB kept",
        "next: give it more",
        "evidence: oom kills: 1",
    ):
        assert words in found.text
    figures = properties(suite)
    assert (
        figures["memory_peak"] == str(GIB)
        and figures["cpu_seconds"] == "3.5"
        and figures["attempts"] == "3"
    )
    assert (
        figures["culprits"] == "0 1"
        and figures["crash_line"] == "2"
        and figures["verdict"] == "a.ipynb.verdict.json"
    )
    assert suite.findtext("system-err") == "last words\n"


@pytest.mark.parametrize(
    ("cwd", "repro", "command"),
    [
        ("docs", "out/docs/a b.repro.ipynb", "safe-exec run 'out/docs/a b.repro.ipynb' --cwd docs"),
        (".", "out/a.repro.ipynb", "safe-exec run out/a.repro.ipynb --cwd ."),
        ("docs", "docs/a.repro.ipynb", "safe-exec run docs/a.repro.ipynb"),
        ("docs", "-x/a.repro.ipynb", "safe-exec run ./-x/a.repro.ipynb --cwd docs"),
        ("docs", None, "safe-exec replay out/docs/a.ipynb.verdict.json"),
    ],
)
def test_the_command_to_reproduce_is_for_the_directory_of_the_batch(
    tmp_path: Path, cwd: str, repro: str | None, command: str
) -> None:
    verdict = make_verdict(cwd=str(tmp_path / cwd))
    entry = make_entry(tmp_path, "docs/a.ipynb", verdict, repro=tmp_path / repro if repro else None)
    found = result(written(make_batch(tmp_path, [entry]))[0])
    assert (
        found is not None
        and found.text is not None
        and found.text.splitlines()[-1] == f"reproduce: {command}"
    )


def test_what_was_not_measured_is_no_property(tmp_path: Path) -> None:
    verdict = make_verdict()
    verdict = replace(verdict, usage=replace(verdict.usage, memory_peak=None, cpu_seconds=None))
    figures = properties(
        written(make_batch(tmp_path, [make_entry(tmp_path, "a.ipynb", verdict)]))[0]
    )
    assert not {"memory_peak", "cpu_seconds"} & set(figures) and "wall_seconds" in figures


def test_a_long_stderr_is_cut_and_says_so(tmp_path: Path) -> None:
    verdict = make_verdict(stderr_tail="x" * 60_000 + "the end")
    suite = written(make_batch(tmp_path, [make_entry(tmp_path, "a.ipynb", verdict)]))[0]
    said = suite.findtext("system-err") or ""
    assert said.startswith("(the first 51815 characters are left out)\n") and said.endswith(
        "the end"
    )


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None
)
@given(
    st.text(st.characters(exclude_categories=()), max_size=60).filter(
        lambda words: "/" not in words
    )
)
def test_any_text_makes_a_valid_file(tmp_path: Path, words: str) -> None:
    cause = make_cause(summary=f"s{words}", advice=words)
    verdict = make_verdict(cause=cause, stderr_tail=words.encode("utf-8", "replace").decode())
    entry = replace(make_entry(tmp_path, "a.ipynb", verdict), path=f"folder {words}/{words}.ipynb")
    suite = written(make_batch(tmp_path, [entry]))[0]
    assert suite.attrib["name"].startswith("folder ")


@pytest.mark.parametrize("words", ["\x00", "\x1b[31m", "\x0b", "\ufffe", "\ud800", "a\x7f\x85"])
def test_characters_that_xml_forbids(words: str) -> None:
    ET.fromstring(f"<a>{junit.clean(words).replace('<', '&lt;')}</a>")
    assert junit.clean("tab\tline\nä\U0001f600") == "tab\tline\nä\U0001f600"
