"""Fixes an error that an interrupt may cause in IPython.

Safe-exec interrupts a kernel when its time is up.
"""

import functools


def patch_interrupts(inside):
    """Make the error of an interrupted ``%%bash`` printable."""
    # IPython gives the script 0.1 s to end after an interrupt. A script that takes longer, since it
    # cleans up or ignores SIGINT, has no return code yet. IPython then raises a CalledProcessError
    # without one and cannot display its text: the user would see only a TypeError.
    from subprocess import CalledProcessError

    text_of = CalledProcessError.__str__

    @functools.wraps(text_of)
    def text(error):
        if error.returncode is None:
            return f"Command '{error.cmd}' was interrupted and did not end at once"
        return text_of(error)

    CalledProcessError.__str__ = text
    inside.instrumented.append("interrupts")
