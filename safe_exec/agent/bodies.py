"""Finds the code that was compiled from the body of a cell magic, in Python's audit events.

Whatever a magic does with its body, Python compiles a text and then executes a code object, and
raises an audit event each time ("compile" and "exec"). A text that ``sources.map_body`` finds in
the running cell is remembered under its file name, and the code object executed under that name
belongs to the cell. The event for a syntax tree has no file name. A tree that contains statements
of such a text, at the same positions, belongs to the cell, and so does the next executed code
object. (``%%timeit`` puts the statements into a loop of its own.)
"""

import ast
import types

from . import sources

# Different texts that are looked for in one cell; a loop that evaluates strings makes any number.
MOST_TEXTS = 200
MOST_CODES = 300


class Bodies:
    """Finds the code that was compiled from the body of the running cell's magic.

    ``names`` maps each file name under which text of the body was compiled to its line map (see
    ``sources``).
    """

    def __init__(self, inside):
        self.inside = inside
        self.cell = ""
        self.active = False
        self.names = {}
        self.texts = {}
        self.statements = {}
        self.unparsed = []
        self.tree = None

    def begin(self, cell):
        """Start a cell; only a cell with a cell magic has a body to find."""
        self.cell = cell
        self.active = "%%" in cell
        self.names, self.texts, self.statements, self.unparsed, self.tree = {}, {}, {}, [], None

    def note_compile(self, source, name):
        """Handle the event "compile": a text with its file name, or a syntax tree without one."""
        if isinstance(source, bytes):
            source = source.decode("utf-8", "replace")
        if isinstance(source, ast.AST):
            self.tree = self.map_of_tree(source)
        elif isinstance(source, str):
            line_map = self.map_of(source)
            if line_map is None:
                self.names.pop(name, None)
            else:
                self.names[name] = line_map

    def map_of_tree(self, tree):
        """Return the line map of the text whose statements a syntax tree contains, or ``None``."""
        if not self.texts:
            return None
        while self.unparsed:
            text = self.unparsed.pop()
            for place in places(parsed(text)):
                self.statements[place] = self.texts[text]
        return next(
            (self.statements[place] for place in places(tree) if place in self.statements), None
        )

    def map_of(self, text):
        """Return the line map of a text of the running cell, or ``None``."""
        if text not in self.texts:
            # A text that is much longer than the cell is something else.
            if len(self.texts) >= MOST_TEXTS or len(text) > 2 * len(self.cell) + 2000:
                return None
            self.texts[text] = sources.map_body(self.cell, text)
            if self.texts[text] is not None:
                self.unparsed.append(text)
        return self.texts[text]

    def note_exec(self, code):
        """Handle the event "exec": code that is about to run."""
        inside, name = self.inside, code.co_filename
        tree, self.tree = self.tree, None
        if id(code) in inside.codes or name in inside.files:
            return
        line_map = self.names.get(name) or tree
        if line_map is not None:
            self.names[name] = line_map
            self.register(code, line_map)

    def register(self, code, line_map):
        """Register a code object and those defined in it."""
        # References are kept, since an id is unique only while the object is alive.
        inside, waiting, rows = self.inside, [code], []
        source = Source(inside.page.cell, line_map, code)
        while waiting:
            one = waiting.pop()
            inside.codes[id(one)] = source
            rows.append((one.co_name, one.co_firstlineno, last_line(one)))
            waiting += [
                constant for constant in one.co_consts if isinstance(constant, types.CodeType)
            ]
        codes = rows if len(rows) <= MOST_CODES else None
        inside.fact(
            file=code.co_filename, cell=inside.page.cell, lines=line_map[:MOST_CODES], codes=codes
        )


class Source:
    """The origin of code: the number of its cell, and its line map."""

    __slots__ = ("cell", "code", "line_map")

    def __init__(self, cell, line_map, code=None):
        self.cell = cell
        self.line_map = line_map
        self.code = code


def parsed(text):
    """Return the syntax tree of a text; an empty one if it cannot be parsed."""
    try:
        flags = ast.PyCF_ONLY_AST | getattr(ast, "PyCF_ALLOW_TOP_LEVEL_AWAIT", 0)
        return compile(text, "<unknown>", "exec", flags, dont_inherit=True)
    except (SyntaxError, ValueError):
        return ast.Module([], [])


def places(tree):
    """Yield each statement without a body, dumped as text with its positions.

    The value of an expression statement, or of an expression tree, is yielded too.
    """
    if isinstance(tree, ast.Expression):
        yield ast.dump(tree.body, include_attributes=True)
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and not hasattr(node, "body"):
            yield ast.dump(node, include_attributes=True)
            if isinstance(node, ast.Expr):
                yield ast.dump(node.value, include_attributes=True)


def last_line(code):
    """Return the last line of a code object, without the functions and classes defined in it."""
    # Before Python 3.10.
    if not hasattr(code, "co_lines"):
        import dis

        return max((line for _, line in dis.findlinestarts(code)), default=code.co_firstlineno)
    return max((line for _, _, line in code.co_lines() if line), default=code.co_firstlineno)
