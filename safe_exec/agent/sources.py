"""Maps lines of compiled code to the lines of their cell. Pure.

IPython does not compile a cell as it is written. It removes leading blank lines, prompts and
indentation, and turns magics and shell commands into calls, joining continued lines. A cell magic
gets the rest of the cell as text and may run it in any way: through ``run_cell``, ``compile``,
``exec``, or wrapped in code of its own. Code is therefore found in its cell by its text, and no
magic needs to be known by name.

A *line map* is a list of ``[code line, cell line]``. From the code line on, both lines count up
together; cell line 0 means that nothing is known from there on.
"""

import re
from bisect import bisect_right

_PROMPT = re.compile(r"\s*(?:>>>(?: |$)|\.\.\.(?: |$)|In \[\d+\]: |\.{3,}: ?)")
_SPECIAL = re.compile(r"[%!?,;/]|.*\?$|.*=\s*[%!]")
_CALL = "get_ipython()."
# The next line that both texts have is looked for this many lines ahead.
WINDOW = 200


def line_of(line_map, line):
    """Return the cell line of a code line; 0 if it is unknown."""
    at = bisect_right(line_map, [line, 1 << 62]) - 1
    if at < 0 or not line_map[at][1]:
        return 0
    return line_map[at][1] + line - line_map[at][0]


def map_cell(cell, code):
    """Return the line map of code that IPython made from a whole cell.

    ``None`` for another text.
    """
    if cell.rstrip() == code.rstrip():
        return [[1, 1], [len(cell.splitlines()) + 1, 0]]
    lines, code_lines = cell.splitlines(), code.splitlines()
    targets, matches = _pair(lines, code_lines)
    if not matches and len(lines) != len(code_lines) and any(code_lines):
        return None
    return _compressed(targets, 0)


def map_body(cell, code):
    """Return the line map of code that a cell magic made from its body; ``None`` for other code.

    Code is taken to be made from the body if at least half of its lines are lines of the body, or
    if it contains every line of the body.
    """
    lines = cell.splitlines()
    start = next((number for number, line in enumerate(lines) if line.strip()), 0)
    if start >= len(lines) or not _bare(lines[start]).startswith("%%"):
        return None
    body, code_lines = lines[start + 1 :], code.splitlines()
    targets, matches = _pair(body, code_lines)
    written = sum(1 for line in code_lines if line.strip())
    is_whole_body = matches > 1 and matches == sum(1 for line in body if line.strip())
    if not matches or (2 * matches < written and not is_whole_body):
        return None
    return _compressed(targets, start + 1)


def _bare(line):
    """Return a line without indentation and without the prompt of a copied session."""
    return _PROMPT.sub("", line, count=1).strip()


def _pair(lines, code_lines):
    """Return for each code line the index of its text line, and the number of sure matches."""
    # Both are traversed together. After a difference, the traversal continues at the nearest common
    # line.
    bare, code = [_bare(line) for line in lines], [_bare(line) for line in code_lines]
    places = {}
    for number, line in enumerate(code):
        if line:
            places.setdefault(line, []).append(number)
    targets, matches, at = [], 0, 0
    while len(targets) < len(code) and at < len(bare):
        code_at = len(targets)
        if bare[at] == code[code_at]:
            matches += bool(bare[at])
            targets.append(at)
            at += 1
        elif not bare[at]:
            at += 1
        elif not code[code_at]:
            targets.append(None)
        elif _CALL in code[code_at] and _SPECIAL.match(bare[at]):
            matches += 1
            targets.append(at)
            while at < len(bare) - 1 and lines[at].endswith("\\"):
                at += 1
            at += 1
        else:
            skipped, extra = _next_common(bare, code, places, at, code_at)
            targets += [
                at + n if n < skipped else at + skipped - 1 if skipped else None
                for n in range(extra)
            ]
            at += skipped
    return targets + [None] * (len(code) - len(targets)), matches


def _next_common(bare, code, places, at, code_at):
    """Return how many lines of text and of code to skip to the next common line."""
    best = None
    for skipped in range(min(WINDOW, len(bare) - at)):
        line = bare[at + skipped]
        if best is not None and skipped >= sum(best):
            break
        candidates = places.get(line, ()) if line else ()
        index = bisect_right(candidates, code_at - 1)
        if index < len(candidates) and (
            best is None or skipped + candidates[index] - code_at < sum(best)
        ):
            best = (skipped, candidates[index] - code_at)
    if best is not None:
        return best
    # Nothing in common from here on: a transformer that keeps lines leaves as many as there were.
    remaining = len(code) - code_at
    return (remaining, remaining) if remaining == len(bare) - at else (len(bare) - at, 0)


def _compressed(targets, offset):
    """Return the line map; ``targets`` has the index of the text line for each code line."""
    line_map = []
    for number, target in enumerate([*targets, None], 1):
        line = 0 if target is None else target + offset + 1
        expected = 0
        if line_map:
            first, mapped = line_map[-1]
            expected = mapped and mapped + number - first
        if not line_map or line != expected:
            line_map.append([number, line])
    return line_map
