"""Profiles and files of limits, their errors, and what holds when several sources speak of the same limit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from safe_exec.errors import LimitsError
from safe_exec.keeper.path_patterns import matches
from safe_exec.limits import values
from safe_exec.limits.profiles import (
    LIMIT_NAMES,
    PROJECT_FILE,
    Figure,
    Resolved,
    apply,
    cell_limits,
    find_project_file,
    format_limit,
    load_profile,
    merge_notebook_limits,
    parse_overrides,
    profile_dir,
    project_overrides,
    resolve,
    shipped_profiles,
    tighten,
)
from safe_exec.limits.project_file import ProjectLimits
from safe_exec.limits.spec import METAVARS, OPTIONS, ROWS, Kind
from safe_exec.model.limits import (
    FolderUse,
    Isolation,
    LimitName,
    Limits,
    RepositoryUse,
    SystemCalls,
)

ROOT = Path(__file__).parents[3]
G = 2**30
MEMORY = 8 * G


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return name


def error_of(name: str) -> str:
    with pytest.raises(LimitsError) as caught:
        load_profile(name, machine_memory=MEMORY)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    return text


# --- the profiles that ship -------------------------------------------------------------------------------------


def test_the_table_of_limits_has_every_field_and_name() -> None:
    assert tuple(row.name for row in ROWS) == Limits.__struct_fields__ == LIMIT_NAMES
    assert [row.name for row in OPTIONS] == [name.value for name in LimitName]
    assert set(values._PARSERS) == set(METAVARS) == set(Kind)


def test_the_kind_of_a_limit_is_the_type_of_its_field() -> None:
    hints = get_type_hints(Limits)
    for row in ROWS:
        is_whole = int in get_args(hints[row.name])
        assert is_whole == (row.kind in (Kind.SIZE, Kind.COUNT)), row.name


def test_shipped_profiles() -> None:
    assert shipped_profiles() == ("ci", "default", "strict", "untrusted")


@pytest.mark.parametrize("name", ["ci", "default", "strict", "untrusted"])
def test_shipped_profiles_are_complete_and_commented(name: str) -> None:
    text = (profile_dir() / f"{name}.yaml").read_text()
    document = yaml.safe_load(text)
    assert set(document["limits"]) == set(LIMIT_NAMES)
    limits, _, walls = text.partition("\nlimits:\n")[2].partition("\nisolation:\n")
    assert set(document.get("isolation", {})) <= set(Isolation.__struct_fields__) and bool(
        walls
    ) is (name != "default")
    # What stands right above the section is its comment.
    for block in limits.rpartition("\n\n#")[0 if walls else 2].strip().split("\n\n"):
        *comment, last = block.splitlines()
        assert comment, f"{last.strip()} has no comment"
        assert all(line.lstrip().startswith("# ") for line in comment)
        assert "Held by" in block


def test_default_profile() -> None:
    profile = load_profile("default", machine_memory=MEMORY)
    assert (profile.loosenable, profile.firm, profile.name) == (True, False, "default")
    assert profile.limits.memory == 6 * G
    assert (profile.limits.cell_timeout, profile.limits.timeout, profile.limits.file_size) == (
        600,
        3600,
        None,
    )


def test_ci_and_strict_profiles() -> None:
    ci, strict = (load_profile(name, machine_memory=MEMORY) for name in ("ci", "strict"))
    assert (ci.limits.memory, ci.limits.cell_timeout, ci.loosenable, ci.firm) == (
        2 * G,
        300,
        False,
        False,
    )
    assert (strict.limits.memory, strict.limits.cpus, strict.loosenable, strict.firm) == (
        G // 2,
        1.0,
        False,
        True,
    )


def test_what_the_profiles_wall_off() -> None:
    found = {name: load_profile(name, machine_memory=MEMORY) for name in shipped_profiles()}
    assert found["default"].isolation == Isolation()
    ci = Isolation(
        hide_home=True,
        read_only_system=True,
        own_processes=True,
        listed_environment=True,
        system_calls=SystemCalls.REFUSE,
    )
    assert found["ci"].isolation == ci
    strict = replace(
        ci, folder=FolderUse.COPY, repository=RepositoryUse.CLOSED, write_back=False, network=False
    )
    assert found["strict"].isolation == strict
    assert found["untrusted"].isolation == replace(strict, other_user=True, required=True)
    assert found["untrusted"].limits == found["strict"].limits
    assert (found["untrusted"].firm, found["untrusted"].loosenable) == (True, False)


def test_unknown_profile_names_the_nearest() -> None:
    assert error_of("strct") == (
        "unknown profile 'strct'; did you mean strict? expected one of ci, default, strict, untrusted, or a file (its name with / or .yaml)"
    )


def test_importing_is_light() -> None:
    code = "import sys, safe_exec.limits.profiles, safe_exec.notebook.notebook; print({'yaml','nbformat','psutil'} & set(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "set()"


# --- a user's own file ------------------------------------------------------------------------------------------


def test_a_file_is_laid_over_default() -> None:
    profile = load_profile(
        write("my.yaml", "description: mine\nlimits:\n  memory: 4G\n"), machine_memory=MEMORY
    )
    assert (profile.limits.memory, profile.limits.timeout) == (4 * G, 3600)
    assert (profile.name, profile.description, profile.loosenable) == ("my.yaml", "mine", False)


def test_a_file_may_extend_a_profile_or_a_file() -> None:
    write("sub/base.yaml", "extends: strict\nlimits: {cell-timeout: 30s}\n")
    profile = load_profile(
        write("my.yaml", "extends: sub/base.yaml\nlimits: {memory: 1G}\n"), machine_memory=None
    )
    assert (profile.limits.memory, profile.limits.cell_timeout, profile.limits.processes) == (
        G,
        30,
        128,
    )
    assert profile.firm


def test_a_file_without_an_ending_is_found_but_shipped_names_come_first() -> None:
    assert load_profile(write("mine", "limits:\n"), machine_memory=MEMORY).limits.timeout == 3600
    write("ci", "limits: {memory: 1}")
    assert load_profile("ci", machine_memory=MEMORY).limits.memory == 2 * G
    assert load_profile("./ci", machine_memory=MEMORY).limits.memory == 1


def test_nothing_is_unlimited() -> None:
    text = "limits:\n  memory:\n  cell_timeout: none\n  timeout: 'unlimited'\n  output: ~\n"
    limits = load_profile(write("my.yaml", text), machine_memory=MEMORY).limits
    assert (limits.memory, limits.cell_timeout, limits.timeout, limits.output) == (None,) * 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "limits:\n  memroy: 1G",
            "my.yaml:2: unknown limit 'memroy'; did you mean memory? expected one of cell_output,",
        ),
        (
            "limits:\n  memory: 12Q",
            "my.yaml:2: memory: '12Q' is not a size: bytes, or a number with K, M, G or T",
        ),
        ("limits:\n\n  timeout: -5s", "my.yaml:3: timeout: '-5s' is negative; expected a duration"),
        ("limits:\n  cell-timeout: 1:30", "my.yaml:2: cell_timeout: '1:30' is not a duration"),
        ("limits:\n  memory: yes", "my.yaml:2: memory: True is not a size"),
        ("limits:\n  memory: .inf", "my.yaml:2: memory: '.inf' is not a size"),
        ("limits:\n  memory: [1]", "my.yaml:2: memory: expected one value, found a list"),
        (
            "limits:\n  interrupt_grace: null",
            "my.yaml:2: interrupt_grace: None is not allowed here",
        ),
        ("limits:\n  memory: 1\n  memory: 2", "my.yaml:3: memory is given twice; keep one"),
        ("limits:\n  cell_timeout: 1\n  cell-timeout: 2", "my.yaml:3: cell_timeout is given twice"),
        ("limits: 5", "my.yaml:1: limits: expected a mapping of keys to values, found text"),
        ("- a", "my.yaml:1: the document: expected a mapping of keys to values, found a list"),
        ("memory: 1G", "my.yaml:1: memory stands at the top level; put it under limits:"),
        (
            "limit: {}",
            "my.yaml:1: unknown section 'limit'; did you mean limits? expected one of description, extends",
        ),
        ("extends: cj", "my.yaml: extends: unknown profile 'cj'; did you mean ci?"),
        ("extends: [ci]", "my.yaml:1: extends: expected text, found a list"),
        ("firm: maybe", "my.yaml:1: firm: expected true or false, found text"),
        ("extends: my.yaml", "my.yaml: extends itself, by way of my.yaml"),
        ("a: b: c", "my.yaml:1:5: not valid YAML: "),
        ("a: [1,\nb: 2", "my.yaml:2:5: not valid YAML: "),
        ("a: 1\n---\nb: 2", "my.yaml:2:1: not valid YAML: "),
        ("a: \x07", "my.yaml: not valid YAML: "),
        ("? [1]\n: 2", "my.yaml:1: expected a word as key, found a sequence"),
        (
            "a: !!python/name:os.system x",
            "my.yaml:1: the tag tag:yaml.org,2002:python/name:os.system is not supported",
        ),
        (
            "a: &x [1]\nb: [*x, *x]",
            "my.yaml:2: aliases (*x) are not supported; write the value out",
        ),
        ("a: &x [*x]", "my.yaml:1: aliases (*x) are not supported"),
        ("[" * 100_000, "my.yaml:1: nested deeper than 20 levels"),
        ("- " * 100_000, "my.yaml:1: nested deeper than 20 levels"),
        ("#" * (2**20 + 1), "my.yaml: larger than 1 MiB"),
    ],
    ids=lambda value: value[:30],
)
@pytest.mark.parametrize("libyaml", [True, False], ids=["libyaml", "python"])
def test_errors_of_files(
    text: str, expected: str, libyaml: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same with each parser; what is invalid in the file is PyYAML's wording."""
    if not libyaml:
        monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    write("my.yaml", text)
    assert error_of("my.yaml").startswith(expected)


def test_files_that_are_none() -> None:
    assert error_of("nope.yaml") == "nope.yaml: no such file"
    write("right.yaml", "")
    assert error_of("rihgt.yaml") == "rihgt.yaml: no such file; did you mean right.yaml?"
    assert error_of("./") == ".: is a directory, not a file"
    os.mkfifo("pipe.yaml")
    assert error_of("pipe.yaml") == "pipe.yaml: is a pipe, not a file"
    Path("latin.yaml").write_bytes(b"a: \xe9")
    assert error_of("latin.yaml") == "latin.yaml: not UTF-8 text (byte 3)"
    assert "cannot be read" in error_of("nul\0.yaml")


def test_a_cycle_of_files() -> None:
    write("a.yaml", "extends: b.yaml")
    write("b.yaml", "extends: a.yaml")
    assert error_of("a.yaml") == "a.yaml: extends itself, by way of b.yaml"


@given(st.binary(max_size=60))
def test_any_bytes_give_limits_or_one_line(data: bytes) -> None:
    Path("fuzz.yaml").write_bytes(data)
    try:
        load_profile("fuzz.yaml", machine_memory=MEMORY)
    except LimitsError:
        assert error_of("fuzz.yaml").startswith("fuzz.yaml")


# --- figures ----------------------------------------------------------------------------------------------------


def test_overrides() -> None:
    found = parse_overrides(
        {"memory": "25%", "cell-timeout": "5m", "cpus": 2}, error_prefix="x", machine_memory=MEMORY
    )
    assert found == {"memory": 2 * G, "cell_timeout": 300, "cpus": 2}


@pytest.mark.parametrize(
    ("mapping", "where", "expected"),
    [
        ({"memory": "x"}, "--safe-exec-", "--safe-exec-memory: 'x' is not a size"),
        ({"cell_timeout": "x"}, "--", "--cell-timeout: 'x' is not a duration"),
        (
            {"memory": "50%"},
            "a.yaml",
            "a.yaml: memory: '50%' of an unknown memory; give a size such as 2G",
        ),
        (
            {"memory": "150%"},
            "a.yaml",
            "a.yaml: memory: '150%' is not a share of the machine's memory",
        ),
        ({"timeout": "50%"}, "a.yaml", "a.yaml: timeout: '50%' is not a duration"),
        ({"mem\nory": 1}, "--", r"options: unknown limit 'mem\\nory'; did you mean memory"),
        (
            {"zzz": 1},
            "nb",
            "nb: unknown limit 'zzz'; expected one of cell_output, cell_timeout, cpu_time",
        ),
    ],
)
def test_errors_of_figures(mapping: dict[str, object], where: str, expected: str) -> None:
    with pytest.raises(LimitsError) as caught:
        parse_overrides(mapping, error_prefix=where, machine_memory=None)
    assert str(caught.value).startswith(expected.replace("\\\\", "\\"))


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("memory", 2 * G, "2.0 GiB"),
        ("timeout", 300.0, "5m"),
        ("cpus", 0.5, "0.5"),
        ("processes", None, "unlimited"),
    ],
)
def test_format_limit(name: str, value: Figure, text: str) -> None:
    assert format_limit(name, value) == text


def figures(name: str) -> st.SearchStrategy[Figure]:
    if name in ("processes", "open_files"):
        return st.none() | st.integers(1, 2**31 - 1)
    if name in ("memory", "file_size", "cell_output", "output", "disk", "shm"):
        return st.none() | st.integers(1, 2**63 - 1)
    durations = st.floats(0.01, 65536.0)
    return durations if name == "interrupt_grace" else st.none() | durations


overrides = st.fixed_dictionaries({}, optional={name: figures(name) for name in LIMIT_NAMES})
all_limits = st.fixed_dictionaries({name: figures(name) for name in LIMIT_NAMES}).map(
    lambda d: apply(Limits(), d)
)


@given(all_limits)
def test_limits_come_back_from_metadata(limits: Limits) -> None:
    found = resolve(metadata={"safe_exec": {"limits": limits.as_dict()}}, machine_memory=MEMORY)
    assert found.limits == limits
    assert found.warnings == ()


@given(all_limits, overrides)
def test_tighten_never_loosens(limits: Limits, wanted: dict[str, Figure]) -> None:
    tight, ignored = tighten(limits, wanted)
    for name in LIMIT_NAMES:
        old, new = getattr(limits, name), getattr(tight, name)
        assert old is None or (new is not None and new <= old)
        assert new == (wanted[name] if name in wanted and name not in ignored else old)
    assert tighten(tight, wanted) == (tight, ignored)


@given(all_limits, overrides)
def test_apply_takes_all(limits: Limits, wanted: dict[str, Figure]) -> None:
    assert apply(limits, wanted).as_dict() == limits.as_dict() | wanted


@given(all_limits, overrides, st.booleans())
def test_merging_warns_of_what_is_ignored(
    limits: Limits, wanted: dict[str, Figure], loosenable: bool
) -> None:
    merged, warnings = merge_notebook_limits(limits, wanted, loosenable=loosenable)
    assert merged == (apply(limits, wanted) if loosenable else tighten(limits, wanted)[0])
    assert len(warnings) == (0 if loosenable else len(tighten(limits, wanted)[1]))


# --- what holds -------------------------------------------------------------------------------------------------


def resolved(text: str = "", **sources: object) -> Resolved:
    """``text`` is the content of a safe-exec.yaml that covers the notebook."""
    project: ProjectLimits | None = None
    if text:
        file = Path(write(PROJECT_FILE, text))
        project = project_overrides(file, "nb.ipynb", machine_memory=MEMORY)
        assert project is not None
    return resolve(project=project, machine_memory=MEMORY, **sources)  # type: ignore[arg-type]


ENTRY = "limits:\n- path: '*.ipynb'\n  "


def test_nothing_said() -> None:
    found = resolved()
    assert found.limits == load_profile("default", machine_memory=MEMORY).limits
    assert (found.profile, found.warnings, found.loosenable, found.fixed) == (
        "default",
        (),
        True,
        frozenset(),
    )
    assert set(found.sources) == set(LIMIT_NAMES)
    assert set(found.sources.values()) == {"profile default"}


def test_every_source_beats_the_one_before() -> None:
    write("mine.yaml", "limits:\n  processes: 30\n  open_files: 30\n  cpus: 3\n  memory: 3G\n")
    project = ENTRY + "{path: '*', timeout: 20, processes: 20, open_files: 20, cpus: 2, memory: 2G}"
    project = project.replace("- path: '*.ipynb'\n  {", "- {")
    notebook: dict[str, object] = {
        "safe_exec": {"limits": {"open_files": 10, "cpus": 1, "memory": "1G"}}
    }
    found = resolved(project, chosen="mine.yaml", metadata=notebook, options={"memory": "5G"})
    assert found.sources["cell_timeout"] == "profile default"
    assert (found.limits.timeout, found.sources["timeout"]) == (20, "safe-exec.yaml:2")
    assert (found.limits.processes, found.sources["processes"]) == (30, "mine.yaml:2")
    assert (found.limits.open_files, found.sources["open_files"]) == (
        10,
        "metadata.safe_exec.limits",
    )
    assert (found.limits.memory, found.sources["memory"]) == (5 * G, "--memory")
    assert (found.profile, set(found.fixed), found.warnings) == ("mine.yaml", {"memory"}, ())


@pytest.mark.parametrize(("memory", "expected"), [("1G", G), ("5G", 5 * G), ("none", None)])
def test_options_win_both_ways(memory: str, expected: int | None) -> None:
    notebook: dict[str, object] = {"safe_exec": {"limits": {"memory": "1500M"}}}
    assert (
        resolved(chosen="ci", metadata=notebook, options={"memory": memory}).limits.memory
        == expected
    )


@pytest.mark.parametrize(
    ("chosen", "memory", "warned"),
    [
        (None, 64 * G, False),
        ("default", 64 * G, False),
        ("ci", 2 * G, True),
        ("strict", G // 2, True),
    ],
)
def test_notebooks_loosen_under_default_only(chosen: str | None, memory: int, warned: bool) -> None:
    found = resolved(chosen=chosen, metadata={"safe_exec": {"limits": {"memory": "64G"}}})
    assert found.limits.memory == memory
    if warned:
        assert found.warnings[0].startswith("metadata.safe_exec.limits: memory 64.0 GiB ignored, ")
        assert found.sources["memory"] == f"profile {chosen}"


def test_notebooks_do_not_loosen_a_users_file() -> None:
    write("mine.yaml", "limits: {memory: 1G}")
    assert (
        resolved(
            chosen="mine.yaml", metadata={"safe_exec": {"limits": {"memory": "2G"}}}
        ).limits.memory
        == G
    )


def test_the_project_chooses_a_profile() -> None:
    found = resolved(ENTRY + "profile: ci\n  memory: 3G")
    assert (found.profile, found.limits.processes, found.limits.memory, found.loosenable) == (
        "ci",
        512,
        3 * G,
        False,
    )


def test_a_named_profile_beats_the_projects_but_not_its_figures() -> None:
    found = resolved(ENTRY + "profile: strict\n  memory: 3G", chosen="ci")
    assert (found.profile, found.limits.processes, found.limits.memory) == ("ci", 512, 3 * G)


def test_a_firm_profile_asked_for_is_not_loosened_by_the_project() -> None:
    text = ENTRY + "memory: 3G\n  timeout: 1m"
    found = resolved(text, chosen="strict")
    assert (found.limits.memory, found.limits.timeout) == (G // 2, 60)
    assert found.warnings == (
        "safe-exec.yaml:3: memory 3.0 GiB ignored, 512 MiB holds: profile strict is firm",
    )
    write("mine.yaml", "extends: strict\nlimits: {processes: 9}")
    assert resolved(text, chosen="mine.yaml").limits.memory == G // 2
    assert resolved(ENTRY + "profile: strict\n  memory: 3G").limits.memory == 3 * G


@pytest.mark.parametrize(
    ("timeout", "expected"),
    [(30, 30.0), ("2m", 120.0), (-1, None), (0, None), (None, None), (1200, 1200.0)],
)
def test_nbclients_timeout(timeout: object, expected: float | None) -> None:
    found = resolved(metadata={"execution": {"timeout": timeout}})
    assert (found.limits.cell_timeout, found.sources["cell_timeout"]) == (
        expected,
        "metadata.execution.timeout",
    )


def test_our_own_metadata_beats_nbclients() -> None:
    metadata: dict[str, object] = {
        "execution": {"timeout": 30},
        "safe_exec": {"limits": {"cell-timeout": 40}},
    }
    assert resolved(metadata=metadata).limits.cell_timeout == 40


def test_nbclients_timeout_tightens_only_under_ci() -> None:
    assert resolved(chosen="ci", metadata={"execution": {"timeout": 30}}).limits.cell_timeout == 30
    found = resolved(chosen="ci", metadata={"execution": {"timeout": -1}})
    assert found.limits.cell_timeout == 300
    assert "cell_timeout unlimited ignored, 5m holds" in found.warnings[0]


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"safe_exec": "x"}, "nb: metadata.safe_exec: expected an object"),
        ({"safe_exec": {"limits": [1]}}, "nb: metadata.safe_exec.limits: expected an object"),
        (
            {"safe_exec": {"limits": {"memory": "x"}}},
            "nb: metadata.safe_exec.limits: memory: 'x' is not a size",
        ),
        (
            {"execution": {"timeout": "x"}},
            "nb: metadata.execution.timeout: cell_timeout: 'x' is not a duration",
        ),
    ],
)
def test_errors_of_metadata(metadata: dict[str, object], expected: str) -> None:
    with pytest.raises(LimitsError) as caught:
        resolve(metadata=metadata, machine_memory=MEMORY, notebook="nb")
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    "metadata", [{}, {"safe_exec": None}, {"safe_exec": {}}, {"execution": 5}, {"execution": {}}]
)
def test_metadata_that_says_nothing(metadata: dict[str, object]) -> None:
    assert resolved(metadata=metadata) == resolved()


# --- cells ------------------------------------------------------------------------------------------------------


def cell(**limits: object) -> dict[str, object]:
    return {"safe_exec": {"limits": limits}}


def test_a_cell_that_says_nothing() -> None:
    assert cell_limits(resolved(), {}, error_prefix="cell 1") == (resolved().limits, ())


def test_a_cell_loosens_under_default() -> None:
    limits, warnings = cell_limits(
        resolved(), cell(cell_timeout="1h", cell_output="1G"), error_prefix="cell 1"
    )
    assert (limits.cell_timeout, limits.cell_output, warnings) == (3600, G, ())


def test_a_cell_only_tightens_elsewhere() -> None:
    limits, warnings = cell_limits(
        resolved(chosen="ci"), cell(cell_timeout="1h", cell_output="1K"), error_prefix="cell 1"
    )
    assert (limits.cell_timeout, limits.cell_output) == (300, 1024)
    assert warnings == (
        "cell 1: cell_timeout 1h ignored, 5m holds: profile ci or an option allows no more",
    )


def test_an_option_caps_cells() -> None:
    found = resolved(options={"cell_timeout": 20})
    assert cell_limits(found, cell(cell_timeout=30), error_prefix="cell 1")[0].cell_timeout == 20
    assert cell_limits(found, cell(cell_timeout=10), error_prefix="cell 1")[0].cell_timeout == 10


def test_a_cell_may_not_carry_other_limits() -> None:
    with pytest.raises(
        LimitsError, match=r"^cell 1: memory: a cell may carry cell_output and cell_timeout only"
    ):
        cell_limits(resolved(), cell(memory="1G", cell_timeout=5), error_prefix="cell 1")
    with pytest.raises(LimitsError, match=r"^cell 1: metadata.safe_exec.limits: unknown limit 'x'"):
        cell_limits(resolved(), cell(x=1), error_prefix="cell 1")


# --- safe-exec.yaml ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("*.ipynb", "a.ipynb", True),
        ("*.ipynb", "docs/a.ipynb", False),
        ("./*.ipynb", "a.ipynb", True),
        ("docs/*.ipynb", "docs/a.ipynb", True),
        ("docs/*.ipynb", "docs/b/a.ipynb", False),
        ("**/*.ipynb", "a.ipynb", True),
        ("**/*.ipynb", "x/y/a.ipynb", True),
        ("docs/**", "docs/x/a.ipynb", True),
        ("docs/", "docs/x/a.ipynb", True),
        ("docs", "docs/a.ipynb", False),
        ("docs/**/slow/*.ipynb", "docs/slow/a.ipynb", True),
        ("docs/**/slow/*.ipynb", "docs/x/slow/y/slow/a.ipynb", True),
        ("docs/**/slow/*.ipynb", "docs/x/a.ipynb", False),
        ("a?.ipynb", "ab.ipynb", True),
        ("[!a].ipynb", "b.ipynb", True),
        ("A.ipynb", "a.ipynb", False),
        ("**/" * 40 + "x", "/".join("a" * 60), False),
        ("*.ipynb", "../a.ipynb", False),
        ("**", "../a.ipynb", False),
    ],
)
def test_patterns(pattern: str, path: str, expected: bool) -> None:
    assert matches(pattern, path) is expected


def test_the_project_file_is_looked_for_up_to_the_repository(tmp_path: Path) -> None:
    notebook = tmp_path / "repo" / "a" / "nb.ipynb"
    notebook.parent.mkdir(parents=True)
    write(PROJECT_FILE, "")
    assert find_project_file(notebook) == tmp_path / PROJECT_FILE
    assert find_project_file("repo/a/nb.ipynb") == tmp_path / PROJECT_FILE
    (tmp_path / "repo" / ".git").mkdir()
    assert find_project_file(notebook) is None
    write(f"repo/{PROJECT_FILE}", "")
    assert find_project_file(notebook) == tmp_path / "repo" / PROJECT_FILE


@pytest.mark.parametrize(
    ("leads_to", "refused"),
    [
        ("../secret", True),
        ("/etc/hosts", True),
        (".git/config", True),
        ("other.yaml", False),
        ("sub/../other.yaml", False),
    ],
)
def test_a_project_file_is_no_link_to_what_the_repository_does_not_hold(
    tmp_path: Path, leads_to: str, *, refused: bool
) -> None:
    """What is wrong in the file is told with its words: of a secret, to whoever reads the log."""
    (tmp_path / "secret").write_text("hunter2")
    repository = tmp_path / "repo"
    for name in (".git", "sub"):
        (repository / name).mkdir(parents=True)
    (repository / ".git" / "config").write_text("token")
    (repository / "other.yaml").write_text("")
    (repository / PROJECT_FILE).symlink_to(leads_to)
    if refused:
        with pytest.raises(LimitsError, match="is a link that leads out of") as caught:
            find_project_file(repository / "sub" / "nb.ipynb")
        assert "hunter2" not in str(caught.value) and "token" not in str(caught.value)
    else:
        assert find_project_file(repository / "sub" / "nb.ipynb") == repository / PROJECT_FILE


def test_the_first_match_wins() -> None:
    text = "limits:\n- path: docs/slow/*\n  timeout: 1h\n- path: docs/**\n  timeout: 1m\n"
    file = Path(write(PROJECT_FILE, text))
    slow = project_overrides(file, "docs/slow/a.ipynb", machine_memory=None)
    quick = project_overrides(file, "docs/a.ipynb", machine_memory=None)
    assert slow is not None
    assert quick is not None
    assert (slow.layer.values, quick.layer.values) == ({"timeout": 3600}, {"timeout": 60})
    assert project_overrides(file, "a.ipynb", machine_memory=None) is None
    assert project_overrides(file, "../docs/a.ipynb", machine_memory=None) is None


@pytest.mark.parametrize("text", ["", "limits:\n", "limits: []", "description: x"])
def test_an_empty_project_file(text: str) -> None:
    assert (
        project_overrides(Path(write(PROJECT_FILE, text)), "a.ipynb", machine_memory=None) is None
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("limits: {memory: 1G}", ":1: limits: expected a list, found a mapping"),
        ("limit: []", ":1: unknown section 'limit'; did you mean limits?"),
        ("limits:\n- memory: 1G", ":2: an entry needs path"),
        ("limits:\n- path: x\n  memroy: 1G", ":3: unknown limit 'memroy'; did you mean memory?"),
        (
            "limits:\n- path: x\n  profile: cj",
            ":3: profile: unknown profile 'cj'; did you mean ci?",
        ),
        ("limits:\n- path: /x", ":2: path: '/x' leaves the directory of the file"),
        ("limits:\n- path: a/../x", ":2: path: 'a/../x' leaves the directory of the file"),
        ("limits:\n- path: [x]", ":2: path: expected text, found a list"),
        ("limits:\n- x", ":2: limits: expected a mapping of keys to values, found text"),
    ],
)
def test_errors_of_the_project_file(text: str, expected: str) -> None:
    with pytest.raises(LimitsError) as caught:
        project_overrides(Path(write(PROJECT_FILE, text)), "a.ipynb", machine_memory=None)
    assert str(caught.value).startswith(PROJECT_FILE + expected)


def test_a_notebooks_own_timeout_is_free_up_to_the_projects_bound(tmp_path: Path) -> None:
    def resolved(seconds: int | str) -> tuple[float | None, bool]:
        project = ProjectLimits(
            file=tmp_path, profile=None, layer=values.Layer(), longest_cell_timeout=7200.0
        )
        metadata = {"safe_exec": {"limits": {"cell_timeout": seconds}}}
        result = resolve(
            chosen="untrusted", project=project, metadata=metadata, machine_memory=None
        )
        return result.limits.cell_timeout, bool(result.warnings)

    assert resolved(7200) == (7200, False)
    allowed = load_profile("untrusted", machine_memory=None).limits.cell_timeout
    assert resolved(7201) == (allowed, True)
    assert resolved("none") == (allowed, True)
