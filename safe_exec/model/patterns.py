"""Regular expressions that are compiled at their first use.

Rules and reports have a hundred of them, and compiling all takes 20 ms of each start. A notebook
that passes needs few.
"""

from __future__ import annotations

import re
from typing import Any, cast

_uncompiled: list[LazyPattern] = []


class LazyPattern:
    """Stands in for a ``re.Pattern``."""

    def __init__(self, text: str, flags: int) -> None:
        self._text, self._flags = text, flags
        self._compiled: re.Pattern[str] | None = None

    def compile(self) -> re.Pattern[str]:
        """Return the compiled pattern."""
        if self._compiled is None:
            self._compiled = re.compile(self._text, self._flags)
        return self._compiled

    def __getattr__(self, name: str) -> Any:
        # Called only for names that are not set: the second use of a method finds it at once.
        value = getattr(self.compile(), name)
        setattr(self, name, value)
        return value


def lazy_pattern(text: str, flags: int = 0) -> re.Pattern[str]:
    """Return a pattern that is compiled when it is used. For constants of modules only."""
    lazy = LazyPattern(text, flags)
    _uncompiled.append(lazy)
    return cast("re.Pattern[str]", lazy)


def compile_next() -> bool:
    """Compile one pattern ahead of its use; false if none is left."""
    if not _uncompiled:
        return False
    _uncompiled.pop().compile()
    return True
