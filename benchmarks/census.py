"""``census.py on|off run ...``: safe-exec with or without the censuses of the kernel's memory.

A program of its own, because no option turns them off: they are part of every run. What it runs is
the notebook of ``growing_cells``, whose memory changes in each cell, so that each ends in a census.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

CENSUS = Path(__file__)
CELLS = 20

# Censuses lie between two cells: there a cell's own work does not hide their few milliseconds.
_FIRST = (
    "import time\nkept, between = {}, 0.0\nend = time.process_time()\nbegun = time.perf_counter()"
)
_GROW = """between += time.process_time() - end
for part in range(4):
    kept[{n}, part] = [(number, str(number), [number]) for number in range(15_000)]
text{n} = bytearray(b'x') * (3 << 20)
total = sum(number * number for number in range(400_000))
end = time.process_time()"""
_LAST = """between += time.process_time() - end
with open('took', 'w') as file:
    file.write(f'{between} {time.perf_counter() - begun}')"""


def growing_cells() -> list[str]:
    """Cells that together take some seconds of the processor and some 400 MiB."""
    return [_FIRST, *(_GROW.format(n=n) for n in range(CELLS)), _LAST]


def main(arguments: Sequence[str]) -> None:
    """Run the command, without censuses if the first argument is ``off``."""
    from safe_exec.kernel import launch

    if arguments[0] == "off":
        settings = launch.inside_config

        def without_census(*given: object, **options: object) -> dict[str, object]:
            return settings(*given, **options) | {"census": False}  # type: ignore[arg-type]

        launch.inside_config = without_census
    sys.argv = ["safe-exec", *arguments[1:]]
    from safe_exec.__main__ import main as command

    command()


if __name__ == "__main__":
    main(sys.argv[1:])
