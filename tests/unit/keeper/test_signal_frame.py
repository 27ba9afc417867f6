"""Registers found in the stack of a signal handler, and the judgement whether a thread left its stack."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safe_exec.keeper import signal_frame
from safe_exec.keeper.signal_frame import Mapping, Registers, describe, divides, find, parse_maps
from safe_exec.kernel.fault_site import read_site

BASE = 0x7F00_0000_1000
PAGE = 4096
MAIN_LOW, MAIN_HIGH = 0x7FFC_0000_0000, 0x7FFC_0080_0000
LOW, HIGH = 0x7F10_0000_1000, 0x7F10_0080_0000
IDENT = HIGH - 0x900


def x86(
    *,
    at: int = 336,
    pointer: int,
    ip: int,
    trap: int,
    error: int = 4,
    address: int = 0,
    fpstate: int = 1024,
) -> bytes:
    """A piece of stack with the registers that the system saved ``at`` bytes from its lower end."""
    words = [0] * 24
    words[15:18] = pointer, ip, 0x10246
    words[18] = int.from_bytes(struct.pack("<4H", 0x33, 0, 0, 0x2B), "little")
    words[19:24] = error, trap, 0, address, BASE + fpstate
    return bytes(at) + struct.pack("<24Q", *words) + bytes(2048)


def arm(*, pointer: int, pc: int, address: int, syndrome: bool) -> bytes:
    context = struct.pack("<35Q", address, *range(31), pointer, pc, 0) + bytes(8)
    records = struct.pack("<II", 0x46508001, 528) + bytes(520)
    records += struct.pack("<IIQ", 0x45535201, 16, 0x92000046) if syndrome else b""
    return bytes(640) + context + records + bytes(64)


def test_the_registers_of_a_page_fault() -> None:
    found = find(x86(pointer=MAIN_LOW, ip=0x400, trap=14, address=0x10), BASE, "x86_64")
    assert found == Registers(faulted=True, address=0x10, stack_pointer=MAIN_LOW, instruction=0x400)


def test_a_signal_that_was_sent_and_an_address_that_is_not_told() -> None:
    sent = find(x86(pointer=MAIN_LOW, ip=0x400, trap=0, error=0), BASE, "x86_64")
    assert sent is not None and (sent.faulted, sent.address) == (False, None)
    general_protection = find(x86(pointer=MAIN_LOW, ip=0x400, trap=13, error=0), BASE, "x86_64")
    assert general_protection is not None and (
        general_protection.faulted,
        general_protection.address,
    ) == (True, None)


def test_the_innermost_of_two_frames_and_no_stale_copy() -> None:
    inner, outer = x86(pointer=1, ip=0x400, trap=14), x86(pointer=2, ip=0x500, trap=0)
    found = find(inner + outer, BASE, "x86_64")
    assert found is not None and found.stack_pointer == 1
    stale = x86(pointer=1, ip=0x400, trap=14, fpstate=1 << 40)
    found = find(
        stale + x86(pointer=2, ip=0x500, trap=14, fpstate=len(stale) + 1024), BASE, "x86_64"
    )
    assert found is not None and found.stack_pointer == 2


def test_arm() -> None:
    found = find(arm(pointer=LOW - 16, pc=0x400, address=LOW - 8, syndrome=True), BASE, "aarch64")
    assert found == Registers(
        faulted=True, address=LOW - 8, stack_pointer=LOW - 16, instruction=0x400
    )
    sent = find(arm(pointer=LOW, pc=0x400, address=0x77, syndrome=False), BASE, "aarch64")
    assert sent is not None and (sent.faulted, sent.address) == (False, None)


@given(memory=st.binary(max_size=4096), machine=st.sampled_from(["x86_64", "aarch64"]))
@settings(max_examples=50)
def test_any_memory_is_read_without_an_error(memory: bytes, machine: str) -> None:
    marks = {
        "x86_64": struct.pack("<4H", 0x33, 0, 0, 0x2B),
        "aarch64": struct.pack("<II", 0x46508001, 528),
    }
    find(memory, BASE, machine)
    find(memory + marks[machine] + memory, BASE, machine)


def test_mappings() -> None:
    text = (
        "7f1000000000-7f1000001000 ---p 00000000 00:00 0 \n"
        "7f1000001000-7f1000800000 rw-p 00000000 00:00 0 \n"
        "7f2000000000-7f2000100000 r-xp 00002000 fe:00 77                /usr/lib/a file.so\n"
        "7ffc00000000-7ffc00800000 rw-p 00000000 00:00 0                 [stack]\n"
        "7ffd00000000-7ffd0"
    )
    found = parse_maps(text)
    assert [(m.access, m.offset, m.name) for m in found] == [
        ("---p", 0, ""),
        ("rw-p", 0, ""),
        ("r-xp", 0x2000, "/usr/lib/a file.so"),
        ("rw-p", 0, "[stack]"),
    ]


MAPS = [
    Mapping(0x40_0000, 0x50_0000, "r-xp", 0x1000, "/usr/bin/python3"),
    Mapping(0x100_0000, 0x200_0000, "rw-p", 0, "[heap]"),
    Mapping(LOW - PAGE, LOW, "---p", 0, ""),
    Mapping(LOW, HIGH, "rw-p", 0, ""),
    Mapping(MAIN_LOW, MAIN_HIGH, "rw-p", 0, "[stack]"),
]
LIGHT_GUARD = [m for m in MAPS if m.access != "---p"]
"""Guard pages that are no mapping of their own (MADV_GUARD_INSTALL)."""
NO_GUARD = LIGHT_GUARD

SITES = [
    ("main-call", {"pointer": MAIN_LOW, "address": MAIN_LOW - 8}, True),
    ("main-small-frame", {"pointer": MAIN_LOW - 64, "address": MAIN_LOW - 32}, True),
    (
        "main-frame-of-128-kib",
        {"pointer": MAIN_LOW - (100 << 10), "address": MAIN_LOW - (100 << 10) - 8},
        True,
    ),
    (
        "main-frame-touched-in-its-middle",
        {"pointer": MAIN_LOW - (9 << 20), "address": MAIN_LOW - (4 << 20)},
        True,
    ),
    ("main-red-zone", {"pointer": MAIN_LOW + 64, "address": MAIN_LOW - 16}, True),
    ("main-null", {"pointer": MAIN_LOW + 512, "address": 0}, False),
    ("main-null-past-the-stack", {"pointer": MAIN_LOW - 8, "address": 0}, False),
    (
        "main-wild-pointer",
        {"pointer": MAIN_LOW + (1 << 20), "address": MAIN_LOW - (1 << 20)},
        False,
    ),
    ("main-pointer-to-below", {"pointer": MAIN_LOW + (1 << 20), "address": MAIN_LOW - 8}, False),
    ("main-beyond-the-upper-end", {"pointer": MAIN_LOW + 512, "address": MAIN_HIGH + 8}, False),
    ("main-address-not-told", {"pointer": MAIN_LOW - 8, "address": None}, False),
    ("main-on-a-stack-of-its-own", {"pointer": LOW, "address": LOW - 8, "maps": NO_GUARD}, False),
    ("main-on-a-guarded-stack-of-its-own", {"pointer": LOW, "address": LOW - 8}, True),
    ("thread-call", {"main": False, "pointer": LOW, "address": LOW - 8}, True),
    (
        "thread-frame-past-the-guard",
        {"main": False, "pointer": LOW - (120 << 10), "address": LOW - (120 << 10) - 8},
        True,
    ),
    (
        "thread-of-unknown-name-in-its-guard",
        {"main": False, "pointer": LOW, "address": LOW - 8, "ident": None},
        True,
    ),
    (
        "thread-of-unknown-name-past-its-guard",
        {"main": False, "pointer": LOW - (120 << 10), "address": LOW - (120 << 10), "ident": None},
        False,
    ),
    (
        "thread-light-guard",
        {"main": False, "pointer": LOW + 64, "address": LOW + 56, "maps": LIGHT_GUARD},
        True,
    ),
    ("thread-null", {"main": False, "pointer": LOW + PAGE, "address": 0}, False),
    (
        "thread-write-to-a-guard-elsewhere",
        {"main": False, "pointer": HIGH - PAGE, "address": LOW - 8},
        False,
    ),
]


@pytest.mark.parametrize(
    ("more", "overflow"), [row[1:] for row in SITES], ids=[row[0] for row in SITES]
)
def test_whether_a_thread_left_its_stack(more: dict[str, Any], overflow: bool) -> None:
    facts = {"main": True, "ident": IDENT, "maps": MAPS, **more}
    registers = Registers(
        faulted=True,
        address=facts["address"],
        stack_pointer=facts["pointer"],
        instruction=0x40_0010,
    )
    site = read_site(
        describe(registers, facts["maps"], pid=1, task=1 if facts["main"] else 2), facts["ident"]
    )
    assert site is not None
    assert site.overflow is overflow
    assert (site.library, site.library_offset) == ("/usr/bin/python3", 0x1010)


@pytest.mark.parametrize(
    ("code", "division"),
    [
        ("f7f9 89c6", True),  # idiv ecx
        ("49f7f0", True),  # div r8
        ("66f73b", True),  # idiv word ptr [rbx]
        ("f6f1", True),  # div cl
        ("6548f73c2500000000", True),  # idiv qword ptr gs:[0]
        ("f7e1", False),  # mul ecx
        ("f7d8", False),  # neg eax
        ("483d00f0ffff 7703 c3", False),  # behind the system call by which a process signals itself
        ("66", False),
        ("f7", False),
        ("", False),
    ],
)
def test_a_division_is_known_by_its_instruction(code: str, division: bool) -> None:
    assert divides(bytes.fromhex(code)) is division


@pytest.mark.skipif(signal_frame.MACHINE != "x86_64", reason="other processors do not trap it")
def test_only_an_arithmetic_fault_asks_whether_the_code_divides() -> None:
    registers = Registers(
        faulted=False, address=None, stack_pointer=MAIN_LOW + 512, instruction=0x40_0010
    )
    divided = describe(registers, MAPS, pid=1, task=1, machine_code=b"\xf7\xf9")
    sent = describe(registers, MAPS, pid=1, task=1, machine_code=b"\x48\x3d")
    sites = [
        read_site(divided, IDENT, arithmetic=True),
        read_site(divided, IDENT, arithmetic=False),
        read_site(sent, IDENT, arithmetic=True),
    ]
    assert [site and site.faulted for site in sites] == [True, False, False]


def test_nothing_seen_is_no_site() -> None:
    assert read_site(None, IDENT) is None
