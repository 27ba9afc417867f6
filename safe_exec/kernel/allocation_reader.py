"""A process of its own that reads what memray recorded: ``allocation_reader.py FD``.

The kernel wrote the file, and its reader is native code: so it runs with bounds and apart from the
runner. Prints a JSON list of the largest allocations that were alive at the end, each with its size,
the size of one of them if they are mappings (else 0), and the stack (function, file, line),
innermost first.
"""

import json
import resource
import sys

MOST_ROWS = 500
MOST_FRAMES = 60
MOST_BYTES = 2 << 30
MOST_SECONDS = 20


def main() -> None:
    """Read the file and print the rows."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (MOST_SECONDS, MOST_SECONDS))
    from memray import AllocatorType, FileReader

    reader = FileReader(f"/proc/self/fd/{int(sys.argv[1])}")
    records = reader.get_leaked_allocation_records(merge_threads=True)
    rows = sorted(records, key=lambda record: -record.size)[:MOST_ROWS]
    output = [
        [
            row.size,
            row.size // row.n_allocations if row.allocator == AllocatorType.MMAP else 0,
            row.stack_trace(max_stacks=MOST_FRAMES),
        ]
        for row in rows
    ]
    json.dump(output, sys.stdout)


if __name__ == "__main__":
    main()
