"""Describes the content of a variable in a few words, without calling code of the notebook."""

import collections
import functools
import gc
import sys
import types

from .holders import Unreached
from .object_sizes import BASES, SEQUENCES, SETS, evenly, first_elements, type_name

# The elements that a description looks at.
MOST_LOOKED_AT = 200
MIB = 1 << 20


def describe(thing, object_bytes=0):
    """Return a type's name and the content: ``("dict", "dict of 3 bytearray")``."""
    kind = type(thing)
    name = type_name(kind)
    if kind is Unreached:
        state = "" if gc.isenabled() else ", and garbage collection is off"
        return type_name(type(thing[0])), "{:,} objects that refer to each other{}".format(
            len(thing), state
        )
    try:
        return name, content(thing, kind, name, object_bytes)[:200]
    except Exception:
        # Another thread changed it, or a library has other attributes than we know.
        return name, name


def content(thing, kind, name, object_bytes):
    """Return the description of an object."""
    bases = BASES(kind)
    for library, function in LIBRARIES.items():
        module = sys.modules.get(library)
        text = function(module, thing, kind, bases, object_bytes) if module is not None else ""
        if text:
            return text
    if dict in bases:
        total = dict.__len__(thing)
        values = first_elements(iter(dict.values(thing)), total, MOST_LOOKED_AT)
        return "{} of {}".format(name, counted(total, values))
    for base in (*SEQUENCES, *SETS):
        if base in bases:
            total = base.__len__(thing)
            if base in SEQUENCES:
                item = base.__getitem__
                elements = [item(thing, at) for at in evenly(total, MOST_LOOKED_AT)]
            else:
                elements = first_elements(base.__iter__(thing), total, MOST_LOOKED_AT)
            return "{} of {}".format(name, counted(total, elements))
    if kind is types.FrameType:
        return "local variables of {}()".format(thing.f_code.co_name)
    if kind is functools._lru_cache_wrapper:
        size = functools._lru_cache_wrapper.cache_info(thing).currsize
        return "lru_cache of {:,} results".format(size)
    if kind is types.GeneratorType:
        return "generator {}()".format(thing.__name__)
    if kind is str:
        return "str of {:,} characters".format(len(thing))
    return name


def counted(total, elements):
    """Return a number of elements with their type: ``3 bytearray``, ``7 objects``."""
    kinds = collections.Counter(map(type, elements)).most_common(2)
    if not kinds:
        return "0"
    noun = type_name(kinds[0][0]) if len(kinds) == 1 else "objects"
    return "{:,} {}".format(total, noun)


def shape_text(shape):
    """Return a shape as ``1,000 x 14``."""
    return " x ".join("{:,}".format(size) for size in shape) or "scalar"


def of_numpy(numpy, thing, _kind, bases, _object_bytes):
    """Describe an array."""
    array = numpy.ndarray
    if array not in bases:
        return ""
    shape = array.__dict__["shape"].__get__(thing)
    dtype = array.__dict__["dtype"].__get__(thing)
    return "{} {} {}".format(type_name(type(thing)), shape_text(shape), dtype)


def of_pandas(pandas, thing, kind, _bases, object_bytes):
    """Describe a table or a column of pandas.

    Subclasses are left out, since they may run any code.
    """
    if kind is pandas.DataFrame:
        text = "DataFrame {}".format(shape_text(thing.shape))
        if object_bytes >= MIB:
            text += ", object columns {:,} MiB".format(object_bytes // MIB)
        return text
    if kind is pandas.Series:
        return "Series of {:,} {}".format(thing.shape[0], thing.dtype)
    return ""


LIBRARIES = {"numpy": of_numpy, "pandas": of_pandas}
