"""What runs inside a Python kernel's process: it leaves on record what the process will not be able to say once it dies.

Standard library only: started by path, in front of the kernel's own command, in an environment where safe-exec need not
be installed. It speaks to the outside in three ways, all on descriptors it was given:

- *page*: shared memory. Its header holds the statement that runs now and what a sampling thread saw last; two segments
  behind it hold what was written to stdout and stderr and every display, before ipykernel queues it. Memory outlives its writer:
  what a SIGKILL takes from ipykernel's buffers (its last 0.2 s) the runner reads from here.
- *facts*: a datagram socket for rare things: which file name belongs to which cell, connections to other hosts, who called
  ``os._exit``, and the read ends of the pipes that ipykernel puts over descriptors 1 and 2.
- *fault*: where faulthandler writes. ipykernel's own stderr is a pipe that the same process reads, so what is written there while
  dying is lost.

Nothing here may change what a notebook sees. Whatever does not fit the ipykernel at hand is left out and reported.
"""

import _thread
import builtins
import ctypes
import faulthandler
import fcntl
import functools
import gc
import importlib.util
import json
import mmap
import os
import signal
import socket
import struct
import sys
import termios
import time
import types

PAGE_BYTES = 8192 + 128 * 1024
SEGMENT_BYTES = 4 * 1024 * 1024
MAGIC = 0x53455831

# The header. The runner reads it with the same numbers (kernel/page.py); change both.
HEADER = struct.Struct("<IIQIIdQQQQ")  # magic, segment, cell, line, pid, time, fd bytes written/consumed x (out, err)
SAMPLE_AT, SAMPLE = 128, struct.Struct("<QIIdddQQ")  # cell, line, depth, time, wait, cpu, place hash, in a call
HISTORY_AT, HISTORY = 512, 64
COUNTS_AT, COUNTS = 256, struct.Struct("<QQ")  # characters written to stdout and stderr in this cell
STACK_AT, STACK_BYTES = 8192, 128 * 1024  # 30 rows with the longest paths
RECORD = struct.Struct("<IQBBHQ")  # payload length, characters of its stream before it, kind, stream, pad, cell
TEXT, MESSAGE = 1, 2
NUL = b"\xc0\x80"  # how a NUL is written in text: the last text of a segment ends where memory is zero
FINISHED = 1 << 31  # in the line of the header
# What ipykernel's OutStream.write is made of, in the versions whose work is known here.
WRITE_ALWAYS = set("parent_header _buffer_lock _buffers frozenset items _schedule_flush _is_master_process echo".split())
WRITE_SOMETIMES = set(
    "isinstance str type TypeError write OSError sys __stderr__ print pub_thread len ValueError _subprocess_flush_pending "
    "schedule _flush format".split()
)

SAMPLE_SECONDS = 0.02
SLOW_SAMPLE_SECONDS = 0.05
DUMP_SIGNAL = getattr(signal, "SIGRTMAX", 64) - 5
KEPT_TOPICS = ("display_data", "execute_result", "error", "clear_output", "comm_open", "comm_msg", "comm_close")
LOCAL = ("127.", "::1", "localhost", "0.0.0.0", "::ffff:127.", "::")
MADV_WIPEONFORK = 18
CONTROL_SECONDS = 1.0


def first_line(code):
    """The first line of a statement's code: ``co_firstlineno`` of a cell's statement is always 1."""
    if not hasattr(code, "co_lines"):  # before Python 3.10
        import dis

        return next((line for _, line in dis.findlinestarts(code)), 1)
    return next((line for _, _, line in code.co_lines() if line), 1)


def wiped_in_children():
    """Memory that begins with 1, and with 0 in every forked child: asking the system who we are takes ten times as long.

    MADV_WIPEONFORK, since Linux 4.14 (madvise(2)).
    """
    memory = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[0] = 1
    memory.madvise(MADV_WIPEONFORK)
    return memory


FROM_DEBUGPY = (
    ("debugpy.server", "api"),
    ("_pydevd_bundle", "pydevd_frame_utils"),
    ("_pydevd_bundle.pydevd_suspended_frames", "SuspendedFramesManager"),
    ("_pydevd_bundle.pydevd_suspended_frames", "_FramesTracker"),
)
"""What ipykernel's debugger imports of it."""


def import_debugger_alone():
    """ipykernel's debugger with nothing in the places of what it has from debugpy; ``None`` where it is not the one that we know."""
    empty = {name: types.ModuleType(name) for name in ("debugpy", *(module for module, _ in FROM_DEBUGPY))}
    for module, name in FROM_DEBUGPY:
        setattr(empty[module], name, None)
    sys.modules.update(empty)
    try:
        from ipykernel import debugger
    except ImportError:  # before version 6 there was none
        return None
    finally:
        for name in empty:
            del sys.modules[name]
    if all(hasattr(debugger, name) for name in ("VariableExplorer", *(name for _, name in FROM_DEBUGPY))):
        return debugger
    import_debugpy(debugger)
    return None


def import_debugpy(debugger):
    """Put what was left out into its place."""
    import threading

    counter = getattr(threading, "_counter", None)
    threading._counter = lambda: 0  # the thread that the import makes has been counted
    quiet = "PYDEVD_DISABLE_FILE_VALIDATION"
    said = os.environ.get(quiet)
    os.environ[quiet] = "1"  # or else a warning comes that the terminal gets when a kernel starts, and no cell
    try:
        for module, name in FROM_DEBUGPY:
            importlib.import_module(module)
            if not hasattr(sys.modules[module], name):
                importlib.import_module(f"{module}.{name}")
            setattr(debugger, name, getattr(sys.modules[module], name))
    finally:
        threading._counter = counter
        if said is None:
            del os.environ[quiet]
        else:
            os.environ[quiet] = said


class Page:
    """The shared memory: header, last stack, and two segments of a journal that are used in turn."""

    def __init__(self, fd):
        self.memory = mmap.mmap(fd, PAGE_BYTES + 2 * SEGMENT_BYTES)
        self.lock = _thread.RLock()
        self.pid = os.getpid()
        self.segment = 0
        self.start = 0  # of the last record's payload
        self.end = PAGE_BYTES + SEGMENT_BYTES
        self.memory.seek(PAGE_BYTES + 4)  # where the journal goes on: the file position of the mapping
        self.last = None  # the stream whose record a further write of this cell may extend
        self.cell = 0
        self.counts = [0, 0]
        self.fd_bytes = [[0, 0], [0, 0]]
        self.head()

    def head(self, line=0):
        """Write where we are. One packed store: a reader sees the old or the new line, hardly ever a torn one."""
        (out_w, out_c), (err_w, err_c) = self.fd_bytes
        HEADER.pack_into(
            self.memory, 0, MAGIC, self.segment, self.cell, line, self.pid, time.monotonic(), out_w, out_c, err_w, err_c
        )

    def note_line(self, line, _pack=struct.Struct("<QIId").pack_into, _now=time.monotonic):
        """The statement that is about to run."""
        _pack(self.memory, 8, self.cell, line, self.pid, _now())

    def finish(self):
        """The cell's code is done; its reply is not sent yet. The line stays: what it did may still end the process."""
        (line,) = struct.unpack_from("<I", self.memory, 16)
        self.note_line(line | FINISHED)

    def note_fd(self, stream, written, consumed):
        """Bytes that came from descriptor 1 or 2: handed on, and taken from the pipe."""
        counts = self.fd_bytes[stream]
        counts[0] += written
        counts[1] += consumed
        struct.pack_into("<QQ", self.memory, 32 + 16 * stream, counts[0], counts[1])

    def text(self, stream, string):
        """Journal a write of the current cell; whether a segment was filled, so that streams should be flushed."""
        data = string.encode("utf-8", "replace")  # character by character, so that counts hold
        if b"\0" in data:
            data = data.replace(b"\0", NUL)
        with self.lock:
            before = self.counts[stream]
            self.counts[stream] = before + len(string)
            if len(data) > 4096:
                self.note_counts()
            if stream == self.last and self.memory.tell() + len(data) <= self.end:
                self.memory.write(data)
                return False
            if len(data) > SEGMENT_BYTES // 2:
                kept = data[-SEGMENT_BYTES // 2 :].decode("utf-8", "ignore")
                before += len(string) - len(kept.replace("\xc0\x80", "\0"))
                data = kept.encode()
            switched = self._append(TEXT, stream, data, before)
            self.last = stream
            return switched

    def note_counts(self):
        """Renew the counts in the header; they lag behind by a sample while a cell runs."""
        COUNTS.pack_into(self.memory, COUNTS_AT, *self.counts)

    def message(self, frames):
        """Journal a message that is about to be queued."""
        parts = [bytes(frame) for frame in frames]
        data = struct.pack("<I", len(parts)) + b"".join(struct.pack("<I", len(p)) + p for p in parts)
        if len(data) < SEGMENT_BYTES // 2:
            with self.lock:
                self._append(MESSAGE, 0, data, 0)
                self.last = None

    def _append(self, kind, stream, data, before):
        memory = self.memory
        base = self.end - SEGMENT_BYTES
        offset = memory.tell()
        switched = offset + RECORD.size + len(data) > self.end
        if switched:
            self.segment ^= 1
            base = PAGE_BYTES + self.segment * SEGMENT_BYTES
            self.end = base + SEGMENT_BYTES
            memory[base : self.end] = bytes(SEGMENT_BYTES)
            struct.pack_into("<I", memory, base, 4)
            struct.pack_into("<I", memory, 4, self.segment)
            offset = base + 4
        elif offset > base + 4:
            struct.pack_into("<I", memory, self.start - RECORD.size, offset - self.start)
        RECORD.pack_into(memory, offset, len(data), before, kind, stream, 0, self.cell)
        self.start = offset + RECORD.size
        memory.seek(self.start)
        memory.write(data)
        # Last: up to here a reader may trust. A text that is written on is the last record, and ends where memory is zero.
        struct.pack_into("<I", memory, base, self.start - base)
        return switched

    def stack(self, text):
        """The stack that the sampling thread saw."""
        data = text.encode("utf-8", "replace")[: STACK_BYTES - 4]
        self.memory[STACK_AT + 4 : STACK_AT + 4 + len(data)] = data
        struct.pack_into("<I", self.memory, STACK_AT, len(data))


class Inside:
    """Everything that is put around one kernel."""

    def __init__(self, page_fd, facts_fd, fault_fd, config):
        for fd in (page_fd, facts_fd, fault_fd):
            os.set_inheritable(fd, False)
        self.page = Page(page_fd)
        os.close(page_fd)
        self.facts = socket.socket(fileno=facts_fd)
        self.facts.setblocking(False)
        self.fault_fd = fault_fd
        self.config = config
        self.main = _thread.get_ident()
        self.files = {}  # file name of cell code -> cell number
        self.headers = {}  # id of a header of the running cell -> it
        self.keys = {}  # the same id -> as ipykernel's buffers are named after it
        self.coroutine = None
        self.in_cell = False
        self.before_cells = lambda: None
        self.msg_id = None
        self.hosts = set()
        self.put = None
        self.fitted = []
        self.child = False

    # --- facts --------------------------------------------------------------------------------------------------

    def fact(self, **fields):
        """Tell a fact; never waits, never raises: a full socket loses facts, not the notebook's time."""
        if not self.child:
            try:
                self.facts.send(json.dumps(fields).encode("utf-8", "replace"))
            except (OSError, ValueError):
                pass

    def frames(self, frame, limit=30):
        """A stack, innermost first, as rows of (function, line, file, cell number)."""
        rows = []
        while frame is not None and len(rows) < limit:
            code = frame.f_code
            cell = self.files.get(code.co_filename, 0)
            rows.append((code.co_name, frame.f_lineno, code.co_filename, cell))
            if cell and code.co_name == "<module>" and not self.nested(frame.f_back):
                break
            frame = frame.f_back
        return rows

    def nested(self, frame):
        """Whether a cell's module frame stands on another cell's (``%run``, ``run_cell`` inside a cell)."""
        depth = 0
        while frame is not None and depth < 60:
            if frame.f_code.co_filename in self.files:
                return True
            frame, depth = frame.f_back, depth + 1
        return False

    def here(self, frame):
        """Note the exact line of the current cell that ``frame`` (of the main thread) is in."""
        rows = self.frames(frame)
        line = next((row[1] for row in rows if row[3] == self.page.cell), None)
        if line:
            self.at(line)
        return rows

    def at(self, line):
        """Note a line. What runs outside of any cell, a callback say, leaves the cell finished; a child's lines are not ours."""
        if not self.child:
            self.page.note_line(line if self.in_cell else line | FINISHED)

    # --- faults -------------------------------------------------------------------------------------------------

    def arm(self):
        """Send fatal signals' stacks, and those asked for by DUMP_SIGNAL, to our own descriptor."""
        enable = faulthandler.enable
        enable(file=self.fault_fd, all_threads=True)
        faulthandler.register(DUMP_SIGNAL, file=self.fault_fd, all_threads=True, chain=False)

        def enable_here(*_args, **_kwargs):
            enable(file=self.fault_fd, all_threads=True)

        # A notebook that enables faulthandler itself would send the stack into the pipe that dies with the process.
        self.keep_enabled = enable_here
        faulthandler.enable = enable_here
        os.register_at_fork(after_in_child=self.forked)

    def forked(self):
        """In a forked child: be as if we had never been here."""
        self.child = True
        self.page.lock = _thread.RLock()
        faulthandler.disable()
        faulthandler.unregister(DUMP_SIGNAL)

    # --- what the process does to itself ------------------------------------------------------------------------

    def watch(self):
        """Note exact places just before calls from which there may be no return, and talk to other hosts."""
        real_exit, real_closerange = os._exit, os.closerange
        noted = {"os.kill", "os.killpg", "signal.pthread_kill", "os.system", "subprocess.Popen", "os.fork", "os.forkpty"}
        noted |= {"os.posix_spawn", "os.spawn"}

        def _exit(status):
            if not self.child and os.getpid() == self.page.pid:
                rows = self.frames(sys._getframe(1))
                self.here(sys._current_frames().get(self.main))
                self.fact(exit_caller=rows, status=status if isinstance(status, int) else None)
            real_exit(status)

        def closerange(fd_low, fd_high, /):
            # It takes libzmq's descriptors too: one of its threads aborts the process now, or the main thread a little later.
            if not self.child and self.in_cell and _thread.get_ident() == self.main:
                self.here(sys._getframe(1))
            real_closerange(fd_low, fd_high)

        for real, ours in ((real_exit, _exit), (real_closerange, closerange)):
            # To be found by pickle under its old name, it has to stand where the name says.
            ours.__doc__, ours.__module__, ours.__qualname__ = real.__doc__, real.__module__, real.__qualname__
            setattr(os, real.__name__, ours)
            setattr(sys.modules[real.__module__], real.__name__, ours)

        def hook(event, args):
            if event in noted:
                if not self.child and self.in_cell and _thread.get_ident() == self.main:
                    self.here(sys._getframe(1))
            elif event == "socket.connect":
                if not self.child:
                    self.connected(args[1])
            elif event == "os.exec" and not self.child:
                self.here(sys._getframe(1))
                self.fact(exec=str(args[0])[:500])

        sys.addaudithook(hook)

    def connected(self, address):
        """A connection is being opened; those to other hosts are told."""
        host = address[0] if isinstance(address, tuple) else None
        if isinstance(host, str) and not host.startswith(LOCAL) and host not in self.hosts and len(self.hosts) < 50:
            self.hosts.add(host)
            self.fact(remote=host[:200])

    # --- cells --------------------------------------------------------------------------------------------------

    def fit_shell(self):
        """Know which cell runs, under which file name, and at which statement it is."""
        from IPython.core.interactiveshell import InteractiveShell
        from ipykernel.ipkernel import IPythonKernel

        inside, page, files = self, self.page, self.files
        run_code = InteractiveShell.run_code

        @functools.wraps(run_code)
        async def run_code_noted(shell, code_obj, result=None, *, async_=False):
            if inside.in_cell and code_obj.co_filename not in files:
                name = code_obj.co_filename
                files[name] = page.cell
                inside.fact(file=name, cell=page.cell)
            inside.at(first_line(code_obj))
            coroutine = run_code(shell, code_obj, result, async_=async_)
            inside.coroutine = coroutine
            try:
                failed = await coroutine
            finally:
                inside.coroutine = None
            if failed and result is not None and inside.in_cell:
                inside.failed(result.error_in_exec)
            return failed

        do_execute = IPythonKernel.do_execute

        @functools.wraps(do_execute)
        async def do_execute_noted(kernel, *args, **kwargs):
            inside.begin(kernel)
            try:
                return await do_execute(kernel, *args, **kwargs)
            finally:
                for stream in (sys.stdout, sys.stderr):
                    inside.settle(stream)
                inside.in_cell = False
                if not inside.child:
                    page.note_counts()
                    page.finish()

        InteractiveShell.run_code = run_code_noted
        IPythonKernel.do_execute = do_execute_noted
        self.fitted.append("cells")

    def failed(self, error):
        """A statement raised: tell where, innermost first; the traceback that is shown may hide frames."""
        rows, entry = [], getattr(error, "__traceback__", None)
        while entry is not None:
            code = entry.tb_frame.f_code
            rows.append((code.co_name, entry.tb_lineno, code.co_filename, self.files.get(code.co_filename, 0)))
            entry = entry.tb_next
        rows = rows[1:][::-1]  # the first is IPython's own, which called exec()
        line = next((row[1] for row in rows if row[3] == self.page.cell), None)
        if line:
            self.fact(error=rows[:30], line=line, cell=self.page.cell)

    def begin(self, kernel):
        """A cell begins: number it, and tell which request it answers."""
        page = self.page
        parent = kernel.get_parent("shell") if hasattr(kernel, "get_parent") else kernel._parent_header
        msg_id = parent.get("header", {}).get("msg_id")
        page.counts[:] = 0, 0
        page.cell += 1
        page.last = None
        COUNTS.pack_into(page.memory, COUNTS_AT, 0, 0)
        page.note_line(0)
        self.msg_id = msg_id
        self.headers.clear()
        self.keys.clear()
        self.in_cell = True
        self.fact(cell=page.cell, msg_id=msg_id)
        if page.cell == 1:
            self.before_cells()

    # --- output -------------------------------------------------------------------------------------------------

    def fit_streams(self):
        """Journal writes before ipykernel buffers them, and stop buffering what is far beyond the cap anyway."""
        from ipykernel.iostream import OutStream

        inside, page = self, self.page
        write = OutStream.write
        cut = self.config.get("cut") or sys.maxsize
        headers = self.headers
        own = page.pid
        getpid = os.getpid

        def put(stream, string, fd_bytes):
            parent = stream.parent_header
            if id(parent) not in headers and not inside.current(parent):
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

        self.put = put
        OutStream.write = write_noted
        self.fitted.append("streams")
        if WRITE_ALWAYS <= set(write.__code__.co_names) <= WRITE_ALWAYS | WRITE_SOMETIMES:
            try:
                self.fit_quick_writes(OutStream, write_noted)
            except (OSError, AttributeError):  # an older system or Python: without the memory that it needs
                pass

    def fit_quick_writes(self, stream_class, write):
        """Do what ipykernel's ``write`` does in one go with the journal, where all is plain; else as before.

        ipykernel makes a frozen set of the parent header at each write, though the header of a cell stays the same, and takes a lock.
        Made once, and one lock for both, it pays for the journal.
        """
        page, keys, ours = self.page, self.keys, wiped_in_children()
        lock, counts, where, record = page.lock, page.counts, page.memory.tell, page.memory.write
        cut = self.config.get("cut") or sys.maxsize

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

    def current(self, parent):
        """Whether a header is that of the running cell; remembered, as it is asked at every write."""
        if self.in_cell and parent.get("msg_id") == self.msg_id:
            self.headers[id(parent)] = parent  # held, so that nothing else gets its id
            self.keys[id(parent)] = frozenset(parent.items())
            return True
        return False

    def fit_messages(self):
        """Journal displays before they are queued; refuse those that no receiver would take."""
        from ipykernel.iostream import IOPubThread

        inside, page = self, self.page
        send = IOPubThread.send_multipart
        largest = self.config.get("message") or sys.maxsize
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
        self.fitted.append("messages")

    def fit_descriptors(self):
        """Let what C code writes to descriptors 1 and 2 survive the process.

        ipykernel reads its pipe in a thread, and data read but not yet handed on when the process aborts is lost. So look at the
        data with tee(2), which leaves it in the pipe, hand it on, and only then take it out. The runner holds a copy of the read
        end and finds there what had not been taken.
        """
        from ipykernel.iostream import OutStream

        inside, page = self, self.page
        libc = ctypes.CDLL(None, use_errno=True)
        libc.tee.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_uint)
        if libc.tee(-1, -1, 1, 0) < 0 and ctypes.get_errno() != 9:  # EBADF, where there is a tee: some sandboxes have none
            return  # then ipykernel reads as it always did
        flush = OutStream.flush
        chunk = 1000

        def watch_pipe_fd(stream):
            index = 1 if stream.name == "stderr" else 0
            peek_r, peek_w = os.pipe()
            inside.hand_over(stream.name, stream._fid)
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
                inside.settle(stream)
            return flush(stream)

        watch_pipe_fd.__name__ = "_watch_pipe_fd"  # threads are named after what they run
        OutStream._watch_pipe_fd = watch_pipe_fd
        OutStream.flush = flush_all
        self.fitted.append("descriptors")

    def hand_over(self, name, fd):
        """Give the runner a copy of a pipe's read end."""
        try:
            socket.send_fds(self.facts, [json.dumps({"pipe": name}).encode()], [fd])
        except (OSError, AttributeError):  # send_fds is there since Python 3.9
            pass

    def settle(self, stream):
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
            target = self.page.fd_bytes[index][1] + waiting
            deadline = time.monotonic() + 0.2
            while self.page.fd_bytes[index][1] < target and time.monotonic() < deadline:
                time.sleep(0.0005)

    # --- what can wait --------------------------------------------------------------------------------------------

    def fit_client(self):
        """Import the part of jupyter_client that a kernel needs; the clients and managers when somebody asks for them."""
        if not self.config.get("headless") or "jupyter_client" in sys.modules:
            return
        spec = importlib.util.find_spec("jupyter_client")
        package = importlib.util.module_from_spec(spec)
        lock, loading = _thread.RLock(), []

        def load(name):
            with lock:
                if not loading and name == "BlockingKernelClient":  # ipykernel's application names its class, and makes none
                    from jupyter_client.blocking import BlockingKernelClient

                    package.BlockingKernelClient = BlockingKernelClient
                elif not loading:
                    loading.append(name)
                    spec.loader.exec_module(package)
                    del package.__getattr__, package.__dir__
            if name in vars(package):
                return vars(package)[name]
            raise AttributeError(f"module 'jupyter_client' has no attribute {name!r}")

        def names():
            load("__name__")
            return dir(package)

        package.__getattr__, package.__dir__ = load, names
        sys.modules["jupyter_client"] = package
        connect = importlib.import_module("jupyter_client.connect")
        vars(package).update((name, getattr(connect, name)) for name in connect.__all__)

    def fit_debugger(self):
        """Import debugpy when it is first used: it takes half as long as all else together, and a headless run seldom needs it.

        ipykernel's debugger is made as ever, of classes that import what they need; what debugpy's import leaves behind stands
        there from the start: a variable, a hook, two functions that it adds to the builtins.
        """
        if not self.config.get("headless") or "debugpy" in sys.modules or importlib.util.find_spec("debugpy") is None:
            return
        debugger = import_debugger_alone()
        if debugger is None:
            return
        explorer = debugger.VariableExplorer
        default = sys.breakpointhook

        def load():
            if sys.breakpointhook is debugpy_breakpointhook:
                sys.breakpointhook = default  # so that the import puts the real one there
            import_debugpy(debugger)

        class VariableExplorer(explorer):
            def __init__(self):
                import threading

                threading.Thread()  # as the import makes one, only to look at it: the next ones have their numbers from it

            def __getattr__(self, name):
                if name.startswith("__") or "tracker" in self.__dict__:
                    raise AttributeError(name)
                load()
                explorer.__init__(self)
                return getattr(self, name)

        def debugpy_breakpointhook(*args, **kwargs):
            load()
            return sys.breakpointhook(*args, **kwargs)

        def execfile(*args, **kwargs):
            load()
            return builtins.execfile(*args, **kwargs)

        def runfile(*args, **kwargs):
            load()
            return builtins.runfile(*args, **kwargs)

        for made, name in ((VariableExplorer, "VariableExplorer"), (debugpy_breakpointhook, "debugpy_breakpointhook")):
            made.__qualname__ = name
        VariableExplorer.__module__ = explorer.__module__
        debugger.VariableExplorer, sys.breakpointhook = VariableExplorer, debugpy_breakpointhook
        builtins.execfile, builtins.runfile = execfile, runfile
        os.environ.setdefault("PYDEVD_USE_FRAME_EVAL", "NO")  # for children too

    def fit_collector(self):
        """Have the garbage collector go through what the notebook made, and not each time through all that was there before it.

        That is two hundred thousand objects, none of them garbage, and a kernel that ends goes through them four times: half of the time
        that its end takes. Whoever asks the collector what there is, or what leads to an object, is answered as ever.
        """
        if not self.config.get("headless"):
            return

        def whole(function):
            @functools.wraps(function)
            def asked(*args, **kwargs):
                gc.unfreeze()
                for name, real in real_ones.items():
                    if getattr(gc, name) is asking[name]:
                        setattr(gc, name, real)
                return function(*args, **kwargs)

            return asked

        real_ones = {name: getattr(gc, name) for name in ("get_objects", "get_referrers", "get_freeze_count")}
        asking = {name: whole(real) for name, real in real_ones.items()}

        def freeze():
            for name, asked in asking.items():
                setattr(gc, name, asked)
            gc.freeze()

        self.before_cells = freeze

    # --- the end -------------------------------------------------------------------------------------------------

    def fit_shutdown(self):
        """Let a kernel that is done end at once."""
        from ipykernel.iostream import IOPubThread
        from ipykernel.kernelapp import IPKernelApp
        from ipykernel.kernelbase import Kernel

        process_children = Kernel._process_children

        @functools.wraps(process_children)
        def process_children_if_any(kernel):
            # psutil need not be imported, and all of /proc read, only to learn that there are none.
            try:
                os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return []
            return process_children(kernel)

        Kernel._process_children = process_children_if_any
        stop = IOPubThread.stop

        @functools.wraps(stop)
        def stop_after_control(thread):
            # The thread of the control channel has taken the request to shut down and flushes, while the main thread ends the one that answers a
            # flush: where both meet, neither comes to its end before the flush gives up, in ten seconds or never.
            control = getattr(IPKernelApp._instance, "control_thread", None)
            if control is not None and control.is_alive() and control.ident != _thread.get_ident():
                control.stop()
                control.join(CONTROL_SECONDS)
            stop(thread)

        IOPubThread.stop = stop_after_control

    # --- samples ------------------------------------------------------------------------------------------------

    def sample_forever(self):
        """See where the main thread is, some fifty times a second, and how long we waited for the interpreter."""
        page, now, slot, seen = self.page, time.monotonic, 0, None
        started, cell = 0.0, 0
        while True:
            pause = SAMPLE_SECONDS if now() - started < 10 else SLOW_SAMPLE_SECONDS
            wanted = now() + pause
            time.sleep(pause)
            if self.child:
                return
            if not self.in_cell:
                continue
            page.note_counts()
            if page.cell != cell:
                cell, started = page.cell, now()
            frame = sys._current_frames().get(self.main)
            rows = self.frames(frame) if frame else []
            line = next((row[1] for row in rows if row[3] == cell), 0)
            awaiting = "" if line else self.awaited(cell)
            if awaiting:
                rows, line = awaiting
            place = hash((rows[0][:3], frame.f_lasti)) & 0xFFFFFFFFFFFFFFFF if rows and frame else 0
            values = (cell, line, len(rows), now(), now() - wanted, time.process_time(), place, 0)
            SAMPLE.pack_into(page.memory, SAMPLE_AT, *values)
            SAMPLE.pack_into(page.memory, HISTORY_AT + slot * SAMPLE.size, *values)
            slot = (slot + 1) % HISTORY
            if place != seen:
                seen = place
                page.stack(json.dumps({"cell": cell, "rows": rows, "awaiting": bool(awaiting)}))
            frame = None

    def awaited(self, cell):
        """The stack of a cell that awaits something: no frame of it is on the main thread then."""
        rows, thing, depth = [], self.coroutine, 0
        while thing is not None and depth < 30:
            frame = getattr(thing, "cr_frame", None) or getattr(thing, "gi_frame", None) or getattr(thing, "ag_frame", None)
            if frame is not None:
                code = frame.f_code
                rows.append((code.co_name, frame.f_lineno, code.co_filename, self.files.get(code.co_filename, 0)))
            else:
                rows.append((type(thing).__name__, 0, type(thing).__module__, 0))
            thing = getattr(thing, "cr_await", None) or getattr(thing, "gi_yieldfrom", None)
            depth += 1
        rows.reverse()
        line = next((row[1] for row in rows if row[3] == cell), 0)
        return (rows, line) if line else ()

    # --- all of it ----------------------------------------------------------------------------------------------

    def fit(self):
        """Put everything around ipykernel that fits the one at hand; what does not is told and left out."""
        self.arm()
        self.watch()
        missing = {}
        parts = (
            self.fit_client,
            self.fit_debugger,
            self.fit_collector,
            self.fit_shell,
            self.fit_streams,
            self.fit_messages,
            self.fit_descriptors,
            self.fit_shutdown,
        )
        for part in parts:
            try:
                part()
            except Exception as error:
                missing[part.__name__] = f"{type(error).__name__}: {error}"
        _thread.start_new_thread(self.sample_forever, ())
        self.fact(
            hello=os.getpid(),
            python=sys.version.split()[0],
            executable=sys.executable,
            path=[p for p in sys.path if p][:20],
            fitted=self.fitted,
            missing=missing,
            main=self.main,
            uid=os.getuid(),
        )


def main(argv):
    """``inside.py PAGE FACTS FAULT CONFIG -m MODULE ARGS...``: fit, then run the module as ``python -m`` would."""
    gc.disable()  # while modules are imported there is nothing to collect
    page, facts, fault, config = int(argv[0]), int(argv[1]), int(argv[2]), json.loads(argv[3])
    module, arguments = argv[5], argv[6:]
    sys.path[0] = os.getcwd()
    # ipykernel_launcher takes the working directory off the path while it imports; do the same while we do.
    first = sys.path.pop(0)
    Inside(page, facts, fault, config).fit()
    gc.enable()
    sys.path.insert(0, first)
    import runpy

    sys.argv = [sys.argv[0], *arguments]
    if hasattr(sys, "orig_argv"):  # since Python 3.10
        at = len(sys.orig_argv) - len(argv) - 1
        del sys.orig_argv[at : at + 5]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
