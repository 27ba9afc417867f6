"""The messages between runner and keeper, with their one encoding: a line of JSON for each message.

Both ends import this module. Standard library only.
"""

# Annotations stay real objects here (no `from __future__ import annotations`): `decode` reads them,
# and a NamedTuple whose annotations are strings takes half as long again to make. All types of this
# file together cost a starting keeper 2 ms; frozen dataclasses cost 20 ms, half of them for
# importing dataclasses.

import json
from collections.abc import Mapping
from types import UnionType
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin

from safe_exec.keeper.child import KernelCommand

# --- parts of messages --------------------------------------------------------------------------


class Delegation(NamedTuple):
    """A cgroup that must delegate controllers; its own processes move to ``leaf`` first."""

    group: str
    leaf: str
    controllers: tuple[str, ...]


class CgroupSetup(NamedTuple):
    """Cgroups to make (parents first), files to write, and files for joining, killing, counting.

    ``optional_writes`` are skipped if the file does not exist. ``memory_file`` holds the memory
    that is charged, ``memory_limit`` the limit it is compared with, in bytes.
    """

    delegation: Delegation | None = None
    dirs: tuple[str, ...] = ()
    writes: tuple[tuple[str, str], ...] = ()
    optional_writes: tuple[tuple[str, str], ...] = ()
    joins: tuple[str, ...] = ()
    kill_files: tuple[str, ...] = ()
    counter_files: tuple[str, ...] = ()
    memory_file: str | None = None
    memory_limit: int | None = None


# Kinds of places whose files disappear with the sandbox.
HOME, TMP, SHM, FOLDER = "home", "tmp", "shm", "folder"


class DiscardedPlace(NamedTuple):
    """A directory whose files disappear with the sandbox, to be listed before they do.

    ``name`` is the user's name for ``path``, ``kind`` is HOME, TMP, SHM or FOLDER. ``skip`` are
    paths below it that do not belong to the notebook: mount points.
    """

    name: str
    kind: str
    path: str
    skip: tuple[str, ...] = ()


class LimitedDisk(NamedTuple):
    """A file system of limited size at ``base``, on which the run sees ``folder``.

    ``size`` is in bytes. ``owner`` is the id of the user who owns all files on it, ``None`` for the
    keeper's own user.
    """

    base: str
    folder: str
    size: int
    inodes: int
    write_back: bool
    owner: int | None


class BwrapSetup(NamedTuple):
    """The command lines of bubblewrap and of the init inside it, and their file systems.

    ``argv`` ends where the init's command begins. ``sockets`` is the directory of the kernel's
    sockets inside, ``devices`` are shown read-only.
    """

    argv: tuple[str, ...]
    python: str
    package_root: str
    sockets: str
    disk: LimitedDisk | None
    discarded: tuple[DiscardedPlace, ...]
    devices: tuple[str, ...]


class FaultingThread(NamedTuple):
    """Registers that Linux saved for a fatal signal, and the mappings that they point into.

    ``faulted`` is false if the signal was sent, and after a failed division, which leaves no trace
    in the registers; ``divides`` is true if the instruction is a division. ``stack`` is the range
    of addresses of the mapping that holds the stack, ``address_access`` the permissions at the
    failing address, as in /proc/PID/maps. ``task`` is the thread's id as seen from outside.
    """

    task: int
    main: bool
    faulted: bool
    divides: bool
    address: int | None
    address_access: str | None
    stack_pointer: int
    stack: tuple[int, int] | None
    stack_is_main: bool
    instruction: int
    library: str | None
    library_offset: int | None


class ProcessAtFault(NamedTuple):
    """The state of the kernel process when its fault handler began a fatal report.

    ``at`` is monotonic time. ``stack_bytes`` and ``stack_limit`` are those of the main thread's
    stack.
    """

    at: float
    stack_bytes: int | None
    stack_limit: int | None
    thread: FaultingThread | None


class DiscardedGroup(NamedTuple):
    """Files that disappeared with the sandbox: a single one, or all below one directory."""

    place: str
    name: str
    files: int
    bytes: int


class KeptFile(NamedTuple):
    """A file that was copied out of the sandbox; its path is relative to the folder."""

    path: str
    bytes: int


# --- to the keeper ------------------------------------------------------------------------------


class Note(NamedTuple):
    """The file that lists everything this sandbox makes; the keeper removes it last."""

    path: str


class Spawn(NamedTuple):
    """Build the sandbox and start the kernel in it.

    Descriptors for the kernel come with this message.

    ``descriptor_names`` are the placeholders for them in the command. ``stack_before`` are the
    termination reasons for which a stack is requested before the kill. ``owner`` gets the runtime
    directory. ``directories`` are removed with the sandbox, ``cleanup_if_runner_dies`` only after
    the runner's death. Files of a private copy that match ``keep_patterns`` are copied to
    ``keep_folder``. The kernel may be traced by descendants of ``tracer``. With ``restorable`` a
    copy of the kernel may take over after its death.
    """

    command: KernelCommand
    descriptor_names: tuple[str, ...] = ()
    dump_signal: int | None = None
    tracer: int | None = None
    stack_before: tuple[str, ...] = ()
    cgroup: CgroupSetup = CgroupSetup()
    mounts: tuple[dict[str, str], ...] = ()
    user_namespace: bool = False
    bwrap: BwrapSetup | None = None
    owner: int | None = None
    discarded: tuple[DiscardedPlace, ...] = ()
    directories: tuple[str, ...] = ()
    cleanup_if_runner_dies: tuple[str, ...] = ()
    keep_patterns: tuple[str, ...] = ()
    keep_folder: str = ""
    restorable: bool = False


class SendSignal(NamedTuple):
    """Send a signal to the kernel, or to its process group."""

    number: int
    group: bool


class Kill(NamedTuple):
    """Kill the whole process tree for this reason, unless one was recorded before."""

    reason: str


class AddCleanup(NamedTuple):
    """Replace the directories of ``Spawn`` that are removed if the runner dies."""

    cleanup_if_runner_dies: tuple[str, ...]


class HoldAtFault(NamedTuple):
    """Hold a dying kernel at its fault until ``ReadOn``, but no longer than these seconds."""

    seconds: float


class ReadOn(NamedTuple):
    """End ``HoldAtFault`` early: let the held kernel write its report and die."""


class Spare(NamedTuple):
    """Let a sleeping copy of the kernel live when the kernel is killed for one of these reasons.

    ``pid`` is ``None`` if there is no copy any more.
    """

    pid: int | None
    reasons: tuple[str, ...]


class Continue(NamedTuple):
    """After the kernel's death: kill all processes but this copy, which becomes the kernel."""

    pid: int


class SpareSnapshot(NamedTuple):
    """Spare this process when the kernel is killed: a snapshot of it. 0 for none."""

    pid: int


class TakeOver(NamedTuple):
    """Make a snapshot the kernel, after the death of the kernel before; kill all others."""

    pid: int


class Finish(NamedTuple):
    """Take the sandbox down and exit."""


# --- to the runner ------------------------------------------------------------------------------


class Ready(NamedTuple):
    """The keeper runs and has made its directory."""

    pid: int


class Spawned(NamedTuple):
    """The kernel was executed.

    With bubblewrap, a descriptor of the sockets' directory inside it is attached.
    """

    pid: int


class Continued(NamedTuple):
    """The copy is the kernel now.

    Its descriptors come along: its own stderr, and the socket of its fault handler. ``pid`` is
    ``None``, and there are none, if the copy does not live or is no child of the keeper.
    """

    pid: int | None


class Failed(NamedTuple):
    """The kernel was not started.

    ``command_failed`` is true if the kernel's own command is to blame.
    """

    message: str
    command_failed: bool


class TookOver(NamedTuple):
    """A snapshot is the kernel now, or cannot be: ``failure`` says why, else it is empty."""

    pid: int
    failure: str


class Fault(NamedTuple):
    """A piece of a fault report of a living kernel; ``at`` is monotonic time."""

    text: str
    at: float


class Dying(NamedTuple):
    """A fatal report has begun in this thread, and the keeper holds the process.

    ``task`` is its id as seen from outside, ``instruction`` the address at which it was stopped.
    """

    task: int
    instruction: int
    stack_pointer: int


class SignalReceived(NamedTuple):
    """The keeper got a signal that was meant for the runner, and did not obey it."""

    number: int


class Trouble(NamedTuple):
    """A warning for the user."""

    message: str


class Exited(NamedTuple):
    """The end of the kernel process, and all facts that cannot be read later.

    ``status`` is the raw wait status, ``None`` if nobody could read it. ``caught_signals`` is a
    mask as in /proc (SigCgt). ``resident_peak`` is the largest resident memory in bytes of the
    process or of a child that it waited for, ``orphans_peak`` that of an adopted process, ``None``
    if none has ended. ``bursts`` are the last pieces of text on its stderr,
    each with its time.
    """

    at: float
    status: int | None
    reason: str | None
    cpu_seconds: float | None
    resident_peak: int | None
    orphans_peak: int | None
    counters: dict[str, str | None]
    fault_text: str
    fault: ProcessAtFault | None
    caught_signals: int | None
    stderr: str
    bursts: tuple[tuple[float, str], ...]
    oomd_killed: bool | None
    disk_free: int | None


class Discarded(NamedTuple):
    """The largest groups of files that disappear with the sandbox, and files that were kept."""

    groups: tuple[DiscardedGroup, ...] = ()
    files: int = 0
    is_complete: bool = True
    kept_files: tuple[KeptFile, ...] = ()


class CleanupResult(NamedTuple):
    """The keeper's last message: processes that did not die, paths that could not be removed."""

    surviving_pids: tuple[int, ...] = ()
    remaining_paths: tuple[str, ...] = ()


ToKeeper = (
    Note
    | Spawn
    | SendSignal
    | Kill
    | AddCleanup
    | HoldAtFault
    | ReadOn
    | Spare
    | Continue
    | SpareSnapshot
    | TakeOver
    | Finish
)
ToRunner = (
    Ready
    | Spawned
    | Continued
    | Failed
    | TookOver
    | Fault
    | Dying
    | SignalReceived
    | Trouble
    | Exited
    | Discarded
    | CleanupResult
)

TO_KEEPER: Mapping[str, type[ToKeeper]] = {
    "note": Note,
    "spawn": Spawn,
    "signal": SendSignal,
    "kill": Kill,
    "add_cleanup": AddCleanup,
    "hold_at_fault": HoldAtFault,
    "read_on": ReadOn,
    "spare": Spare,
    "continue": Continue,
    "spare_snapshot": SpareSnapshot,
    "take_over": TakeOver,
    "finish": Finish,
}
TO_RUNNER: Mapping[str, type[ToRunner]] = {
    "ready": Ready,
    "spawned": Spawned,
    "continued": Continued,
    "failed": Failed,
    "took_over": TookOver,
    "fault": Fault,
    "dying": Dying,
    "signal": SignalReceived,
    "trouble": Trouble,
    "exited": Exited,
    "discarded": Discarded,
    "cleaned_up": CleanupResult,
}
_NAMES: Mapping[type, str] = {
    kind: name for table in (TO_KEEPER, TO_RUNNER) for name, kind in table.items()
}
_Message = TypeVar("_Message", ToKeeper, ToRunner)


# --- encoding -----------------------------------------------------------------------------------


class ProtocolError(ValueError):
    """A line that is no message of this protocol; the text names the field."""


class LineBuffer:
    """Splits the bytes from the socket into lines, and keeps an unfinished last line."""

    def __init__(self) -> None:
        self._unfinished = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Add a piece from the socket, return the lines that it completes."""
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        return lines


def encode(message: ToKeeper | ToRunner) -> bytes:
    """Return the line for a message."""
    fields = as_plain(message)
    return json.dumps({"type": _NAMES[type(message)], **fields}).encode() + b"\n"


def decode(line: bytes, kinds: Mapping[str, type[_Message]]) -> _Message:
    """Return the message of a line; ``kinds`` is TO_KEEPER or TO_RUNNER. Raises ProtocolError."""
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ProtocolError(f"not JSON: {error}") from error
    name = fields.pop("type", None) if isinstance(fields, dict) else None
    kind = kinds.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ProtocolError(f"no message of this direction: {line[:100]!r}")
    message: _Message = _value(kind, fields, _NAMES[kind])
    return message


def as_plain(value: Any) -> Any:
    """Convert a message, or a part of one, to lists, dictionaries and scalars."""
    if hasattr(value, "_fields"):
        return {name: as_plain(getattr(value, name)) for name in value._fields}
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    return value


def _value(kind: Any, value: Any, path: str) -> Any:
    """Check a JSON value against a type, and convert it. ``path`` names it in errors."""
    if get_origin(kind) in (Union, UnionType):
        if value is None:
            return None
        (kind,) = (member for member in get_args(kind) if member is not type(None))
    origin = get_origin(kind)
    if origin is tuple:
        return _tuple(get_args(kind), value, path)
    if origin is dict and isinstance(value, dict):
        _, values = get_args(kind)
        return {name: _value(values, item, f"{path}.{name}") for name, item in value.items()}
    if hasattr(kind, "_fields") and isinstance(value, dict):
        return _record(kind, value, path)
    # JSON has one kind of number, and to Python True is an int.
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ProtocolError(f"{path}: {kind} expected, not {value!r:.100}")
    return value


def _tuple(kinds: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ProtocolError(f"{path}: a list expected, not {value!r:.100}")
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(kinds) != len(value):
        raise ProtocolError(f"{path}: {len(kinds)} items expected, not {len(value)}")
    return tuple(
        _value(kind, item, f"{path}[{index}]")
        for index, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _record(kind: Any, value: dict[str, Any], path: str) -> Any:
    if set(value) != set(kind._fields):
        names = ", ".join(sorted(set(value) ^ set(kind._fields)))
        raise ProtocolError(f"{path}: unknown or missing fields: {names}")
    return kind(
        **{
            name: _value(annotation, value[name], f"{path}.{name}")
            for name, annotation in kind.__annotations__.items()
        }
    )
