"""Finds the paths, variables, modules, programs and hosts that a cell failed to get. Pure.

Attributes of exceptions come first, since they are exact. Texts of libraries and programs come
next. They name many things that were not refused, so each need must be checked outside the sandbox
(see ``conflicts``).
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator, Sequence

from msgspec import Struct
from msgspec.structs import replace

from safe_exec.model.ending import CellError
from safe_exec.model.evidence import NeedKind, Raised
from safe_exec.model.patterns import lazy_pattern

# Each need costs system calls outside, and the notebook chooses their number.
MOST_NEEDS = 60
MOST_LINES = 400
LONGEST_LINE = 2000
SHOWN_CHARACTERS = 300

# Error numbers of open(2), mkdir(2), execve(2) and the like for what is hidden, refused or
# read-only.
REFUSALS = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}

QUOTES = "'\"`\u2018\u2019\u201c\u201d"
# As Python, Rust (polars, ruff, uv) and HDF5 write it.
_NUMBER = lazy_pattern(r"\[Errno (\d+)\]|\(os error (\d+)\)|\berrno ?[=:]? ?(\d+)")

# The same as strerror(3) and libraries word it: SQLite, HDF5, DuckDB, Arrow, GDAL, R, shells.
_WORDS: tuple[tuple[int, re.Pattern[str]], ...] = (
    (errno.EROFS, lazy_pattern(r"[Rr]ead-only file ?system|readonly database|EROFS")),
    (
        errno.EACCES,
        lazy_pattern(
            r"[Pp]ermission denied|[Oo]peration not permitted|[Aa]ccess denied|not "
            r"writ[e]?able|EACCES|EPERM"
        ),
    ),
    (
        errno.ENOENT,
        lazy_pattern(
            r"[Nn]o such file|[Nn]ot found\b|[Dd]oes not exist|[Dd]oesn't exist|[Dd]o not "
            r"exist|ENOENT"
            r"|(?:[Cc]annot|[Cc]an't|[Cc]ould(?: not|n't)|[Uu]nable to|[Ff]ailed to)(?: \w+ly)? "
            r"(?:open|find|access|stat|locate|read|load)"
            r"|[Nn]o files found|not a (?:valid )?(?:file|directory|path)|non-?existent"
            r"|expanded paths were empty|[Nn]o match(?:es|ing files)"
        ),
    ),
)
# strerror(3) of ENOENT, as the system, Python and Rust write it.
_SAYS_MISSING = lazy_pattern(r"[Nn]o such file|\[Errno 2\]|os error 2\b|errno ?= ?2\b|ENOENT")
_BY_NAME = {
    "FileNotFoundError": errno.ENOENT,
    "PermissionError": errno.EACCES,
    "NotADirectoryError": errno.ENOTDIR,
}

# Quotes of each kind by themselves: R puts one kind into another.
_QUOTED = tuple(
    lazy_pattern(pattern)
    for pattern in (
        r"(?:\bb|(?<!\w))'([^'\n]{1,1000})'",
        r'"([^"\n]{1,1000})"',
        "\u2018([^\u2019\n]{1,1000})\u2019",
        "\u201c([^\u201d\n]{1,1000})\u201d",
        r"`([^`'\n]{1,1000})[`']",
    )
)
_PATH_LIKE = lazy_pattern(r"[/\\]|\.\w{1,8}$")
_BARE = lazy_pattern(
    r"(?:^|(?<=[\s(=:,<\[|]))((?:~|\.{1,2})?/[^\s'\"\u2018\u2019\u201c\u201d`,;:)\]>|]+)"
)
# `cat: my file.csv: No such file or directory`: a name with blanks, or without a slash.
_BEFORE = lazy_pattern(
    r"(?:^|: |\d: )([^:\n]{1,400}): (?:[Nn]o such file|[Pp]ermission denied|[Rr]ead-only file"
    r"|[Oo]peration not permitted|[Nn]ot found)"
)
# How a shell begins its complaints.
_SHELL = lazy_pattern(r"^\s*\S*sh: (?:(?:line )?\d+: )?")
# As bash, dash, zsh, fish and which(1) write it.
_COMMAND = lazy_pattern(
    r"command not found: ([\w.+-]{1,100})|(?:^|: |\d: )([\w.+-]{1,100}): (?:command )?not "
    r"found(?!:)"
    r"|[Uu]nknown command:? [\"'`]?([\w.+-]{1,100})|\bno ([\w.+-]{1,100}) in \("
)
# As Python and R write it.
_MODULE = lazy_pattern(
    r"No module named ['\"]?([\w.]{1,200})|there is no package called "
    r"[\u2018'\"\u201c]([\w.]{1,100})"
)
_NAME = lazy_pattern(r"\b[A-Za-z_][A-Za-z0-9_]{3,}\b")
_ABOUT_VARIABLES = lazy_pattern(
    r"environ|\benv(?:ar|var)?s?\b|variable|unbound|\b(?:un|not )?set\b|missing|required|not "
    r"found|token|credential|api[ _]?key|secret",
    re.IGNORECASE,
)
# A hint on how to switch something on or off ("run with `RUST_BACKTRACE=1`"); no secret or setting
# that a program misses has such a value.
_SWITCH = lazy_pattern(
    r"\b([A-Za-z_][A-Za-z0-9_]{3,})=[\"'(]?(?:[01]|true|false|on|off|yes|no|full)\b", re.IGNORECASE
)
# Only reading fails with these words.
_READS = lazy_pattern(
    r"(?:[Cc]annot|[Cc]an't|[Cc]ould(?: not|n't)|[Uu]nable to|[Ff]ailed to) (?:\w+ly )?"
    r"(?:find|stat|locate|read|load|list|open (?:the )?dir)"
)
_NONE = lazy_pattern(r"\bNone(?:Type)?\b")
_GETENV = lazy_pattern(
    r"(?:(?P<target>[A-Za-z_]\w*)\s*=[^=\n]*?)?(?:getenv"
    r"|environ\.get)\(\s*['\"](?P<name>[A-Za-z_]\w*)['\"]\s*(?:,\s*None\s*)?\)"
)
# Calls that answer with nothing, and raise no error, where there is nothing of that name (glob,
# os, pathlib).
_ASKS_ABOUT = lazy_pattern(
    r"(?:\b(?P<target>[A-Za-z_]\w*)[ \t]*=(?!=)[^\n]*?)?"
    r"(?:\bPath\(\s*[rb]?['\"](?P<path>[^'\"{}\n]+)['\"]\s*\)\s*\.)?"
    r"\b(?:r?i?glob|walk|iterdir|exists|isfile|isdir|is_file|is_dir)"
    r"\(\s*(?:[rb]?['\"](?P<name>[^'\"{}\n]+)['\"])?"
)
_RAISES = lazy_pattern(r"^\s*(?:raise|assert)\b", re.MULTILINE)
# Errors that do not come from a list that is empty.
UNLIKE_EMPTY = frozenset(
    {
        "NameError",
        "SyntaxError",
        "IndentationError",
        "ImportError",
        "ModuleNotFoundError",
        "UnboundLocalError",
        "KeyboardInterrupt",
        "MemoryError",
        "SystemExit",
    }
)
# As the system, urllib3, curl, wget, git, apt, R, Node and Rust write it (connect(2),
# gai_strerror(3)) where there is only loopback.
UNREACHABLE = lazy_pattern(
    r"Network is unreachable|Temporary failure in name resolution|Name or service not known|No "
    r"address associated with hostname"
    r"|getaddrinfo failed|[Ff]ailed to resolve|NameResolutionError|[Cc]ould not resolve host"
    r"|[Cc]ouldn't resolve host|Unknown host"
    r"|cannot open URL|No route to host|unable to resolve host address|Temporary failure "
    r"resolving|ENETUNREACH|EAI_AGAIN|dns error"
)
# As strerror(3) and clients of databases and services word ECONNREFUSED.
CONNECTION_REFUSED = lazy_pattern(
    r"[Cc]onnection refused|ECONNREFUSED|\[Errno 111\]|os error 111\b|[Ff]ailed to connect"
    r"|[Cc](?:an't|annot|ouldn't|ould not) connect"
)
# ``localhost:6379``, ``host='localhost', port=5000``, ``"127.0.0.1", port 5432``.
_LOCAL_PORT = lazy_pattern(
    r"(?<![\w.])(localhost|127(?:\.\d{1,3}){3}|::1)\]?['\"]?"
    r"(?::|[,) ]{0,3}port[ =:]{0,2})['\"]?(\d{2,5})\b"
)
_LOOPBACK = lazy_pattern(r"localhost|127(?:\.\d{1,3}){3}|::1")
# As pip and uv write it, asked to be quiet, where they cannot reach their index, or it has no such
# package.
_NO_PACKAGE = lazy_pattern(
    r"\(from versions: none\)|No matching distribution found|not found in the package registry"
)
_HOST = lazy_pattern(
    r"(?:host: |host='|resolve(?: host)?(?: address)?:? ['\"\u2018]?"
    r"|https?://(?:[^/@\s]*@)?)([A-Za-z0-9.-]{1,253})"
)
_WRITES = lazy_pattern(
    r"\b(?:write|save|dump|mkdir|makedirs|touch|export)|\bto_[a-z]+\("
    r"""|['"][wax]b?\+?['"]|(?<!-)>|\b(?:cp|mv|tee|install)\b|create""",
    re.IGNORECASE,
)
_ANSI = lazy_pattern(r"\x1b\[[0-9;?]*[A-Za-z]")


class Need(Struct, frozen=True, kw_only=True):
    """One thing that a cell asked for and was refused, as the cell named it.

    ``number`` is the error number, and ``says_missing`` tells whether the system itself said
    ENOENT. ``exact`` is true if the name is an attribute of the exception, or the only thing that
    the refusal is about. ``writes`` tells whether the cell tried to write it, if that is known;
    ``may_write`` is true if the source suggests it. ``line`` is the text that names it. ``cell`` is
    the cell that named it, and ``in_output`` tells whether it did so in its output. ``remote`` is
    true if the exception was only being handled when another one ended the cell.
    """

    kind: NeedKind
    name: str
    # The text that names the thing.
    line: str
    # The error number.
    number: int | None = None
    # An attribute of the exception, or the only thing that the refusal is about.
    exact: bool = False
    # The system's own word for ENOENT. A library's "cannot open" stands for other refusals, too.
    says_missing: bool = False
    # Whether it was to be written, if known.
    writes: bool | None = None
    # Whether the source looks as if it wrote files.
    may_write: bool = False
    cell: int | None = None
    in_output: bool = False
    # The exception was only being handled when another one ended the cell.
    remote: bool = False


def needs_of_error(
    error: CellError, raised: Sequence[Raised], removed: Iterable[str]
) -> list[Need]:
    """Return the needs that a cell's error names, the most exact first.

    ``removed`` are the names of variables that the kernel's environment lacks.
    """
    text = _ANSI.sub("", f"{error.ename}: {error.evalue}")
    error_number = number_in(text) or _BY_NAME.get(error.ename)
    needs = [need for row in raised for need in _of_attributes(row, _quotation(text), error_number)]
    # The attributes tell a KeyError of another dictionary from that of a missing variable.
    names = frozenset() if raised and error.ename == "KeyError" else frozenset(removed)
    # The notebook chooses the length of its errors.
    for line in text.splitlines()[:MOST_LINES]:
        needs += _of_line(
            line[:LONGEST_LINE], names, number_in(line) or error_number, is_error=True
        )
    # The exceptions that it came from stand in the traceback alone.
    needs += [need for line in _lines_of(error.traceback) if (need := _host(line)) is not None]
    host = next((row.host for row in raised if row.host), None)
    return _distinct(
        replace(need, name=host) if host and need.kind is NeedKind.HOST and not need.name else need
        for need in needs
    )


def needs_of_output(text: str, removed: Iterable[str], cell: int) -> list[Need]:
    """Return the needs that output lines report as refused or missing; see :class:`Need`."""
    names = frozenset(removed)
    lines = _ANSI.sub("", text).splitlines()[-MOST_LINES:]
    needs = [
        need
        for line in lines
        for need in _of_line(line[:LONGEST_LINE], names, number_in(line), is_error=False)
    ]
    return [replace(need, cell=cell, in_output=True) for need in _distinct(needs)]


def needs_of_none(
    error: CellError, sources: Iterable[str], lines: Iterable[str], removed: Iterable[str]
) -> list[Need]:
    """Return variables for which ``os.getenv`` returned None, if the error is about a None.

    ``sources`` are the cells up to the failed one, ``lines`` those in the traceback. One of these
    lines must ask for the variable, or use the name that it was assigned to.
    """
    if not _NONE.search(error.evalue):
        return []
    names, text = frozenset(removed), "\n".join(lines)
    needs = []
    for source in sources:
        for match in _GETENV.finditer(source):
            target, name = match["target"], match["name"]
            is_used = name in text or (
                target is not None and re.search(rf"\b{target}\b", text) is not None
            )
            if name in names and is_used:
                needs.append(Need(kind=NeedKind.VARIABLE, name=name, line=_quotation(match[0])))
    return _distinct(needs)


def needs_of_empty(error: CellError, sources: Sequence[str], lines: Iterable[str]) -> list[Need]:
    """Return paths that a cell looked for without opening them (``glob``, ``exists``).

    A hidden path gives an empty answer, and the error comes later. ``sources`` are the cells up to
    the failed one, ``lines`` those in the traceback. A path is returned if one of these uses the
    variable that holds the answer, or if the failed cell itself asked, and raised because of it.
    """
    if not sources or error.ename in UNLIKE_EMPTY:
        return []
    text = "\n".join(lines)
    needs = []
    for number, source in enumerate(sources):
        for match in _ASKS_ABOUT.finditer(source):
            target, in_cell = match["target"], number == len(sources) - 1
            lists = "glob" in match[0] or "walk" in match[0] or "iterdir" in match[0]
            is_used = (target is not None and re.search(rf"\b{target}\b", text) is not None) or (
                in_cell and (lists or _RAISES.search(text) is not None)
            )
            name = "/".join(part.rstrip("/") for part in (match["path"], match["name"]) if part)
            if is_used and name:
                needs.append(
                    Need(
                        kind=NeedKind.PATH,
                        name=name,
                        line=_quotation(match[0]),
                        number=errno.ENOENT,
                        writes=False,
                    )
                )
    return _distinct(needs)


def may_write(source: str) -> bool:
    """Tell whether a line of a cell looks as if it wrote files."""
    return _WRITES.search(source) is not None


def number_in(text: str) -> int | None:
    """Return the error number of the refusal that a text describes."""
    for match in _NUMBER.finditer(text):
        number = int(next(group for group in match.groups() if group)[:4])
        if number in REFUSALS:
            return number
    return next((number for number, pattern in _WORDS if pattern.search(text)), None)


def _of_attributes(row: Raised, quotation: str, number_of_text: int | None) -> Iterator[Need]:
    line = row.type if row.remote else quotation
    if row.variable:
        yield Need(
            kind=NeedKind.VARIABLE, name=row.variable, line=line, exact=True, remote=row.remote
        )
    if row.module:
        yield Need(kind=NeedKind.MODULE, name=row.module, line=line, exact=True, remote=row.remote)
    # Some libraries put the number into the text only.
    number = row.number if row.number is not None else number_of_text
    if number == errno.ECONNREFUSED and row.port and _LOOPBACK.fullmatch(row.host or ""):
        name = f"{row.host}:{row.port}"
        yield Need(
            kind=NeedKind.HOST, name=name, line=line, number=number, exact=True, remote=row.remote
        )
    if number not in REFUSALS:
        return
    # Landlock refuses connect(2) like this.
    if row.host and number == errno.EACCES:
        yield Need(
            kind=NeedKind.HOST,
            name=row.host,
            line=line,
            number=number,
            exact=True,
            remote=row.remote,
        )
    for name in row.files:
        if "/" not in name and number in (errno.ENOENT, errno.EACCES):
            yield Need(
                kind=NeedKind.PROGRAM,
                name=name,
                line=line,
                number=number,
                exact=True,
                remote=row.remote,
            )
        yield Need(
            kind=NeedKind.PATH,
            name=name,
            line=line,
            number=number,
            exact=True,
            says_missing=row.number == errno.ENOENT,
            writes=row.writes,
            remote=row.remote,
        )


def _of_line(
    line: str, removed: frozenset[str], number: int | None, *, is_error: bool
) -> Iterator[Need]:
    quotation = _quotation(line)
    for module in _MODULE.finditer(line):
        yield Need(kind=NeedKind.MODULE, name=_first(module), line=quotation, exact=True)
    for command in _COMMAND.finditer(line):
        yield Need(
            kind=NeedKind.PROGRAM,
            name=_first(command),
            line=quotation,
            number=errno.ENOENT,
            exact=True,
        )
    if (host := _host(line)) is not None:
        yield host
    if number is not None:
        complaint = _SHELL.sub("", line)
        direct = _direct(complaint)
        names = dict.fromkeys([*([direct] if direct else []), *_names(complaint)])
        paths = [name for name in names if _PATH_LIKE.search(name)]
        for name in names:
            exact = name == direct or paths == [name]
            writes = False if _READS.search(line) is not None else None
            yield Need(
                kind=NeedKind.PATH,
                name=name,
                line=quotation,
                number=number,
                exact=exact,
                says_missing=_SAYS_MISSING.search(line) is not None,
                writes=writes,
            )
    hints = set(_SWITCH.findall(line))
    for name in removed.intersection(_NAME.findall(line)) - hints:
        about = _ABOUT_VARIABLES.search(line.replace(name, " ")) is not None
        if about or (is_error and "_" in name):
            yield Need(kind=NeedKind.VARIABLE, name=name, line=quotation, exact=about)


def _host(line: str) -> Need | None:
    if _NO_PACKAGE.search(line) is not None:
        return Need(kind=NeedKind.HOST, name="", line=_quotation(line))
    refused = CONNECTION_REFUSED.search(line) is not None
    if refused and (local := _LOCAL_PORT.search(line)) is not None:
        name = f"{local[1]}:{local[2]}"
        return Need(
            kind=NeedKind.HOST,
            name=name,
            line=_quotation(line),
            number=errno.ECONNREFUSED,
            exact=True,
        )
    if UNREACHABLE.search(line) is None:
        return None
    host = _HOST.search(line)
    return Need(kind=NeedKind.HOST, name=host[1] if host else "", line=_quotation(line), exact=True)


def _lines_of(texts: Iterable[str]) -> list[str]:
    return [
        line[:LONGEST_LINE] for line in _ANSI.sub("", "\n".join(texts)).splitlines()[-MOST_LINES:]
    ]


def _direct(line: str) -> str | None:
    """Return the text right before the words of a refusal, if it is a single name."""
    match = _BEFORE.search(line)
    name = match[1].strip() if match else ""
    if name.startswith(("cannot ", "can't ", "failed to ", "unable to ")) or any(
        mark in name[1:-1] for mark in QUOTES
    ):
        return None
    return name.strip(QUOTES) or None


def _first(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group)


def _names(line: str) -> list[str]:
    """Return everything in a line that may be a path.

    Candidates are quoted texts and words that begin like a path.
    """
    quoted = [
        match[1].strip().removeprefix("file://")
        for pattern in _QUOTED
        for match in pattern.finditer(line)
    ]
    bare = [match[1].rstrip(".,").removeprefix("file://") for match in _BARE.finditer(line)]
    # `https://example.org/x`: what follows the colon is no path.
    names = dict.fromkeys(
        name
        for name in (*quoted, *bare)
        if name and not name.startswith("//") and "://" not in name
    )
    # If a quotation quotes another message, only the inner quotation counts.
    return [
        name for name in names if not any(name != other and f"{other}'" in name for other in names)
    ]


def _quotation(text: str) -> str:
    return " ".join(text.split())[:SHOWN_CHARACTERS]


def _distinct(needs: Iterable[Need]) -> list[Need]:
    """Return each need once, in its most exact form, those of the raised exception first."""
    best: dict[tuple[NeedKind, str], Need] = {}
    for need in needs:
        key = need.kind, need.name
        if key not in best or (need.exact, not need.remote) > (
            best[key].exact,
            not best[key].remote,
        ):
            best[key] = need
    return sorted(best.values(), key=lambda need: (need.remote, not need.exact))[:MOST_NEEDS]
