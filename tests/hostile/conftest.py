"""What all hostile notebooks need: root, who can become an ordinary user, groups that root may make, and walls for both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.arena import PLACES, Arena

BEDS = pytest.mark.bed("ordinary-user", "user-namespaces", "cgroup-v1-root", "bubblewrap")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(BEDS)


@pytest.fixture(params=PLACES, ids="-".join)
def arena(request: pytest.FixtureRequest) -> Iterator[Arena]:
    """An arena in each of the two places, or in that which the parameter says."""
    who, profile = request.param
    with Arena(who, profile) as found:
        yield found
