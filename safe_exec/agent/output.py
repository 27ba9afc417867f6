"""Journals prints, displays and the output of C code before ipykernel queues them."""

import _thread
import ctypes
import fcntl
import functools
import json
import mmap
import os
import select
import socket
import struct
import sys
import termios
import time

from .layout import COUNTS, COUNTS_AT

# What ipykernel's OutStream.write is made of, in the versions whose work is known here.
WRITE_ALWAYS = set(
    "parent_header _buffer_lock _buffers frozenset items _schedule_flush _is_master_process "
    "echo".split()
)
WRITE_SOMETIMES = set(
    "isinstance str type TypeError write OSError sys __stderr__ print pub_thread len ValueError "
    "_subprocess_flush_pending "
    "schedule _flush format".split()
)
JOURNALED_TOPICS = (
    "display_data",
    "execute_result",
    "error",
    "clear_output",
    "comm_open",
    "comm_msg",
    "comm_close",
)
MADV_WIPEONFORK = 18

# How a write knows that nobody else can have written since the last one; see quick_write.
# Seconds between the two writes of a print; what takes longer is something else.
LONGEST_GAP = 3e-6
GAP_SAMPLES = 16
# As a share of the time of a poll: a write to the pipe takes longer than that.
POLL_SHARE = 0.7


def wiped_in_children():
    """Return a memory map whose first byte is 1 here, and 0 in every forked child.

    Reading it takes a tenth of the time of getpid(2).

    Uses MADV_WIPEONFORK, available since Linux 4.14 (madvise(2)).
    """
    memory = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[0] = 1
    memory.madvise(MADV_WIPEONFORK)
    return memory


def patch_streams(inside):
    """Journal writes before ipykernel buffers them; drop output far beyond the output limit."""
    from ipykernel.iostream import OutStream

    page = inside.page
    write = OutStream.write
    cut = inside.config.get("cut") or sys.maxsize
    headers = inside.headers
    getpid = os.getpid

    def write_text(stream, string, fd_bytes):
        parent = stream.parent_header
        if id(parent) not in headers and not current(inside, parent):
            if fd_bytes:
                page.note_fd(1 if stream.name == "stderr" else 0, fd_bytes, 0)
            return write(stream, string)
        index = 1 if stream.name == "stderr" else 0
        if page.counts[index] > cut and isinstance(string, str) and getpid() == page.pid:
            page.counts[index] += len(string)
            COUNTS.pack_into(page.memory, COUNTS_AT, *page.counts)
            if fd_bytes:
                page.note_fd(index, fd_bytes, 0)
            return len(string)
        # First on record, then to ipykernel: between the two the process may end.
        filled = isinstance(string, str) and getpid() == page.pid and page.text(index, string)
        if fd_bytes:
            page.note_fd(index, fd_bytes, 0)
        result = write(stream, string)
        if filled:
            stream.flush()
        return result

    @functools.wraps(write)
    def write_noted(stream, string):
        try:
            if stream._unread(0, 1):
                settle_before_write(inside, stream)
        except (OSError, ValueError):
            # The notebook has closed all descriptors.
            stream._unread = nothing_unread
        return write_text(stream, string, 0)

    inside.write_text = write_text
    OutStream._unread = staticmethod(nothing_unread)
    OutStream.write = write_noted
    inside.instrumented.append("streams")
    if WRITE_ALWAYS <= set(write.__code__.co_names) <= WRITE_ALWAYS | WRITE_SOMETIMES:
        try:
            ours = inside.is_not_forked = wiped_in_children()
        except (
            OSError,
            AttributeError,
        ):  # an older system or Python: without the memory that it needs
            return
        OutStream._buffer_lock = property(lambda _stream: page.lock, lambda _stream, _own: None)
        patch_quick_writes(OutStream, lambda stream: quick_write(inside, stream, write_noted, ours))


def patch_quick_writes(stream_class, write_of):
    """Give each stream a ``write`` method that handles plain writes in one step."""
    init = stream_class.__init__

    @functools.wraps(init)
    def init_with_write(stream, *args, **kwargs):
        init(stream, *args, **kwargs)
        # This happens before any cell runs: IPython replaces the method while a cell runs, and
        # restores this one afterwards.
        try:
            stream.write = write_of(stream)
        except AttributeError:
            # An older ipykernel, whose streams keep their header in another way.
            pass

    stream_class.__init__ = init_with_write


def quick_write(inside, stream, slow_write, ours):
    """Return a fast ``write`` for one stream, which falls back to ``slow_write``."""
    # It does the work of ipykernel's method together with the journal. ipykernel creates a frozen
    # set of the parent header and takes a lock at each write, although the header stays the same
    # during a cell. Creating the set once, and sharing one lock, pays for the journal.
    #
    # Output of C code or a child on the descriptor must come first, so the pipe has to be polled
    # before each write. Polling is a system call and takes a fifth of a print. It is skipped if no
    # write(2) fits into the time since the last write here: the time between the text and the
    # newline of one print, plus most of the time of a poll.
    page, keys, live = inside.page, inside.keys, inside.live
    lock, counts, position, record = page.lock, page.counts, page.memory.tell, page.memory.write
    cut = inside.config.get("cut") or sys.maxsize
    index = 1 if stream.name == "stderr" else 0
    header, clock = stream._parent_header.get, time.monotonic
    last_end = threshold = 0.0
    after_text = False
    shortest_gap = shortest_poll = sys.float_info.max
    samples = 0

    def unread(start, gap, newline):
        """Tell whether the pipe has data.

        Also adjusts ``threshold``, the time since the last write after which the pipe is checked.
        """
        nonlocal threshold, shortest_gap, shortest_poll, samples
        if stream._unread(0, 1):
            return True
        shortest_poll = min(shortest_poll, clock() - start)
        if after_text and newline and gap < LONGEST_GAP:
            samples += 1
            shortest_gap = min(shortest_gap, gap)
        if samples >= GAP_SAMPLES:
            threshold = shortest_gap + POLL_SHARE * shortest_poll
        return False

    @functools.wraps(type(stream).write)
    def write(string):
        nonlocal last_end, threshold, shortest_gap, after_text
        start = clock()
        gap = start - last_end
        try:
            if gap > threshold:
                if unread(start, gap, string == "\n"):
                    return slow_write(stream, string)
            elif gap < shortest_gap:
                threshold += gap - shortest_gap
                shortest_gap = gap
            parent = header()
            key = live[1] if parent is live[0] else keys[id(parent)]
            data = string.encode()
        except (LookupError, AttributeError, ValueError, OSError):
            return slow_write(stream, string)
        if (
            ours[0]
            and "\0" not in string
            and type(string) is str
            and stream.echo is None
            and stream.pub_thread is not None
        ):
            with lock:
                plain = (
                    index == page.last
                    and counts[index] <= cut
                    and position() + len(data) <= page.end
                )
                if plain:
                    record(data)
                    counts[index] += len(string)
                    stream._buffers[key].write(string)
            if plain:
                if not stream._flush_pending:
                    stream._schedule_flush()
                after_text = string != "\n"
                last_end = clock()
                return len(string)
        return slow_write(stream, string)

    return write


def current(inside, parent):
    """Tell whether a message header belongs to the running cell.

    The answer is cached, because every write asks.
    """
    if inside.in_cell and parent.get("msg_id") == inside.msg_id:
        # Held, so that nothing else gets its id.
        inside.headers[id(parent)] = parent
        inside.keys[id(parent)] = frozenset(parent.items())
        inside.live[:] = parent, inside.keys[id(parent)]
        return True
    return False


def patch_messages(inside):
    """Journal displays before they are queued.

    Refuse messages that are too large for any receiver.
    """
    from ipykernel.iostream import IOPubThread

    page = inside.page
    send = IOPubThread.send_multipart
    largest = inside.config.get("message") or sys.maxsize
    journaled_topics = tuple(topic.encode() for topic in JOURNALED_TOPICS)

    def send_noted(thread, msg, *args, **kwargs):
        if page.pid == os.getpid():
            topic = bytes(msg[0])
            if sum(map(len, msg)) > largest:
                inside.fact(
                    oversize=sum(map(len, msg)),
                    topic=topic.decode("utf-8", "replace"),
                    cell=page.cell,
                )
                return None
            if topic.endswith(journaled_topics) and inside.in_cell:
                page.message(msg)
        return send(thread, msg, *args, **kwargs)

    start = IOPubThread.start

    @functools.wraps(start)
    def start_ready(thread):
        start(thread)
        # The thread wakes itself by a socket that it makes at its first flush. That is too late
        # where a cell has taken all descriptors, and the cell would hang.
        if hasattr(thread, "_event_pipe"):
            thread.schedule(lambda: thread._event_pipe)

    IOPubThread.start = start_ready
    IOPubThread.send_multipart = send_noted
    inside.instrumented.append("messages")


def patch_descriptors(inside):
    """Preserve the output of C code on descriptors 1 and 2 if the process crashes.

    ipykernel reads its pipe in a thread; data that it has read but not forwarded is lost when the
    process aborts. So the data is copied with tee(2), which leaves it in the pipe, forwarded, and
    only then removed. The runner holds a copy of the read end and finds there what was not yet
    removed.
    """
    from ipykernel.iostream import OutStream

    page = inside.page
    libc = ctypes.CDLL(None, use_errno=True)
    libc.tee.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_uint)
    if (
        libc.tee(-1, -1, 1, 0) < 0 and ctypes.get_errno() != 9
    ):  # EBADF, where there is a tee: some sandboxes have none
        # Then ipykernel reads as it always did.
        return
    flush = OutStream.flush
    chunk = 1000

    def watch_pipe_fd(stream):
        index = 1 if stream.name == "stderr" else 0
        peek_r, peek_w = os.pipe()
        hand_over(inside, stream.name, stream._fid)
        stream._unread = unread_of(stream._fid)
        try:
            while stream._should_watch:
                size = libc.tee(stream._fid, peek_w, chunk, 0)
                # EINTR.
                if size < 0 and ctypes.get_errno() == 4:
                    continue
                if size <= 0 or not stream._should_watch:
                    break
                data = os.read(peek_r, size)
                inside.write_text(stream, data.decode(errors="replace"), size)
                os.read(stream._fid, size)
                page.note_fd(index, 0, size)
                os.write(stream._original_stdstream_copy, data)
        except Exception:
            stream._exc = sys.exc_info()

    @functools.wraps(flush)
    def flush_all(stream):
        if _thread.get_ident() == inside.main and inside.in_cell and not inside.child:
            settle(inside, stream)
        return flush(stream)

    # Threads are named after what they run.
    watch_pipe_fd.__name__ = "_watch_pipe_fd"
    OutStream._watch_pipe_fd = watch_pipe_fd
    OutStream.flush = flush_all
    inside.instrumented.append("descriptors")


def hand_over(inside, name, fd):
    """Give the runner a copy of a pipe's read end."""
    try:
        socket.send_fds(inside.facts, [json.dumps({"pipe": name}).encode()], [fd])
    except (OSError, AttributeError):
        # Send_fds is there since Python 3.9.
        pass


def nothing_unread(_timeout, _most):
    """Report no events. Replaces ``poll`` for a stream without a pipe that can be polled."""
    return ()


def unread_of(fd):
    """Return a function that tells whether a pipe has data.

    Call it with 0 (timeout) and 1 (events).
    """
    # epoll_wait(2) is the fastest way: poll(2) and an ioctl(2) through ctypes take twice as long.
    try:
        waiting = select.epoll()
        waiting.register(fd, select.EPOLLIN)
    except OSError:
        # No descriptor is left, or the system has none.
        return nothing_unread
    return waiting.poll


def settle_before_write(inside, stream):
    """Before a write, forward the pending output of C code or a child, to keep the order."""
    if inside.page.pid == os.getpid() and stream.watch_fd_thread.is_alive():
        settle(inside, stream)


def settle(inside, stream):
    """Wait at most 0.2 s until the pipe's data is forwarded.

    Otherwise the last line of a child could appear in the next cell.
    """
    fd = getattr(stream, "_fid", None)
    if fd is None or stream.watch_fd_thread.ident == _thread.get_ident():
        return
    index = 1 if stream.name == "stderr" else 0
    consumed = inside.page.fd_bytes[index]
    consumed_before = consumed[
        1
    ]  # first: what is taken from here on is in one of both figures at least
    try:
        waiting = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0"))[0]
    except OSError:
        return
    deadline = time.monotonic() + 0.2
    turns = 0
    while consumed[1] < consumed_before + waiting and time.monotonic() < deadline:
        turns += 1
        # At first only let the other thread have its turn.
        time.sleep(0 if turns < 50 else 0.0005)
