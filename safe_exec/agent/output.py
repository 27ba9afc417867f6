"""Prints, displays, and what C code writes: on record before ipykernel queues them."""

import _thread
import ctypes
import fcntl
import functools
import json
import mmap
import os
import socket
import struct
import sys
import termios
import time

from .layout import COUNTS, COUNTS_AT

# What ipykernel's OutStream.write is made of, in the versions whose work is known here.
WRITE_ALWAYS = set("parent_header _buffer_lock _buffers frozenset items _schedule_flush _is_master_process echo".split())
WRITE_SOMETIMES = set(
    "isinstance str type TypeError write OSError sys __stderr__ print pub_thread len ValueError _subprocess_flush_pending "
    "schedule _flush format".split()
)
KEPT_TOPICS = ("display_data", "execute_result", "error", "clear_output", "comm_open", "comm_msg", "comm_close")
MADV_WIPEONFORK = 18


def wiped_in_children():
    """Memory that begins with 1, and with 0 in every forked child: asking the system who we are takes ten times as long.

    MADV_WIPEONFORK, since Linux 4.14 (madvise(2)).
    """
    memory = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[0] = 1
    memory.madvise(MADV_WIPEONFORK)
    return memory


def fit_streams(inside):
    """Journal writes before ipykernel buffers them, and stop buffering what is far beyond the cap anyway."""
    from ipykernel.iostream import OutStream

    page = inside.page
    write = OutStream.write
    cut = inside.config.get("cut") or sys.maxsize
    headers = inside.headers
    own = page.pid
    getpid = os.getpid

    def put(stream, string, fd_bytes):
        parent = stream.parent_header
        if id(parent) not in headers and not current(inside, parent):
            if fd_bytes:
                page.note_fd(1 if stream.name == "stderr" else 0, fd_bytes, 0)
            return write(stream, string)
        index = 1 if stream.name == "stderr" else 0
        if page.counts[index] > cut and isinstance(string, str) and getpid() == own:
            page.counts[index] += len(string)
            COUNTS.pack_into(page.memory, COUNTS_AT, *page.counts)
            if fd_bytes:
                page.note_fd(index, fd_bytes, 0)
            return len(string)
        # First on record, then to ipykernel: between the two the process may end.
        filled = isinstance(string, str) and getpid() == own and page.text(index, string)
        if fd_bytes:
            page.note_fd(index, fd_bytes, 0)
        result = write(stream, string)
        if filled:
            stream.flush()
        return result

    @functools.wraps(write)
    def write_noted(stream, string):
        return put(stream, string, 0)

    inside.put = put
    OutStream.write = write_noted
    inside.fitted.append("streams")
    if WRITE_ALWAYS <= set(write.__code__.co_names) <= WRITE_ALWAYS | WRITE_SOMETIMES:
        try:
            fit_quick_writes(inside, OutStream, write_noted)
        except (OSError, AttributeError):  # an older system or Python: without the memory that it needs
            pass


def fit_quick_writes(inside, stream_class, write):
    """Do what ipykernel's ``write`` does in one go with the journal, where all is plain; else as before.

    ipykernel makes a frozen set of the parent header at each write, though the header of a cell stays the same, and takes a lock.
    Made once, and one lock for both, it pays for the journal.
    """
    page, keys, ours = inside.page, inside.keys, wiped_in_children()
    lock, counts, where, record = page.lock, page.counts, page.memory.tell, page.memory.write
    cut = inside.config.get("cut") or sys.maxsize

    @functools.wraps(write)
    def write_quickly(stream, string):
        try:
            key = keys[id(stream._parent_header.get())]
            data = string.encode()
        except (LookupError, AttributeError, UnicodeEncodeError):
            return write(stream, string)
        if ours[0] and "\0" not in string and type(string) is str and stream.echo is None and stream.pub_thread is not None:
            index = stream.name == "stderr"
            with lock:
                plain = index == page.last and counts[index] <= cut and where() + len(data) <= page.end
                if plain:
                    record(data)
                    counts[index] += len(string)
                    stream._buffers[key].write(string)
            if plain:
                if not stream._flush_pending:
                    stream._schedule_flush()
                return len(string)
        return write(stream, string)

    stream_class._buffer_lock = property(lambda _stream: page.lock, lambda _stream, _own: None)
    stream_class.write = write_quickly


def current(inside, parent):
    """Whether a header is that of the running cell; remembered, as it is asked at every write."""
    if inside.in_cell and parent.get("msg_id") == inside.msg_id:
        inside.headers[id(parent)] = parent  # held, so that nothing else gets its id
        inside.keys[id(parent)] = frozenset(parent.items())
        return True
    return False


def fit_messages(inside):
    """Journal displays before they are queued; refuse those that no receiver would take."""
    from ipykernel.iostream import IOPubThread

    page = inside.page
    send = IOPubThread.send_multipart
    largest = inside.config.get("message") or sys.maxsize
    kept = tuple(topic.encode() for topic in KEPT_TOPICS)

    def send_noted(thread, msg, *args, **kwargs):
        if page.pid == os.getpid():
            topic = bytes(msg[0])
            if sum(map(len, msg)) > largest:
                inside.fact(oversize=sum(map(len, msg)), topic=topic.decode("utf-8", "replace"), cell=page.cell)
                return None
            if topic.endswith(kept) and inside.in_cell:
                page.message(msg)
        return send(thread, msg, *args, **kwargs)

    start = IOPubThread.start

    @functools.wraps(start)
    def start_ready(thread):
        start(thread)
        # It wakes itself by a socket that it makes at its first flush: too late where a cell has taken all descriptors, and the cell hangs.
        if hasattr(thread, "_event_pipe"):
            thread.schedule(lambda: thread._event_pipe)

    IOPubThread.start = start_ready
    IOPubThread.send_multipart = send_noted
    inside.fitted.append("messages")


def fit_descriptors(inside):
    """Let what C code writes to descriptors 1 and 2 survive the process.

    ipykernel reads its pipe in a thread, and data read but not yet handed on when the process aborts is lost. So look at the
    data with tee(2), which leaves it in the pipe, hand it on, and only then take it out. The runner holds a copy of the read
    end and finds there what had not been taken.
    """
    from ipykernel.iostream import OutStream

    page = inside.page
    libc = ctypes.CDLL(None, use_errno=True)
    libc.tee.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_uint)
    if libc.tee(-1, -1, 1, 0) < 0 and ctypes.get_errno() != 9:  # EBADF, where there is a tee: some sandboxes have none
        return  # then ipykernel reads as it always did
    flush = OutStream.flush
    chunk = 1000

    def watch_pipe_fd(stream):
        index = 1 if stream.name == "stderr" else 0
        peek_r, peek_w = os.pipe()
        hand_over(inside, stream.name, stream._fid)
        try:
            while stream._should_watch:
                size = libc.tee(stream._fid, peek_w, chunk, 0)
                if size < 0 and ctypes.get_errno() == 4:  # EINTR
                    continue
                if size <= 0 or not stream._should_watch:
                    break
                data = os.read(peek_r, size)
                inside.put(stream, data.decode(errors="replace"), size)
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

    watch_pipe_fd.__name__ = "_watch_pipe_fd"  # threads are named after what they run
    OutStream._watch_pipe_fd = watch_pipe_fd
    OutStream.flush = flush_all
    inside.fitted.append("descriptors")


def hand_over(inside, name, fd):
    """Give the runner a copy of a pipe's read end."""
    try:
        socket.send_fds(inside.facts, [json.dumps({"pipe": name}).encode()], [fd])
    except (OSError, AttributeError):  # send_fds is there since Python 3.9
        pass


def settle(inside, stream):
    """Wait, at most 0.2 s, until what stands in the pipe now is handed on: a child's last line belongs to its cell."""
    fd = getattr(stream, "_fid", None)
    if fd is None:
        return
    try:
        waiting = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0"))[0]
    except OSError:
        return
    if waiting:
        index = 1 if stream.name == "stderr" else 0
        target = inside.page.fd_bytes[index][1] + waiting
        deadline = time.monotonic() + 0.2
        while inside.page.fd_bytes[index][1] < target and time.monotonic() < deadline:
            time.sleep(0.0005)
