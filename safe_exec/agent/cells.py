"""Tracks the running cell, its file names, and its current statement."""

import functools
import inspect
import linecache
import sys
import weakref

from .attributes import tell_attributes
from .bodies import Source
from .layout import COUNTS, COUNTS_AT
from .output import settle
from .sources import line_of, map_body, map_cell


def first_line(code):
    """Return the line number at which a statement's code begins.

    ``co_firstlineno`` does not tell: it is 1 for every statement of a cell.
    """
    # Before Python 3.10.
    if not hasattr(code, "co_lines"):
        import dis

        return next((line for _, line in dis.findlinestarts(code)), 1)
    return next((line for _, _, line in code.co_lines() if line), 1)


def patch_shell(inside):
    """Track the running cell, its file name and its statement."""
    from IPython.core.interactiveshell import InteractiveShell
    from ipykernel.ipkernel import IPythonKernel

    run_code = InteractiveShell.run_code

    # Neither function is a coroutine: while a cell runs no frame of ours lies on the stack. Python
    # 3.12 and 3.13 show it whole to the cell (`stack_info`, `stacklevel`), and each frame counts
    # for the recursion limit.
    @functools.wraps(run_code)
    def run_code_noted(shell, code_obj, result=None, *, async_=False):
        source = source_of(inside, code_obj.co_filename) if inside.in_cell else None
        if source is not None:
            line = line_of(source.line_map, first_line(code_obj))
            if line:
                inside.at(line)
                if not inside.child:
                    inside.census.begin_statement(line)
        elif not inside.in_cell:
            inside.at(first_line(code_obj))
        coroutine = run_code(shell, code_obj, result, async_=async_)
        inside.running.append(
            when_done(coroutine, lambda reference: ran(inside, reference, result))
        )
        return coroutine

    do_execute = IPythonKernel.do_execute

    @functools.wraps(do_execute)
    def do_execute_noted(kernel, *args, **kwargs):
        begin(inside, kernel, args[0] if args else kwargs.get("code"))
        coroutine = do_execute(kernel, *args, **kwargs)
        inside.request = when_done(coroutine, lambda _: finish(inside))
        return coroutine

    finish_metadata = IPythonKernel.finish_metadata

    # Called right before the reply is sent. Code that looks at `f_locals` of all its callers, as
    # IPython's debugger does, keeps the finished coroutine alive in the frame of ipykernel's
    # `execute_request` (Python 3.12 and older): its reference tells nothing then.
    @functools.wraps(finish_metadata)
    def finish_metadata_noted(kernel, *args, **kwargs):
        if inside.request is not None and inside.in_cell:
            inside.request = None
            finish(inside)
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
        return finish_metadata(kernel, *args, **kwargs)

    # Since Python 3.12.
    mark = getattr(inspect, "markcoroutinefunction", lambda function: function)
    InteractiveShell.run_code = mark(run_code_noted)
    IPythonKernel.do_execute = mark(do_execute_noted)
    IPythonKernel.finish_metadata = finish_metadata_noted
    inside.instrumented.append("cells")


def when_done(coroutine, call):
    """Return a weak reference to a coroutine; ``call`` runs when the coroutine is done.

    The caller that awaits a coroutine releases it as soon as it has returned or raised.
    """
    return weakref.ref(coroutine, call)


def ran(inside, reference, result):
    """Record that a statement has run or raised."""
    inside.running.remove(reference)
    error = getattr(result, "error_in_exec", None)
    if error is not None and inside.in_cell:
        tell_failure(inside, error)


def finish(inside):
    """Record that a cell has run; its reply has not been sent yet."""
    try:
        for stream in (sys.stdout, sys.stderr):
            settle(inside, stream)
    finally:
        inside.in_cell = False
        if not inside.child:
            inside.census.end_cell()
            inside.page.note_counts()
            inside.page.finish()
            inside.coverage.end_cell()


def source_of(inside, name):
    """Return the ``Source`` of code, by the file name that IPython gave to it.

    Returns ``None`` for code that does not belong to the running cell.
    """
    page, cell = inside.page, inside.bodies.cell
    registered = inside.files.get(name)
    if registered is not None and registered.cell == page.cell:
        return registered
    entry = linecache.cache.get(name)
    code = "".join(entry[2]) if entry is not None and len(entry) > 2 else cell
    # The first text of a request is the cell itself; later ones are run by magics, or by the cell's
    # own code.
    line_map = map_cell(cell, code) if inside.first_text else None
    if line_map is None:
        line_map = map_body(cell, code)
    if line_map is None:
        return None
    inside.first_text = False
    # Cells with the same text have the same file name, which then stands for the one that runs.
    source = inside.files[name] = Source(page.cell, line_map)
    inside.fact(file=name, cell=page.cell, lines=line_map[:500])
    return source


def traceback_rows(inside, entry):
    """Return the rows of a traceback, outermost first; a frame that repeats gets one row."""
    # An error in a trace function (a debugger's) passes the frame that was traced twice.
    rows, last = [], None
    while entry is not None:
        if entry.tb_frame is not last:
            rows.append(inside.row(entry.tb_frame.f_code, entry.tb_lineno))
        last, entry = entry.tb_frame, entry.tb_next
    return rows


def tell_failure(inside, error):
    """Report the stack of a statement's error, innermost first.

    The displayed traceback may hide some of these frames.
    """
    rows = traceback_rows(inside, getattr(error, "__traceback__", None))
    # The first is IPython's own, which called exec().
    rows = rows[1:][::-1]
    line = syntax_line(inside, error) or next(
        (row[1] for row in rows if row[3] == inside.page.cell), 0
    )
    if line:
        inside.fact(error=rows[:30], line=line, cell=inside.page.cell)
    tell_attributes(inside, error)


def syntax_line(inside, error):
    """Return the cell line of a syntax error in the cell's own text; 0 for any other error."""
    if not isinstance(error, SyntaxError) or not error.filename or not error.lineno:
        return 0
    line_map = inside.bodies.names.get(error.filename)
    if line_map is not None:
        return line_of(line_map, error.lineno)
    source = source_of(inside, error.filename) if error.filename.endswith(".py") else None
    return line_of(source.line_map, error.lineno) if source is not None else 0


def begin(inside, kernel, code):
    """Start a cell: number it, and report the request that it answers."""
    page = inside.page
    parent = kernel.get_parent("shell") if hasattr(kernel, "get_parent") else kernel._parent_header
    msg_id = parent.get("header", {}).get("msg_id")
    page.counts[:] = 0, 0
    page.cell += 1
    page.last = None
    COUNTS.pack_into(page.memory, COUNTS_AT, 0, 0)
    page.note_line(0)
    inside.msg_id = msg_id
    inside.headers.clear()
    inside.told_error = None
    inside.keys.clear()
    inside.live[:] = None, None
    inside.bodies.begin(code if isinstance(code, str) else "")
    inside.first_text = True
    inside.in_cell = True
    inside.fact(cell=page.cell, msg_id=msg_id)
    inside.check_handler()
    inside.actions.begin_cell()
    if page.cell == 1:
        inside.before_cells()
        inside.shell = getattr(kernel, "shell", None)
        inside.census.begin_cells()
        inside.coverage.start()
    inside.coverage.begin_cell()
    inside.census.begin_cell()
