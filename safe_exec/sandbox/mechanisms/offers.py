"""The interface of a mechanism: a pure function from limits and host to an offer."""

from __future__ import annotations

from typing import Protocol

from msgspec import Struct

from safe_exec.model.limits import Limits
from safe_exec.sandbox.host.capabilities import HostCapabilities
from safe_exec.sandbox.plan import Offer


class Placement(Struct, frozen=True, kw_only=True):
    """The name of a sandbox's cgroups, and whether its kernel runs inside bubblewrap."""

    cgroup: str = "safe-exec"
    enclosed: bool = False


ANYWHERE = Placement()


class OfferFunction(Protocol):
    """The ``offer`` of a mechanism."""

    def __call__(
        self, limits: Limits, machine: HostCapabilities, placement: Placement, /
    ) -> Offer | None:
        """Return the mechanism's offer, ``None`` if the mechanism is not available."""
