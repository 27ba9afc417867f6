"""A wheel carries the profiles and the schema, and works away from the repository."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from tests.support import ROOT

SCRIPT = """
import safe_exec, sys
from safe_exec.limits.profiles import load_profile, shipped_profiles
from safe_exec.reports.verdict_json import load_schema
from safe_exec.agent import bootstrap as start
assert safe_exec.__file__.startswith(sys.argv[1]), safe_exec.__file__
assert set(shipped_profiles()) >= {"default", "ci", "strict"}, shipped_profiles()
assert load_profile("ci", machine_memory=1 << 34).limits.memory == 2 << 30
assert load_schema()["$id"] == "safe-exec/verdict/1"
from datetime import datetime, timezone
from pathlib import Path
from safe_exec.reports.batch.html import page
from safe_exec.reports.batch.results import BatchResult
here = Path.cwd()
none = BatchResult(results=(), root=here, out=here, started=datetime.now(timezone.utc), seconds=0, exit_code=0, command=(), safe_exec_version="")
page.write(none, here / "report.html")
assert "</html>" in (here / "report.html").read_text()
print("fine")
"""


def test_a_wheel_stands_on_its_own(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("safe_exec-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "safe_exec/_limits/default.yaml" in names
    assert {
        f"safe_exec/reports/{name}" for name in ("verdict.schema.json", "batch/summary.schema.json")
    } <= set(names)
    assert {
        f"safe_exec/reports/batch/html/page.{ending}" for ending in ("html", "css", "js")
    } <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, sys.argv[1]){SCRIPT}",
            str(tmp_path / "site"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "fine", done.stderr
