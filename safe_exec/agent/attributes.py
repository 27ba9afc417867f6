"""Reads the attributes of a cell's exception: error numbers, file names, modules, variables.

An exception's text is meant for people, and each library words it differently; the attributes say
the same exactly. Nothing here calls code of the exception's class: it may define properties of its
own, and their effects would change the notebook.
"""

import builtins
import os
import sys

# Since Python 3.11.
GROUP = getattr(builtins, "BaseExceptionGroup", None)
# A fact is one datagram, so the report must stay small.
MOST_ERRORS = 6
MOST_PARTS = 3
MOST_TEXT = 1000
MOST_PATHS = 60
MOST_PATH = 400
# The methods of `os.environ` that raise KeyError.
ENVIRON = ("__getitem__", "__delitem__")


def tell_attributes(inside, error):
    """Report the attributes of an error that the cell raised or displayed.

    Each error is reported once, since displaying it opens files.
    """
    if issubclass(type(error), BaseException) and id(error) != inside.told_error:
        inside.told_error = id(
            error
        )  # not the error itself: that would lengthen the lives of all in its frames
        inside.fact(
            raised=attributes_of(inside, error), cell=inside.page.cell, **surroundings(inside)
        )


def attributes_of(inside, error):
    """Return the attributes of an error, then those of its causes, contexts and group members."""
    rows, visited, waiting = [], set(), [(error, False)]
    while waiting and len(rows) < MOST_ERRORS:
        current, remote = waiting.pop(0)
        if current is None or id(current) in visited:
            continue
        visited.add(id(current))
        rows.append(_row(inside, current, remote))
        waiting.append((BaseException.__cause__.__get__(current), remote))
        waiting.append((BaseException.__context__.__get__(current), True))
        if GROUP is not None and issubclass(type(current), GROUP):
            waiting.extend(
                (part, remote) for part in GROUP.exceptions.__get__(current)[:MOST_PARTS]
            )
    return rows


def _row(inside, error, remote):
    """Return one exception's attributes.

    ``remote`` is true for a context: an exception that was being handled when another one was
    raised.
    """
    kind = type(error)
    row = {"type": kind.__name__, "remote": remote}
    if issubclass(kind, OSError):
        row["errno"] = _number(OSError.errno.__get__(error))
        names = [
            path_text(name)
            for name in (OSError.filename.__get__(error), OSError.filename2.__get__(error))
        ]
        row["files"] = [name for name in names if name]
        row["writes"] = is_written(inside, row["files"][0]) if row["files"] else None
    elif issubclass(kind, ImportError):
        row["module"] = _text(ImportError.name.__get__(error))
    elif issubclass(kind, KeyError) and _is_of_environ(error):
        arguments = BaseException.args.__get__(error)
        row["variable"] = _text(arguments[0]) if arguments else None
    return row


def _is_of_environ(error):
    """Tell whether ``os.environ[...]`` raised a KeyError.

    Other dictionaries may have a key of the same name.
    """
    entry, code = BaseException.__traceback__.__get__(error), None
    while entry is not None:
        code, entry = entry.tb_frame.f_code, entry.tb_next
    return (
        code is not None
        and code.co_filename == os._Environ.__getitem__.__code__.co_filename
        and code.co_name in ENVIRON
    )


def _number(value):
    return value if type(value) is int else None


def _text(value):
    return value[:MOST_TEXT] if type(value) is str else None


def path_text(value):
    """Return a file name as text; ``None`` for any other value."""
    if type(value) is bytes:
        return os.fsdecode(value)[:MOST_TEXT]
    pure = getattr(sys.modules.get("pathlib"), "PurePath", None)
    if pure is not None and issubclass(type(value), pure):
        return pure.__str__(value)[:MOST_TEXT]
    return _text(value)


def note_file(inside, event, args):
    """Record the file, the database or the address that an audit event names."""
    # An error does not always name its file, and never tells whether it was to be written. Only
    # plain text is kept: a reference to a notebook's object would extend its life.
    if event == "sqlite3.connect":
        inside.database = path_text(args[0])
    elif event == "socket.getaddrinfo":
        inside.dialled, inside.dialled_port = path_text(args[0]), _number(args[1])
    elif event == "socket.connect":
        address = args[1]
        host = address[0] if type(address) is tuple and address else address
        inside.dialled = path_text(host)
        has_port = type(address) is tuple and len(address) > 1
        inside.dialled_port = _number(address[1]) if has_port else None
    elif type(args[0]) is str:
        inside.opened.append((event, args))


def surroundings(inside):
    """Return the paths by which the cell's relative names were looked up.

    These are the working directory, ``sys.path`` and ``PATH`` at the end of the cell, the database
    that was opened last, and the address that was connected to last.
    """
    try:
        folder = os.getcwd()
    except OSError:
        # The working directory was removed.
        folder = None
    return {
        "cwd": folder,
        "sys_path": [
            part[:MOST_PATH]
            for part in [*sys.path[:MOST_PATHS], *_user_site()]
            if type(part) is str
        ],
        "search": os.environ.get("PATH", "")[: 4 * MOST_TEXT],
        "database": inside.database,
        "dialled": inside.dialled,
        "dialled_port": inside.dialled_port,
    }


def is_written(inside, name):
    """Tell whether a file was last opened for writing; ``None`` if unknown."""
    for event, args in reversed(inside.opened):
        if args[0] == name:
            flags = os.O_CREAT if event == "os.mkdir" else args[2]
            return type(flags) is int and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return None


def _user_site():
    """Return the user's package directory, which ``sys.path`` lacks if it does not exist."""
    site = sys.modules.get("site")
    return [site.USER_SITE] if getattr(site, "ENABLE_USER_SITE", False) else []
