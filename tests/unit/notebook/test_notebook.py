"""Notebook files: what is read and refused, what stripping leaves, and that writing is all or nothing."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safe_exec.errors import NotebookError, OutputPathError
from safe_exec.notebook.notebook import (
    MOST_CONTAINERS,
    OUR_ERROR_PREFIX,
    check_writable,
    code_cells,
    default_outputs,
    dumps,
    read,
    strip_annotations,
    write_atomically,
)

ROOT = Path(__file__).parents[3]
NOBODY = 65534


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def names() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def code(source: object = "1", **more: Any) -> dict[str, Any]:
    cell = {
        "cell_type": "code",
        "source": source,
        "metadata": {},
        "outputs": [],
        "execution_count": None,
    }
    return cell | more


def document(*cells: Any, minor: int = 5, **metadata: Any) -> dict[str, Any]:
    return {"nbformat": 4, "nbformat_minor": minor, "metadata": metadata, "cells": list(cells)}


def save(content: object, name: str = "nb.ipynb") -> Path:
    path = Path(name)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def node_of(*cells: Any, **more: Any) -> Any:
    return read(save(document(*cells, **more))).node


def error_of(path: Path | str) -> str:
    with pytest.raises(NotebookError) as caught:
        read(path)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert "\n" not in text
    return text


# --- reading ----------------------------------------------------------------------------------------------------


def test_reading() -> None:
    kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = save(document(code(["a = 1\n", "a"], id="x"), kernelspec=kernelspec))
    notebook = read(path)
    assert notebook.path == path
    assert notebook.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (notebook.kernel_name, notebook.language) == ("python3", "python")
    assert notebook.node.cells[0].source == "a = 1\na"
    assert notebook.node.cells[0].id == "x"


def test_it_is_what_nbformat_reads() -> None:
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": ["a\n", "b"]},
        {
            "output_type": "display_data",
            "metadata": {},
            "data": {"text/plain": ["x\n"], "application/json": ["y"]},
        },
        {"output_type": "error", "ename": "E", "evalue": "", "traceback": ["t"]},
    ]
    cell = code(outputs=outputs, id="a", metadata={"trusted": True})
    text = {
        "cell_type": "markdown",
        "id": "b",
        "metadata": {},
        "source": [],
        "attachments": {"f": {"text/x": ["1"]}},
    }
    path = save(document(cell, text, orig_nbformat=3))
    assert read(path).node == nbformat.read(path, as_version=4)


def test_a_notebook_without_cells() -> None:
    assert code_cells(read(save(document())).node) == []


def test_metadata_that_says_no_kernel() -> None:
    for metadata in ({}, {"kernelspec": "x", "language_info": None}, {"kernelspec": {"name": 5}}):
        notebook = read(save(document(**metadata)))
        assert (notebook.kernel_name, notebook.language) == (None, None)
    assert read(save(document(language_info={"name": "R"}))).language == "R"


def test_missing_ids_are_given_and_stay_the_same() -> None:
    path = save(
        document(
            code(),
            code(),
            code(id="a"),
            code(id="a"),
            code(id=""),
            code(id=[1]),
            code(id="with space"),
        )
    )
    ids = [cell.id for cell in read(path).node.cells]
    assert ids == [cell.id for cell in read(path).node.cells]
    assert len(set(ids)) == len(ids)
    assert ids[2] == "a"
    nbformat.validate(read(path).node)


def test_before_4_5_there_are_no_ids() -> None:
    node = node_of(code(id="x"), code(), minor=4)
    assert [cell.get("id") for cell in node.cells] == [None, None]
    nbformat.validate(node)
    assert code_cells(node)[0].id is None


def test_what_executing_does_not_need_may_be_missing() -> None:
    cell = code()
    del cell["outputs"], cell["execution_count"]
    broken = document(cell)
    del broken["nbformat_minor"]
    node = read(save(broken)).node
    assert (node.cells[0].outputs, node.cells[0].execution_count, node.nbformat_minor) == (
        [],
        None,
        0,
    )


def test_nbformat_3_is_upgraded() -> None:
    output = {"output_type": "pyout", "prompt_number": 1, "text": ["2"]}
    cells = [
        {"cell_type": "heading", "level": 2, "source": ["T"], "metadata": {}},
        {
            "cell_type": "code",
            "input": ["1+1\n", "2"],
            "outputs": [output],
            "language": "python",
            "prompt_number": 1,
        },
    ]
    old = {
        "nbformat": 3,
        "nbformat_minor": 0,
        "metadata": {"name": "n"},
        "worksheets": [{"cells": cells}],
    }
    notebook = read(save(old))
    assert (notebook.node.nbformat, notebook.node.cells[0].source) == (4, "## T")
    assert notebook.node.cells[1].source == "1+1\n2"
    assert notebook.node.cells[1].outputs[0].data == {"text/plain": "2"}
    assert notebook.node == read(save(old)).node
    nbformat.validate(notebook.node)


def test_nbformat_2_is_upgraded() -> None:
    cells = [
        {"cell_type": "code", "input": "1", "outputs": [], "language": "python", "prompt_number": 1}
    ]
    notebook = read(save({"nbformat": 2, "metadata": {}, "worksheets": [{"cells": cells}]}))
    assert notebook.node.cells[0].source == "1"


def test_a_byte_order_mark_is_no_obstacle() -> None:
    read(save(b"\xef\xbb\xbf" + json.dumps(document()).encode()))


def test_lone_surrogates_are_replaced_and_pairs_kept() -> None:
    node = node_of(
        code("print('\ud800', '\ude00\ud83d')", metadata={"k\udfff": 1}), code("'\U0001f600'")
    )
    assert node.cells[0].source == "print('\ufffd', '\ufffd\ufffd')"
    assert node.cells[0].metadata == {"k\ufffd": 1}
    assert node.cells[1].source == "'\U0001f600'"
    dumps(node)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "nb.ipynb: an empty file, not a notebook; restore it"),
        (b"[1,", "nb.ipynb:1:4: not JSON: Expecting value"),
        (b'{"a": 1,\n  oops}', "nb.ipynb:2:3: not JSON: Expecting property name"),
        (b"\xff\xfe{}", "nb.ipynb: UTF-16 text, not a notebook; save it as UTF-8"),
        (b"{\xff}", "nb.ipynb: not a notebook: not UTF-8 text (byte 1)"),
        (b"PK\x03\x04", "nb.ipynb: a zip archive, not a notebook"),
        (b"[" * 100_000, "nb.ipynb: not a notebook: nested deeper than 200 levels"),
        (
            b'{"a":' * 300 + b"1" + b"}" * 300,
            "nb.ipynb: not a notebook: nested deeper than 200 levels",
        ),
        (b"9" * 5000, "nb.ipynb: not a notebook: it holds a number of thousands of digits"),
        (b"null", "nb.ipynb: JSON, but not a notebook: no nbformat in it"),
        (5, "nb.ipynb: JSON, but not a notebook: no nbformat in it"),
        ([document()], "nb.ipynb: JSON, but not a notebook: no nbformat in it"),
        ({"cells": []}, "nb.ipynb: JSON, but not a notebook: no nbformat in it"),
        (
            {"nbformat": 5},
            "nb.ipynb: nbformat 5 is newer than this program; save the notebook as nbformat 4",
        ),
        (
            {"nbformat": "4"},
            "nb.ipynb: not a notebook: nbformat and nbformat_minor must be whole numbers",
        ),
        (
            {"nbformat": True},
            "nb.ipynb: not a notebook: nbformat and nbformat_minor must be whole numbers",
        ),
        (
            {"nbformat": 0},
            "nb.ipynb: not a notebook: nbformat and nbformat_minor must be whole numbers",
        ),
        (
            {"nbformat": 4, "metadata": {}},
            "nb.ipynb: not a valid notebook: its cells must be a list",
        ),
        (
            {"nbformat": 4, "cells": []},
            "nb.ipynb: not a valid notebook: its metadata must be an object",
        ),
        ({"nbformat": 3}, "nb.ipynb: not a valid notebook of nbformat 3: it cannot be upgraded"),
        (
            {"nbformat": 3, "worksheets": "x", "metadata": {}},
            "nb.ipynb: not a valid notebook of nbformat 3",
        ),
        ({"nbformat": 1}, "nb.ipynb: not a valid notebook of nbformat 1"),
        (document(5), "nb.ipynb: not a valid notebook: cell 0 (from 0): it must be an object"),
        (
            document(code(), code(5)),
            "nb.ipynb: not a valid notebook: cell 1 (from 0): source must be text or a list",
        ),
        (
            document(code(["a", 5])),
            "nb.ipynb: not a valid notebook: cell 0 (from 0): source must be text",
        ),
        (
            document(code(cell_type="x")),
            "nb.ipynb: not a valid notebook: cell 0 (from 0): cell_type must be one of",
        ),
        (
            document(code(metadata=None)),
            "nb.ipynb: not a valid notebook: cell 0 (from 0): metadata must be an object",
        ),
        *(
            (
                document(code(metadata={"tags": tags})),
                "nb.ipynb: not a valid notebook: cell 0 (from 0): metadata.tags must be a list of words",
            )
            for tags in (5, None, True, 1.5)
        ),
        (
            document(code(attachments={"a": 1})),
            "nb.ipynb: not a valid notebook: cell 0 (from 0): attachments",
        ),
        (
            document(code(outputs={})),
            "nb.ipynb: not a valid notebook: cell 0 (from 0): outputs must be a list",
        ),
        (
            document(code(outputs=[5])),
            "nb.ipynb: not a valid notebook: cell 0 (from 0): output 0: it must be an object",
        ),
        (
            document(code(outputs=[{"output_type": "stream", "text": 1}])),
            "nb.ipynb: not a valid notebook: cell 0",
        ),
        (
            document(code(outputs=[{"output_type": "display_data"}])),
            "nb.ipynb: not a valid notebook: cell 0",
        ),
        (
            document(code(outputs=[{"output_type": "error"}])),
            "nb.ipynb: not a valid notebook: cell 0",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_notebook(content: object, expected: str) -> None:
    assert error_of(save(content)).startswith(expected)


def test_what_is_no_file() -> None:
    assert error_of("nope.ipynb") == "nope.ipynb: no such file"
    assert error_of("no/nope.ipynb") == "no/nope.ipynb: no such file (nor a directory no)"
    save(document(), "analysis.ipynb")
    assert error_of("anlysis.ipynb") == "anlysis.ipynb: no such file; did you mean analysis.ipynb?"
    assert error_of("analysis.ipynb/x") == "analysis.ipynb/x: cannot be read: not a directory"
    assert (
        error_of(".")
        == ".: is a directory, not a notebook; run all notebooks in it: safe-exec batch ."
    )
    assert error_of("a\0b") == r"a\x00b: cannot be read: a file name cannot contain a NUL character"
    assert error_of("a\ud800b") == r"a\ud800b: cannot be read: its name is not UTF-8 text"
    assert error_of("a\nb") == r"a\nb: no such file"
    assert "cannot be read: file name too long" in error_of("x" * 300)


def test_pipes_devices_and_sockets_do_not_hang() -> None:
    os.mkfifo("pipe")
    assert error_of("pipe") == "pipe: is a pipe, not a file"
    assert error_of("/dev/zero") == "/dev/zero: is a device, not a file"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        assert error_of("socket") == "socket: is a socket, not a file"


def test_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safe_exec.notebook.notebook.MOST_BYTES", 2**20)
    Path("big.ipynb").touch()
    os.truncate("big.ipynb", 2**20 + 1)
    assert error_of("big.ipynb") == "big.ipynb: larger than 1 MiB, which is the most that is read"


def as_nobody(statement: str, folder: Path) -> str:
    """What ``statement`` prints as an ordinary user who may enter ``folder``."""
    code = f"import os; from safe_exec import files, errors; from safe_exec.notebook import notebook; os.chdir({str(folder)!r})\n"
    code += f"if os.geteuid() == 0: os.setgid({NOBODY}); os.setuid({NOBODY})\n"
    code += f"try: {statement}\nexcept errors.UsageError as e: print(e)\nelse: print('fine')"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return run.stdout.strip()


def test_an_unreadable_file(tmp_path: Path) -> None:
    save(document()).chmod(0)
    expected = "nb.ipynb: cannot be read: permission denied; make it readable for this user"
    assert as_nobody("notebook.read('nb.ipynb')", tmp_path) == expected


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
keys = st.sampled_from(
    [
        "cell_type",
        "source",
        "metadata",
        "outputs",
        "id",
        "attachments",
        "output_type",
        "text",
        "data",
    ]
)
cell_like = st.dictionaries(
    keys, json_values | st.sampled_from(["code", "markdown", "raw"]), max_size=6
)


@given(st.integers(1, 4), st.lists(cell_like | json_values, max_size=3), json_values)
def test_any_json_is_read_or_refused(major: int, cells: list[Any], metadata: Any) -> None:
    content = {
        "nbformat": major,
        "nbformat_minor": 5,
        "metadata": metadata,
        "cells": cells,
        "worksheets": cells,
    }
    path = save(content)
    try:
        node = read(path).node
    except NotebookError:
        assert error_of(path).startswith("nb.ipynb")
    else:
        json.loads(dumps(strip_annotations(node)))
        code_cells(node)


# --- cells and annotations --------------------------------------------------------------------------------------


def test_code_cells() -> None:
    text = {"cell_type": "markdown", "source": "t", "metadata": {}}
    node = node_of(
        text,
        code("1", id="a", metadata={"tags": ["x", 5]}),
        text,
        code("2", metadata={"tags": "x"}),
    )
    first, second = code_cells(node)
    assert (first.index, first.code_index, first.id, first.source, first.tags) == (
        1,
        0,
        "a",
        "1",
        ("x",),
    )
    assert (second.index, second.code_index, second.tags) == (3, 1, ())
    assert first.metadata == {"tags": ["x", 5]}


STREAM = {"output_type": "stream", "name": "stdout", "text": "x"}
OURS_ERROR = {
    "output_type": "error",
    "ename": f"{OUR_ERROR_PREFIX}: out_of_memory",
    "evalue": "",
    "traceback": [],
}
THEIR_ERROR = {"output_type": "error", "ename": "SafeExecError", "evalue": "", "traceback": []}
OURS_DISPLAY = {
    "output_type": "display_data",
    "data": {},
    "metadata": {"safe_exec": {"kind": "note"}},
}
THEIR_DISPLAY = {"output_type": "display_data", "data": {}, "metadata": {}}
BANNER = {
    "cell_type": "markdown",
    "id": "banner",
    "source": "b",
    "metadata": {"tags": ["safe-exec"], "safe_exec": {"role": "banner"}},
}


def annotated(node: Any) -> Any:
    """``node`` with everything a run of ours may add."""
    node = copy.deepcopy(node)
    for index, cell in enumerate(node.cells):
        ours = cell.metadata.setdefault("safe_exec", {})
        ours["result"] = {"status": "passed", "seconds": index}
        if cell.cell_type == "code":
            cell.outputs = [OURS_DISPLAY, *cell.outputs, OURS_ERROR]
    node.metadata.setdefault("safe_exec", {})["result"] = {"status": "kernel_died"}
    node.cells.insert(0, nbformat.from_dict(BANNER))
    return node


limits_metadata = st.sampled_from(
    [{}, {"safe_exec": {"limits": {"memory": "1G"}}}, {"tags": ["safe-exec"]}]
)
outputs = st.lists(st.sampled_from([STREAM, THEIR_ERROR, THEIR_DISPLAY]), max_size=3)
cells = st.builds(lambda m, o: code(metadata=m, outputs=o), limits_metadata, outputs)


@given(st.lists(cells, max_size=4), limits_metadata)
def test_stripping_undoes_annotating(found: list[Any], metadata: Any) -> None:
    original = node_of(*found, **metadata)
    before = copy.deepcopy(original)
    once = strip_annotations(original)
    assert once == original == before
    assert strip_annotations(annotated(original)) == once
    assert strip_annotations(annotated(annotated(original))) == once
    assert strip_annotations(once) == once


def test_stripping_copies() -> None:
    original = annotated(node_of(code(outputs=[STREAM])))
    before = copy.deepcopy(original)
    clean = strip_annotations(original)
    assert original == before
    clean.cells[0].outputs[0].text = "changed"
    assert original == before


@pytest.mark.parametrize(
    ("cell_type", "metadata", "gone"),
    [
        ("markdown", {"tags": ["safe-exec"], "safe_exec": {"role": "banner"}}, True),
        ("code", {"tags": ["safe-exec"], "safe_exec": {"result": {"role": "banner"}}}, True),
        ("markdown", {"tags": ["safe-exec"], "safe_exec": {"result": {}}}, True),
        ("markdown", {"tags": ["safe-exec"]}, False),
        ("markdown", {"safe_exec": {"role": "banner"}}, False),
        ("code", {"tags": ["safe-exec"], "safe_exec": {"result": {"status": "passed"}}}, False),
        ("markdown", {"tags": "safe-exec", "safe_exec": "banner"}, False),
    ],
)
def test_banners(cell_type: str, metadata: dict[str, Any], gone: bool) -> None:
    cell = code(metadata=metadata) | {"cell_type": cell_type}
    assert len(strip_annotations(node_of(cell)).cells) == (0 if gone else 1)


@pytest.mark.parametrize(
    ("metadata", "left"),
    [
        ({"safe_exec": {"result": 1}}, {}),
        ({"safe_exec": {}}, {}),
        (
            {"safe_exec": {"result": 1, "limits": {"cpus": 1}}},
            {"safe_exec": {"limits": {"cpus": 1}}},
        ),
        ({"safe_exec": "x"}, {"safe_exec": "x"}),
    ],
)
def test_results_go_and_limits_stay(metadata: dict[str, Any], left: dict[str, Any]) -> None:
    clean = strip_annotations(node_of(code(metadata=metadata), **metadata))
    assert (clean.metadata, clean.cells[0].metadata) == (left, left)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("d/a.ipynb", ["d/a.out.ipynb", "d/a.verdict.json", "d/a.repro.ipynb"]),
        ("a.out.ipynb", ["a.out.ipynb", "a.verdict.json", "a.repro.ipynb"]),
        ("a.repro.ipynb", ["a.repro.out.ipynb", "a.repro.verdict.json", "a.repro.repro.ipynb"]),
        ("a.IPYNB", ["a.out.ipynb", "a.verdict.json", "a.repro.ipynb"]),
        ("a.json", ["a.json.out.ipynb", "a.json.verdict.json", "a.json.repro.ipynb"]),
        (".ipynb", [".ipynb.out.ipynb", ".ipynb.verdict.json", ".ipynb.repro.ipynb"]),
    ],
)
def test_default_outputs(name: str, expected: list[str]) -> None:
    assert [str(path) for path in default_outputs(name)] == expected


# --- writing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("minor", [4, 5])
def test_it_is_what_nbformat_writes(minor: int) -> None:
    outputs = [{"output_type": "stream", "name": "stdout", "text": "ä\nb\U0001f600"}]
    node = node_of(code("a\nb", outputs=outputs), minor=minor, b=1, a="\x00")
    assert dumps(node).decode() == nbformat.writes(node) + "\n"


@given(st.lists(st.text(max_size=20), max_size=4), json_values)
def test_round_trip(sources: list[str], value: Any) -> None:
    node = node_of(*(code(source, metadata={"value": value}) for source in sources))
    first = dumps(node)
    again = read(save(first)).node
    assert dumps(again) == first
    assert [cell.source for cell in code_cells(again)] == [cell.source for cell in code_cells(node)]


def test_what_kernels_send_cannot_spoil_the_file() -> None:
    node = node_of(code())
    deep: Any = 1
    for _ in range(2000):
        deep = [deep]
    data = {
        "application/json": {"nan": float("nan"), "deep": deep},
        "text/plain": "\ud800 \ud83d\ude00",
    }
    node.cells[0].outputs.append({"output_type": "display_data", "metadata": {}, "data": data})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    written = json.loads(dumps(node), parse_constant=refuse)
    found = written["cells"][0]["outputs"][0]["data"]
    assert found["text/plain"] == ["\ufffd \U0001f600"]
    assert found["application/json"]["nan"] is None
    nbformat.validate(read(save(dumps(node))).node)


@pytest.mark.parametrize("line", ["y\n", "y\r", "\u2028", "\r\n"])
def test_millions_of_lines_are_written_in_one_piece(line: str) -> None:
    node = node_of(code("a\nb", outputs=[STREAM | {"text": "c\nd"}]))
    flood = line * 300_000
    node.cells[0].outputs.append(nbformat.v4.new_output("stream", text=flood))
    node.cells[0].outputs.append(nbformat.v4.new_output("display_data", {"text/plain": flood}))
    before = copy.deepcopy(node)
    written = dumps(node)
    assert node == before
    assert len(written) < 5 * len(flood.encode())
    cell = json.loads(written)["cells"][0]
    assert (cell["source"], cell["outputs"][0]["text"]) == (["a\n", "b"], ["c\n", "d"])
    assert (cell["outputs"][1]["text"], cell["outputs"][2]["data"]["text/plain"]) == (flood, flood)
    assert read(save(written)).node == node


def test_ids_are_left_out_before_4_5() -> None:
    node = node_of(code(), minor=4)
    node.cells.insert(0, nbformat.v4.new_markdown_cell("x"))
    assert all("id" not in cell for cell in json.loads(dumps(node))["cells"])
    assert "id" in node.cells[0]


def test_writing() -> None:
    old = os.umask(0o027)
    try:
        write_atomically("f", b"data")
    finally:
        os.umask(old)
    assert Path("f").read_bytes() == b"data"
    assert stat.S_IMODE(Path("f").stat().st_mode) == 0o640
    assert names() == ["f"]


def test_writing_replaces_a_symlink_and_does_not_follow_it() -> None:
    Path("target").write_text("old")
    Path("link").symlink_to("target")
    Path("dangling").symlink_to("nowhere")
    for name in ("link", "dangling"):
        check_writable(name)
        write_atomically(name, b"new")
        assert not Path(name).is_symlink()
    assert Path("target").read_text() == "old"
    assert names() == ["dangling", "link", "target"]


def test_writing_under_the_longest_name() -> None:
    write_atomically("x" * 255, b"")


@pytest.mark.parametrize("step", ["rename", "fsync"])
@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_what_was_there(
    step: str, failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("f").write_text("old")

    def fail(*_: object, **__: object) -> None:
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(type(failure)):
            write_atomically("f", b"new")
    assert names() == ["f"]
    assert Path("f").read_text() == "old"


def refusal(path: str) -> str:
    before = names()
    with pytest.raises(OutputPathError) as caught:
        check_writable(path)
    assert names() == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.bed("root")  # to others /dev itself is closed
def test_paths_that_cannot_be_written() -> None:
    Path("file").write_text("")
    Path("dir").mkdir()
    os.mkfifo("pipe")
    Path("to_dir").symlink_to("dir")
    Path("to_null").symlink_to("/dev/null")
    assert refusal("no/f") == "no/f: the directory no does not exist; create it first"
    assert refusal("file/f") == "file/f: file is not a directory"
    assert refusal("dir") == "dir: is a directory; name a file to write"
    assert refusal("to_dir") == "to_dir: is a directory; name a file to write"
    assert refusal(".") == ".: is a directory; name a file to write"
    assert refusal("pipe") == "pipe: is a pipe; name a file to write"
    assert refusal("/dev/null") == "/dev/null: is a device; name a file to write"
    assert refusal("to_null") == "to_null: is a device; name a file to write"
    assert refusal("x" * 256).endswith(": cannot be written: file name too long")
    assert (
        refusal("a\0b") == r"a\x00b: cannot be written: a file name cannot contain a NUL character"
    )
    assert refusal("/proc/f").startswith("/proc/f: the directory /proc cannot be written: ")


def test_paths_that_can_be_written() -> None:
    Path("file").write_text("old")
    for name in ("new", "file"):
        check_writable(name)
    assert names() == ["file"]
    assert Path("file").read_text() == "old"


def test_a_file_system_without_unnamed_files(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def without(path: Any, flags: int, *more: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(path, flags, *more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", without)
        check_writable("new")
        assert names() == []
        assert refusal("/proc/f").startswith("/proc/f: the directory /proc cannot be written: ")


def test_a_directory_that_is_closed_to_us(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    answer = as_nobody("notebook.check_writable('f')", folder)
    assert answer == "f: the directory . cannot be written: permission denied; choose another"


@pytest.mark.bed("root")
def test_a_file_of_another_user_in_a_sticky_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("f").write_text("")
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    check_writable("f")
    tmp_path.chmod(0o1777)
    check_writable("g")
    assert refusal("f") == "f: belongs to another user; choose another output path"


def test_a_file_that_would_swell_in_memory_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "nb.ipynb"
    whole = json.dumps(document(code("x", metadata={"a": "@"})))
    path.write_text(whole.replace('"@"', "[" + "{}," * MOST_CONTAINERS + "{}]"))
    with pytest.raises(NotebookError, match="more than 500,000 lists and objects"):
        read(path)
    text = '\\"{[' * (MOST_CONTAINERS // 2 + 1)
    path.write_text(whole.replace('"@"', f'"{text}"'))
    assert read(path).node.cells[0].metadata.a == text.replace("\\", "")
