"""Enumerates the places that may hold memory: variables first, then objects without a variable."""

import gc
import itertools
import sys
import types

from .object_sizes import ATOMS, BASES, MODULE, NAMESPACE, NEVER, type_name

# A function's frame has this flag, a module's has not (inspect.CO_NEWLOCALS).
NEW_LOCALS = 2
MOST_OWNERS = 20000
NAMES_AT_A_TIME = 1000
MOST_OUTPUTS = 2000
# Modules of the notebook's folder are few; others are looked at while there is time.
MOST_MODULES = 3000
# A list of so many objects takes 16 MiB.
MOST_BLOCKS = 2 << 20
# What IPython puts into the namespace of a notebook.
OF_SHELL = frozenset(("In", "Out", "exit", "quit", "open", "get_ipython"))
HISTORY = frozenset(("_i", "_ii", "_iii", "_ih", "_oh", "_dh"))
# What every class has, or what is code.
NOT_DATA = (
    *NEVER,
    types.FunctionType,
    types.MethodType,
    types.ModuleType,
    staticmethod,
    classmethod,
    property,
)


def is_of_shell(name):
    """Tell whether IPython defined a name, such as ``_``, ``_3`` or ``_i2``."""
    if name in OF_SHELL or name in HISTORY or name[:2] == "__":
        return True
    return name[:1] == "_" and (not name.strip("_") or name.lstrip("_i").isdigit())


def is_class(thing):
    """Tell whether an object is a class, whatever its metaclass."""
    return type in BASES(type(thing))


def variables(walk, namespace, first=()):
    """Yield the notebook's variables: those named in ``first``, then the others, newest first.

    An object with several names is counted for only one of them.
    """
    names = [name for name in first if name in namespace]
    visited, classes = set(names), []
    # A census that runs out of time has seen what was large before, and what came last.
    fresh = (name for name in reversed(namespace) if name not in visited)
    chunk = names
    while chunk is not None:
        yield from own_values(walk, namespace, chunk, classes)
        chunk = list(itertools.islice(fresh, NAMES_AT_A_TIME)) or None
    for name, kind in classes:
        if MODULE(kind) == "__main__":
            yield from class_attributes(name, kind)


def own_values(walk, namespace, names, classes):
    """Yield the variables with these names, but append those that are classes to ``classes``."""
    own = []
    for name in names:
        if type(name) is not str or is_of_shell(name) or name not in namespace:
            continue
        value = namespace[name]
        kind = type(value)
        if is_class(value):
            classes.append((name, value))
        elif kind not in NEVER:
            walk.tick()
            own.append(name)
            if kind not in ATOMS and len(walk.owners) < MOST_OWNERS:
                walk.owners.setdefault(id(value), name)
    for name in own:
        if name in namespace:
            yield name, namespace[name]


def class_attributes(name, kind):
    """Yield the attributes of a class that hold data."""
    for attribute, value in list(NAMESPACE(kind).items()):
        if type(attribute) is str and not attribute.startswith("__") and is_data(value):
            yield "{}.{}".format(name, attribute), value


def is_data(value):
    """Tell whether a value may hold data, and is neither code nor a class nor a module."""
    return type(value) not in NOT_DATA and not is_class(value)


def outputs(namespace):
    """Yield the results that IPython keeps: ``Out[3]``."""
    history = namespace.get("_oh")
    if type(history) is not dict:
        return
    for number in list(history)[-MOST_OUTPUTS:]:
        if type(number) is int and number in history:
            yield "Out[{}]".format(number), history[number]


def figures():
    """Yield the open figures of pyplot as a single holder, because each alone is small."""
    helpers = sys.modules.get("matplotlib._pylab_helpers")
    managers = getattr(getattr(helpers, "Gcf", None), "figs", None)
    if managers:
        canvases = [getattr(manager, "canvas", None) for manager in managers.values()]
        yield "pyplot figures", [getattr(canvas, "figure", canvas) for canvas in canvases]


def tracebacks():
    """Yield the frames that the last shown traceback keeps alive."""
    entry = getattr(sys, "last_traceback", None)
    while entry is not None and type(entry) is types.TracebackType:
        frame = entry.tb_frame
        name = frame.f_code.co_name
        if frame.f_locals is not frame.f_globals and not name.startswith("<module"):
            yield "{}() in the last traceback".format(name[:60]), frame
        entry = entry.tb_next


class Modules:
    """The modules that the notebook imported: its own ones and, separately, the installed ones.

    Each module is examined only once: there may be thousands.
    """

    def __init__(self):
        self.count = len(sys.modules)
        self.own = []
        self.installed = []

    def update(self):
        """Add the modules imported since the last update, to ``own`` or to ``installed``."""
        fresh = list(itertools.islice(sys.modules.items(), self.count, self.count + MOST_MODULES))
        self.count = len(sys.modules)
        for name, module in fresh:
            if type(name) is str and type(module) is types.ModuleType:
                (self.installed if is_installed(module) else self.own).append((name, module))

    def variables(self, modules):
        """Yield the global variables of modules."""
        for name, module in modules:
            for attribute, value in list(vars(module).items()):
                if type(attribute) is str and attribute[:2] != "__" and is_data(value):
                    yield "{}.{}".format(name, attribute), value


def is_installed(module):
    """Tell whether a module belongs to Python or to an installed package."""
    path = vars(module).get("__file__")
    if type(path) is not str:
        return True
    return (
        path.startswith(sys.prefix)
        or path.startswith(sys.base_prefix)
        or ("site-packages" in path or "dist-packages" in path)
    )


def local_variables(main, namespace):
    """Yield the local variables of the notebook's running functions, the main thread's first.

    Before Python 3.13 a frame keeps a copy of its local variables once they were read.
    """
    frames = sys._current_frames()
    for thread in sorted(frames, key=lambda thread: thread != main):
        frame = frames[thread]
        while frame is not None:
            code, is_own = frame.f_code, frame.f_globals is namespace
            if code.co_flags & NEW_LOCALS and (is_own or thread == main):
                for name, value in list(frame.f_locals.items()):
                    if is_data(value):
                        yield "{} in {}()".format(name, code.co_name[:60]), value
            elif is_own:
                break
            frame = frame.f_back


class Unreached(list):
    """Objects of one class that no holder refers to."""


def unreached(walk):
    """Yield, for each class of the notebook, the objects that no other holder refers to.

    Such objects refer to each other and wait for the garbage collector, which may be disabled.
    """
    # The system knows no smaller bound for the number of objects.
    if sys.getallocatedblocks() > MOST_BLOCKS:
        return
    objects = gc.get_objects()
    own = {kind for kind in set(map(type, objects)) if MODULE(kind) == "__main__"}
    by_class = {kind: Unreached() for kind in own if type not in BASES(kind)}
    for thing in [thing for thing in objects if type(thing) in own]:
        if id(thing) not in walk.visited and type(thing) in by_class:
            walk.tick()
            by_class[type(thing)].append(thing)
    for kind, things in by_class.items():
        if things:
            yield "{} objects without a variable".format(type_name(kind)), things
