"""YAML is read whatever happened to the modules of PyYAML."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
from safe_exec.limits import profiles
before = profiles.load_profile("ci", machine_memory=None)
for name in list(sys.modules):
    if name.split(".")[0] in ("yaml", "_yaml", "safe_exec"):
        del sys.modules[name]
from safe_exec.limits import profiles
print(repr(before) == repr(profiles.load_profile("ci", machine_memory=None)))
"""


def test_a_profile_is_read_after_a_reset_of_modules() -> None:
    # As pytester does between tests in one process.
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("True\n", "")
