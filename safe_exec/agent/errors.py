"""Reports the origin of errors that a cell displays, and of requests to exit.

A cell may display a traceback and then continue: ``%run`` of a file that raises, a failing
formatter, ``showtraceback()`` in a library. The shell's reply then does not say where the error was
raised.
"""

import functools
import sys

from .attributes import tell_attributes
from .cells import syntax_line, traceback_rows

MOST_ROWS = 30


def patch_errors(inside):
    """Report where each displayed error was raised, and the caller of ``exit()`` or ``quit()``."""
    from ipykernel.zmqshell import ZMQInteractiveShell

    show, ask_exit = ZMQInteractiveShell._showtraceback, ZMQInteractiveShell.ask_exit

    @functools.wraps(show)
    def show_noted(shell, etype, evalue, stb):
        if inside.in_cell and not inside.child:
            tell_shown(inside, evalue)
        return show(shell, etype, evalue, stb)

    @functools.wraps(ask_exit)
    def ask_exit_noted(shell):
        if inside.in_cell and not inside.child:
            rows = inside.frames(sys._getframe(1))
            line = next((row[1] for row in rows if row[3] == inside.page.cell), 0)
            inside.fact(asked_to_exit=rows, line=line, cell=inside.page.cell)
        return ask_exit(shell)

    ZMQInteractiveShell._showtraceback = show_noted
    ZMQInteractiveShell.ask_exit = ask_exit_noted
    inside.instrumented.append("errors")


def tell_shown(inside, error):
    """Report the stack of an error that is about to be displayed.

    The stack ends at the cell that displays the error.
    """
    rows = rows_of(inside, error)
    line = syntax_line(inside, error) or next(
        (row[1] for row in rows if row[3] == inside.page.cell), 0
    )
    if line:
        inside.fact(shown=rows[:MOST_ROWS], line=line, cell=inside.page.cell)
    tell_attributes(inside, error)


def rows_of(inside, error):
    """Return an error's stack, innermost first: its traceback, then the callers of the handler."""
    entry = getattr(error, "__traceback__", None)
    if entry is None:
        return []
    callers = inside.frames(entry.tb_frame.f_back)
    rows = traceback_rows(inside, entry)
    # Below the cell's frame there are only frames of the code that runs the cell.
    return rows[::-1] + (callers if callers and callers[-1][3] else [])
