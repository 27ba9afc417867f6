"""Runs one notebook under plain nbclient and under ``safe-exec run``, and makes the two results comparable.

Left out of the comparison is only what differs between two runs of nbclient itself: times, addresses, ids of objects
and processes, the folder of the test, and the places at which a stream was split into messages.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import nbformat

from tests.support import Outcome, run_notebook

Prepare = Callable[[Path], None]

_PLAIN = """
import sys
import nbformat
from jupyter_client.channels import AsyncZMQSocketChannel
from nbclient import NotebookClient
send = AsyncZMQSocketChannel.send
def send_and_look(channel, msg):
    send(channel, msg)
    channel.socket._schedule_remaining_events()
AsyncZMQSocketChannel.send = send_and_look
path, folder, kernel, allow_errors = sys.argv[1:5]
node = nbformat.read(path, as_version=4)
client = NotebookClient(
    node, timeout=60, kernel_name=kernel, allow_errors=allow_errors == "yes", resources={"metadata": {"path": folder}}
)
client.execute()
nbformat.write(node, sys.argv[5])
"""
"""In a process of its own, as the command is: a kernel inherits environment, descriptors and signal masks from it.

jupyter_client sends past the asyncio socket, whose descriptor is edge-triggered: a reply that comes just while nbclient
answers a widget is not announced and nbclient sits out its timeout. Looking again changes no output.
"""

MORE_RUNS = 2
"""On a busy machine ipykernel's threads hand text on late, and nbclient itself gives different notebooks: ours has to be one of them."""

_CHANGING = (
    (re.compile(r"0x[0-9a-f]{6,}"), "0xADDRESS"),
    (re.compile(r"ipykernel_\d+"), "ipykernel_PID"),
    (re.compile(r"\(pid=\d+\)"), "(pid=PID)"),  # Python 3.12 warns of forks with threads
    (re.compile(r"(?<=ipykernel_PID/)\d+(?=\.py)"), "HASH"),
    (re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])"), "HEX"),
    (re.compile(r"object at [0-9a-f]{8,}"), "object at ADDRESS"),
    (
        re.compile(r"/bin/python3?(?![\w.])"),
        "/bin/python",
    ),  # the kernel's is the one that runs the client
    (re.compile(r"'connection_file': '[^']*'"), "'connection_file': 'FILE'"),
    (re.compile(r"\bstarted \d+"), "started IDENT"),
    (
        re.compile(r"\b[\d.]+(?:e[+-]\d+)? (?:ns|[μµu]s|ms|s)\b"),
        "TIME",
    ),  # 999.6 µs are "1e+03 μs" to IPython
    (
        re.compile(r"(?:Compiler|Parser) *: TIME\\n"),
        "",
    ),  # %%time prints these where they took over 0.1 s
)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The notebook as nbclient left it, as safe-exec left it, and the run of the latter."""

    plain: Any
    ours: Any
    outcome: Outcome
    again: Callable[[], Any]
    """Runs it once more under nbclient."""

    def text(self, index: int) -> str:
        """All text that safe-exec has of a cell's streams, both together."""
        return "".join(
            str(out.text) for out in self.ours.cells[index].outputs if out.output_type == "stream"
        )


def run_both(
    folder: Path,
    document: Any,
    *,
    kernel: str = "python3",
    allow_errors: bool = False,
    env: Mapping[str, str] | None = None,
    prepare: Prepare | None = None,
) -> Pair:
    """Execute ``document`` (a node, or the text of a notebook file) both ways, each in a folder of its own under ``folder``."""
    text = document if isinstance(document, str) else nbformat.writes(document)
    plain, ours = folder / "plain", folder / "ours"

    def fill(work: Path) -> None:
        work.mkdir()
        (work / "notebook.ipynb").write_text(text)
        if prepare is not None:
            prepare(work)

    def again() -> Any:
        shutil.rmtree(plain)
        fill(plain)
        with mock.patch.dict(os.environ):
            os.environ.pop("PYTEST_CURRENT_TEST", None)
            return comparable(_run_plain(plain, kernel, env, allow_errors=allow_errors), plain)

    fill(plain)
    fill(ours)
    # ipykernel leaves descriptors 1 and 2 alone where it sees this variable.
    with mock.patch.dict(os.environ):
        os.environ.pop("PYTEST_CURRENT_TEST", None)
        node = _run_plain(plain, kernel, env, allow_errors=allow_errors)
        options = (
            "--kernel",
            kernel,
            "--cell-timeout",
            "60s",
            *(("--allow-errors",) if allow_errors else ()),
        )
        outcome = run_notebook(ours / "notebook.ipynb", *options, env=env, cwd=ours)
    return Pair(
        plain=comparable(node, plain),
        ours=comparable(outcome.notebook, ours),
        outcome=outcome,
        again=again,
    )


def _run_plain(
    work: Path, kernel: str, env: Mapping[str, str] | None, *, allow_errors: bool
) -> Any:
    result = work / "notebook.out.ipynb"
    argv = [
        sys.executable,
        "-c",
        _PLAIN,
        "notebook.ipynb",
        str(work),
        kernel,
        "yes" if allow_errors else "no",
        str(result),
    ]
    done = subprocess.run(
        argv,
        cwd=work,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return nbformat.read(result, as_version=4)


def comparable(node: Any, work: Path) -> Any:
    """A copy of a result without what differs between two runs of the same tool, and without our own figures."""
    copy = deepcopy(node)
    copy.metadata.pop("safe_exec", None)
    if "widgets" in copy.metadata:
        copy.metadata["widgets"] = _widgets(copy.metadata["widgets"])
    for cell in copy.cells:
        cell.metadata.pop("safe_exec", None)
        if "execution" in cell.metadata:
            cell.metadata["execution"] = sorted(cell.metadata["execution"])
        if "outputs" in cell:
            cell.outputs = joined(cell.outputs)
    text = json.dumps(copy, ensure_ascii=False, sort_keys=True).replace(str(work), "FOLDER")
    for pattern, word in _CHANGING:
        text = pattern.sub(word, text)
    return nbformat.from_dict(json.loads(text))


def _widgets(metadata: Any) -> list[str]:
    """The states of all widgets; the keys are ids made up at random."""
    states = metadata["application/vnd.jupyter.widget-state+json"]["state"].values()
    pattern, word = next((pattern, word) for pattern, word in _CHANGING if word == "HEX")
    return sorted(pattern.sub(word, json.dumps(state, sort_keys=True)) for state in states)


def joined(outputs: list[Any]) -> list[Any]:
    """Adjacent chunks of the same stream as one."""
    result: list[Any] = []
    for output in outputs:
        last = result[-1] if result else None
        if (
            last
            and output["output_type"] == last["output_type"] == "stream"
            and output["name"] == last["name"]
        ):
            last["text"] += output["text"]
        else:
            result.append(deepcopy(output))
    return result


def by_stream(outputs: list[Any]) -> dict[str, str]:
    """The text of each stream, whatever came between."""
    found: dict[str, str] = {}
    for output in outputs:
        if output["output_type"] == "stream":
            found[output["name"]] = found.get(output["name"], "") + output["text"]
    return found


def assert_same(pair: Pair, *, status: str = "passed") -> None:
    """Outputs, counts, sources, ids, metadata: all the same."""
    assert pair.outcome.verdict["status"] == status, pair.outcome.stdout + pair.outcome.stderr
    assert len(pair.ours.cells) == len(pair.plain.cells)
    plain = pair.plain
    for _ in range(MORE_RUNS):
        if difference(plain, pair.ours) is None:
            break
        plain = pair.again()
    assert difference(plain, pair.ours) is None, difference(pair.plain, pair.ours)


def difference(plain: Any, ours: Any) -> str | None:
    """Where the two differ first."""
    for cell, own in zip(plain.cells, ours.cells, strict=True):
        if in_order(own) != in_order(cell):
            return f"in the cell\n{cell.source}\nnbclient\n{in_order(cell)}\nsafe-exec\n{in_order(own)}"
    if dict(ours.metadata) != dict(plain.metadata):
        return f"in the metadata: nbclient {plain.metadata}, safe-exec {ours.metadata}"
    versions = (plain.nbformat, plain.nbformat_minor), (ours.nbformat, ours.nbformat_minor)
    return None if versions[0] == versions[1] else f"in the format: {versions}"


def in_order(cell: Any) -> dict[str, Any]:
    """A cell; where it writes to both streams and flushes neither, each stream by itself.

    ipykernel sends the two when its timer fires: on a busy machine that is in the middle of the cell, and nbclient's own order varies.
    """
    found = dict(cell)
    outputs = found.get("outputs", [])
    names = {output["name"] for output in outputs if output["output_type"] == "stream"}
    if (
        len(names) > 1
        and "flush" not in cell.source
        and all(output["output_type"] == "stream" for output in outputs)
    ):
        found["outputs"] = by_stream(outputs)
    return found


def notebook_of(
    *sources: str,
    tags: Mapping[int, list[str]] | None = None,
    kernel: str = "python3",
    **metadata: Any,
) -> Any:
    """A notebook of code cells; ``tags`` by index."""
    cells = [nbformat.v4.new_code_cell(source, id=f"cell-{n}") for n, source in enumerate(sources)]
    for index, words in (tags or {}).items():
        cells[index].metadata["tags"] = words
    kernelspec = {"name": kernel, "display_name": kernel, "language": "python"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernelspec, **metadata})
