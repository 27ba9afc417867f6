"""A native stack and the Python frames that its loops ran become one stack."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safe_exec.inspector.merge import EVAL, IGNORED, PLAIN, CodeFrame, Entry, merge


def native(*names: str) -> list[Entry]:
    kinds = {"E": EVAL, "i": IGNORED}
    return [Entry(kind=kinds.get(name[0], PLAIN), frame={"function": name}) for name in names]


def python(*names: str) -> list[CodeFrame]:
    """Frames of Python; a capital begins the name of one for which a loop was entered."""
    return [CodeFrame(is_entry=name[0].isupper(), frame={"function": name}) for name in names]


@pytest.mark.parametrize(
    ("c_functions", "code", "merged"),
    [
        (("strlen", "call", "Eval"), ("f", "Cell"), ["strlen", "call", "f", "Cell"]),
        (("strlen", "helper_i", "Eval"), ("Cell",), ["strlen", "helper_i", "Cell"]),
        (
            ("sort", "Eval", "iterate", "sum", "Eval"),
            ("Key", "Cell"),
            ["sort", "Key", "sum", "Cell"],
        ),
        (("Eval",), ("Cell",), ["Eval", "Cell"]),
        (("strlen", "Eval"), ("A", "B"), ["strlen", "A", "B"]),
        (("strlen",), (), ["strlen"]),
        ((), ("Cell",), ["Cell"]),
        ((), (), []),
    ],
    ids=[
        "one loop runs two frames",
        "helpers inside the innermost loop stay",
        "helpers further out are left out",
        "the fault is in the loop itself",
        "loops that do not match",
        "no Python",
        "no C",
        "nothing",
    ],
)
def test_table(c_functions: tuple[str, ...], code: tuple[str, ...], merged: list[str]) -> None:
    names = [name.replace("iterate", "i_iterate") for name in c_functions]
    assert [frame["function"] for frame in merge(native(*names), python(*code))] == merged


@given(
    st.lists(st.sampled_from(["Eval", "plain", "ignored"])),
    st.lists(st.sampled_from(["Entry", "inner"])),
)
def test_no_python_frame_is_lost_or_doubled(c_functions: list[str], code: list[str]) -> None:
    frames = python(*code)
    for number, frame in enumerate(frames):
        frame.frame["number"] = number
    merged = merge(native(*c_functions), frames)
    numbers = [frame["number"] for frame in merged if "number" in frame]
    # Frames further out than the outermost loop's entry belong to no loop.
    assert numbers == list(range(len(numbers)))
    last_entry = max((n for n, name in enumerate(code) if name == "Entry"), default=-1)
    assert len(numbers) > last_entry
    if c_functions:
        assert merged[0]["function"] == c_functions[0]
