"""Notebook files: read and validate them, strip earlier annotations, write them atomically.

Re-exports the public names of its parts. nbformat takes 150 ms to import, so only the functions
that need it import it.
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

from msgspec import Struct, field

from safe_exec.errors import NotebookError
from safe_exec.files import check_writable, one_line, read_regular, write_atomically
from safe_exec.notebook import text_formats
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

# The tag and role by which our banner cell is recognised.
BANNER_TAG = "safe-exec"
BANNER_ROLE = "banner"
# `ename` of the `error` outputs we write, alone or before anything that is no letter (`"SafeExec:
# exit"`).
OUR_ERROR_PREFIX = "SafeExec"

_FORMAT = 4
MOST_BYTES = 2**30
# Lists and objects. Each of them takes us more than a kilobyte until all is written; a hundred
# charts of 5000 rows have this many.
MOST_CONTAINERS = 500_000
_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_OUR_ENAME = re.compile(rf"{OUR_ERROR_PREFIX}(?!\w)")
# The pattern of ids in nbformat's schema, since 4.5.
_CELL_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


class Notebook(Struct, frozen=True, kw_only=True):
    """A notebook as read. ``node`` has nbformat 4; ``sha256`` is the hash of the file in hex.

    ``file_lines`` are the lines in the file of a notebook kept as text, from 1, by the id of a cell.
    """

    path: Path
    node: NotebookNode
    sha256: str
    kernel_name: str | None
    language: str | None
    file_lines: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


class CodeCell(Struct, frozen=True, kw_only=True):
    """A code cell. ``index`` counts all cells from 0, ``code_index`` only code cells.

    ``metadata`` is the node's own mapping.
    """

    index: int
    code_index: int
    id: str | None
    source: str
    tags: tuple[str, ...]
    metadata: Mapping[str, Any]


class OutputPaths(NamedTuple):
    """The default paths of the annotated notebook, the verdict and the reproduction."""

    out: Path
    verdict: Path
    repro: Path


class Scan(Struct, frozen=True, kw_only=True):
    """The metadata of a notebook, read before the whole notebook is validated.

    ``cells`` exclude our banners.
    """

    metadata: Mapping[str, Any]
    cells: tuple[Mapping[str, Any], ...]
    kernel_name: str | None
    language: str | None


# --- reading --------------------------------------------------------------------------------------


def read(path: Path | str) -> Notebook:
    """Read a notebook; older formats are upgraded in memory. Raises NotebookError (one line).

    Cells of nbformat 4.5 and later without an id get one that depends only on the file.
    """
    return Source.of(Path(path)).notebook()


class Source(Struct, frozen=True, kw_only=True):
    """A file that contains a notebook, as JSON or as text with cells."""

    path: Path
    data: bytes
    document: Any
    version: tuple[int, int]
    # A text that jupytext converts, not JSON.
    text: bool = False

    @classmethod
    def of(cls, path: Path) -> Self:
        """Read the file once. Raises NotebookError."""
        # Unlike Path.is_dir, False for names that no file can have.
        if os.path.isdir(path):
            raise NotebookError(
                f"{one_line(path)}: is a directory, not a notebook; run all notebooks in it: "
                f"safe-exec batch {one_line(path)}"
            )
        data = read_regular(path, most=MOST_BYTES, error=NotebookError)
        if text_formats.is_text_format(path) and text_formats.has_cells(path, data):
            document = text_formats.document_of(path, data)
            return cls(
                path=path, data=data, document=document, version=_version(document, path), text=True
            )
        return cls.of_data(path, data)

    @classmethod
    def of_data(cls, path: Path, data: bytes) -> Self:
        """Parse data as the content of the file. Raises NotebookError."""
        # The file is read once: it may be a pipe, or may change in between.
        document = _parse(data, path)
        version = _version(document, path)
        if _SURROGATE_ESCAPE.search(data):
            document = mapped(document, joined)
        return cls(path=path, data=data, document=document, version=version)

    def scan(self) -> Scan | None:
        """Return the metadata; ``None`` for an older format or an unexpected structure."""
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
        kernel_name, language = _kernel_of(metadata)
        return Scan(metadata=metadata, cells=own, kernel_name=kernel_name, language=language)

    def notebook(self) -> Notebook:
        """Validate the notebook and return it; consumes the document. Raises NotebookError."""
        current = self.version[0] == _FORMAT
        node = (
            _current(self.document, self.path)
            if current
            else _upgraded(self.document, self.version, self.path)
        )
        # The hash is of the bytes, so that anybody can check it with sha256sum.
        sha256 = hashlib.sha256(self.data).hexdigest()
        _assign_ids(node, sha256)
        # The node's metadata: converters move it when they upgrade.
        kernel, language = _kernel_of(node.metadata)
        return Notebook(
            path=self.path,
            node=node,
            sha256=sha256,
            kernel_name=kernel,
            language=language,
            file_lines=self._file_lines(node) if self.text else {},
        )

    def _file_lines(self, node: NotebookNode) -> dict[str, tuple[int, ...]]:
        ids = [cell.get("id", str(index)) for index, cell in enumerate(node.cells)]
        return dict(zip(ids, text_formats.file_lines(self.data, node.cells), strict=True))


def _has_metadata(cell: Any) -> bool:
    return (
        isinstance(cell, dict)
        and isinstance(cell.get("metadata"), dict)
        and isinstance(cell.get("cell_type"), str)
    )


def _demand_few(data: bytes, path: Path) -> None:
    """Raise NotebookError for a file with too many containers."""
    # A file of 60 MB with nothing but `{}` takes gigabytes once it is parsed, and the runner has no
    # memory limit. Text may contain any number of brackets.
    if data.count(b"{") + data.count(b"[") <= MOST_CONTAINERS:
        return
    # Brackets inside texts cost nothing.
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
            f"{place}: not JSON: {problem.msg}; pass a file that Jupyter saved (.ipynb)"
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
    """Return the node of a version 4 notebook."""
    from nbformat import v4

    problem = next(problems(document), None)
    if problem:
        raise NotebookError(f"{one_line(path)}: not a valid notebook: {problem}")
    document.setdefault("nbformat_minor", 0)
    node: NotebookNode = v4.to_notebook(document)
    return node


def _upgraded(document: Any, version: tuple[int, int], path: Path) -> NotebookNode:
    """Return the node of an older notebook, upgraded by nbformat's own converters."""
    import nbformat

    try:
        # Each old format has a converter of its own in nbformat.
        old = nbformat.versions[version[0]].to_notebook_json(document, minor=version[1])
        node = json.loads(json.dumps(nbformat.convert(old, _FORMAT)))
    except Exception as problem:  # noqa: BLE001
        # The converters expect valid notebooks and raise arbitrary errors for others.
        kind = type(problem).__name__
        raise NotebookError(
            f"{one_line(path)}: not a valid notebook of nbformat {version[0]}: it cannot be "
            f"upgraded ({kind})"
        ) from None
    for cell in node.get("cells", []):
        # nbformat's ids are random; ours are the same each time.
        cell.pop("id", None)
    return _current(node, path)


def _assign_ids(node: NotebookNode, seed: str) -> None:
    """Give ids to the cells for which nbformat's reader would make up random ones."""
    # From nbformat 4.5 on ids are valid and unique; before, there are none.
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
    """Return the names of kernel and language in the metadata, if any."""
    kernel, language = _section(metadata, "kernelspec"), _section(metadata, "language_info")
    return _word(kernel.get("name")), _word(language.get("name")) or _word(kernel.get("language"))


def _section(metadata: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = metadata.get(key)
    return section if isinstance(section, Mapping) else {}


def _word(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


# --- cells and annotations ------------------------------------------------------------------------


def code_cells(node: NotebookNode) -> list[CodeCell]:
    """Return the code cells of a notebook, in order."""
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
    """Return a copy of ``node`` without the additions of earlier runs: banner, outputs, results.

    The user's own ``metadata.safe_exec.limits`` stay. Stripping twice is the same as stripping
    once.
    """
    # The caller may still need the annotations.
    clean = copy.deepcopy(node)
    clean["cells"] = [cell for cell in clean.cells if not is_banner(cell)]
    _drop_result(clean.metadata)
    for cell in clean.cells:
        _drop_result(cell.metadata)
        if cell.cell_type == "code":
            cell["outputs"] = [output for output in cell.outputs if not is_our_output(output)]
    return clean


def is_banner(cell: Mapping[str, Any]) -> bool:
    """Tell whether safe-exec wrote this cell: it has our tag and the role of a banner.

    In older files a Markdown cell with our tag and a result is a banner, since only banners and
    code cells have results. The tag alone is no proof: a user may give it to any cell.
    """
    ours = _section(cell["metadata"], METADATA_KEY)
    if BANNER_TAG not in _tags(cell):
        return False
    # Older versions stored the role inside the result.
    roles = (ours.get("role"), _section(ours, "result").get("role"))
    return BANNER_ROLE in roles or (cell["cell_type"] == "markdown" and "result" in ours)


def is_our_output(output: Mapping[str, Any]) -> bool:
    """Tell whether safe-exec wrote this output, by its metadata or its ``ename``."""
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
    # Metadata may contain anything; only a list of texts is a list of tags.
    tags = cell["metadata"].get("tags")
    return tuple(tag for tag in tags if isinstance(tag, str)) if isinstance(tags, list) else ()


def default_outputs(path: Path | str) -> OutputPaths:
    """Return the paths beside the notebook: NB.out.ipynb, NB.verdict.json, NB.repro.ipynb.

    ``X.out.ipynb``, safe-exec's own output, counts as ``X.ipynb``: it is overwritten rather than
    followed by X.out.out.ipynb.
    """
    path = Path(path)
    # The extension may be in capitals on some systems.
    name = path.name[: -len(".ipynb")] if path.name.lower().endswith(".ipynb") else path.name
    stem = name.removesuffix(".out") or name or path.name
    return OutputPaths(
        *(path.with_name(stem + end) for end in (".out.ipynb", ".verdict.json", ".repro.ipynb"))
    )
