"""The verdict document: its schema, its keys, its round trip."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from msgspec import Struct

from safe_exec.model.evidence import Frame
from safe_exec.model.limits import (
    Enforcement,
    FolderUse,
    Isolation,
    LimitName,
    Limits,
    Mechanism,
    RepositoryUse,
    SystemCalls,
    Wall,
)
from safe_exec.model.verdict import (
    VERDICT_SCHEMA,
    Cause,
    CellRecord,
    CrashCell,
    Culprit,
    Culprits,
    Environment,
    Fact,
    Status,
    Stopped,
    Usage,
    Verdict,
)
from safe_exec.reports import json_text, schemas
from safe_exec.reports.json_text import plain
from safe_exec.reports.verdict_json import dumps, from_document, load_schema, loads
from tests.unit.builders import (
    every_verdict,
    make_cause,
    make_crash,
    make_culprits,
    make_fact,
    make_verdict,
    name_of,
    nothing_found,
)

SCHEMA = load_schema()
VALIDATOR = Draft202012Validator(SCHEMA)

CONTRACT_KEYS = [
    "schema",
    "safe_exec_version",
    "run_id",
    "started",
    "finished",
    "command",
    "cwd",
    "status",
    "exit_code",
    "notebook",
    "cause",
    "crash_cell",
    "culprits",
    "memory",
    "failures",
    "differences",
    "cells",
    "limits",
    "enforcement",
    "isolation",
    "attempts",
    "runs",
    "flaky_cells",
    "allow_errors",
    "remote_hosts",
    "files",
    "more_files",
    "timeline",
    "profile",
    "usage",
    "stderr_tail",
    "environment",
    "warnings",
    "outputs",
]


def errors_of(document: dict[str, Any]) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in VALIDATOR.iter_errors(document)]


def test_the_schema_is_a_schema() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$id"] == VERDICT_SCHEMA
    assert SCHEMA["properties"]["schema"]["enum"] == [VERDICT_SCHEMA]


@pytest.mark.parametrize("verdict", every_verdict(), ids=name_of)
def test_every_verdict_obeys_the_schema_and_comes_back(verdict: Verdict) -> None:
    document = json.loads(dumps(verdict))
    assert errors_of(document) == []
    assert document == plain(verdict)
    assert from_document(document) == verdict


def test_the_keys_are_those_of_the_contract_in_its_order() -> None:
    assert list(plain(make_verdict())) == CONTRACT_KEYS
    assert SCHEMA["required"] == CONTRACT_KEYS == list(SCHEMA["properties"])


@pytest.mark.parametrize("path", schemas.FILES, ids=lambda path: path.name)
def test_the_schemas_are_made_from_the_types(path: Path) -> None:
    assert path.read_text("utf-8") == schemas.text_of(schemas.FILES[path]()), "run `make schema`"


def test_the_overlay_of_the_schema_names_what_there_is() -> None:
    """A type or key that was renamed must not lose its description, tie or exception in silence."""
    types = {"Verdict": schemas.verdict_schema(), "Summary": schemas.summary_schema()}
    types |= types["Verdict"]["$defs"] | types["Summary"]["$defs"]
    for table in (schemas.OPTIONAL, schemas.DESCRIPTIONS):
        for name, keys in table.items():
            assert set(keys) <= set(types[name]["properties"]), name
    for name, rules in schemas.RULES.items():
        tied = set(re.findall(r"'properties': \{'(\w+)'", str(rules)))
        assert tied and tied <= set(types[name]["properties"]), name


def test_every_status_has_its_exit_code_in_the_schema() -> None:
    ties = next(rule["oneOf"] for rule in SCHEMA["allOf"] if "oneOf" in rule)
    said = {
        tie["properties"]["status"]["const"]: tie["properties"]["exit_code"]["const"]
        for tie in ties
    }
    assert said == {status.value: status.exit_code for status in Status}


ENVIRONMENT = plain(make_verdict())["environment"]
BROKEN = [
    ("a wrong exit code", {"exit_code": 0}),
    ("no such status", {"status": "crashed"}),
    ("a further key", {"mood": "bad"}),
    ("a local time", {"started": "2026-01-01T12:00:00+02:00"}),
    (
        "a limit with a unit",
        {"limits": {**plain(make_verdict())["limits"], "memory": "1 GiB"}},
    ),
    ("a kernel that died of nothing", {"cause": None}),
    ("a positive signal", {"cause": {**plain(make_cause()), "signal": 9}}),
    ("a signal and an exit code", {"cause": {**plain(make_cause()), "exit_code": 137}}),
    ("no such kind", {"cause": {**plain(make_cause()), "kind": "bad_luck"}}),
    ("line 0", {"crash_cell": {**plain(make_crash()), "line": 0}}),
    ("no such limit", {"enforcement": {"patience": {"by": "none", "hard": False, "note": ""}}}),
    ("nothing, and hard", {"enforcement": {"memory": {"by": "none", "hard": True, "note": ""}}}),
    (
        "no such wall",
        {
            "environment": {
                **ENVIRONMENT,
                "isolation": {"moat": {"by": "none", "hard": False, "note": ""}},
            }
        },
    ),
    (
        "no wall, and hard",
        {
            "environment": {
                **ENVIRONMENT,
                "isolation": {"home": {"by": "none", "hard": True, "note": ""}},
            }
        },
    ),
    ("no such use of the folder", {"isolation": {**plain(Isolation()), "folder": "burn"}}),
    ("a wall less", {"isolation": {k: v for k, v in plain(Isolation()).items() if k != "network"}}),
    ("no host", {"remote_hosts": [None]}),
    ("a flag that is a number", {"allow_errors": 1}),
    (
        "too long a timeline",
        {"timeline": {"seconds": [0.0] * 501, "memory": [], "cpu": [], "cell": []}},
    ),
]


@pytest.mark.parametrize(
    "change", [change for _, change in BROKEN], ids=[name for name, _ in BROKEN]
)
def test_the_schema_refuses(change: dict[str, Any]) -> None:
    assert errors_of({**plain(make_verdict()), **change})


def test_the_schema_refuses_a_cause_of_a_passed_run() -> None:
    assert errors_of({**plain(make_verdict(Status.PASSED)), "cause": plain(make_cause())})


@pytest.mark.parametrize("key", CONTRACT_KEYS)
def test_the_schema_asks_for_every_key(key: str) -> None:
    document = plain(make_verdict())
    del document[key]
    assert errors_of(document)


WRONG_CULPRITS = [
    ("a count too few", {"reproduced": [2]}),
    ("a count too many", {"reproduced": [2, 2, 2]}),
    ("less than none", {"reproduced": [-1, 2]}),
    ("no such end", {"stopped": "tired"}),
    ("no such role", {"cells": [{**plain(make_culprits().cells[0]), "role": "victim"}]}),
    (
        "a cell without a line",
        {
            "cells": [
                {k: v for k, v in plain(make_culprits().cells[0]).items() if k != "source_line"}
            ]
        },
    ),
    ("nothing, and yet done", {"cells": []}),
    ("nothing, and no less", {"cells": [], "stopped": "budget"}),
    ("no time", {"seconds": None}),
    ("a cell before the first", {"look_first": -1}),
    ("no place", {"look_first": "second"}),
    ("a further key", {"mood": "bad"}),
]


@pytest.mark.parametrize(
    "change", [change for _, change in WRONG_CULPRITS], ids=[name for name, _ in WRONG_CULPRITS]
)
def test_the_schema_refuses_culprits_with(change: dict[str, Any]) -> None:
    document = plain(make_verdict(culprits=make_culprits()))
    assert errors_of(document) == []
    assert errors_of({**document, "culprits": {**document["culprits"], **change}})


@pytest.mark.parametrize(
    "key", sorted(set(Culprits.__struct_fields__) - schemas.OPTIONAL["Culprits"])
)
def test_the_schema_asks_for_every_key_of_culprits(key: str) -> None:
    document = plain(make_verdict(culprits=make_culprits()))
    del document["culprits"][key]
    assert errors_of(document)


@pytest.mark.parametrize("stopped", Stopped)
def test_a_search_may_find_nothing(stopped: Stopped) -> None:
    document = plain(make_verdict(culprits=nothing_found(stopped)))
    assert errors_of(document) == []
    assert document["culprits"]["cells"] == [] and document["culprits"]["stopped"] == stopped.value


def test_a_passed_run_has_no_culprits() -> None:
    assert errors_of(plain(make_verdict(Status.PASSED, culprits=make_culprits())))


def test_what_json_cannot_hold_becomes_null_or_an_escape() -> None:
    usage = Usage(wall_seconds=math.nan, cpu_seconds=math.inf)
    facts = (make_fact(value=-math.inf), make_fact(value="a\ud800b"))
    verdict = make_verdict(cause=make_cause(evidence=facts), usage=usage, cwd="/tmp/caf\udce9")
    text = dumps(verdict)
    document = json.loads(text)
    assert b"NaN" not in text and b"Infinity" not in text
    assert document["usage"]["wall_seconds"] is None and document["usage"]["cpu_seconds"] is None
    assert [fact["value"] for fact in document["cause"]["evidence"]] == [None, "a\\ud800b"]
    assert document["cwd"] == "/tmp/caf\\udce9"
    assert errors_of(document) == []


def test_the_text_is_utf8_indented_and_ends_with_a_newline() -> None:
    text = dumps(make_verdict(cwd="/home/zoë"))
    assert "/home/zoë".encode() in text
    assert text.startswith(b'{\n  "schema": "safe-exec/verdict/1",\n') and text.endswith(b"}\n")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": "safe-exec/verdict/2"}, "schema is 'safe-exec/verdict/2'"),
        ({"mood": "bad"}, "verdict: object contains unknown field `mood`"),
        ({"status": "crashed"}, "verdict.status: invalid enum value 'crashed'"),
        ({"cwd": 3}, "verdict.cwd: expected `str`, got `int`"),
        (
            {"usage": {"oom_kills": "one"}},
            "verdict.usage.oom_kills: expected `int . null`, got `str`",
        ),
        ({"notebook": {"path": "x"}}, "verdict.notebook: object missing required field `sha256`"),
        ({"cells": {}}, "verdict.cells: expected `array`, got `object`"),
        (
            {"culprits": {**plain(make_culprits()), "reproduced": [2]}},
            "verdict.culprits.reproduced: expected `array` of length 2",
        ),
        (
            {"culprits": {**plain(make_culprits()), "trials": None}},
            "verdict.culprits.trials: expected `int`, got `null`",
        ),
        (
            {"culprits": {**plain(make_culprits()), "stopped": "tired"}},
            "verdict.culprits.stopped: invalid enum value 'tired'",
        ),
        (
            {"cause": {**plain(make_cause()), "evidence": [{**plain(make_fact()), "value": []}]}},
            "evidence.0..value: ",
        ),
    ],
)
def test_reading_back_names_what_does_not_fit(change: dict[str, Any], said: str) -> None:
    document = {**plain(make_verdict()), **change}
    with pytest.raises(ValueError, match=said) as from_values:
        from_document(document)
    with pytest.raises(ValueError, match=said) as from_text:
        loads(json.dumps(document).encode())
    assert "\n" not in f"{from_values.value}{from_text.value}"


def test_a_whole_number_is_a_fine_number_of_seconds() -> None:
    document = plain(make_verdict())
    document["limits"]["cell_timeout"] = 30
    assert from_document(document).limits.cell_timeout == 30.0


# --- any verdict at all -----------------------------------------------------------------------------------------

counts = st.none() | st.integers(0, 1 << 60)
amounts = st.none() | st.floats(0, allow_infinity=False, allow_nan=False)
finite = st.floats(allow_infinity=False, allow_nan=False)
texts = st.text(max_size=12)
frames = st.builds(Frame, function=texts, line=counts, file=st.none() | texts, cell=counts)
facts = st.builds(
    Fact,
    fact=st.text(min_size=1, max_size=8),
    value=texts | st.booleans() | st.none() | st.integers() | finite,
    source=texts,
)
causes = st.builds(
    Cause,
    summary=st.text(min_size=1, max_size=8),
    evidence=st.lists(facts, max_size=2).map(tuple),
    advice=texts,
    signal=st.none() | st.integers(-64, -1),
    exit_code=st.none(),
)
crashes = st.builds(
    CrashCell,
    index=st.integers(0, 99),
    code_index=st.integers(0, 99),
    execution_count=counts,
    line=st.none() | st.integers(1, 99),
    stack=st.lists(frames, max_size=2).map(tuple),
)
records = st.builds(
    CellRecord,
    index=st.integers(0, 99),
    code_index=st.integers(0, 99),
    started=amounts,
    seconds=amounts,
    cpu_seconds=amounts,
    memory_peak=counts,
    memory_kept=st.none() | st.integers(),
    output_bytes=counts,
)
culprits = st.builds(
    Culprits,
    cells=st.lists(
        st.builds(
            Culprit,
            index=st.integers(0, 99),
            code_index=st.integers(0, 99),
            source_line=st.none() | texts,
        ),
        min_size=1,
        max_size=3,
    ).map(tuple),
    look_first=counts,
    trials=st.integers(0, 99),
    cached=st.integers(0, 99),
    reproduced=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    seconds=st.floats(0, allow_infinity=False, allow_nan=False),
    repro_notebook=st.none() | texts,
    stopped=st.none() | st.sampled_from(Stopped),
)
enforcements = st.dictionaries(
    st.sampled_from(LimitName),
    st.builds(
        Enforcement, by=st.sampled_from(Mechanism).filter(lambda by: by is not Mechanism.NONE)
    ),
)
walls = st.dictionaries(
    st.sampled_from(Wall),
    st.builds(Enforcement, by=st.sampled_from(Mechanism), hard=st.just(value=False), note=texts),
)
isolations = st.builds(
    Isolation,
    folder=st.sampled_from(FolderUse),
    repository=st.sampled_from(RepositoryUse),
    system_calls=st.sampled_from(SystemCalls),
    env=st.lists(texts, max_size=2).map(tuple),
    hide=st.lists(texts, max_size=2).map(tuple),
)
verdicts = st.builds(
    make_verdict,
    status=st.sampled_from([status for status in Status if status is not Status.PASSED]),
    kind=st.none(),
    command=st.lists(texts, max_size=3).map(tuple),
    cwd=texts,
    cause=causes,
    crash_cell=st.none() | crashes,
    culprits=st.none() | culprits,
    cells=st.lists(records, max_size=3).map(tuple),
    limits=st.builds(Limits, memory=counts, cpus=amounts, cell_timeout=amounts, output=counts),
    enforcement=enforcements,
    usage=st.builds(Usage, wall_seconds=amounts, memory_peak=counts),
    environment=st.builds(
        Environment, packages=st.none() | st.dictionaries(texts, texts, max_size=2), isolation=walls
    ),
    isolation=isolations,
    allow_errors=st.booleans(),
    remote_hosts=st.lists(texts, max_size=2).map(tuple),
    stderr_tail=st.text(),
    warnings=st.lists(texts, max_size=2).map(tuple),
    outputs=st.dictionaries(texts, texts, max_size=2),
)


@settings(max_examples=60, deadline=None)
@given(verdicts)
def test_any_verdict_comes_back_as_it_was(verdict: Verdict) -> None:
    document = json.loads(dumps(verdict))
    assert errors_of(document) == []
    assert from_document(document) == loads(dumps(verdict)) == verdict


def as_json_writes_it(value: Any) -> Any:
    """Any value as Python's json module takes it; written by hand, to compare with."""
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Struct):
        tag = {"schema": VERDICT_SCHEMA} if isinstance(value, Verdict) else {}
        return tag | {
            name: as_json_writes_it(getattr(value, name)) for name in value.__struct_fields__
        }
    if isinstance(value, Mapping):
        return {as_json_writes_it(key): as_json_writes_it(item) for key, item in value.items()}
    return [as_json_writes_it(item) for item in value] if isinstance(value, tuple | list) else value


@settings(max_examples=60, deadline=None)
@given(verdicts)
def test_the_text_is_what_pythons_json_writes(verdict: Verdict) -> None:
    document = as_json_writes_it(verdict)
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, indent=2) + "\n"
    assert dumps(verdict) == text.encode()
    assert list(document) == CONTRACT_KEYS


any_float = st.floats() | st.floats(1e-8, 1e-3) | st.floats(1e14, 1e19)
any_text = st.text(st.characters()) | st.sampled_from(["1e-06", "1e-06,", '"', "\udc80", "0.00001"])


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | any_float | any_text,
        lambda items: st.lists(items, max_size=4) | st.dictionaries(any_text, items, max_size=4),
    )
)
def test_any_value_is_written_as_pythons_json_writes_it(value: Any) -> None:
    wanted = as_json_writes_it(value)
    assert (
        json_text.document(value)
        == (json.dumps(wanted, ensure_ascii=False, allow_nan=False, indent=2) + "\n").encode()
    )
    assert (
        json_text.line(value)
        == (json.dumps(wanted, ensure_ascii=False, allow_nan=False) + "\n").encode()
    )


def test_mappings_and_numbers_beyond_64_bits() -> None:
    assert plain(MappingProxyType({"a": (1 << 70, -1e-05, 10.00001)})) == {
        "a": [1 << 70, -1e-05, 10.00001]
    }
    with pytest.raises(NotImplementedError, match="object has no form in JSON"):
        plain(object())


@settings(max_examples=100)
@given(st.text(st.characters(), max_size=30))
def test_any_text_can_be_written(words: str) -> None:
    document = json.loads(dumps(make_verdict(stderr_tail=words)))
    assert document["stderr_tail"].encode() == words.encode("utf-8", "backslashreplace")
