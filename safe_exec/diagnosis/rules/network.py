"""A cell that needed another host while the run had no network."""

from __future__ import annotations

from safe_exec.diagnosis.context import Context, make, outside
from safe_exec.diagnosis.rules.isolation import advice, is_reason, naming_fact
from safe_exec.model.ending import CellFailed
from safe_exec.model.evidence import NeedKind
from safe_exec.model.limits import Mechanism, Wall
from safe_exec.model.verdict import Cause, CauseKind, Confidence


def blocked(context: Context) -> Cause | None:
    """Recognise a network error in a cell, or in its program, while the network is blocked."""
    wall = context.walls.get(Wall.NETWORK)
    if not isinstance(context.ending, CellFailed) or wall is None or wall.by is Mechanism.NONE:
        return None
    hosts = [conflict for conflict in context.evidence.conflicts if conflict.kind is NeedKind.HOST]
    conflict = next((host for host in hosts if is_reason(context, host)), None)
    if conflict is None:
        return None
    facts = [
        naming_fact(context, conflict),
        outside("network", "off", f"isolation of this run, held by {wall.by}"),
    ]
    if not conflict.usable:
        facts.append(
            outside(
                "route to other networks", "none", "/proc/net/route and ipv6_route of this machine"
            )
        )
    if conflict.local:
        facts.append(outside("listens outside", conflict.name, "/proc/net/tcp of this machine"))
    host = f" {conflict.name}" if conflict.name else ""
    cell = context.human(conflict.cell)
    summary = (
        f"isolation keeps the notebook from other hosts, and {cell} wanted "
        f"one{':' if host else ''}{host}"
    )
    if conflict.local:
        summary = (
            "isolation gives the notebook a loopback of its own: a service of this machine "
            f"listens on{host}, but {cell} could not reach it"
        )
    is_certain = (
        wall.hard
        and conflict.usable
        and (not conflict.in_output or conflict.cell == context.current)
    )
    confidence = Confidence.CERTAIN if is_certain else Confidence.LIKELY
    return make(
        context, CauseKind.NETWORK_BLOCKED, summary, confidence, tuple(facts), advice(conflict)
    )
