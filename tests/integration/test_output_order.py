"""What C code and child processes write to descriptors 1 and 2 keeps its place between the prints around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import make_notebook, run_notebook

pytestmark = pytest.mark.kills

SETUP = "import ctypes, os, subprocess, sys, threading\nlibc = ctypes.CDLL(None)"
WRITERS = (
    "libc.puts(b'c{n}'); libc.fflush(None)",
    "os.write(1, b'c{n}\\n')",
    "subprocess.run(['echo', 'c{n}'])",
    "os.system('echo c{n}')",
    "child = os.fork() or (os.write(1, b'c{n}\\n'), os._exit(0)); os.waitpid(child, 0)",
)
CELLS = 40


def text_of(cell: Any, name: str = "stdout") -> str:
    return "".join(output["text"] for output in cell.outputs if output.get("name") == name)


def run(folder: Path, *cells: str) -> list[Any]:
    outcome = run_notebook(make_notebook(folder / "nb.ipynb", SETUP, *cells), "--no-bisect")
    assert outcome.verdict["status"] == "passed", outcome.stdout
    return [cell for cell in outcome.notebook.cells if cell.cell_type == "code"][1:]


@pytest.mark.parametrize("number", range(3))
def test_prints_and_other_writes_alternate(tmp_path: Path, number: int) -> None:
    """Without asking the pipe before each write 2 to 8 of 40 cells were out of order; nbclient has 7 to 27."""
    sources = []
    for cell in range(CELLS):
        writer = WRITERS[cell % len(WRITERS)]
        sources.append(
            "\n".join(f"print('p{n}')\n{writer.format(n=n)}" for n in range(4)) + "\nprint('end')"
        )
    expected = "".join(f"p{n}\nc{n}\n" for n in range(4)) + "end\n"
    assert [text_of(cell) for cell in run(tmp_path, *sources)] == [expected] * CELLS


def test_in_a_tight_loop(tmp_path: Path) -> None:
    """After thousands of plain prints it is known how little time lies between two of them: a write(2) does not fit in."""
    plain = "for n in range(5000):\n    print(n)"
    both = "for n in range(500):\n    print('p', n)\n    os.write(1, b'c %d\\n' % n)"
    errors = (
        "for n in range(500):\n    print('p', n, file=sys.stderr)\n    os.write(2, b'c %d\\n' % n)"
    )
    pieces = "for n in range(500):\n    os.write(1, b'a')\n    print('b', end='')\n    os.write(1, b'c')\n    print()"
    first, second, third, fourth = run(tmp_path, plain, both, errors, pieces)
    assert text_of(first) == "".join(f"{n}\n" for n in range(5000))
    assert (
        text_of(second)
        == text_of(third, "stderr")
        == "".join(f"p {n}\nc {n}\n" for n in range(500))
    )
    assert text_of(fourth) == "abc\n" * 500


def test_in_a_thread_and_before_a_display(tmp_path: Path) -> None:
    thread = (
        "def work():\n    for n in range(200):\n        print('p', n)\n        os.write(1, b'c %d\\n' % n)\n"
        "thread = threading.Thread(target=work)\nthread.start()\nthread.join()"
    )
    shown = "from IPython.display import display\nfor n in range(5):\n    libc.puts(b'c%d' % n)\n    libc.fflush(None)\n    display(n)"
    first, second = run(tmp_path, thread, shown)
    assert text_of(first) == "".join(f"p {n}\nc {n}\n" for n in range(200))
    kinds = [(out.output_type, out.get("text") or out.data["text/plain"]) for out in second.outputs]
    assert kinds == [
        pair for n in range(5) for pair in (("stream", f"c{n}\n"), ("display_data", f"{n}"))
    ]


def test_a_forked_child_prints_as_before(tmp_path: Path) -> None:
    child = (
        "print('parent')\nsys.stdout.flush()\nchild = os.fork()\nif child == 0:\n    print('child')\n    sys.stdout.flush()\n    os._exit(0)\n"
        "os.waitpid(child, 0)\nprint('end')"
    )
    (cell,) = run(tmp_path, child)
    assert sorted(text_of(cell).split()) == ["child", "end", "parent"]
