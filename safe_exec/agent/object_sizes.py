"""Measures the memory of objects without calling any code of the notebook.

Python-defined ``__sizeof__``, ``__len__``, ``__repr__``, properties and metaclasses are never used:
types are read through descriptors of ``type``, contents through the C methods of the built-in base
class, and all other references through ``gc.get_referents``. A large container is not traversed;
some of its elements, evenly spaced, stand for all of them, and the result is marked as an estimate.
"""

import array
import collections
import functools
import gc
import itertools
import mmap
import os
import sys
import time
import types

# The C getters of `type`: a metaclass cannot override them.
BASES = type.__dict__["__mro__"].__get__
NAMESPACE = type.__dict__["__dict__"].__get__
FLAGS = type.__dict__["__flags__"].__get__
NAME = type.__dict__["__name__"].__get__
MODULE = type.__dict__["__module__"].__get__
HEAP_TYPE = 1 << 9
GC_HEADER_BYTES = 16
# `malloc` and Python's own allocator round up to this.
ALIGNMENT = 16

# Their values hold nothing else, and `sys.getsizeof` of them runs no Python code.
ATOMS = frozenset((int, float, complex, bool, str, bytes, type(None), range, type(...)))
# What cannot be held by a variable alone: code, and what the interpreter keeps anyway.
NEVER = (
    type,
    types.ModuleType,
    types.CodeType,
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.MappingProxyType,
)
SEQUENCES = (list, tuple, collections.deque)
SETS = (set, frozenset)
# Packages whose objects lead to everything else in the kernel.
SURROUNDINGS = ("IPython", "ipykernel", "traitlets", "zmq", "tornado", "asyncio", "logging")
C_FUNCTIONS = (
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.BuiltinFunctionType,
)
# A buffer from this size on may be memory that was never written to, and so does not exist.
LEAST_SPARSE_BYTES = 8 << 20
RESIDENCY_PROBES = 64
PRESENT_OR_SWAPPED = 3 << 62
PAGE_BYTES = mmap.PAGESIZE
# Objects with a memory of their own from this size on are remembered, so that each counts once.
LEAST_SHARED_BYTES = 512
# 16 MiB bound the census; an id in a set takes about 100 bytes.
MOST_OBJECTS = 60000
CLOCK_EVERY = 64
# The objects that stand for all of a holder's; a small container is counted in full.
LEAST_SAMPLES = 32
MOST_SAMPLES = 40000
SAMPLES_PER_SECOND = 100000


class OutOfTime(Exception):
    """The budget of a census is used up."""


def bases_of(thing):
    """Return the bases of an object's real type; ``__class__`` may lie."""
    return BASES(type(thing))


def type_name(kind):
    """Return the name of a type, at most 100 characters of it."""
    return NAME(kind)[:100]


def module_name(kind):
    """Return the module name of a type, empty if it is not a string."""
    module = MODULE(kind)
    return module if type(module) is str else ""


def rounded(size):
    """Round the size of an object up to the allocator's unit."""
    return (size + ALIGNMENT - 1) & -ALIGNMENT


def atom_bytes(thing):
    """Return the size of an object that refers to no others, as its allocator rounds it."""
    return rounded(sys.getsizeof(thing))


@functools.lru_cache(maxsize=2000)
def size_method(kind):
    """Return the C implementation of ``__sizeof__`` of a type; a Python function is skipped."""
    for base in BASES(kind):
        method = NAMESPACE(base).get("__sizeof__")
        if method is not None and isinstance_exact(method, C_FUNCTIONS):
            return method
    return object.__sizeof__


def isinstance_exact(thing, kinds):
    """Whether an object's type is one of several; subclasses do not count."""
    return type(thing) in kinds


def shallow_bytes(thing):
    """Return the bytes of an object alone, without the objects that it refers to."""
    kind = type(thing)
    try:
        size = size_method(kind)(thing)
    except Exception:
        # A type that is not initialised, or a method for another type.
        size = object.__sizeof__(thing)
    if type(size) is not int or not 0 <= size < 1 << 48:
        size = object.__sizeof__(thing)
    return rounded(size + GC_HEADER_BYTES * gc.is_tracked(thing))


class Residency:
    """Tells which part of a buffer is in memory: ``numpy.zeros`` takes none before a write.

    Source: Documentation/admin-guide/mm/pagemap.rst; the bits "present" and "swapped" need no
    privilege.
    """

    def __init__(self):
        try:
            self.fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self.fd = None

    def resident(self, address, size):
        """Return an estimate of the bytes of a buffer that are in memory."""
        if size < LEAST_SPARSE_BYTES or self.fd is None:
            return size
        first, pages = address // PAGE_BYTES, size // PAGE_BYTES
        present = 0
        for probe in range(RESIDENCY_PROBES):
            page = first + (2 * probe + 1) * pages // (2 * RESIDENCY_PROBES)
            try:
                entry = os.pread(self.fd, 8, page * 8)
            except (OSError, OverflowError):
                return size
            present += (
                len(entry) == 8 and int.from_bytes(entry, sys.byteorder) & (PRESENT_OR_SWAPPED) != 0
            )
        return size * present // RESIDENCY_PROBES


class Part:
    """A sampled object.

    ``weight`` is the number of objects that it stands for; ``allowance`` limits the number of its
    elements that are sampled.
    """

    __slots__ = ("allowance", "weight")

    def __init__(self, weight, allowance):
        self.weight = weight
        self.allowance = max(allowance, LEAST_SAMPLES)


class Walk:
    """Adds up the memory of objects. Each object and each buffer counts once in a walk."""

    def __init__(self, residency, seconds, handlers, skipped=()):
        self.residency = residency
        # Other processes and threads may take most of the time that passes.
        self.clock = time.thread_time
        self.deadline = self.clock() + seconds
        # What belongs to somebody else: namespaces, other variables' own values.
        self.visited = set(skipped)
        self.owners = {}
        self.ticks = 0
        self.most_objects = MOST_OBJECTS
        # Every object was counted, and none stood for others.
        self.exact = True
        self.object_bytes = 0
        # The sum over all holders so far.
        self.total = 0
        self.handlers = handlers

    def tick(self):
        """Count an object. Raises OutOfTime."""
        self.ticks += 1
        if not self.ticks % CLOCK_EVERY and (
            self.clock() > self.deadline or len(self.visited) > self.most_objects
        ):
            self.exact = False
            raise OutOfTime

    def measure(self, thing, name=None):
        """Return the bytes that an object holds and that were not counted before.

        An object that a variable other than ``name`` holds is counted for that variable. Raises
        OutOfTime; ``partial`` then holds the bytes so far.
        """
        self.partial = 0.0
        self.object_bytes = 0
        waiting = [(thing, 1.0, self.allowance())]
        while waiting:
            current, weight, allowance = waiting.pop()
            kind = type(current)
            if kind in ATOMS:
                size = atom_bytes(current)
                if size >= LEAST_SHARED_BYTES and not self.is_new(current, name):
                    continue
                if kind is bytes:
                    size = self.residency.resident(id(current) + 32, size)
                self.partial += size * weight
                continue
            self.tick()
            if not self.is_new(current, name):
                continue
            handler = self.handler_of(kind)
            if handler is not None:
                handler(self, current, Part(weight, allowance), waiting)
        return int(self.partial)

    def allowance(self):
        """Return how many objects of one holder may be sampled in the remaining time."""
        remaining = self.deadline - self.clock()
        return int(min(MOST_SAMPLES, max(LEAST_SAMPLES, remaining * SAMPLES_PER_SECOND)))

    def is_new(self, thing, name):
        """Tell whether an object was not counted before, and mark it as counted."""
        key = id(thing)
        if key in self.visited or self.owners.get(key, name) != name:
            return False
        self.visited.add(key)
        return True

    def handler_of(self, kind):
        """Return the function that counts objects of a type; ``None`` if they are not counted."""
        handler = self.handlers.get(kind, kind)
        if handler is not kind:
            return handler
        handler = self.handlers[kind] = choose_handler(kind, self.handlers)
        return handler

    def add_elements(self, elements, total, part, waiting):
        """Count the elements of a container; of a large one, extrapolate from some of them."""
        count = len(elements)
        if not count:
            return
        scale = part.weight
        kinds = set(map(type, elements))
        if total > count:
            self.exact = False
            # The container holds the same few objects again and again.
            distinct = len(set(map(id, elements)))
            scale = part.weight * total / count if 2 * distinct > count else part.weight
        if kinds <= ATOMS:
            unique = {id(element): element for element in elements}.values()
            large = [e for e in unique if len(e) >= LEAST_SHARED_BYTES] if kinds <= TEXTS else ()
            if not large:
                self.ticks += count >> 3
                self.tick()
                self.partial += scale * sum(map(atom_bytes, unique))
                return
        elif count > LEAST_SAMPLES:
            # Each of them may be large itself: fewer, so that all together stay in the allowance.
            most = max(LEAST_SAMPLES, 4 * int(part.allowance**0.5))
            if count > most:
                self.exact = False
                elements = elements[:: -(-count // most)]
                scale *= count / len(elements)
        allowance = part.allowance // len(elements)
        waiting.extend((element, scale, allowance) for element in elements)

    def add(self, things, part, waiting):
        """Count the objects that an object refers to."""
        waiting.extend((thing, part.weight, part.allowance) for thing in things)

    def buffer(self, key, address, size, part):
        """Count a buffer that several objects may share."""
        if key not in self.visited:
            self.visited.add(key)
            resident = size if address is None else self.residency.resident(address, size)
            self.partial += resident * part.weight
            return resident
        return 0


TEXTS = frozenset((str, bytes))


def choose_handler(kind, handlers):
    """Choose the handler for a type."""
    bases = BASES(kind)
    for base in bases:
        if base is not object and base in handlers:
            return handlers[base]
    if any(base in NEVER for base in bases) or module_name(kind).startswith(SURROUNDINGS):
        return None
    if FLAGS(kind) & HEAP_TYPE:
        return count_instance
    return count_object


def evenly(total, most):
    """Return at most ``most`` evenly spaced positions of a sequence of ``total`` elements."""
    return range(total) if total <= most else range(0, total, -(-total // most))


def count_sequence(walk, thing, part, waiting):
    """Count a list, a tuple or a deque."""
    base = next(base for base in bases_of(thing) if base in SEQUENCES)
    walk.partial += shallow_bytes(thing) * part.weight
    total = base.__len__(thing)
    try:
        if total <= part.allowance:
            elements = list(base.__iter__(thing))
        else:
            item = base.__getitem__
            elements = [item(thing, at) for at in evenly(total, part.allowance)]
    except (IndexError, RuntimeError):
        # Another thread changes it.
        walk.exact = False
        return
    walk.add_elements(elements, total, part, waiting)
    add_attributes(walk, thing, total, part, waiting)


def first_elements(iterator, total, most):
    """Return up to ``most`` elements, evenly spaced, of something that can only be iterated."""
    if total <= most:
        return list(iterator)
    # A million steps take 10 ms: in larger ones, the first elements stand for all.
    step = total // most if total <= 1000000 else 1
    return list(itertools.islice(iterator, 0, most * step, step))


def count_set(walk, thing, part, waiting):
    """Count the elements of a set, and its table."""
    base = next(base for base in bases_of(thing) if base in SETS)
    walk.partial += shallow_bytes(thing) * part.weight
    total = base.__len__(thing)
    try:
        elements = first_elements(base.__iter__(thing), total, part.allowance)
    except RuntimeError:
        walk.exact = False
        return
    walk.add_elements(elements, total, part, waiting)


def count_dict(walk, thing, part, waiting):
    """Count a dictionary, except the namespace of a module."""
    total = dict.__len__(thing)
    if type(thing) is dict and is_namespace(thing):
        return
    walk.partial += shallow_bytes(thing) * part.weight
    most = max(32, part.allowance // 2)
    try:
        items = first_elements(dict.items(thing).__iter__(), total, most)
    except RuntimeError:
        walk.exact = False
        return
    walk.add_elements([key for key, _ in items], total, part, waiting)
    walk.add_elements([value for _, value in items], total, part, waiting)
    add_attributes(walk, thing, total, part, waiting)


def is_namespace(thing):
    """Tell whether a dictionary is the namespace of a module."""
    return "__builtins__" in thing or "__spec__" in thing


def add_attributes(walk, thing, total, part, waiting):
    """Add the attributes of an instance of a container's subclass, if it is small."""
    if FLAGS(type(thing)) & HEAP_TYPE and total < 1000:
        walk.add(gc.get_referents(thing), part, waiting)


def count_instance(walk, thing, part, waiting):
    """Count an instance of a class, with its attributes."""
    referents = gc.get_referents(thing)
    # Since Python 3.11 the values of attributes are not in a dictionary but beside the object.
    walk.partial += (shallow_bytes(thing) + 8 * len(referents)) * part.weight
    walk.add(referents, part, waiting)


def count_object(walk, thing, part, waiting):
    """Count an object of a type that is implemented in C."""
    walk.partial += shallow_bytes(thing) * part.weight
    walk.add(gc.get_referents(thing), part, waiting)


def count_function(walk, thing, part, waiting):
    """Count a function's closure, defaults and attributes, but not its globals."""
    walk.partial += shallow_bytes(thing) * part.weight
    own = [thing.__closure__, thing.__defaults__, thing.__kwdefaults__]
    own += [
        referent
        for referent in gc.get_referents(thing)
        if type(referent) is dict and referent is not thing.__globals__
    ]
    walk.add((referent for referent in own if referent is not None), part, waiting)


def count_frame(walk, thing, part, waiting):
    """Count the local variables of a frame that has ended, or of a suspended generator."""
    walk.partial += shallow_bytes(thing) * part.weight
    walk.add(
        [
            referent
            for referent in gc.get_referents(thing)
            if type(referent) is not types.FrameType
            and referent is not thing.f_globals
            and referent is not thing.f_builtins
        ],
        part,
        waiting,
    )


def count_buffer(walk, thing, part, _waiting):
    """Count an object whose ``__sizeof__`` includes its buffer."""
    walk.partial += shallow_bytes(thing) * part.weight


def count_mapping(_walk, _thing, _part, _waiting):
    """Count nothing for a file mapped into memory: the system can reclaim its pages."""


BUILT_IN = {
    list: count_sequence,
    tuple: count_sequence,
    collections.deque: count_sequence,
    set: count_set,
    frozenset: count_set,
    dict: count_dict,
    types.FunctionType: count_function,
    types.FrameType: count_frame,
    bytearray: count_buffer,
    array.array: count_buffer,
    mmap.mmap: count_mapping,
    str: count_buffer,
    bytes: count_buffer,
    int: count_buffer,
    float: count_buffer,
}
