"""Chooses a kernel for a notebook among the installed ones. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple

from safe_exec.errors import UsageError

# Names that are chosen first among kernels of the same language.
PREFERRED = ("python3", "ir", "bash")


class KernelFallback(StrEnum):
    """Whether another kernel of the same language may replace one that is not installed."""

    LANGUAGE = "language"
    NEVER = "never"


def kernel_fallback(text: str) -> KernelFallback:
    """Parse ``language`` or ``never``. Raises UsageError."""
    try:
        return KernelFallback(text)
    except ValueError:
        raise UsageError(f"kernel_fallback: {text!r} is neither 'language' nor 'never'") from None


class KernelChoice(NamedTuple):
    """The kernel that runs a notebook, and a warning if the notebook names another one."""

    name: str
    warning: str | None = None


def kernels_of_language(installed: Mapping[str, str], language: str | None) -> list[str]:
    """Return the installed kernels of a language, the preferred ones first.

    ``installed`` maps names of kernels to languages.
    """
    names = [
        name
        for name, spoken in sorted(installed.items())
        if language and spoken.lower() == language.lower()
    ]
    return sorted(names, key=lambda name: name not in PREFERRED)


def stand_in(
    kernel: str | None, language: str | None, installed: Mapping[str, str]
) -> KernelChoice | None:
    """Return the kernel that replaces one which is not installed; ``None`` if there is none.

    ``kernel`` is ``None`` for a notebook that names no kernel.
    """
    alike = kernels_of_language(installed, language)
    if not alike:
        return None
    if kernel is None:
        return KernelChoice(alike[0])
    return KernelChoice(
        alike[0],
        f"kernel {kernel} is not installed: ran with {alike[0]}, of the same language ({language});"
        " --kernel-fallback never refuses that",
    )
