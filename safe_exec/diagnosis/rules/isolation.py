"""A cell asked for an existing file, variable, module or program that isolation took away.

The kernel names the thing in an error or an output. safe-exec checks outside the sandbox that the
thing exists there, and that this run's isolation takes it away (``Evidence.conflicts``). Without
both, the error is an exception like any other.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from safe_exec.diagnosis.context import Context, inside, leaves_reason_to_output, make, outside
from safe_exec.model.ending import CellFailed
from safe_exec.model.evidence import Access, IsolationConflict, NeedKind
from safe_exec.model.limits import Mechanism, Wall
from safe_exec.model.patterns import lazy_pattern
from safe_exec.model.verdict import Cause, CauseKind, Confidence, Fact

# A path in an environment of Python's: its prefix, and the first name below its packages.
PACKAGES = lazy_pattern(
    r"^(/.+?)/lib(?:64)?/(?:python[\d.]+|pypy[\d.]+)/(?:site|dist)-packages(?:/([^/]+))?"
)
# What pip, uv and conda write where their index cannot be reached.
INSTALLER = lazy_pattern(
    r"\bpip\b|/simple/|pypi|conda|urllib3|retrying|distribution|requirement|index|package",
    re.IGNORECASE,
)
NETWORK_ADVICE = (
    "Let it reach other hosts with --network, or give it the data beside the "
    "notebook; loopback works in any case."
)
LOCAL_ADVICE = (
    "Let it reach the services of this machine with --network, or start the service in the "
    "notebook itself."
)
NO_ROUTE_ADVICE = (
    "Give it the data beside the notebook. This machine itself has no route to "
    "other networks, so --network alone would not help."
)
WRITE_HERE = "Write into the notebook's folder."


def refused_access(context: Context) -> Cause | None:
    """Recognise a cell error that comes from something that isolation took away."""
    if not isinstance(context.ending, CellFailed) or context.evidence.error is None:
        return None
    conflict = next(
        (
            c
            for c in context.evidence.conflicts
            if c.kind is not NeedKind.HOST and is_reason(context, c)
        ),
        None,
    )
    if conflict is None:
        return None
    return make(
        context,
        CauseKind.ISOLATION,
        _summary(context, conflict),
        Confidence.CERTAIN if _is_certain(context, conflict) else Confidence.LIKELY,
        (naming_fact(context, conflict), *_facts(context, conflict)),
        advice(conflict),
    )


MOST_WARNINGS = 3


def unexplained(context: Context, cause: Cause | None) -> tuple[str, ...]:
    """Return warnings about refusals in outputs that the cause does not mention."""
    if cause is not None and cause.kind in (CauseKind.ISOLATION, CauseKind.NETWORK_BLOCKED):
        return ()
    conflicts = [c for c in context.evidence.conflicts if c.in_output and c.exact][:MOST_WARNINGS]
    return tuple(
        f"{context.human(c.cell)} printed {c.line!r}: {_conflict_text(c)}. {advice(c)}"
        for c in conflicts
    )


def _conflict_text(conflict: IsolationConflict) -> str:
    if conflict.local:
        return (
            f"isolation gives the notebook a loopback of its own: {conflict.name} of this "
            "machine is out of reach"
        )
    if conflict.kind is NeedKind.HOST:
        return "isolation keeps the notebook from other hosts"
    # A variable's value is never shown: it may be a secret.
    if conflict.kind is NeedKind.VARIABLE:
        return f"isolation removed the environment variable {conflict.name}"
    if conflict.writes:
        return (
            f"isolation makes {conflict.path} read-only"
            if conflict.access is Access.READ_ONLY
            else f"isolation hides {conflict.path}"
        )
    return f"isolation hides {conflict.path}"


def is_reason(context: Context, conflict: IsolationConflict) -> bool:
    """Tell whether a conflict explains the cell's error.

    Either the error names the refused thing, or it gives no reason and an output names the thing.
    The output may be that of an earlier cell, if the error is about a thing that was refused there.
    """
    # The error itself names the thing.
    if not conflict.in_output:
        return True
    if conflict.cell == context.current and leaves_reason_to_output(context):
        return True
    # A module is missing if an earlier installation failed.
    missing = any(row.module for row in context.evidence.raised)
    if missing and (_installs(conflict) or _is_of_installer(conflict)):
        return True
    # The last component of a path identifies a file in an output.
    names = [
        name.rstrip("/").rpartition("/")[2] for row in context.evidence.raised for name in row.files
    ]
    line_words = re.findall(r"[\w.-]+", conflict.line)
    return any(name in line_words for name in names if name)


def _is_of_installer(conflict: IsolationConflict) -> bool:
    """Tell whether a package installer could not reach a host."""
    return conflict.kind is NeedKind.HOST and INSTALLER.search(conflict.line) is not None


def _installs(conflict: IsolationConflict) -> bool:
    """Tell whether the refused access was an installation of packages."""
    return (
        conflict.path is not None
        and conflict.access is not Access.OPEN
        and PACKAGES.match(conflict.path) is not None
    )


def _is_certain(context: Context, conflict: IsolationConflict) -> bool:
    """Tell whether the kernel named the refused thing exactly, and a hard wall refuses it."""
    # The text may be a quotation of something else.
    if not conflict.exact:
        return False
    # Several walls may hide a path; name the one whose option opens it.
    wall = _wall(context, conflict)
    enforcement = context.walls.get(wall) if wall else None
    if enforcement is None or not enforcement.hard:
        return False
    if not conflict.in_output or conflict.cell == context.current:
        return True
    # The path names the package that could not be installed.
    match = PACKAGES.match(conflict.path or "")
    modules = {
        (row.module or "").partition(".")[0] for row in context.evidence.raised if row.module
    }
    return match is not None and (match[2] or "").partition(".")[0] in modules


def _wall(context: Context, conflict: IsolationConflict) -> Wall | None:
    """Return the wall that refuses access to the thing."""
    if conflict.kind is NeedKind.VARIABLE:
        return Wall.ENVIRONMENT
    facts = context.evidence.isolation
    if facts is None or conflict.path is None:
        return None
    if not conflict.usable and conflict.access is not Access.HIDDEN:
        return Wall.USER
    if conflict.access is Access.READ_ONLY:
        return (
            Wall.FOLDER
            if facts.folder and _lies_in(conflict.path, (facts.folder,))
            else Wall.SYSTEM
        )
    if _lies_in(conflict.path, facts.hidden):
        return Wall.HIDDEN
    return (
        Wall.HOME if _lies_in(conflict.path, facts.hidden_homes) or conflict.moved else Wall.SYSTEM
    )


def _lies_in(path: str, tops: Sequence[str]) -> bool:
    return any(path == top or path.startswith(f"{top}/") for top in tops)


NOUNS = {NeedKind.MODULE: "module", NeedKind.PROGRAM: "program"}


def _summary(context: Context, conflict: IsolationConflict) -> str:
    name, cell = conflict.name, context.human(conflict.cell)
    if conflict.kind is NeedKind.VARIABLE:
        return (
            f"isolation removed the environment variable {name}: it is set outside the "
            f"sandbox, but {cell} could not read it"
        )
    if _installs(conflict):
        return (
            f"isolation makes the kernel's environment read-only, so {cell} could not "
            "install packages into it"
        )
    if conflict.writes:
        place = conflict.allow[0] if conflict.allow else conflict.path
        obstacle = (
            f"hides the directory {place}"
            if conflict.access is Access.HIDDEN
            else f"makes the directory {place} read-only"
        )
        return f"isolation {obstacle}, so {cell} could not write {name}"
    if not conflict.usable and conflict.access is not Access.HIDDEN:
        return (
            f"the kernel runs as another user, who may not read {name}; you may, but {cell} "
            "could not"
        )
    noun = f"the {NOUNS[conflict.kind]} " if conflict.kind in NOUNS else ""
    path_text = f" ({conflict.path})" if conflict.path and conflict.path != name else ""
    return (
        f"isolation hides {noun}{name}{path_text}: it exists outside the sandbox, but {cell} "
        "could not reach it"
    )


def advice(conflict: IsolationConflict) -> str:
    """Return the option that gives the notebook access, and alternatives."""
    if conflict.kind is NeedKind.HOST:
        remote = NETWORK_ADVICE if conflict.usable else NO_ROUTE_ADVICE
        return LOCAL_ADVICE if conflict.local else remote
    if conflict.kind is NeedKind.VARIABLE:
        return f"Pass it on with --env {conflict.name}: the notebook can then read its value."
    if _installs(conflict) and conflict.allow:
        return (
            "Install the packages before the run, outside the sandbox, into the environment of "
            "the kernel. Or allow the notebook to change"
            f" this environment with --writable {shlex.quote(conflict.allow[0])}."
        )
    if _is_device(conflict):
        return f"Let the notebook use the device with --device {shlex.quote(conflict.path or '')}."
    if not conflict.usable:
        return (
            "Let other users read it (chmod o+r), or put a copy that they may read into the "
            "notebook's folder."
        )
    return _of_socket(conflict) if conflict.socket else _of_paths(conflict)


def _of_socket(conflict: IsolationConflict) -> str:
    """Return advice for the socket of a program that listens outside the sandbox."""
    options = " ".join(f"--show {shlex.quote(path)}" for path in conflict.allow)
    if not options:
        return f"Use its path without links, which the notebook can reach: {conflict.path}."
    return (
        f"Allow it with {options}: the notebook can then have the program that listens there do "
        "whatever that program does for you."
    )


def _of_paths(conflict: IsolationConflict) -> str:
    options = " ".join(
        f"{'--writable' if conflict.writes else '--show'} {shlex.quote(path)}"
        for path in conflict.allow
    )
    if conflict.writes:
        place = "a temporary directory" if conflict.in_folder else "the notebook's folder"
        return f"Allow it with {options}, or write into {place}." if options else WRITE_HERE
    if not options and conflict.moved:
        return (
            "The notebook's home is another directory here: give it the full path, "
            f"{conflict.path}, which it can reach."
        )
    if not options:
        return f"Use its path without links, which the notebook can reach: {conflict.path}."
    if conflict.moved:
        return (
            f"Allow it with {options}, and use this path: the notebook's home is another "
            "directory here. Or put a copy into its folder."
        )
    if conflict.kind is NeedKind.PATH:
        return f"Allow reading it with {options}, or put it into the notebook's folder."
    return f"Allow it with {options}."


def _is_device(conflict: IsolationConflict) -> bool:
    shared_memory = "/dev/shm/"  # noqa: S108 - named, not used
    path = conflict.path or ""
    # Shared memory is a directory for files, not a device.
    return path.startswith("/dev/") and not path.startswith(shared_memory)


def naming_fact(context: Context, conflict: IsolationConflict) -> Fact:
    """Return the error or the output line that names the refused thing, as a fact."""
    error = context.evidence.error
    if conflict.in_output or error is None:
        return inside("printed", conflict.line, f"output of {context.human(conflict.cell)}")
    return inside("raised", f"{error.ename}: {error.evalue}"[:300], "the cell's error")


def _facts(context: Context, conflict: IsolationConflict) -> tuple[Fact, ...]:
    facts: list[Fact] = []
    if conflict.kind is NeedKind.VARIABLE:
        facts.append(
            outside(
                "set outside", conflict.name, "environment of safe-exec; its value is not shown"
            )
        )
    elif conflict.writes:
        facts.append(
            outside(
                "writable outside",
                conflict.allow[0] if conflict.allow else conflict.path,
                "access(2) by safe-exec",
            )
        )
    else:
        facts.append(outside("exists outside", conflict.path, "stat(2) by safe-exec"))
    wall = _wall(context, conflict)
    enforcement = context.walls.get(wall) if wall else None
    if enforcement is not None and wall is not None and enforcement.by is not Mechanism.NONE:
        facts.append(
            outside(
                "isolation",
                enforcement.note or wall.value,
                f"isolation of this run, held by {enforcement.by}",
            )
        )
    return tuple(facts)
