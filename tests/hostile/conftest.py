"""What all hostile notebooks need: root, who can become an ordinary user, groups that root may make, and walls for both."""

from __future__ import annotations

from pathlib import Path

import pytest

BEDS = pytest.mark.bed("ordinary-user", "user-namespaces", "cgroup-v1-root", "bubblewrap")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(BEDS)
