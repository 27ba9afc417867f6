"""Postpones rarely needed imports, and exempts the kernel's own objects from garbage collection."""

import _thread
import builtins
import functools
import gc
import importlib.util
import os
import sys
import types

# The names that ipykernel's debugger imports from debugpy.
FROM_DEBUGPY = (
    ("debugpy.server", "api"),
    ("_pydevd_bundle", "pydevd_frame_utils"),
    ("_pydevd_bundle.pydevd_suspended_frames", "SuspendedFramesManager"),
    ("_pydevd_bundle.pydevd_suspended_frames", "_FramesTracker"),
)


def import_debugger_alone():
    """Import ipykernel's debugger without debugpy.

    Returns ``None`` if this version of ipykernel is not supported.
    """
    empty = {
        name: types.ModuleType(name)
        for name in ("debugpy", *(module for module, _ in FROM_DEBUGPY))
    }
    for module, name in FROM_DEBUGPY:
        setattr(empty[module], name, None)
    sys.modules.update(empty)
    try:
        from ipykernel import debugger
    except ImportError:
        # Before version 6 there was none.
        return None
    finally:
        for name in empty:
            del sys.modules[name]
    if all(
        hasattr(debugger, name)
        for name in ("VariableExplorer", *(name for _, name in FROM_DEBUGPY))
    ):
        return debugger
    import_debugpy(debugger)
    return None


def import_debugpy(debugger):
    """Import debugpy and put its names into ipykernel's debugger."""
    import threading

    counter = getattr(threading, "_counter", None)
    # The thread that the import makes has been counted.
    threading._counter = lambda: 0
    quiet = "PYDEVD_DISABLE_FILE_VALIDATION"
    previous_value = os.environ.get(quiet)
    os.environ[quiet] = (
        "1"  # or else a warning comes that the terminal gets when a kernel starts, and no cell
    )
    try:
        for module, name in FROM_DEBUGPY:
            importlib.import_module(module)
            if not hasattr(sys.modules[module], name):
                importlib.import_module(f"{module}.{name}")
            setattr(debugger, name, getattr(sys.modules[module], name))
    finally:
        threading._counter = counter
        if previous_value is None:
            del os.environ[quiet]
        else:
            os.environ[quiet] = previous_value


def patch_client(inside):
    """Import only the part of jupyter_client that a kernel needs; load the rest on first use."""
    if not inside.config.get("headless") or "jupyter_client" in sys.modules:
        return
    spec = importlib.util.find_spec("jupyter_client")
    package = importlib.util.module_from_spec(spec)
    lock, loading = _thread.RLock(), []

    def load(name):
        with lock:
            if (
                not loading and name == "BlockingKernelClient"
            ):  # ipykernel's application names its class, and makes none
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


def patch_debugger(inside):
    """Import debugpy on first use: it takes half as long as all other imports together."""
    # ipykernel's debugger is created as usual, from classes that import what they need. The side
    # effects of importing debugpy exist from the start: a variable, a hook, and two functions in
    # the builtins.
    if (
        not inside.config.get("headless")
        or "debugpy" in sys.modules
        or importlib.util.find_spec("debugpy") is None
    ):
        return
    debugger = import_debugger_alone()
    if debugger is None:
        return
    explorer = debugger.VariableExplorer
    default = sys.breakpointhook

    def load():
        if sys.breakpointhook is debugpy_breakpointhook:
            # Restore the default, so that the import installs debugpy's own hook.
            sys.breakpointhook = default
        import_debugpy(debugger)

    class VariableExplorer(explorer):
        def __init__(self):
            import threading

            # The import makes one thread object too, so later threads get the same numbers as after
            # it.
            threading.Thread()

        def __getattr__(self, name):
            if name.startswith("__") or "tracker" in inside.__dict__:
                raise AttributeError(name)
            load()
            explorer.__init__(self)
            return getattr(self, name)

    def debugpy_breakpointhook(*args, **kwargs):
        load()
        return sys.breakpointhook(*args, **kwargs)

    def execfile(file, glob=None, loc=None):
        load()
        # The function uses the globals of its caller's frame, which would be ours here.
        return builtins.execfile(file, sys._getframe(1).f_globals if glob is None else glob, loc)

    def runfile(*args, **kwargs):
        load()
        return builtins.runfile(*args, **kwargs)

    for replacement, name in (
        (VariableExplorer, "VariableExplorer"),
        (debugpy_breakpointhook, "debugpy_breakpointhook"),
    ):
        replacement.__qualname__ = name
    VariableExplorer.__module__ = explorer.__module__
    debugger.VariableExplorer, sys.breakpointhook = VariableExplorer, debugpy_breakpointhook
    builtins.execfile, builtins.runfile = execfile, runfile
    # For children too.
    os.environ.setdefault("PYDEVD_USE_FRAME_EVAL", "NO")


def patch_collector(inside):
    """Exempt the objects that exist before the first cell from garbage collection."""
    # These are two hundred thousand objects, none of them garbage. An ending kernel would traverse
    # them four times, which is half of the time that its end takes. Code that asks the collector
    # for objects or their referrers gets the usual answer.
    if not inside.config.get("headless"):
        return

    def whole(function):
        @functools.wraps(function)
        def unfreezing(*args, **kwargs):
            gc.unfreeze()
            for name, real in real_ones.items():
                if getattr(gc, name) is asking[name]:
                    setattr(gc, name, real)
            return function(*args, **kwargs)

        return unfreezing

    real_ones = {
        name: getattr(gc, name) for name in ("get_objects", "get_referrers", "get_freeze_count")
    }
    asking = {name: whole(real) for name, real in real_ones.items()}

    def freeze():
        for name, unfreezing in asking.items():
            setattr(gc, name, unfreezing)
        gc.freeze()

    inside.before_cells = freeze
