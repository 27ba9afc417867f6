"""``probe`` and ``replay`` with real kernels: the bracket is where the limit strikes, and nothing is left beside the notebook."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import EXECUTABLE, MARK, make_notebook, marked_processes, safe_exec, wait_until

MIB = 1 << 20
BIG = "big = bytearray(b'x') * (150 << 20)"

pytestmark = pytest.mark.kills


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of one's own, so that what is left in it can be seen."""
    home = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No process, no copy of the folder, and in the folder what the test put there."""
    mark = secrets.token_hex(8)
    monkeypatch.setenv(MARK, mark)
    yield
    wait_until(lambda: marked_processes(mark) == [], 5, "no process is left")
    folders = cache / "safe-exec" / "folders"
    assert not folders.is_dir() or os.listdir(folders) == []


def probe(path: Path, limit: str, *options: str) -> dict[str, Any]:
    before = sorted(os.listdir(path.parent))
    done = safe_exec("probe", path, limit, "--json", *options)
    assert done.returncode in (0, 1), done.stderr
    assert done.stderr == ""
    assert sorted(os.listdir(path.parent)) == before
    document: dict[str, Any] = json.loads(done.stdout)
    assert document["found"] == (done.returncode == 0)
    return document


def run(path: Path, *options: str) -> dict[str, Any]:
    safe_exec("run", path, "--no-bisect", "-q", *options)
    verdict: dict[str, Any] = json.loads(path.with_suffix(".verdict.json").read_text())
    return verdict


# --- probe ------------------------------------------------------------------------------------------------------


def test_memory(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", "x = 1", BIG, "print(x)")
    found = probe(path, "memory")
    assert found["fails"] < found["passes"] <= found["fails"] * 1.05
    assert found["fails"] > 150 * MIB and found["passes"] < 320 * MIB
    assert found["peak"] <= found["passes"]
    assert (found["cause"]["kind"], found["crash_cell"]["code_index"]) == ("out_of_memory", 1)
    assert len(found["runs"]) <= 6


def test_what_it_says_is_true_of_run(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", "x = 1", BIG)
    done = safe_exec("probe", path, "memory", "--precision", "10%")
    assert done.returncode == 0
    lines = {line.split()[0]: line.split() for line in done.stdout.splitlines()}
    assert [line.startswith("run ") for line in done.stderr.splitlines()] == [True] * len(
        done.stderr.splitlines()
    )
    assert lines["reproduce"][1:3] == ["safe-exec", "run"]
    verdict = run(path, *lines["reproduce"][4:])
    assert (verdict["status"], verdict["cause"]["kind"]) == ("kernel_died", "out_of_memory")
    assert run(path, *lines["use"][1:3])["status"] == "passed"


def test_up_from_a_limit_that_is_too_tight(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", "x = 1", BIG)
    found = probe(path, "memory", "--memory", "100M")
    assert [found["runs"][0]["passed"], found["runs"][0]["value"]] == [False, 100 * MIB]
    assert found["fails"] < found["passes"] <= found["fails"] * 1.05


def test_open_files(tmp_path: Path) -> None:
    path = make_notebook(
        tmp_path / "nb.ipynb", "held = [open('/dev/null') for _ in range(100)]", "print(len(held))"
    )
    found = probe(path, "open-files")
    assert found["passes"] == found["fails"] + 1
    assert 100 < found["fails"] < 300
    assert found["cause"]["kind"] == "too_many_open_files"
    assert len(found["runs"]) <= 12


def test_processes(tmp_path: Path) -> None:
    source = "import threading, time\nts = [threading.Thread(target=time.sleep, args=(0.6,)) for _ in range(20)]\n"
    path = make_notebook(
        tmp_path / "nb.ipynb", source + "[t.start() for t in ts]\n[t.join() for t in ts]"
    )
    found = probe(path, "processes")
    assert found["passes"] == found["fails"] + 1
    assert (found["cause"]["kind"], found["crash_cell"]["line"]) == ("too_many_processes", 3)
    assert len(found["runs"]) <= 6


def test_a_cell_timeout(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", "import time", "time.sleep(1)")
    found = probe(path, "cell-timeout", "--precision", "20%")
    assert 0.6 < found["fails"] <= 1.3 and 1.0 <= found["passes"] < 3.0
    assert (found["cause"]["kind"], found["crash_cell"]["code_index"]) == ("cell_timeout", 1)


def test_the_size_of_a_file(tmp_path: Path) -> None:
    path = make_notebook(
        tmp_path / "nb.ipynb",
        "file = open('out.bin', 'wb')\nfile.write(b'x' * 5_000_000)\nfile.flush()",
        "file.close()",
    )
    found = probe(path, "file-size")
    assert found["fails"] < 5_000_000 <= found["passes"]
    assert found["cause"]["kind"] == "file_too_large"


def test_a_name_error_is_no_matter_of_memory(tmp_path: Path) -> None:
    found = probe(make_notebook(tmp_path / "nb.ipynb", "x = 1", "print(nothing)"), "memory")
    assert (found["ended"], len(found["runs"]), found["cause"]["kind"]) == (
        "unrelated",
        1,
        "exception",
    )


def test_runs_do_not_see_each_other(tmp_path: Path) -> None:
    source = "import os\nassert not os.path.exists('mine')\nopen('mine', 'w').close()\nassert open('given').read() == 'data'"
    (tmp_path / "given").write_text("data")
    path = make_notebook(
        tmp_path / "nb.ipynb", source, "held = [open('/dev/null') for _ in range(100)]"
    )
    assert probe(path, "open-files")["found"]


def test_the_budget(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", "import time\ntime.sleep(3)")
    began = time.monotonic()
    found = probe(path, "memory", "--budget", "9s")
    assert found["ended"] == "budget" and found["reason"]
    assert time.monotonic() - began < 20


def test_ctrl_c_prints_what_is_known(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", "import time\ntime.sleep(1)")
    argv = [str(EXECUTABLE), "probe", str(path), "memory"]
    env = {key: value for key, value in os.environ.items() if key != "PYTEST_CURRENT_TEST"}
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("run 1 ")
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "stopped; what is known so far" in stdout and "passes with" in stdout
    assert os.listdir(tmp_path) == ["nb.ipynb"]


# --- replay -----------------------------------------------------------------------------------------------------


def replay(path: Path, *options: str) -> tuple[int, str]:
    before = sorted(os.listdir(path.parent))
    done = safe_exec("replay", path, *options)
    assert sorted(os.listdir(path.parent)) == before
    return done.returncode, done.stdout or done.stderr


def test_the_failure_of_a_verdict_again(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", "x = 1", BIG)
    run(path, "--memory", "120M")
    code, words = replay(tmp_path / "nb.verdict.json")
    assert code == 0
    assert words.startswith(
        "✓ the same here: out of memory in code cell 2, line 1, peak 120 MiB (120 MiB then)\n"
    )


def test_the_reproduction_of_a_verdict(tmp_path: Path) -> None:
    path = make_notebook(
        tmp_path / "nb.ipynb", "x = 1", BIG, "y = 2", "more = bytearray(b'x') * (150 << 20)"
    )
    safe_exec("run", path, "--memory", "260M", "-q")
    assert (tmp_path / "nb.repro.ipynb").exists()
    code, words = replay(tmp_path / "nb.verdict.json", "--json")
    document = json.loads(words)
    assert (code, document["same"], document["reproduction"], document["differs"]) == (
        0,
        True,
        True,
        [],
    )


def test_a_verdict_that_claims_another_cause(tmp_path: Path) -> None:
    path = make_notebook(tmp_path / "nb.ipynb", "x = 1", BIG)
    verdict = run(path, "--memory", "120M")
    verdict["cause"]["kind"], verdict["cause"]["signal"] = "segfault", -11
    verdict["environment"]["packages"]["ipykernel"] = "0.1"
    (tmp_path / "nb.verdict.json").write_text(json.dumps(verdict))
    code, words = replay(tmp_path / "nb.verdict.json")
    assert code == 1
    rows = [line.split() for line in words.splitlines()]
    assert words.startswith("✗ not the same: out of memory in code cell 2 here\n")
    assert ["cause", "segfault", "out", "of", "memory"] in rows and [
        "signal",
        "SIGSEGV",
        "SIGKILL",
    ] in rows
    assert any(row[:2] == ["ipykernel", "0.1"] for row in rows)


def test_a_failure_that_does_not_happen_here(tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    path = make_notebook(
        tmp_path / "nb.ipynb", "import os\nif os.path.exists('broken'):\n    os.abort()"
    )
    run(path)
    (tmp_path / "broken").unlink()
    code, words = replay(tmp_path / "nb.verdict.json")
    assert code == 1 and words.startswith("✗ not the same: it passed here\n")


def test_a_passed_verdict_has_nothing_to_replay(tmp_path: Path) -> None:
    run(make_notebook(tmp_path / "nb.ipynb", "1"))
    code, words = replay(tmp_path / "nb.verdict.json")
    assert code == 2 and "nothing to replay: the run passed" in words
