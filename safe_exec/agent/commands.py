"""Reports shell commands that fail in a cell: ``!command``, ``x = !command``, ``%pip``.

IPython ignores their status. With the option ``strict_shell`` a failing command raises
CalledProcessError, as ``%%bash`` does.
"""

import functools
import sys

LONGEST_COMMAND = 300


def patch_commands(inside):
    """Check the status of each command that IPython's shell runs."""
    # The functions that run a command are replaced, and not the methods of the shell: IPython
    # expands `{name}` in a command with the variables of the frame that calls the method.
    from IPython.utils import _process_common
    from ipykernel import zmqshell

    system, process_handler = zmqshell.system, _process_common.process_handler

    @functools.wraps(system)
    def system_checked(cmd):
        __tracebackhide__ = True
        status = system(cmd)
        check(inside, cmd, status)
        return status

    @functools.wraps(process_handler)
    def process_handler_checked(cmd, callback, *args, **kwargs):
        __tracebackhide__ = True

        def call(process):
            __tracebackhide__ = True
            output = callback(process)
            check(inside, cmd, process.returncode)
            return output

        return process_handler(cmd, call, *args, **kwargs)

    zmqshell.system = system_checked
    _process_common.process_handler = process_handler_checked
    inside.instrumented.append("commands")


def check(inside, cmd, status):
    """Report a command that failed, or raise CalledProcessError for it."""
    __tracebackhide__ = True
    if not status or inside.child or not inside.in_cell:
        return
    text = cmd if isinstance(cmd, str) else " ".join(map(str, cmd))
    if inside.config.get("strict_shell"):
        from subprocess import CalledProcessError

        raise CalledProcessError(status, text)
    rows = inside.frames(sys._getframe(2))
    place = next((row[1] for row in rows if row[3] == inside.page.cell), 0)
    inside.fact(
        failed_command=text[:LONGEST_COMMAND],
        status=int(status),
        place=place,
        cell=inside.page.cell,
    )
