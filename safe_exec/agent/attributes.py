"""The attributes of an exception that a cell raised: error numbers, file names, modules, variables.

Its text is for people and is worded differently by each library; these say the same thing exactly. Nothing here calls code of the exception's
class: a class may define properties of its own, and what they do would change the notebook.
"""

import builtins
import os
import sys

# Since Python 3.11.
GROUP = getattr(builtins, "BaseExceptionGroup", None)
MOST_ERRORS = 6
MOST_PARTS = 3
MOST_TEXT = 1000
MOST_PATHS = 60
MOST_PATH = 400
# The methods of `os.environ` that raise KeyError.
ENVIRON = ("__getitem__", "__delitem__")


def tell_attributes(inside, error):
    """Tell the attributes of an error that the cell raised or showed; once, since files are opened to show it."""
    if issubclass(type(error), BaseException) and id(error) != inside.told_error:
        inside.told_error = id(
            error
        )  # not the error itself: that would lengthen the lives of all in its frames
        inside.fact(
            raised=attributes_of(inside, error), cell=inside.page.cell, **surroundings(inside)
        )


def attributes_of(inside, error):
    """The exception and those that it came from (``__cause__``, ``__context__``, the parts of a group), the raised one first."""
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
    """``remote``: it was only being handled when the next one was raised, and need not be what that one came from."""
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
    """Whether ``os.environ[...]`` raised it: another dictionary's key may have the same name."""
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
    """A file name as text; ``None`` for what is none."""
    if type(value) is bytes:
        return os.fsdecode(value)[:MOST_TEXT]
    pure = getattr(sys.modules.get("pathlib"), "PurePath", None)
    if pure is not None and issubclass(type(value), pure):
        return pure.__str__(value)[:MOST_TEXT]
    return _text(value)


def note_file(inside, event, args):
    """Note from an audit event what is opened: a refusal does not always say of which file, and never whether it was to be written.

    Only plain text is kept: to hold an object of the notebook's would lengthen its life.
    """
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
    """Where names that are not absolute were looked for: the working directory, ``sys.path`` and ``PATH`` as the cell has left them.

    And the database that was opened last, and the address that was connected to.
    """
    try:
        folder = os.getcwd()
    except OSError:
        # It was removed.
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
    """Whether a file was last opened to be written, ``None`` where that is not known."""
    for event, args in reversed(inside.opened):
        if args[0] == name:
            flags = os.O_CREAT if event == "os.mkdir" else args[2]
            return type(flags) is int and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return None


def _user_site():
    """The user's own packages, where they count: the directory is missing from ``sys.path`` if it is not there."""
    site = sys.modules.get("site")
    return [site.USER_SITE] if getattr(site, "ENABLE_USER_SITE", False) else []
