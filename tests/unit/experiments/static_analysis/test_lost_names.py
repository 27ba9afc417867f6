"""The cells that a failed cell takes with it: those that need its names, and no others."""

from __future__ import annotations

import pytest

from safe_exec.experiments.static_analysis.lost_names import cells_without_names

CASES: dict[str, tuple[list[str], set[int], dict[int, str]]] = {
    "a name of the failed cell": (
        ["a = 1", "b = a + 1", "print(b)", "print(a)"],
        {1},
        {2: "needs `b` of code cell 2, which failed"},
    ),
    "a name of a skipped cell": (
        ["a = 1", "b = a", "c = b"],
        {0},
        {
            1: "needs `a` of code cell 1, which failed",
            2: "needs `b` of code cell 2, which was skipped",
        },
    ),
    "a name that is bound again behind the failed cell": (
        ["a = 1", "a = 2", "print(a)"],
        {0},
        {},
    ),
    "an import that an earlier cell made too": (
        ["import os", "import os\nos.abort()", "os.getpid()"],
        {1},
        {},
    ),
    "an import of the failed cell alone": (
        ["x = 1", "import os\nos.abort()", "os.getpid()"],
        {1},
        {2: "needs `os` of code cell 2, which failed"},
    ),
    "a name that the failed cell replaced": (
        ["t = 1", "t = t + 1", "print(t)"],
        {1},
        {2: "needs `t` of code cell 2, which failed"},
    ),
    "an object that the failed cell changed": (
        ["rows = []", "rows.append(1)", "print(rows)"],
        {1},
        {2: "needs an effect of code cell 2, which failed"},
    ),
    "many names": (
        ["a = b = c = d = 1", "print(a, b, c, d)"],
        {0},
        {1: "needs `a`, `b`, `c` and others of code cell 1, which failed"},
    ),
    "nothing failed": (["a = 1", "print(a)"], set(), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_cells_without_names(name: str) -> None:
    sources, failed, reasons = CASES[name]
    # Markdown cells lie between: indexes are those of the notebook, names count code cells.
    indexed = {2 * number: source for number, source in enumerate(sources)}
    lost = cells_without_names(indexed, {2 * number for number in failed}, language="python")
    assert lost == {2 * number: reason for number, reason in reasons.items()}


def test_nothing_is_known_of_other_languages() -> None:
    assert cells_without_names({0: "a=1", 1: "echo $a"}, {0}, language="bash") == {}
