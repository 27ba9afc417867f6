"""A cell that wanted another host where the run was to reach none."""

from __future__ import annotations

import re

from safe_exec.diagnosis.context import Context, inside, make, outside
from safe_exec.model.ending import CellFailed
from safe_exec.model.limits import Mechanism, Wall
from safe_exec.model.verdict import Cause, CauseKind, Confidence

UNREACHABLE = re.compile(
    r"Network is unreachable|Temporary failure in name resolution|Name or service not known|No address associated with hostname"
    r"|getaddrinfo failed|[Ff]ailed to resolve|NameResolutionError|Could not resolve host|Unknown host|cannot open URL"
    r"|No route to host"
)
"""What the system and libraries say (connect(2) ENETUNREACH, gai_strerror(3), urllib3, curl, R) when there is nothing but loopback."""


def blocked(context: Context) -> Cause | None:
    """A network error of a cell, with the network walled off by us."""
    error, wall = context.evidence.error, context.walls.get(Wall.NETWORK)
    if not isinstance(context.ending, CellFailed) or error is None or wall is None or wall.by is Mechanism.NONE:
        return None
    said = "\n".join((error.evalue, *error.traceback))
    found = UNREACHABLE.search(said)
    if found is None:
        return None
    facts = (
        inside("raised", f"{error.ename}: {error.evalue}"[:300], "the cell's error"),
        outside("network", "off", f"isolation of this run, held by {wall.by}"),
    )
    summary = f"the network is walled off, and the cell wanted another host ({found[0]})"
    advice = "Let it reach other hosts with --network, or give it the data beside the notebook; loopback works in any case."
    return make(
        context, CauseKind.NETWORK_BLOCKED, summary, Confidence.CERTAIN if wall.hard else Confidence.LIKELY, facts, advice
    )
