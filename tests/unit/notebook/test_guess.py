"""Files that are no notebooks: each is named in one line that says how to get one."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safe_exec.notebook.guess import guess, guess_json
from safe_exec.notebook.validate import complete_metadata

NOTEBOOK = json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": []}, indent=1)
CONFLICT = f"<<<<<<< HEAD\n{NOTEBOOK}\n=======\n{NOTEBOOK}\n>>>>>>> topic\n"


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("nb.ipynb", b"", ["an empty file", "git checkout -- nb.ipynb"]),
        ("nb.ipynb", b"\xef\xbb\xbf \n", ["an empty file"]),
        ("nb.ipynb", b"\0" * 512, ["an empty file"]),  # a file of which a crash kept the size alone
        ("nb.ipynb", CONFLICT.encode(), ["git merge conflict markers (line 1)", "nbdime"]),
        ("nb.ipynb", f"{{\n{CONFLICT}}}".encode(), ["git merge conflict markers (line 2)"]),
        (
            "my nb.ipynb",
            CONFLICT.replace("\n", "\r\n").encode(),
            ["git checkout --ours 'my nb.ipynb'"],
        ),
        (
            "nb.ipynb",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
            ["a Git LFS pointer", "git lfs pull"],
        ),
        (
            "nb.ipynb",
            gzip.compress(NOTEBOOK.encode(), mtime=0),
            ["gzip", "gunzip -c nb.ipynb > nb.plain.ipynb"],
        ),
        ("nb.ipynb", b"PK\x03\x04", ["a zip archive", "unzip nb.ipynb"]),
        ("nb.ipynb", NOTEBOOK.encode("utf-16"), ["UTF-16", "iconv"]),
        ("nb.ipynb", b"\n<!DOCTYPE html>\n<html lang=en>", ["an HTML page", "Raw"]),
        (
            "nb.ipynb",
            b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
            ["an HTML page"],
        ),
        (
            "nb.ipynb",
            b"# %%\nimport os\nprint(1)\n",
            ["Python source", "jupytext --to ipynb --from py nb.ipynb"],
        ),
        ("nb.ipynb", NOTEBOOK[:-3].encode(), ["cut off in the middle"]),
        ("script.py", b"print(1)", ["a Python script", "python script.py", "# %%"]),
        ("analysis.R", b"x <- 1", ["an R script", "Rscript"]),
        ("text.md", b"# Title", ["a Markdown document without code cells", ".ipynb"]),
        ("text.Rmd", b"---\n", ["an R Markdown document"]),
        ("text.qmd", b"---\n", ["a Quarto document", "with cells"]),
        ("safe-exec.yaml", b"limits: []", ["a YAML file", "--limits"]),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_file_of_another_kind(name: str, data: bytes, words: list[str]) -> None:
    line = guess(Path(name), data)
    assert line is not None and "not a notebook" in line and "\n" not in line
    assert [word for word in words if word not in line] == [], line


@pytest.mark.parametrize(
    "data",
    [
        b'{"a": 1,}',
        b"[1, 2",
        b"{",
        b"oops",
        json.dumps({"cells": ["<<<<<<< HEAD\n=======\n>>>>>>> x"]}).encode()
        + b",",  # escaped: no line begins with it
    ],
)
def test_for_the_rest_the_parser_knows_the_place(data: bytes) -> None:
    assert guess(Path("nb.ipynb"), data) is None


@given(data=st.binary(max_size=60), name=st.sampled_from(["a.ipynb", "b.py", "c"]))
def test_any_bytes(data: bytes, name: str) -> None:
    line = guess(Path(name), data)
    assert line is None or "\n" not in line


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"message": "Not Found", "status": "404"}, "error message of a server"),
        ({"content": "e30=", "encoding": "base64"}, "GitHub"),
        ([], "that Jupyter saved"),
        ({"cells": []}, "that Jupyter saved"),
    ],
)
def test_json_of_another_kind(document: object, words: str) -> None:
    assert words in guess_json(document)


SPEC = {"name": "python3", "display_name": "Python 3", "language": "python"}


@pytest.mark.parametrize(
    ("metadata", "complete"),
    [
        ({}, {}),
        ({"kernelspec": SPEC}, {"kernelspec": SPEC}),
        ({"kernelspec": {"name": "x"}}, {"kernelspec": {"name": "x", "display_name": "x"}}),
        (
            {"kernelspec": {"name": "x", "display_name": None}},
            {"kernelspec": {"name": "x", "display_name": "x"}},
        ),
        (
            {"kernelspec": {"name": "", "display_name": ""}},
            {"kernelspec": {"name": "", "display_name": ""}},
        ),
        (
            {"kernelspec": {"language": "python"}},
            {"kernelspec": {"language": "python", "name": "ran", "display_name": "ran"}},
        ),
        ({"kernelspec": {}}, {"kernelspec": {"name": "ran", "display_name": "ran"}}),
        ({"kernelspec": None}, {"kernelspec": {"name": "ran", "display_name": "ran"}}),
        ({"language_info": {"version": "3"}}, {"language_info": {"version": "3", "name": "R"}}),
        ({"language_info": None}, {"language_info": {"name": "R"}}),
        ({"orig_nbformat": 4}, {"orig_nbformat": 4}),
        ({"orig_nbformat": None, "colab": {"provenance": []}}, {"colab": {"provenance": []}}),
        ({"orig_nbformat": 0}, {}),
    ],
)
def test_metadata_is_made_complete(
    metadata: dict[str, object], complete: dict[str, object]
) -> None:
    complete_metadata(metadata, "ran", "R")
    assert metadata == complete
