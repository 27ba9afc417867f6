"""What an interrupt, which a headless run sends when a cell's time is up, must not end in."""

import functools


def patch_interrupts(inside):
    """Let the error of an interrupted ``%%bash`` be shown.

    IPython gives the script 0.1 s to end after an interrupt. One that takes longer, because it cleans up or ignores SIGINT, has no return code yet,
    and IPython raises a CalledProcessError without one, whose text it cannot show: a TypeError would be all there is to see.
    """
    from subprocess import CalledProcessError

    text_of = CalledProcessError.__str__

    @functools.wraps(text_of)
    def text(error):
        if error.returncode is None:
            return f"Command '{error.cmd}' was interrupted and did not end at once"
        return text_of(error)

    CalledProcessError.__str__ = text
    inside.instrumented.append("interrupts")
