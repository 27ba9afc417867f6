"""The processor's state at a fatal signal, read from outside. Linux only; standard library only.

Before Linux calls a signal handler, it saves the interrupted thread's registers on the stack that
the handler will use (sigreturn(2), arch/x86/kernel/signal_64.c, arch/arm64/kernel/signal.c). The
fault handler of a dying kernel blocks in write(2) on our small socket (see keeper/crash_output.py),
so the saved registers lie a few hundred bytes above its stack pointer, and stay there until we read
the socket.

They hold the address whose access failed, the stack pointer and the instruction. Together with
/proc/PID/maps they tell a stack overflow from any other bad access, in every thread and however
large the frames are, and name the library that was executing.
"""

from __future__ import annotations

import os
import struct
import time
from typing import NamedTuple

from safe_exec.keeper import procfs
from safe_exec.keeper.protocol import FaultingThread

MACHINE = os.uname().machine if hasattr(os, "uname") else ""
WRITE_CALL = {"x86_64": 1, "aarch64": 64}
WAIT_SECONDS = 0.25
PAUSE_SECONDS = 0.0005
SEARCH_BYTES = 64 * 1024
# No instruction of x86_64 is longer than 15 bytes.
CODE_BYTES = 16
# A process may have 65530 mappings (sysctl vm.max_map_count).
MAPS_BYTES = 8 << 20

# x86_64: the code and stack segments of every 64-bit user process, in the middle of the saved
# registers.
_X86_SEGMENTS = struct.pack("<4H", 0x33, 0, 0, 0x2B)
_X86_BEFORE_SEGMENTS = 18 * 8
_X86_REGISTERS = struct.Struct("<24Q")
_X86_SP, _X86_IP, _X86_FLAGS, _X86_ERROR, _X86_TRAP, _X86_ADDRESS, _X86_FPSTATE = (
    15,
    16,
    17,
    19,
    20,
    22,
    23,
)
_X86_FLAG_ALWAYS_SET = 0x2
# Bits 3 to 5 of the second byte choose among eight operations; the last two are div and idiv.
_X86_DIVISION = 0x30
_X86_PREFIXES = bytes(
    (0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF2, 0xF3, *range(0x40, 0x50))
)
_X86_TRAPS = 32
X86_PAGE_FAULT = 14

# aarch64: the header of the floating point registers follows the general ones.
_ARM_FLOATS = struct.pack("<II", 0x46508001, 528)
_ARM_BEFORE_FLOATS = 288
_ARM_CONTEXT = struct.Struct("<35Q")
_ARM_ADDRESS, _ARM_SP, _ARM_PC = 0, 32, 33
_ARM_SYNDROME = struct.pack("<II", 0x45535201, 16)


class Registers(NamedTuple):
    """Registers that Linux saved. ``faulted`` is false if the signal was sent (kill, raise).

    ``address`` is the one whose access failed, ``None`` if the processor does not report it: for a
    non-canonical address or an illegal instruction.
    """

    faulted: bool
    address: int | None
    stack_pointer: int
    instruction: int


class Mapping(NamedTuple):
    """A line of /proc/PID/maps."""

    low: int
    high: int
    access: str
    offset: int
    name: str


def read(pid: int, channel: int, dump_signal: int | None) -> FaultingThread | None:
    """Return the state of the thread that is writing a fatal report, ``None`` if it cannot be read.

    ``channel`` is the inode of the socket's end that the fault handler writes to. A thread that
    answers ``dump_signal`` writes there too, and is not the one that faulted. Waits at most
    WAIT_SECONDS for the handler to block.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    while MACHINE in WRITE_CALL and time.monotonic() < deadline:
        try:
            writer = _writer(pid, channel, dump_signal)
            if writer is not None:
                return _read_thread(pid, *writer)
        except OSError:
            # The process has ended, or the system does not let us look (Yama, a container).
            return None
        state = procfs.stat(pid)
        if state is None or state.state in "ZX":
            return None
        time.sleep(PAUSE_SECONDS)
    return None


def _writer(pid: int, channel: int, dump_signal: int | None) -> tuple[int, int] | None:
    """Return the thread that is blocked in writing to the channel, and its stack pointer."""
    call = str(WRITE_CALL[MACHINE])
    for task in os.listdir(f"/proc/{pid}/task"):
        try:
            with open(f"/proc/{pid}/task/{task}/syscall") as file:
                fields = file.read().split()
            if fields[0] != call or not _is_channel(pid, int(fields[1], 16), channel):
                continue
        except (FileNotFoundError, ProcessLookupError):
            continue  # this thread has ended
        if dump_signal is None or not procfs.blocks(pid, int(task), dump_signal):
            return int(task), int(fields[-2], 16)
    return None


def _is_channel(pid: int, fd: int, inode: int) -> bool:
    return os.readlink(f"/proc/{pid}/fd/{fd}") == f"socket:[{inode}]"


def _read_thread(pid: int, task: int, handler_sp: int) -> FaultingThread | None:
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
        memory = os.pread(file.fileno(), SEARCH_BYTES, handler_sp)
        registers = find(memory, handler_sp, MACHINE)
        if registers is None:
            return None
        machine_code = _machine_code(file.fileno(), registers.instruction)
    with open(f"/proc/{pid}/maps", errors="replace") as maps:
        mappings = parse_maps(maps.read(MAPS_BYTES))
    return describe(registers, mappings, pid=pid, task=task, machine_code=machine_code)


def _machine_code(memory: int, address: int) -> bytes:
    """Return the bytes at an instruction; empty if unreadable, as after a call of a bad address."""
    try:
        return os.pread(memory, CODE_BYTES, address)
    except (OSError, OverflowError):
        return b""


# --- pure -----------------------------------------------------------------------------------------


def find(memory: bytes, base: int, machine: str) -> Registers | None:
    """Find the registers of the innermost signal frame in stack memory from address ``base``."""
    return _find_x86(memory, base) if machine == "x86_64" else _find_arm(memory)


def _find_x86(memory: bytes, base: int) -> Registers | None:
    at = memory.find(_X86_SEGMENTS)
    while at >= 0:
        start = at - _X86_BEFORE_SEGMENTS
        if start >= 0 and start % 8 == 0 and start + _X86_REGISTERS.size <= len(memory):
            values = _X86_REGISTERS.unpack_from(memory, start)
            # The floating point registers lie above, aligned to 64 bytes; a stale copy would point
            # elsewhere.
            beyond = values[_X86_FPSTATE] - base
            if (
                values[_X86_FLAGS] & _X86_FLAG_ALWAYS_SET
                and at < beyond <= len(memory)
                and values[_X86_TRAP] < _X86_TRAPS
            ):
                page_fault = values[_X86_TRAP] == X86_PAGE_FAULT
                return Registers(
                    faulted=values[_X86_TRAP] != 0 or values[_X86_ERROR] != 0,
                    address=values[_X86_ADDRESS] if page_fault else None,
                    stack_pointer=values[_X86_SP],
                    instruction=values[_X86_IP],
                )
        at = memory.find(_X86_SEGMENTS, at + 1)
    return None


def _find_arm(memory: bytes) -> Registers | None:
    at = memory.find(_ARM_FLOATS)
    while at >= 0:
        start = at - _ARM_BEFORE_FLOATS
        if start >= 0 and start % 16 == 0:
            values = _ARM_CONTEXT.unpack_from(memory, start)
            faulted = _ARM_SYNDROME in memory[at : at + 2048]
            return Registers(
                faulted=faulted,
                address=values[_ARM_ADDRESS] if faulted else None,
                stack_pointer=values[_ARM_SP],
                instruction=values[_ARM_PC],
            )
        at = memory.find(_ARM_FLOATS, at + 1)
    return None


def parse_maps(text: str) -> list[Mapping]:
    """Return the mappings of a process, lowest first; invalid lines are left out."""
    mappings = []
    for line in text.splitlines():
        try:
            span, access, offset, _device, _inode, *name = line.split(None, 5)
            low, high = (int(part, 16) for part in span.split("-"))
            mappings.append(Mapping(low, high, access, int(offset, 16), "".join(name)))
        except ValueError:
            # The last line may be cut off.
            continue
    return mappings


def divides(machine_code: bytes) -> bool:
    """Whether x86_64 code begins with a division of integers."""
    # The division error is trap 0, and it has no error code: the saved registers look like those of
    # a signal that was sent. Only the instruction tells them apart.
    operation = machine_code.lstrip(_X86_PREFIXES)
    if operation[:1] not in (b"\xf6", b"\xf7") or not operation[1:]:
        return False
    return operation[1] & _X86_DIVISION == _X86_DIVISION


def describe(
    registers: Registers,
    mappings: list[Mapping],
    *,
    pid: int,
    task: int,
    machine_code: bytes = b"",
) -> FaultingThread:
    """Return the registers of a thread together with the mappings that they point into.

    ``stack`` is the writable mapping that holds the stack pointer, or the next one above it: a
    stack grows downwards, so after an overflow its own mapping lies above the pointer.
    ``machine_code`` begins with the interrupted instruction.
    """
    address, pointer = registers.address, registers.stack_pointer
    lowest = max(pointer, address) if address is not None and _near(address, pointer) else pointer
    stack = next((m for m in mappings if m.high > lowest and "rw" in m.access), None)
    code = next((m for m in mappings if m.low <= registers.instruction < m.high), None)
    target = next((m for m in mappings if address is not None and m.low <= address < m.high), None)
    return FaultingThread(
        task=task,
        main=task == pid,
        faulted=registers.faulted,
        divides=MACHINE == "x86_64" and divides(machine_code),
        address=address,
        address_access=target.access if target else None,
        stack_pointer=pointer,
        stack=None if stack is None else (stack.low, stack.high),
        stack_is_main=stack is not None and stack.name == "[stack]",
        instruction=registers.instruction,
        library=None if code is None else code.name,
        library_offset=None if code is None else registers.instruction - code.low + code.offset,
    )


def _near(address: int, pointer: int) -> bool:
    return 0 <= address - pointer < 1 << 30
