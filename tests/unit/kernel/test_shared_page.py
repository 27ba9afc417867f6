"""The shared page: what the kernel's side writes is what the runner's side reads, and garbage is never more than garbage."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_exec.agent import layout
from safe_exec.agent import page as inside_page
from safe_exec.kernel.shared_page import SIZE, Message, Page, Text

SMALL = 600
STREAMS = ("stdout", "stderr")
KERNEL_SIDE: Any = inside_page  # which has no types


@contextmanager
def pages(segment: int = layout.SEGMENT_BYTES) -> Iterator[tuple[Any, Page]]:
    """Both sides of one page; with small segments they are changed often."""
    usual, layout.SEGMENT_BYTES = layout.SEGMENT_BYTES, segment
    outer = Page()
    try:
        inner: Any = KERNEL_SIDE.Page(outer.fd)
        begin(inner)
        yield inner, outer
        inner.memory.close()
    finally:
        outer.close()
        layout.SEGMENT_BYTES = usual


def begin(inner: Any) -> None:
    """What ``cells.begin`` does with the page at the start of a cell."""
    inner.counts[:] = 0, 0
    inner.cell += 1
    inner.last = None
    layout.COUNTS.pack_into(inner.memory, layout.COUNTS_AT, 0, 0)
    inner.note_line(0)


def texts_of(outer: Page, cell: int) -> dict[str, str]:
    found = dict.fromkeys(STREAMS, "")
    for record in outer.journal(cell):
        if isinstance(record, Text):
            found[record.stream] += record.text
    return found


def test_a_page_is_dead_until_the_kernel_writes() -> None:
    outer = Page()
    assert (
        not outer.alive
        and list(outer.journal(0)) == []
        and outer.history() == []
        and outer.stack() == (0, [], False)
    )
    outer.close()
    with pages() as (_, alive):
        assert alive.alive


def test_the_size_cannot_be_changed_under_us() -> None:
    with pages() as (_, outer):
        for size in (0, SIZE + 1):
            with pytest.raises(PermissionError):
                os.ftruncate(outer.fd, size)


def test_notes_counts_samples_and_stacks() -> None:
    with pages() as (inner, outer):
        inner.note_line(17)
        note = outer.note()
        assert (note.cell, note.line) == (1, 17) and note.time > 0
        inner.text(0, "äöü")
        inner.text(1, "x")
        inner.note_counts()
        assert outer.counts() == (3, 1)
        for n in range(3):
            at = layout.HISTORY_AT + n * layout.SAMPLE.size
            layout.SAMPLE.pack_into(inner.memory, at, 1, 5 + n, 2, 30.0 - n, 0.005, 1.0, 99 + n, 0)
        assert [(s.line, s.time, s.wait, s.place) for s in outer.history()] == [
            (7, 28.0, 0.005, 101),
            (6, 29.0, 0.005, 100),
            (5, 30.0, 0.005, 99),
        ]
        inner.stack(json.dumps({"cell": 1, "rows": [["f", 3, "file", 1]], "awaiting": True}))
        assert outer.stack() == (1, [("f", 3, "file", 1)], True)


@pytest.mark.parametrize(
    ("written", "consumed", "unread"), [(0, 0, 0), (10, 4, 6), (4, 10, 0), (1 << 40, 0, 65536)]
)
def test_bytes_that_were_handed_on_and_not_taken(written: int, consumed: int, unread: int) -> None:
    with pages() as (inner, outer):
        inner.note_fd(1, written, consumed)
        assert (outer.unread("stderr"), outer.unread("stdout")) == (unread, 0)


def test_header_fields_do_not_overlap() -> None:
    with pages() as (inner, outer):
        inner.note_fd(0, 5, 1)
        inner.note_fd(1, 9, 2)
        inner.note_line(3)
        inner.text(0, "abc")
        inner.note_counts()
        assert (
            outer.note().line,
            outer.unread("stdout"),
            outer.unread("stderr"),
            outer.counts(),
        ) == (3, 4, 7, (3, 0))


def test_cells_are_told_apart() -> None:
    with pages() as (inner, outer):
        inner.text(0, "one")
        begin(inner)
        inner.text(0, "two")
        assert (texts_of(outer, 1)["stdout"], texts_of(outer, 2)["stdout"]) == ("one", "two")


def test_order_is_kept_between_streams_and_displays() -> None:
    with pages() as (inner, outer):
        inner.text(0, "a")
        inner.text(0, "b")
        inner.message([b"topic", b"<IDS|MSG>", b"{}"])
        inner.text(0, "c")
        inner.text(1, "d")
        assert list(outer.journal(1)) == [
            Text(stream="stdout", cell=1, start=0, text="ab"),
            Message(cell=1, frames=(b"topic", b"<IDS|MSG>", b"{}")),
            Text(stream="stdout", cell=1, start=2, text="c"),
            Text(stream="stderr", cell=1, start=0, text="d"),
        ]


def test_a_message_too_large_to_keep_is_left_out() -> None:
    with pages(SMALL) as (inner, outer):
        inner.message([bytes(SMALL)])
        inner.text(0, "after")
        assert [type(record) for record in outer.journal(1)] == [Text]


def test_a_write_larger_than_a_segment_keeps_its_end() -> None:
    with pages(SMALL) as (inner, outer):
        inner.text(0, "x" * 5000 + "ä" * 100 + "end")
        (record,) = outer.journal(1)
        assert isinstance(record, Text) and record.text.endswith("ä" * 100 + "end")
        assert record.start + len(record.text) == 5103


def test_a_full_segment_asks_for_a_flush() -> None:
    with pages(SMALL) as (inner, _):
        asked = [inner.text(0, "y" * 100) for _ in range(12)]
        assert asked.count(True) in (2, 3) and asked[0] is False


# Lone surrogates too: Python's strings may hold them.
texts = st.lists(st.characters() | st.sampled_from("\ud800\udc80\udfff"), max_size=40).map("".join)
writes = st.tuples(st.sampled_from([0, 1]), texts)
frames = st.lists(st.binary(max_size=60), max_size=5)
steps = st.lists(st.one_of(writes, frames, st.none()), max_size=60)


def shown(text: str) -> str:
    """A text as it can be sent: what is no character is replaced by one that is."""
    return text.encode("utf-8", "replace").decode()


@settings(deadline=None)
@given(steps=steps)
def test_what_was_written_is_read_back(steps: list[Any]) -> None:
    with pages() as (inner, outer):
        wrote = ["", ""]
        sent: list[tuple[bytes, ...]] = []
        for step in steps:
            if step is None:
                begin(inner)
                wrote, sent = ["", ""], []
            elif isinstance(step, tuple):
                inner.text(*step)
                wrote[step[0]] += step[1]
            else:
                inner.message(step)
                sent.append(tuple(step))
        assert [
            record.frames for record in outer.journal(inner.cell) if isinstance(record, Message)
        ] == sent
        read = texts_of(outer, inner.cell)
        inner.note_counts()
        assert (
            [len(read[name]) for name in STREAMS]
            == [len(text) for text in wrote]
            == list(outer.counts())
        )
        for name, text in zip(STREAMS, wrote, strict=True):
            assert all(a == b for a, b in zip(read[name], text, strict=True) if shown(b) == b)


@settings(deadline=None)
@given(steps=steps)
def test_each_record_says_where_its_text_stood(steps: list[Any]) -> None:
    with pages(SMALL) as (inner, outer):
        wrote = ["", ""]
        for step in steps:
            if step is None:
                begin(inner)
                wrote = ["", ""]
            elif isinstance(step, tuple):
                inner.text(*step)
                wrote[step[0]] += step[1]
            else:
                inner.message(step)
        ends = dict.fromkeys(STREAMS, 0)
        for record in outer.journal(inner.cell):
            if isinstance(record, Text):
                text = wrote[STREAMS.index(record.stream)][
                    record.start : record.start + len(record.text)
                ]
                assert len(text) == len(record.text)
                assert all(a == b for a, b in zip(record.text, text, strict=True) if shown(b) == b)
                ends[record.stream] = record.start + len(record.text)
        assert all(end in (0, len(text)) for end, text in zip(ends.values(), wrote, strict=True)), (
            "what was written last is kept"
        )


offsets = st.integers(0, layout.PAGE_BYTES + 2 * SMALL - 64)


@settings(deadline=None)
@given(
    garbage=st.lists(st.tuples(offsets, st.binary(min_size=1, max_size=64)), max_size=20),
    cell=st.integers(0, 3),
)
def test_garbage_never_raises(garbage: list[tuple[int, bytes]], cell: int) -> None:
    with pages(SMALL) as (inner, outer):
        inner.text(0, "something")
        inner.message([b"a", b"b"])
        for at, data in garbage:
            inner.memory[at : at + len(data)] = data
        for record in outer.journal(cell):
            assert record.cell == cell
        outer.note(), outer.sample(), outer.history(), outer.counts(), outer.stack()
        assert 0 <= outer.unread("stdout") <= 65536
        assert isinstance(outer.alive, bool)


@pytest.mark.parametrize("length", [0, 1, 4096, 0xFFFFFFFF])
@pytest.mark.parametrize(
    "text", [b"", b"{", b'{"rows": 5}', b'{"rows": [[1]], "cell": 1}', b"[" * 4096, b"\xff" * 50]
)
def test_a_stack_that_is_none_is_empty(length: int, text: bytes) -> None:
    with pages() as (inner, outer):
        inner.memory[layout.STACK_AT + 4 : layout.STACK_AT + 4 + len(text)] = text
        struct.pack_into("<I", inner.memory, layout.STACK_AT, length)
        assert outer.stack() == (0, [], False)


def test_a_stack_with_long_paths_is_shortened_and_not_lost() -> None:
    rows = [("f", n, "/a/very/long/path" * 30, 0) for n in range(29)] + [("<module>", 7, "cell", 1)]
    with pages() as (inner, outer):
        inner.stack(json.dumps({"cell": 1, "rows": rows, "awaiting": True}))
        cell, found, awaiting = outer.stack()
        assert (cell, awaiting) == (1, True) and found[0] == rows[0]
