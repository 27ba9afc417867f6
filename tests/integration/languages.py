"""The table of kills for kernels in which no code of ours runs: R, TypeScript and bash, each a program of its own."""

from __future__ import annotations

from dataclasses import dataclass

from safe_exec.model.verdict import CauseKind, Status

S, K = Status, CauseKind
BRIEF = ("--cell-timeout", "3")
NATIVE = "libc <- dyn.load(Sys.glob('/lib/*/libc.so.6')[1])\n.C(getNativeSymbolInfo('{}', libc)$address, raw(8), 1L, 1L)"
"""R hands pointers to its vectors: as a length, one is enough for any memory."""
HOARD = "cat('hogging\\n')\nflush(stdout())\nkept <- list()\nwhile (TRUE) kept[[length(kept) + 1]] <- numeric(2e6) + 1"
FILL = "console.log('hogging');\nconst kept: Uint8Array[] = [];\nwhile (true) kept.push(new Uint8Array(16 << 20).fill(1));"
READ_NULL = (
    "console.log('before');\nnew Deno.UnsafePointerView(Deno.UnsafePointer.create(8n)!).getInt32();"
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What cells do and what is said of it; ``line`` is that of a cell of one line, else nobody knows it."""

    id: str
    kernel: str
    cells: tuple[str, ...]
    status: Status
    cause: CauseKind | None
    cell: int | None = None
    line: int | None = None
    options: tuple[str, ...] = ("--cell-timeout", "60")
    env: tuple[tuple[str, str], ...] = ()
    activity: str | None = None
    signal: int | None = None
    exit_code: int | None = None
    saved: str | None = None
    words: str = ""
    beds: tuple[str, ...] = ()


V1 = ("cgroup-v1-root",)
MEMORY = ("--memory", "300M", "--cell-timeout", "60")

ROWS = (
    Row(id="R-passes", kernel="ir", cells=("x <- 41", "cat(x + 1, '\\n')"), status=S.PASSED, cause=None, saved="42"),
    Row(id="R-error", kernel="ir", cells=("x <- 1", "f <- function() stop('boom')\nf()"), status=S.CELL_ERROR, cause=K.EXCEPTION,
        cell=1, words="boom"),
    Row(id="R-memory", kernel="ir", cells=("x <- 1", HOARD), status=S.KERNEL_DIED, cause=K.OUT_OF_MEMORY, cell=1, options=MEMORY,
        saved="hogging", beds=V1),
    Row(id="R-memory-refused", kernel="ir", cells=("x <- 1", HOARD), status=S.CELL_ERROR, cause=K.MEMORY_ERROR, cell=1,
        options=(*MEMORY, "--mechanisms", "rlimit"), words="cannot allocate vector"),
    Row(id="R-segfault", kernel="ir", cells=("x <- 1", "cat('before\\n')\nflush(stdout())\n" + NATIVE.format("memset")),
        status=S.KERNEL_DIED, cause=K.SEGFAULT, cell=1, signal=-11, words="caught segfault"),
    Row(id="R-abort", kernel="ir", cells=("x <- 1", NATIVE.format("abort")), status=S.KERNEL_DIED, cause=K.ABORT, cell=1, signal=-6),
    Row(id="R-killed", kernel="ir", cells=("x <- 1", "tools::pskill(Sys.getpid(), 9)"), status=S.KERNEL_DIED, cause=K.KILLED, cell=1,
        line=1, signal=-9),
    Row(id="R-quit", kernel="ir", cells=("x <- 1", "quit()", "print(x)"), status=S.KERNEL_DIED, cause=K.EXIT, cell=1,
        line=None),
    Row(id="R-timeout-loop", kernel="ir", cells=("x <- 1", "while (TRUE) x <- x + 1"), status=S.TIMEOUT, cause=K.CELL_TIMEOUT,
        options=BRIEF, cell=1, line=1, activity="native_code", words="it was computing"),
    Row(id="R-timeout-sleep", kernel="ir", cells=("x <- 1", "Sys.sleep(60)"), status=S.TIMEOUT, cause=K.CELL_TIMEOUT, options=BRIEF,
        cell=1, line=1, activity="sleeping"),
    Row(id="deno-passes", kernel="deno", cells=("const x = 41;", "if (x !== 41) throw x;"), status=S.PASSED, cause=None),
    Row(id="deno-error", kernel="deno", cells=("const x = 1;", "throw new Error('boom')"), status=S.CELL_ERROR, cause=K.EXCEPTION,
        cell=1, line=1, words="boom"),
    Row(id="deno-memory", kernel="deno", cells=("const x = 1;", FILL), status=S.KERNEL_DIED, cause=K.OUT_OF_MEMORY, cell=1,
        options=("--memory", "500M", "--cell-timeout", "60"), beds=V1),
    Row(id="deno-memory-watchdog", kernel="deno", cells=("const x = 1;", FILL), status=S.KERNEL_DIED, cause=K.OUT_OF_MEMORY, cell=1,
        options=("--memory", "500M", "--cell-timeout", "60", "--mechanisms", "watchdog")),
    # V8 reserves half a gigabyte for code alone.
    Row(id="deno-memory-refused", kernel="deno", cells=("const x = 1;",), status=S.START_FAILED, cause=K.KERNEL_START_FAILED,
        options=("--memory", "300M", "--mechanisms", "rlimit")),
    Row(id="deno-heap", kernel="deno", cells=("const x = 1;", "const kept: object[] = [];\nwhile (true) kept.push([kept.length]);"),
        status=S.KERNEL_DIED, cause=K.ABORT, cell=1, signal=-5, words="out of memory", env=(("DENO_V8_FLAGS", "--max-old-space-size=150"),)),
    Row(id="deno-segfault", kernel="deno", cells=("const x = 1;", READ_NULL), status=S.KERNEL_DIED, cause=K.SEGFAULT, cell=1, signal=-11),
    Row(id="deno-exit", kernel="deno", cells=("const x = 1;", "console.log('leaving');\nDeno.exit(3);", "x"), status=S.KERNEL_DIED,
        cause=K.EXIT, cell=1, exit_code=3),
    Row(id="deno-timeout", kernel="deno", cells=("let x = 1;", "while (true) x += 1;"), status=S.TIMEOUT, cause=K.CELL_TIMEOUT,
        options=BRIEF, cell=1, line=1, activity="native_code", words="it was computing"),
    Row(id="deno-timeout-sleep", kernel="deno", cells=("let x = 1;", "await new Promise((done) => setTimeout(done, 60000));"),
        status=S.TIMEOUT, cause=K.CELL_TIMEOUT, options=BRIEF, cell=1, line=1),
    Row(id="bash-memory", kernel="bash", cells=("x=1", "x=a\nwhile true; do x=$x$x; done"), status=S.LIMIT_EXCEEDED,
        cause=K.WORKER_OUT_OF_MEMORY, cell=1, options=("--memory", "200M", "--cell-timeout", "60"), beds=V1),
    Row(id="bash-killed", kernel="bash", cells=("x=1", "kill -9 $PPID"), status=S.KERNEL_DIED, cause=K.KILLED, cell=1, line=1, signal=-9),
    Row(id="bash-timeout", kernel="bash", cells=("x=1", "while true; do :; done"), status=S.TIMEOUT, cause=K.CELL_TIMEOUT,
        options=("--cell-timeout", "6"), cell=1, line=1),
)  # fmt: skip
