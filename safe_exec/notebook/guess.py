"""Names the kind of a file that is not a notebook, and tells how to get the notebook. Pure.

People pass scripts, empty files, merge conflicts and failed downloads. The JSON parser's complaint
about line 1 does not help then.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# The lines that `git merge` writes around both versions.
_CONFLICT = re.compile(rb"^(?:<{7}|>{7}) |^={7}\r?$", re.MULTILINE)
_LFS = b"version https://git-lfs.github.com/spec/"
# The first bytes of other formats, their names, and remedies.
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (
        b"\x1f\x8b",
        "compressed with gzip",
        "decompress it first: gunzip -c {file} > {stem}.plain.ipynb",
    ),
    (
        b"BZh",
        "compressed with bzip2",
        "decompress it first: bunzip2 -c {file} > {stem}.plain.ipynb",
    ),
    (
        b"\xfd7zXZ\x00",
        "compressed with xz",
        "decompress it first: xz -dc {file} > {stem}.plain.ipynb",
    ),
    (
        b"\x28\xb5\x2f\xfd",
        "compressed with zstd",
        "decompress it first: zstd -dc {file} > {stem}.plain.ipynb",
    ),
    (b"PK\x03\x04", "a zip archive", "unpack it first: unzip {file}"),
    (b"%PDF", "a PDF document", "pass the notebook that it was made from"),
    (b"\x89PNG", "a picture", "pass the notebook itself"),
    (
        b"\xff\xfe",
        "UTF-16 text",
        "save it as UTF-8: iconv -f UTF-16 -t UTF-8 {file} > {stem}.utf8.ipynb",
    ),
    (
        b"\xfe\xff",
        "UTF-16 text",
        "save it as UTF-8: iconv -f UTF-16 -t UTF-8 {file} > {stem}.utf8.ipynb",
    ),
)
_SCRIPT = "run it with "
_JUPYTEXT = "make a notebook of it: jupytext --to ipynb {file}"
# Formats without such bytes, by the suffix of the name.
_SUFFIXES: Mapping[str, tuple[str, str]] = {
    ".py": ("a Python script without cells", f"mark cells with # %%, or {_SCRIPT}python {{file}}"),
    ".ipy": ("an IPython script", "run it with ipython {file}"),
    ".r": ("an R script without cells", f"mark cells with # %%, or {_SCRIPT}Rscript {{file}}"),
    ".jl": ("a Julia script without cells", f"mark cells with # %%, or {_SCRIPT}julia {{file}}"),
    ".sh": ("a shell script", "run it with sh {file}"),
    ".md": (
        "a Markdown document without code cells",
        "pass one with cells, or a notebook (.ipynb)",
    ),
    ".markdown": ("a Markdown document", _JUPYTEXT),
    ".rmd": ("an R Markdown document without code cells", "pass one with cells"),
    ".qmd": ("a Quarto document without code cells", "pass one with cells"),
    ".rst": ("a reStructuredText document", "pass a notebook (.ipynb)"),
    ".txt": ("a text file", "pass a notebook (.ipynb)"),
    ".csv": ("a table", "pass a notebook (.ipynb)"),
    ".yaml": ("a YAML file", "pass a notebook (.ipynb); a limits file goes with --limits"),
    ".yml": ("a YAML file", "pass a notebook (.ipynb); a limits file goes with --limits"),
}
_HTML = re.compile(rb"\s*<(?:!doctype html|html|head|body|\?xml)\b", re.IGNORECASE)
_LARGEST_SOURCE = 1 << 20


def guess(path: Path, data: bytes) -> str | None:
    """Describe a file that is not JSON, and the way to a notebook; ``None`` if unknown."""
    # From the most reliable sign to the least.
    kind = _by_content(data) or _by_name(path) or _by_source(data) or _cut_off(data)
    if kind is None:
        return None
    description, remedy = kind
    return (
        f"{description}, not a notebook; "
        f"{remedy.format(file=shlex.quote(path.name), stem=shlex.quote(path.stem))}"
    )


def guess_json(document: Any) -> str:
    """Return advice for JSON that is not a notebook."""
    if (
        isinstance(document, Mapping)
        and "nbformat" not in document
        and "content" in document
        and "encoding" in document
    ):
        return "an answer of GitHub's API; download the raw file (the button Raw) instead"
    if isinstance(document, Mapping) and ("message" in document or "error" in document):
        return "it looks like the error message of a server; download the notebook again"
    return "pass a file that Jupyter saved (.ipynb)"


def _by_content(data: bytes) -> tuple[str, str] | None:
    # A byte order mark alone is an empty file, too.
    if not data.strip(b"\xef\xbb\xbf \t\r\n\0"):
        return (
            "an empty file",
            (
                "restore it (git checkout -- {file}, or the copy in .ipynb_checkpoints), or "
                "save it "
                "again in Jupyter"
            ),
        )
    # Git LFS replaces large files by a small text file.
    if data.startswith(_LFS):
        return ("a Git LFS pointer", "fetch the notebook itself: git lfs pull")
    for magic, description, remedy in _MAGIC:
        if data.startswith(magic):
            return (description, remedy)
    # A frequent download: the page that shows a notebook, or the page of a login.
    if _HTML.match(data):
        return (
            "an HTML page",
            (
                "download the notebook itself (on GitHub the button Raw), or check the address and "
                "the login"
            ),
        )
    # A conflict may leave valid-looking JSON at the top.
    conflict = _CONFLICT.search(data)
    if conflict is not None:
        line = data.count(b"\n", 0, conflict.start()) + 1
        remedy = (
            "take one side (git checkout --ours {file}, or --theirs), or merge it with "
            "nbdime: nbdime mergetool"
        )
        return (f"a file with git merge conflict markers (line {line})", remedy)
    return None


def _by_name(path: Path) -> tuple[str, str] | None:
    return _SUFFIXES.get(path.suffix.lower())


def _by_source(data: bytes) -> tuple[str, str] | None:
    """Recognise Python source in a file that is named like a notebook."""
    try:
        # Parsing a huge file could take long and much memory.
        tree = ast.parse(data) if len(data) <= _LARGEST_SOURCE else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    # JSON that is almost right may be an expression of Python's, too.
    if tree is None or not any(
        not isinstance(node, ast.Expr) or isinstance(node.value, ast.Call) for node in tree.body
    ):
        return None
    return (
        "Python source",
        "run it with python {file}, or make a notebook of it: jupytext --to ipynb --from py {file}",
    )


def _cut_off(data: bytes) -> tuple[str, str] | None:
    """Recognise a truncated notebook, left by a full disk or a failed download."""
    # A download may be cut in the middle of a character.
    text = data.decode("utf-8-sig", "replace").rstrip()
    try:
        json.loads(text)
    except (json.JSONDecodeError, RecursionError) as problem:
        ends = isinstance(problem, json.JSONDecodeError) and (
            problem.pos >= len(text) or problem.msg.startswith("Unterminated")
        )
    else:
        ends = False
    if ends and text.startswith("{") and '"cells"' in text:
        return (
            "cut off in the middle",
            "restore it (git checkout -- {file}, or the copy in .ipynb_checkpoints)",
        )
    return None
