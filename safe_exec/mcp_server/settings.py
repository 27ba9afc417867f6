"""The settings of the server: the folder, the limits, the kernel.

The person who starts the server chooses them; agents cannot change them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from safe_exec.errors import UsageError


class Settings(Struct, frozen=True, kw_only=True):
    """The options of ``safe-exec mcp``.

    ``folder`` is absolute and without symlinks; notebooks outside of it are refused. ``limits``
    names a profile or a file, ``figures`` and ``walls`` override parts of it. ``arguments`` are the
    equivalent options of ``safe-exec kernel``. ``kernel`` is the kernel of ``run_cells``.
    """

    folder: Path
    limits: str
    figures: Mapping[str, object] = {}
    walls: Mapping[str, Any] = {}
    arguments: tuple[str, ...] = ()
    kernel: str = "python3"

    def notebook(self, path: str) -> Path:
        """Return the path of a notebook that an agent named, relative to the folder.

        Raises UsageError.
        """
        # Resolved first: a symlink must not lead out of the folder.
        full = (self.folder / path).resolve()
        if not full.is_relative_to(self.folder):
            raise UsageError(f"{path}: outside of {self.folder}; start the server with that folder")
        if full.suffix.lower() != ".ipynb":
            raise UsageError(f"{path}: not a notebook; name a file that ends in .ipynb")
        return full
