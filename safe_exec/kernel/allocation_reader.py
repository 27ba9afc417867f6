"""Reads memray's recording in a process of its own: ``allocation_reader.py FD``.

The kernel wrote the file, and memray's reader is native code, so it runs apart from the runner and
within bounds. Prints a JSON list of the allocations that were alive at the end, by stack, the
largest first: the bytes, those of them in large mappings, and the stack (function, file, line),
innermost first.
"""

import json
import resource
import sys
from collections import Counter
from typing import Any

MOST_ROWS = 500
MOST_FRAMES = 60
MOST_BYTES = 2 << 30
MOST_SECONDS = 20
# The least size of a mapping that its owner may only have reserved.
LEAST_RESERVED_BYTES = 256 << 20

Frame = tuple[str, str, int]


def main() -> None:
    """Read the file and print the rows."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (MOST_SECONDS, MOST_SECONDS))
    from memray import FileReader

    file = f"/proc/self/fd/{int(sys.argv[1])}"
    records = FileReader(file).get_leaked_allocation_records(merge_threads=True)
    rows = sorted(records, key=lambda record: -record.size)[:MOST_ROWS]
    # memray adds up all allocations of a stack, so each mapping has to be found one by one.
    is_large = bool(rows) and rows[0].size >= LEAST_RESERVED_BYTES
    mapped = large_mappings(FileReader(file)) if is_large else Counter()
    stacks = [tuple(row.stack_trace(max_stacks=MOST_FRAMES)) for row in rows]
    output = [[row.size, mapped[stack], stack] for row, stack in zip(rows, stacks, strict=True)]
    json.dump(output, sys.stdout)


def large_mappings(reader: Any) -> Counter[tuple[Frame, ...]]:
    """Return the bytes of the large mappings that existed at the end, by stack."""
    from memray import AllocatorType

    mappings: dict[int, tuple[int, tuple[Frame, ...]]] = {}
    for record in reader.get_allocation_records():
        if record.allocator == AllocatorType.MMAP and record.size >= LEAST_RESERVED_BYTES:
            stack = tuple(record.stack_trace(max_stacks=MOST_FRAMES))
            mappings[record.address] = (record.size, stack)
        elif record.allocator == AllocatorType.MUNMAP:
            mappings.pop(record.address, None)
    sums: Counter[tuple[Frame, ...]] = Counter()
    for size, stack in mappings.values():
        sums[stack] += size
    return sums


if __name__ == "__main__":
    main()
