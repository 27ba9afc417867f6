"""The values of --cluster."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from safe_exec.batch.cluster.connection import ADDRESS_VARIABLE, parse_cluster
from safe_exec.batch.fingerprint import describe_differences
from safe_exec.errors import UsageError


@pytest.mark.parametrize(
    ("text", "kind", "target", "count"),
    [
        ("tcp://host:8786", "address", "tcp://host:8786", 0),
        ("tls://host:8786", "address", "tls://host:8786", 0),
        ("local:3", "local", "", 3),
        ("local", "local", "", 1),
        ("slurm:20", "slurm", "", 20),
        ("htcondor", "htcondor", "", 1),
    ],
)
def test_clusters(text: str, kind: str, target: str, count: int) -> None:
    address = parse_cluster(text)
    assert (address.kind, address.target, address.count) == (kind, target, count)


def test_a_scheduler_file(tmp_path: Path) -> None:
    path = tmp_path / "scheduler.json"
    path.write_text("{}")
    assert parse_cluster(str(path)).kind == "file"


def test_the_address_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ADDRESS_VARIABLE, raising=False)
    with pytest.raises(UsageError, match="DASK_SCHEDULER_ADDRESS is not set"):
        parse_cluster("dask")
    monkeypatch.setenv(ADDRESS_VARIABLE, "tcp://host:1")
    assert parse_cluster("dask").target == "tcp://host:1"


@pytest.mark.parametrize("text", ["", "local:0", "local:x", "local:", "nowhere", "slurm:²"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--cluster"):
        parse_cluster(text)


def test_nothing_of_dask_is_imported_without_a_cluster() -> None:
    code = (
        "import sys; import safe_exec.cli.batch, safe_exec.cli.run, safe_exec.batch.scheduler; "
        "print([name for name in sys.modules if name.split('.')[0] in ('dask', 'distributed')])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"


def test_versions_that_differ() -> None:
    def environment(python: str, packages: str) -> str:
        return f'[["python"], {{}}, "[\\"{python} (main)\\", \\"Linux\\", {packages}]"]'

    same = environment("3.11.2", '[[\\"numpy\\", \\"1.26\\"]]')
    other = environment("3.12.1", '[[\\"numpy\\", \\"2.0\\"], [\\"pandas\\", \\"2.2\\"]]')
    assert describe_differences({"node-a": same, "node-b": same}) == ""
    assert describe_differences({"node-a": same, "node-b": other}) == (
        "Python 3.11.2 (node-a), 3.12.1 (node-b); numpy 1.26 (node-a), 2.0 (node-b); "
        "pandas 2.2 (node-b)"
    )
    assert describe_differences({"node-a": "none", "node-b": "none"}) == ""
