"""What the runner makes of the rows of a kernel, which may be torn or made up."""

from __future__ import annotations

import errno
import json
import os
import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safe_exec.kernel.coverage_file import CoverageFile, CoverageSettings, lost_rows, record_of


def rows(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def test_rows_of_a_file_add_up() -> None:
    data = rows(
        {"started": "7.6"},
        {"file": "/lib/a.py", "lines": [1, 2]},
        {"file": "/lib/a.py", "lines": [2, 5]},
        {"file": "/lib/b.py", "lines": []},
        {"replaced": 3},
    )
    record = record_of(data)
    assert record.lines == {"/lib/a.py": {1, 2, 5}, "/lib/b.py": set()}
    assert record.started and record.replaced == 3 and record.arcs == {}


def test_arcs_are_pairs() -> None:
    record = record_of(rows({"file": "/a.py", "arcs": [[-1, 2], [2, -1]]}))
    assert record.arcs == {"/a.py": {(-1, 2), (2, -1)}} and record.lines == {}


def test_a_torn_row_is_left_out() -> None:
    whole = rows({"file": "/a.py", "lines": [1]}, {"file": "/b.py", "lines": [1]})
    assert record_of(whole[:-4]).lines == {"/a.py": {1}}
    later = rows({"file": "/c.py", "lines": [2]}, {"file": "/d.py", "lines": [3]})
    # The row that follows a torn one directly is lost with it.
    assert record_of(whole[:-4] + later).lines == {"/a.py": {1}, "/d.py": {3}}


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errno.EFBIG, "raise --file-size"),
        (errno.ENOSPC, "or set TMPDIR"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_rows_that_were_not_written_are_a_warning_with_the_fix(error: int, words: str) -> None:
    assert lost_rows(error).startswith("coverage is incomplete: ") and words in lost_rows(error)


def test_paths_and_lines_that_cannot_be_are_left_out() -> None:
    data = rows(
        {"file": "relative.py", "lines": [1]},
        {"file": "/a\nb.py", "lines": [1]},
        {"file": "/" + "x" * 5000, "lines": [1]},
        {"file": "/a.py", "lines": [1, 1 << 40]},
    )
    assert record_of(data).lines == {"/a.py": {1}}


@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
def test_any_bytes_are_a_record(data: bytes) -> None:
    assert record_of(rows({"file": "/a.py", "lines": [1]}) + data).lines["/a.py"] >= {1}


def test_what_the_kernel_writes_is_read_while_it_lives() -> None:
    file = CoverageFile(CoverageSettings())
    ours, kernels = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, kernels:
        file.send(ours)
        _, (descriptor,), _, _ = socket.recv_fds(kernels, 100, 1)
    os.write(descriptor, rows({"missing": "/usr/bin/python"}))
    assert file.read().missing == "/usr/bin/python"
    os.close(descriptor)
