"""The needs that real texts name: errors of libraries and languages, outputs of programs."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safe_exec.model.ending import CellError
from safe_exec.model.evidence import NeedKind, Raised
from safe_exec.trial.needs import (
    Need,
    needs_of_empty,
    needs_of_error,
    needs_of_none,
    needs_of_output,
    number_in,
)

P, V, M, G, H = NeedKind.PATH, NeedKind.VARIABLE, NeedKind.MODULE, NeedKind.PROGRAM, NeedKind.HOST
REMOVED = ("MY_TOKEN", "OPENAI_API_KEY", "EDITOR", "A")

OUTPUTS = [
    ("cat: ../data/d.csv: No such file or directory", P, "../data/d.csv"),
    ("cat: my file.csv: No such file or directory", P, "my file.csv"),
    ("ls: cannot access '/home/me/data': No such file or directory", P, "/home/me/data"),
    ("cp: cannot stat '/home/me/a b.csv': No such file or directory", P, "/home/me/a b.csv"),
    ("bash: line 1: /home/me/bin/tool: No such file or directory", P, "/home/me/bin/tool"),
    ("/bin/sh: 1: cannot open ../x.txt: No such file", P, "../x.txt"),
    ("mkdir: cannot create directory \u2018/srv/out\u2019: Read-only file system", P, "/srv/out"),
    ("touch: cannot touch '/srv/x': Permission denied", P, "/srv/x"),
    ("\u201ccannot open file '../data/d.csv': No such file or directory\u201d", P, "../data/d.csv"),
    ("  cannot open file '/root/x.csv': No such file or directory", P, "/root/x.csv"),
    ("head: can't open '/root/x.csv'", P, "/root/x.csv"),
    (
        "ERROR: Could not install packages due to an OSError: [Errno 30] Read-only file system: '/v/lib/p.py'",
        P,
        "/v/lib/p.py",
    ),
    ("\x1b[31mERROR: [Errno 30] Read-only file system: '/v/lib/p.py'\x1b[0m", P, "/v/lib/p.py"),
    (
        "error: failed to create directory `/v/lib/q`: Read-only file system (os error 30)",
        P,
        "/v/lib/q",
    ),
    ("fatal: repository '/home/me/repo' does not exist", P, "/home/me/repo"),
    ("/bin/bash: line 1: mytool: command not found", G, "mytool"),
    ("/bin/sh: 1: my-tool: not found", G, "my-tool"),
    ("zsh: command not found: mytool", G, "mytool"),
    ("ModuleNotFoundError: No module named 'mymod'", M, "mymod"),
    ("/usr/bin/python: No module named mymod", M, "mymod"),
    ("Error in library(foo) : there is no package called \u2018foo\u2019", M, "foo"),
    ("bash: MY_TOKEN: unbound variable", V, "MY_TOKEN"),
    ("curl: (6) Could not resolve host: example.org", H, "example.org"),
    (
        "fatal: unable to access 'https://github.com/a/b/': Could not resolve host: github.com",
        H,
        "github.com",
    ),
    ("wget: unable to resolve host address \u2018example.org\u2019", H, "example.org"),
    ("curl: (7) Failed to connect to localhost port 5000 after 0 ms", H, "localhost:5000"),
]


@pytest.mark.parametrize(
    ("line", "kind", "name"), OUTPUTS, ids=[line[:40] for line, _, _ in OUTPUTS]
)
def test_a_program_names_what_it_could_not_have(line: str, kind: NeedKind, name: str) -> None:
    needs = needs_of_output(f"before\n{line}\nafter", REMOVED, 4)
    assert [need.name for need in needs if need.kind is kind and need.exact] == [name]
    assert all(need.cell == 4 and need.in_output for need in needs)


@pytest.mark.parametrize(
    "line",
    [
        "saved /home/me/x.csv",
        "reading '/home/me/x.csv'",
        "MY_TOKEN",
        "A is not set",
        "wrote ~/report.html",
        "",
    ],
)
def test_an_output_that_speaks_of_no_refusal_needs_nothing(line: str) -> None:
    assert needs_of_output(line, REMOVED, 0) == []


ERRORS = [
    ("OperationalError", 'connection to server at "127.0.0.1", port 5432 failed: Connection refused', H, "127.0.0.1:5432"),
    ("ConnectionError", "Error 111 connecting to localhost:6379. Connection refused.", H, "localhost:6379"),
    ("MaxRetryError", "HTTPConnectionPool(host='localhost', port=5000): [Errno 111] Connection refused", H, "localhost:5000"),
    ("OperationalError", "(2003, \"Can't connect to MySQL server on '127.0.0.1:3306' (111)\")", H, "127.0.0.1:3306"),
    ("ServerSelectionTimeoutError", "[::1]:27017: [Errno 111] Connection refused", H, "::1:27017"),
    ("FileNotFoundError", "/root/x.txt not found.", P, "/root/x.txt"),
    ("FileNotFoundError", "No such file or directory (os error 2): /root/x.csv", P, "/root/x.csv"),
    (
        "FileNotFoundError",
        ("[Errno 2] Unable to synchronously open file (unable to open file: name = '/root/x.h5', errno = 2, error message = "
        "'No such file or directory', flags = 0, o_flags = 0)"),
        P,
        "/root/x.h5",
    ),
    ("IOException", 'IO Error: Cannot open file "/root/x.db": No such file or directory', P, "/root/x.db"),
    ("IOException", 'IO Error: No files found that match the pattern "~/x/*.csv"', P, "~/x/*.csv"),
    ("OSError", "Cannot save file into a non-existent directory: '../results'", P, "../results"),
    (
        "ComputeError",
        ('failed to retrieve first file schema (parquet): expanded paths were empty (path expansion input: \'paths: [PlRefPath { inner: '
        '"../data/*.parquet" }]\', glob: true).'),
        P,
        "../data/*.parquet",
    ),
    ("DataSourceError", "/root/x.shp: No such file or directory", P, "/root/x.shp"),
    ("FileNotFoundError", "[Errno 2] No such file or directory: PosixPath('/root/x')", P, "/root/x"),
    ("FileNotFoundError", "[Errno 2] No such file or directory: b'/root/x.nc'", P, "/root/x.nc"),
    ("ERROR", "Error in library(foo): there is no package called \u2018foo\u2019\n", M, "foo"),
    ("OpenAIError", ("The api_key client option must be set either by passing api_key or by setting the OPENAI_API_KEY"
     " environment variable"), V, "OPENAI_API_KEY"),
    ("UndefinedValueError", "MY_TOKEN not found. Declare it as envvar or define a default value.", V, "MY_TOKEN"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("ename", "evalue", "kind", "name"), ERRORS, ids=[row[1][:40] for row in ERRORS]
)
def test_an_error_names_what_it_could_not_have(
    ename: str, evalue: str, kind: NeedKind, name: str
) -> None:
    needs = needs_of_error(CellError(ename=ename, evalue=evalue), (), REMOVED)
    assert name in [need.name for need in needs if need.kind is kind]


def test_attributes_come_before_words() -> None:
    error = CellError(
        ename="FileNotFoundError", evalue="[Errno 2] No such file or directory: '../d.csv'"
    )
    row = Raised(type="FileNotFoundError", number=errno.ENOENT, files=("../d.csv",), writes=False)
    first = needs_of_error(error, (row,), ())[0]
    assert first == Need(
        kind=P,
        name="../d.csv",
        line=f"FileNotFoundError: {error.evalue}",
        number=errno.ENOENT,
        exact=True,
        says_missing=True,
        writes=False,
    )


def test_a_name_without_a_slash_may_be_a_program() -> None:
    row = Raised(type="FileNotFoundError", number=errno.ENOENT, files=("mytool",))
    needs = needs_of_error(CellError(ename="FileNotFoundError", evalue="x"), (row,), ())
    assert [(need.kind, need.name) for need in needs] == [(G, "mytool"), (P, "mytool")]


def test_a_key_of_another_dictionary_is_no_variable() -> None:
    error = CellError(ename="KeyError", evalue="'MY_TOKEN'")
    assert needs_of_error(error, (Raised(type="KeyError"),), REMOVED) == []
    assert [
        need.name
        for need in needs_of_error(error, (Raised(type="KeyError", variable="MY_TOKEN"),), REMOVED)
    ] == ["MY_TOKEN"]


def test_an_error_that_was_only_being_handled_comes_last() -> None:
    handled = Raised(type="FileNotFoundError", number=errno.ENOENT, files=("/root/a",), remote=True)
    cause = Raised(type="FileNotFoundError", number=errno.ENOENT, files=("/root/b",))
    needs = needs_of_error(
        CellError(ename="ValueError", evalue="bad"), (Raised(type="ValueError"), handled, cause), ()
    )
    assert [(need.name, need.remote) for need in needs] == [("/root/b", False), ("/root/a", True)]


def test_an_error_of_another_kind_names_no_path() -> None:
    error = CellError(ename="ParserError", evalue="Error tokenizing data in /tmp/data.csv")
    assert needs_of_error(error, (Raised(type="ParserError"),), ()) == []


def test_sqlite_names_no_file_itself() -> None:
    row = Raised(type="OperationalError", files=("/root/x.db",))
    needs = needs_of_error(
        CellError(ename="OperationalError", evalue="unable to open database file"), (row,), ()
    )
    assert [(need.name, need.number) for need in needs] == [("/root/x.db", errno.ENOENT)]
    needs = needs_of_error(
        CellError(ename="OperationalError", evalue="no such table: x"), (row,), ()
    )
    assert needs == []


@pytest.mark.parametrize(
    ("sources", "line", "names"),
    [
        (["token = os.getenv('MY_TOKEN')"], "len(token)", ["MY_TOKEN"]),
        (["token = os.environ.get('MY_TOKEN', None)"], "'Bearer ' + token", ["MY_TOKEN"]),
        (["import os"], "len(os.getenv('MY_TOKEN'))", []),
        (["len(os.getenv('MY_TOKEN'))"], "len(os.getenv('MY_TOKEN'))", ["MY_TOKEN"]),
        (["token = os.getenv('MY_TOKEN')"], "len(other)", []),
        (["token = os.getenv('NOT_REMOVED')"], "len(token)", []),
        (["token = os.getenv('MY_TOKEN', 'x')"], "len(token)", []),
    ],
)
def test_a_variable_that_is_none(sources: list[str], line: str, names: list[str]) -> None:
    error = CellError(ename="TypeError", evalue="object of type 'NoneType' has no len()")
    needs = needs_of_none(error, sources, [line], REMOVED)
    assert [need.name for need in needs] == names
    assert not any(need.exact for need in needs)
    assert (
        needs_of_none(CellError(ename="TypeError", evalue="other"), sources, [line], REMOVED) == []
    )


def test_a_service_of_this_machine_by_the_attributes_of_the_error() -> None:
    raised = Raised(type="ConnectionRefusedError", number=111, host="127.0.0.1", port=5000)
    error = CellError(ename="URLError", evalue="<urlopen error [Errno 111] Connection refused>")
    (need,) = needs_of_error(error, (Raised(type="URLError"), raised), REMOVED)
    assert (need.kind, need.name, need.number, need.exact) == (H, "127.0.0.1:5000", 111, True)
    remote = Raised(type="ConnectionRefusedError", number=111, host="10.0.0.7", port=5000)
    assert needs_of_error(error, (remote,), REMOVED) == []


def test_an_address_in_the_web_is_no_path() -> None:
    text = "Resource not found.\n  see: https://www.example.org/data.html\n  - '/root/my_data'"
    needs = needs_of_error(CellError(ename="LookupError", evalue=text), (), REMOVED)
    assert [need.name for need in needs] == ["/root/my_data"]


@pytest.mark.parametrize(
    ("sources", "line", "names"),
    [
        (["files = glob.glob('../data/*.csv')", "x"], "pd.concat(files)", ["../data/*.csv"]),
        (["names = sorted(Path('/srv/data').glob('*.txt'))"], "names[0]", ["/srv/data/*.txt"]),
        (["x = list(Path('../in').iterdir())", "y"], "max(x)", ["../in"]),
        (["x", "total = max(f(n) for n in glob('../a/*'))"], "total = max(f(n))", ["../a/*"]),
        (["if not os.path.exists('../a'):\n    raise E"], "    raise E", ["../a"]),
        (["if os.path.exists('../a'):\n    pass\n1 / 0"], "1 / 0", []),
        (["files = glob.glob('../data/*.csv')", "x"], "pd.concat(others)", []),
        (["files = glob.glob(f'{top}/*.csv')", "x"], "pd.concat(files)", []),
        (["files == glob.glob('../data/*.csv')", "x"], "pd.concat(files)", []),
    ],
)
def test_a_path_that_was_only_asked_about(sources: list[str], line: str, names: list[str]) -> None:
    error = CellError(ename="ValueError", evalue="No objects to concatenate")
    needs = needs_of_empty(error, sources, [line])
    assert [need.name for need in needs] == names
    assert not any(need.exact or need.writes for need in needs)
    assert needs_of_empty(CellError(ename="NameError", evalue="x"), sources, [line]) == []


@pytest.mark.parametrize(
    "line",
    [
        "note: run with `MY_TOKEN=1` environment variable to display a backtrace",
        "For debugging consider passing MY_TOKEN=1 (environment variable)",
        "Set the environment variable MY_TOKEN=true to disable this warning.",
        "\t- Explicitly set the environment variable MY_TOKEN=(true | false)",
        "Set the environment variable MY_TOKEN=full for a complete stack trace.",
    ],
)
def test_a_switch_that_is_offered_is_not_missing(line: str) -> None:
    assert needs_of_output(line, REMOVED, 0) == []


@pytest.mark.parametrize(
    "line", ["set MY_TOKEN=<your token>", "the variable MY_TOKEN=12345 is missing"]
)
def test_a_value_that_is_no_switch_is_missing(line: str) -> None:
    assert [need.name for need in needs_of_output(line, REMOVED, 0)] == ["MY_TOKEN"]


@pytest.mark.parametrize(
    ("line", "writes", "says_missing"),
    [
        ("Error (2): could not open dir ../results/", False, False),
        ("cannot read file '../results/t.csv': No such file or directory", False, True),
        ("could not find ../results/t.csv", False, False),
        ("cannot open ../results/t.csv", None, False),
        ("prog: unexpected error opening '/etc/t.txt': No such file or directory", None, True),
        ("cannot create '../results/t.csv': No such file or directory", None, True),
    ],
)
def test_words_tell_a_reader_from_a_writer(
    line: str, writes: bool | None, says_missing: bool
) -> None:
    needs = [
        need for need in needs_of_output(line, REMOVED, 0) if need.kind is P and "t" in need.name
    ]
    assert needs
    assert {(need.writes, need.says_missing) for need in needs} == {(writes, says_missing)}


@given(st.text(max_size=300), st.text(max_size=300))
def test_whatever_is_said_is_read(ename: str, evalue: str) -> None:
    needs_of_error(CellError(ename=ename, evalue=evalue), (), REMOVED)
    needs_of_output(evalue, REMOVED, 0)
    number_in(evalue)
