"""Starts a kernel with safe-exec's patches.

It is started by its path, in front of the kernel's command: ``bootstrap.py PAGE FACTS FAULT CONFIG
-m MODULE ...``.

It patches ipykernel with the modules of this folder and then runs the module as ``python -m``
would. The patches are in separate modules because Python caches the bytecode of modules, but not of
the script that it runs; that saves 6 ms of each start. The modules are loaded under a name that no
notebook uses, and that name is then removed.
"""

import gc
import sys

NAME = "_safe_exec_inside"


def load():
    """Import this package's ``install`` and ``agent``, then remove it from ``sys.modules``."""
    import importlib
    import importlib.util
    import os

    folder = os.path.dirname(os.path.abspath(__file__))
    spec = importlib.util.spec_from_file_location(
        NAME, os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
    )
    sys.modules[NAME] = importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module(NAME + ".install"), importlib.import_module(NAME + ".agent")
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == NAME]:
            del sys.modules[name]
        for path in (folder, __file__):
            sys.path_importer_cache.pop(path, None)


def decline_free_threading():
    """Exit with a message if Python runs without its global interpreter lock.

    Without the lock, the agent cannot read the stack of a running thread.
    """
    # Since Python 3.13.
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        sys.exit(
            "safe-exec: a kernel of a free-threaded Python ({}) runs only with the global "
            "interpreter lock:"
            " set PYTHON_GIL=1, in the environment or in the kernelspec's env, or choose a "
            "kernel of the ordinary"
            " build".format(sys.version.split()[0])
        )


def main(argv):
    """Patch the kernel; return the name of the module to run."""
    decline_free_threading()
    # While modules are imported there is nothing to collect.
    gc.disable()
    page, facts, fault, arguments = int(argv[0]), int(argv[1]), int(argv[2]), argv[6:]
    # Python put our folder where ``python -m`` has the working directory. ipykernel_launcher takes
    # that off the path while it imports, and so do we.
    placed = not (sys.flags.isolated or getattr(sys.flags, "safe_path", False))
    if placed:
        del sys.path[0]
    install, agent = load()
    import json
    import os

    install.patch_kernel(agent.Inside(page, facts, fault, json.loads(argv[3])))
    gc.enable()
    if placed:
        sys.path.insert(0, os.getcwd())
    sys.argv = [sys.argv[0], *arguments]
    # Since Python 3.10.
    if hasattr(sys, "orig_argv"):
        at = len(sys.orig_argv) - len(argv) - 1
        del sys.orig_argv[at : at + 5]
    return argv[5]


if __name__ == "__main__":
    import runpy

    # As `python -m` does it (runpy._run_module_as_main), in this frame: a cell's stack has as many
    # frames as without us, of which a cell can see this outermost one in Python 3.12 and 3.13.
    try:
        _, spec, code = runpy._get_module_details(main(sys.argv[1:]), runpy._Error)
    except runpy._Error as error:
        sys.exit("{}: {}".format(sys.executable, error))
    sys.argv[0] = spec.origin
    take_over = None
    try:
        runpy._run_code(code, globals(), None, "__main__", spec)
    except SystemExit as error:
        # A snapshot that is to go on as the kernel has unwound its stack up to here.
        take_over = getattr(error, "take_over", None)
        if take_over is None:
            raise
    if take_over is not None:
        take_over()
