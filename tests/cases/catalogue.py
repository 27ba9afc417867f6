"""Read the cases: every JSON file in this folder, each with a notebook ``notebooks/ID.ipynb``.

README.md beside this file describes the format.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from packaging.specifiers import SpecifierSet

HERE = Path(__file__).parent
NOTEBOOKS = HERE / "notebooks"

Place = Literal["root", "user", "landlock", "user-landlock"]
PLACES: tuple[Place, ...] = ("root", "user", "landlock", "user-landlock")
WRITTEN = (True, False, "or-not-passed")
"""What ``wrote`` may say of a file: it exists, it does not, or it exists unless the run failed."""
KERNEL_BEDS = {"bash": "bash", "ir": "R", "deno": "deno"}
WALLED = ("ci", "strict", "untrusted")
"""The profiles that isolate, so that Landlock alone makes a difference."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One notebook with its right answer; the keys of the JSON file."""

    id: str
    title: str
    source: str
    expected: Mapping[str, Any]
    options: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    packages: tuple[str, ...] = ()
    needs_isolation: tuple[str, ...] = ()
    memory: Mapping[str, Any] | None = None
    native: str = ""
    python: str = ""
    alternatives: tuple[Mapping[str, Any], ...] = ()
    says: tuple[str, ...] = ()
    search_says: tuple[str, ...] = ()
    never_says: tuple[str, ...] = ()
    git: bool = False
    home: bool = False
    wrote: Mapping[str, bool | str] = field(default_factory=dict)
    user: bool = True
    places: tuple[Place, ...] = ("root",)
    notes: str = ""

    @property
    def notebook(self) -> Path:
        """The notebook of the case."""
        return NOTEBOOKS / f"{self.id}.ipynb"

    @cached_property
    def beds(self) -> tuple[str, ...]:
        """The beds that the case needs wherever it runs (tests/beds.py)."""
        metadata = json.loads(self.notebook.read_text())["metadata"]
        kernel = KERNEL_BEDS.get(metadata.get("kernelspec", {}).get("name"))
        isolation = ("bubblewrap",) if self.needs_isolation else ()
        return (*((kernel,) if kernel else ()), *isolation)

    @property
    def every_place(self) -> tuple[Place, ...]:
        """All places where the answer holds."""
        named = "--limits" in self.options and self.options[self.options.index("--limits") + 1]
        landlock = named in WALLED and not self.needs_isolation
        return tuple(
            place
            for place in PLACES
            if place in self.places
            or (
                (self.user or "user" not in place)
                and ("landlock" not in place or (landlock and "--mechanisms" not in self.options))
            )
        )

    def holds_for(self, version: str) -> bool:
        """Whether the answer is meant for this version of Python (``">=3.12,<3.14"``)."""
        return version in SpecifierSet(self.python)

    def for_version(self, version: str) -> Case:
        """The case with the keys of ``expected`` that differ in this version of Python."""
        return self._with(
            [
                a
                for a in self.alternatives
                if "place" not in a and version in SpecifierSet(a["python"])
            ]
        )

    def at(self, place: Place) -> Case:
        """The case with the keys of ``expected`` that differ in this place."""
        return self._with([a for a in self.alternatives if a.get("place") == place])

    def _with(self, alternatives: list[Mapping[str, Any]]) -> Case:
        if not alternatives:
            return self
        return replace(self, expected={**self.expected, **alternatives[0]["expected"]})


def read(path: Path) -> list[Case]:
    """The cases of one file. Raises ValueError for a key or a place that does not exist."""
    cases = []
    for entry in json.loads(path.read_text())["cases"]:
        unknown = entry.keys() - set(Case.__dataclass_fields__)
        if unknown:
            raise ValueError(
                f"{path.name}, {entry['id']}: unknown keys {', '.join(sorted(unknown))}"
            )
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()
        }
        case = Case(**values)
        wrong = [
            *(set(case.places) - set(PLACES)),
            *(v for v in case.wrote.values() if v not in WRITTEN),
            *(a["place"] for a in case.alternatives if a.get("place", "root") not in PLACES),
            *(k for a in case.alternatives for k in a if k not in {"place", "python", "expected"}),
        ]
        if wrong:
            raise ValueError(f"{path.name}, {case.id}: {wrong} is not a value of this format")
        cases.append(case)
    return cases


def read_all(folder: Path = HERE) -> list[Case]:
    """All cases, in the order of their files' names. Raises ValueError if two have the same id."""
    cases = [case for path in sorted(folder.glob("*.json")) for case in read(path)]
    repeated = [name for name, count in Counter(case.id for case in cases).items() if count > 1]
    if repeated:
        raise ValueError(f"more than one case is called {', '.join(repeated)}")
    return cases


def runnable(cases: list[Case]) -> list[Case]:
    """The cases whose answer holds for this Python, which is the kernel's too."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    return [case.for_version(version) for case in cases if case.holds_for(version)]
