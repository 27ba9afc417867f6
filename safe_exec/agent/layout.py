"""The layout of the shared page, and the numbers of the dump signals.

``kernel/shared_page.py`` reads it.
"""

import signal
import struct

PAGE_BYTES = 8192 + 128 * 1024
SEGMENT_BYTES = 4 * 1024 * 1024
# Marks a page whose header has been written.
MAGIC = 0x53455831

# The header.
HEADER = struct.Struct(
    "<IIQIIdQQQQ"
)  # magic, segment, cell, line, pid, time, fd bytes written/consumed x (out, err)
SAMPLE_AT, SAMPLE = (
    128,
    struct.Struct("<QIIdddQQ"),
)  # cell, line, depth, time, wait, cpu, place hash, in a call
HISTORY_AT, HISTORY = 512, 64
COUNTS_AT, COUNTS = (
    256,
    struct.Struct("<QQ"),
)  # characters written to stdout and stderr in this cell
# Not zero: the runner asks for the stacks of all threads.
REQUEST_AT = 280
# 30 rows with the longest paths.
STACK_AT, STACK_BYTES = 8192, 128 * 1024
RECORD = struct.Struct(
    "<IQBBHQ"
)  # payload length, characters of its stream before it, kind, stream, pad, cell
TEXT, MESSAGE = 1, 2
# How a NUL is written in text: the last text of a segment ends where memory is zero.
NUL = b"\xc0\x80"
# In the line of the header.
FINISHED = 1 << 31
# The signal at which the main thread writes its own stack.
DUMP_SIGNAL = getattr(signal, "SIGRTMAX", 64) - 5
# The signal for the stacks of all threads, which is safe only while none of them can run.
DUMP_ALL_SIGNAL = DUMP_SIGNAL - 1
