"""Notebook files: read and check them, strip what an earlier run of ours wrote into them, write them atomically.

Imports ``errors`` and its own parts (``files``, ``nbcheck``, ``nbjson``), whose public names it passes on; nbformat
(150 ms) is imported by the functions that need it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from msgspec import Struct

from safe_exec.errors import NotebookError
from safe_exec.files import check_writable, one_line, read_regular, write_atomically
from safe_exec.notebook.encode import DEEPEST, IDS_SINCE, Encoded, dumps, is_shallow, joined, mapped
from safe_exec.notebook.guess import guess, guess_json
from safe_exec.notebook.validate import problems

if TYPE_CHECKING:
    from nbformat import NotebookNode

__all__ = [
    "BANNER_ROLE",
    "BANNER_TAG",
    "METADATA_KEY",
    "OUR_ERROR_PREFIX",
    "CodeCell",
    "Encoded",
    "Notebook",
    "OutputPaths",
    "Scan",
    "Source",
    "check_writable",
    "code_cells",
    "default_outputs",
    "dumps",
    "is_banner",
    "is_our_output",
    "read",
    "strip_annotations",
    "write_atomically",
]

# What is ours in the metadata of notebooks, cells and outputs; its `limits` are the user's.
METADATA_KEY = "safe_exec"

BANNER_TAG = "safe-exec"
BANNER_ROLE = "banner"
# `ename` of the `error` outputs we write, alone or before anything that is no letter (`"SafeExec:
# exit"`).
OUR_ERROR_PREFIX = "SafeExec"

_FORMAT = 4
_MOST_BYTES = 2**30
# Lists and objects, each of which takes us more than a kilobyte until all is written; a hundred
# charts of 5000 rows have so many.
MOST_CONTAINERS = 500_000
_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_OUR_ENAME = re.compile(rf"{OUR_ERROR_PREFIX}(?!\w)")
_CELL_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


class Notebook(Struct, frozen=True, kw_only=True):
    """A notebook as read. ``node`` is of nbformat 4; ``sha256`` is of the bytes of the file, in hex."""

    path: Path
    node: NotebookNode
    sha256: str
    kernel_name: str | None
    language: str | None


class CodeCell(Struct, frozen=True, kw_only=True):
    """A code cell. ``index`` counts all cells from 0, ``code_index`` the code cells. ``metadata`` is the node's own."""

    index: int
    code_index: int
    id: str | None
    source: str
    tags: tuple[str, ...]
    metadata: Mapping[str, Any]


class OutputPaths(NamedTuple):
    """Where the annotated notebook, the verdict and the reproduction go if nothing else is said."""

    out: Path
    verdict: Path
    repro: Path


class Scan(Struct, frozen=True, kw_only=True):
    """What the metadata of a notebook says, before anybody has checked the notebook as a whole. ``cells`` are without our banners."""

    metadata: Mapping[str, Any]
    cells: tuple[Mapping[str, Any], ...]
    kernel_name: str | None


# --- reading --------------------------------------------------------------------------------------


def read(path: Path | str) -> Notebook:
    """The notebook in ``path``, older formats upgraded in memory. Raises NotebookError, one line.

    Cells of nbformat 4.5 and later without an id get one that depends on the file alone.
    """
    return Source.of(Path(path)).notebook()


class Source(Struct, frozen=True, kw_only=True):
    """A file that holds JSON and says that it is a notebook."""

    path: Path
    data: bytes
    document: Any
    version: tuple[int, int]

    @classmethod
    def of(cls, path: Path) -> Self:
        """Read it, once. Raises NotebookError."""
        # Unlike Path.is_dir, False for names that no file can have.
        if os.path.isdir(path):
            raise NotebookError(
                f"{one_line(path)}: is a directory, not a notebook; run all notebooks in it: "
                f"safe-exec batch {one_line(path)}"
            )
        return cls.of_data(path, read_regular(path, most=_MOST_BYTES, error=NotebookError))

    @classmethod
    def of_data(cls, path: Path, data: bytes) -> Self:
        """What a file of that name would hold. Raises NotebookError."""
        document = _parse(data, path)
        version = _version(document, path)
        if _SURROGATE_ESCAPE.search(data):
            document = mapped(document, joined)
        return cls(path=path, data=data, document=document, version=version)

    def scan(self) -> Scan | None:
        """Its metadata, where it is of the current format and everything is as it should be on the way there."""
        metadata, cells = self.document.get("metadata"), self.document.get("cells")
        if (
            self.version[0] != _FORMAT
            or not isinstance(metadata, dict)
            or not isinstance(cells, list)
        ):
            return None
        if not all(_has_metadata(cell) for cell in cells):
            return None
        metadata = copy.deepcopy(metadata)
        _drop_result(metadata)
        own = tuple(cell for cell in cells if not is_banner(cell))
        return Scan(metadata=metadata, cells=own, kernel_name=_kernel_of(metadata)[0])

    def notebook(self) -> Notebook:
        """The notebook, checked; uses the document up. Raises NotebookError."""
        current = self.version[0] == _FORMAT
        node = (
            _current(self.document, self.path)
            if current
            else _upgraded(self.document, self.version, self.path)
        )
        sha256 = hashlib.sha256(self.data).hexdigest()
        _give_ids(node, sha256)
        kernel, language = _kernel_of(node.metadata)
        return Notebook(
            path=self.path,
            node=node,
            sha256=sha256,
            kernel_name=kernel,
            language=language,
        )


def _has_metadata(cell: Any) -> bool:
    return (
        isinstance(cell, dict)
        and isinstance(cell.get("metadata"), dict)
        and isinstance(cell.get("cell_type"), str)
    )


def _demand_few(data: bytes, path: Path) -> None:
    """A file of 60 MB that is nothing but ``{}`` takes gigabytes once it is read, and we are inside no limit. Text may hold what it likes."""
    if data.count(b"{") + data.count(b"[") <= MOST_CONTAINERS:
        return
    bare = _TEXT.sub(b"", data)
    if bare.count(b"{") + bare.count(b"[") > MOST_CONTAINERS:
        raise NotebookError(
            f"{one_line(path)}: not read: it holds more than {MOST_CONTAINERS:,} lists and objects"
        )


def _parse(data: bytes, path: Path) -> Any:
    _demand_few(data, path)
    deep = f"{one_line(path)}: not a notebook: nested deeper than {DEEPEST} levels"
    try:
        document = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as problem:
        kind = guess(path, data) or f"not a notebook: not UTF-8 text (byte {problem.start})"
        raise NotebookError(f"{one_line(path)}: {kind}") from None
    except json.JSONDecodeError as problem:
        other = guess(path, data)
        if other is not None:
            raise NotebookError(f"{one_line(path)}: {one_line(other)}") from None
        place = f"{one_line(path)}:{problem.lineno}:{problem.colno}"
        raise NotebookError(
            f"{place}: not JSON: {problem.msg}; a notebook is a JSON file"
        ) from None
    except ValueError:
        # Int() refuses more than 4300 digits.
        raise NotebookError(
            f"{one_line(path)}: not a notebook: it holds a number of thousands of digits"
        ) from None
    except RecursionError:
        raise NotebookError(deep) from None
    if not is_shallow(document):
        raise NotebookError(deep)
    return document


def _version(document: Any, path: Path) -> tuple[int, int]:
    if not isinstance(document, dict) or "nbformat" not in document:
        raise NotebookError(
            f"{one_line(path)}: JSON, but not a notebook: no nbformat in it; {guess_json(document)}"
        )
    major, minor = document["nbformat"], document.get("nbformat_minor", 0)
    if type(major) is not int or type(minor) is not int or major < 1 or minor < 0:
        raise NotebookError(
            f"{one_line(path)}: not a notebook: nbformat and nbformat_minor must be whole numbers"
        )
    if major > _FORMAT:
        raise NotebookError(
            f"{one_line(path)}: nbformat {major} is newer than this program; save the notebook "
            "as nbformat 4"
        )
    return major, minor


def _current(document: Any, path: Path) -> NotebookNode:
    """The node of a notebook of version 4."""
    from nbformat import v4

    problem = next(problems(document), None)
    if problem:
        raise NotebookError(f"{one_line(path)}: not a valid notebook: {problem}")
    document.setdefault("nbformat_minor", 0)
    node: NotebookNode = v4.to_notebook(document)
    return node


def _upgraded(document: Any, version: tuple[int, int], path: Path) -> NotebookNode:
    """The node of an older notebook, as nbformat's own converters make it."""
    import nbformat

    try:
        old = nbformat.versions[version[0]].to_notebook_json(document, minor=version[1])
        node = json.loads(json.dumps(nbformat.convert(old, _FORMAT)))
    except Exception as problem:  # noqa: BLE001 - the converters are for valid notebooks and fail anyhow on others
        kind = type(problem).__name__
        raise NotebookError(
            f"{one_line(path)}: not a valid notebook of nbformat {version[0]}: it cannot be "
            f"upgraded ({kind})"
        ) from None
    for cell in node.get("cells", []):
        # Random ones; ours are the same each time.
        cell.pop("id", None)
    return _current(node, path)


def _give_ids(node: NotebookNode, seed: str) -> None:
    """Ids as nbformat's own reader would leave them: valid and different from 4.5 on, none before; but never random."""
    used_ids: set[str] = set()
    for index, cell in enumerate(node.cells):
        if node.nbformat_minor < IDS_SINCE:
            cell.pop("id", None)
            continue
        cell_id, attempt = cell.get("id"), 0
        while (
            not isinstance(cell_id, str) or not _CELL_ID.fullmatch(cell_id) or cell_id in used_ids
        ):
            cell_id = hashlib.sha256(f"{seed}:{index}:{attempt}".encode()).hexdigest()[:8]
            attempt += 1
        used_ids.add(cell_id)
        cell["id"] = cell_id


def _kernel_of(metadata: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Names of kernel and language, as far as the metadata says them."""
    kernel, language = _section(metadata, "kernelspec"), _section(metadata, "language_info")
    return _word(kernel.get("name")), _word(language.get("name")) or _word(kernel.get("language"))


def _section(metadata: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = metadata.get(key)
    return section if isinstance(section, Mapping) else {}


def _word(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


# --- cells and annotations ------------------------------------------------------------------------


def code_cells(node: NotebookNode) -> list[CodeCell]:
    """The code cells of a notebook, in order."""
    numbered = [(index, cell) for index, cell in enumerate(node.cells) if cell.cell_type == "code"]
    return [
        CodeCell(
            index=index,
            code_index=code_index,
            id=cell.get("id"),
            source=cell.source,
            tags=_tags(cell),
            metadata=cell.metadata,
        )
        for code_index, (index, cell) in enumerate(numbered)
    ]


def strip_annotations(node: NotebookNode) -> NotebookNode:
    """A copy of ``node`` without anything an earlier run of ours added: banner, outputs, ``safe_exec.result``.

    A user's ``metadata.safe_exec.limits`` stay. Doing it twice changes no more than doing it once.
    """
    clean = copy.deepcopy(node)
    clean["cells"] = [cell for cell in clean.cells if not is_banner(cell)]
    _drop_result(clean.metadata)
    for cell in clean.cells:
        _drop_result(cell.metadata)
        if cell.cell_type == "code":
            cell["outputs"] = [output for output in cell.outputs if not is_our_output(output)]
    return clean


def is_banner(cell: Mapping[str, Any]) -> bool:
    """Whether we wrote this cell: tagged, and with the role of a banner or a result where only a banner has one.

    The tag alone says nothing: a user may tag a cell so, and if it runs, we put a result into its metadata.
    """
    ours = _section(cell["metadata"], METADATA_KEY)
    if BANNER_TAG not in _tags(cell):
        return False
    roles = (ours.get("role"), _section(ours, "result").get("role"))
    return BANNER_ROLE in roles or (cell["cell_type"] == "markdown" and "result" in ours)


def is_our_output(output: Mapping[str, Any]) -> bool:
    """Whether we wrote this output: marked in its metadata or, where the format allows none, by its ``ename``."""
    if output.get("output_type") == "error":
        return _OUR_ENAME.match(str(output.get("ename"))) is not None
    return METADATA_KEY in _section(output, "metadata")


def _drop_result(metadata: dict[str, Any]) -> None:
    ours = metadata.get(METADATA_KEY)
    if isinstance(ours, dict):
        ours.pop("result", None)
        if not ours:
            del metadata[METADATA_KEY]


def _tags(cell: Mapping[str, Any]) -> tuple[str, ...]:
    tags = cell["metadata"].get("tags")
    return tuple(tag for tag in tags if isinstance(tag, str)) if isinstance(tags, list) else ()


def default_outputs(path: Path | str) -> OutputPaths:
    """The paths beside the notebook: NB.out.ipynb, NB.verdict.json, NB.repro.ipynb.

    ``X.out.ipynb``, our own output, counts as ``X.ipynb``: it is overwritten, not followed by X.out.out.ipynb.
    """
    path = Path(path)
    name = path.name[: -len(".ipynb")] if path.name.lower().endswith(".ipynb") else path.name
    stem = name.removesuffix(".out") or name or path.name
    return OutputPaths(
        *(path.with_name(stem + end) for end in (".out.ipynb", ".verdict.json", ".repro.ipynb"))
    )
