"""YAML files of limits as plain values with their lines, and an error for every invalid file.

This is a deliberate subset of YAML: no aliases, no tags, no duplicate keys, and numbers stay text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from safe_exec.errors import LimitsError
from safe_exec.files import one_line, read_regular

if TYPE_CHECKING:
    import yaml

_MOST_BYTES = 2**20
# No honest file nests deeper. The composer in C recurses, and crashes the process at 100000 levels.
_DEEPEST = 20
_STANDARD = "tag:yaml.org,2002:"
_TAGS = frozenset(
    {"str", "int", "float", "null", "bool", "timestamp", "merge", "value", "map", "seq"}
)


class Value(Struct, frozen=True, kw_only=True):
    """A value in a YAML file, with its location."""

    data: bool | str | tuple[Value, ...] | Mapping[str, Value] | None
    # ``FILE:LINE``, from line 1. A value in a mapping has the line of its key.
    location: str

    def mapping(self, name: str) -> Mapping[str, Value]:
        """Return the mapping, empty for null. Raises LimitsError for any other type."""
        if self.data is None:
            return {}
        if isinstance(self.data, Mapping):
            return self.data
        raise LimitsError(
            f"{self.location}: {name}: expected a mapping of keys to values, found {self.kind}"
        )

    def items(self, name: str) -> tuple[Value, ...]:
        """Return the list, empty for null. Raises LimitsError for any other type."""
        if self.data is None:
            return ()
        if isinstance(self.data, tuple):
            return self.data
        raise LimitsError(f"{self.location}: {name}: expected a list, found {self.kind}")

    def text(self, name: str) -> str:
        """Return the text, stripped. Raises LimitsError for any other type and for empty text."""
        if isinstance(self.data, str) and self.data.strip():
            return self.data.strip()
        raise LimitsError(f"{self.location}: {name}: expected text, found {self.kind}")

    def words(self, name: str) -> tuple[str, ...]:
        """Return a list of texts. Raises LimitsError for any other type."""
        return tuple(item.text(name) for item in self.items(name))

    def flag(self, name: str) -> bool:
        """Return the boolean. Raises LimitsError for any other type."""
        if isinstance(self.data, bool):
            return self.data
        raise LimitsError(f"{self.location}: {name}: expected true or false, found {self.kind}")

    def scalar(self, name: str) -> bool | str | None:
        """Return a value that is neither list nor mapping. Raises LimitsError for those."""
        if self.data is None or isinstance(self.data, bool | str):
            return self.data
        raise LimitsError(f"{self.location}: {name}: expected one value, found {self.kind}")

    def plain(self) -> object:
        """Return the value without locations, and its texts stripped."""
        if isinstance(self.data, Mapping):
            return {key: value.plain() for key, value in self.data.items()}
        if isinstance(self.data, tuple):
            return [value.plain() for value in self.data]
        return self.data.strip() if isinstance(self.data, str) else self.data

    @property
    def kind(self) -> str:
        """The type in words, for an error message."""
        if self.data is None:
            return "nothing"
        if isinstance(self.data, bool):
            return "yes or no"
        if isinstance(self.data, str):
            return "text"
        return "a mapping" if isinstance(self.data, Mapping) else "a list"


def load(path: Path) -> Value:
    """Load the only document in ``path``. Raises LimitsError: one line with file and line."""
    # The import takes 30 ms, and a run that takes its limits from a verdict does not need it.
    import yaml

    try:
        # utf-8-sig: some editors begin a file with a byte order mark.
        text = read_regular(path, most=_MOST_BYTES, error=LimitsError).decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise LimitsError(f"{one_line(path)}: not UTF-8 text (byte {problem.start})") from None
    loader = _loader()
    try:
        # Checked on the stream of events, before the recursive composer sees the text.
        _demand_simple(yaml.parse(text, Loader=loader), path)
        root = yaml.compose(text, Loader=loader)
    except yaml.YAMLError as problem:
        _explain(text, path)
        raise LimitsError(_syntax_error(problem, path)) from None
    return _value(root, path, 1)


def _loader() -> Any:
    """Return PyYAML's loader in C, which is 60 times as fast, or its own if C is not usable."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", None)
    # The extension module is initialised once per process and keeps the classes of that time. After
    # sys.modules was reset (pytester does so), PyYAML has others, and no node gets a tag.
    if loader is None or not isinstance(yaml.compose("a", Loader=loader), yaml.nodes.Node):
        return yaml.SafeLoader
    return loader


def _explain(text: str, path: Path) -> None:
    """Read invalid text again with PyYAML's own parser. Raises LimitsError for an error there."""
    # libyaml's errors depend on its version: 0.2.6 gives up at 1000 levels, before it has reported
    # the first of them; older versions report each. PyYAML's own parser is slower, and its errors
    # are the same everywhere.
    import yaml

    try:
        _demand_simple(yaml.parse(text, Loader=yaml.SafeLoader), path)
        yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as problem:
        raise LimitsError(_syntax_error(problem, path)) from None


def _demand_simple(events: Iterator[Any], path: Path) -> None:
    """Refuse aliases and deep nesting. Raises LimitsError."""
    depth = 0
    for event in events:
        kind = type(event).__name__
        depth += kind.endswith("StartEvent") - kind.endswith("EndEvent")
        location = f"{one_line(path)}:{event.start_mark.line + 1}"
        # A kilobyte of nested aliases can expand to gigabytes.
        if kind == "AliasEvent":
            raise LimitsError(
                f"{location}: aliases (*{one_line(event.anchor)}) are not supported; write the value out"
            )
        if depth > _DEEPEST:
            raise LimitsError(f"{location}: nested deeper than {_DEEPEST} levels")


def _syntax_error(problem: yaml.YAMLError, path: Path) -> str:
    # Errors of the reader (an invalid character) have no mark.
    mark = getattr(problem, "problem_mark", None)
    place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
    text = getattr(problem, "problem", None) or str(problem).splitlines()[0]
    hint = "; check the indentation of this line" if "block" in text else ""
    return f"{one_line(path)}{place}: not valid YAML: {one_line(text)}{hint}"


def _value(node: Any, path: Path, line: int) -> Value:
    if node is None:
        return Value(data=None, location=f"{one_line(path)}:{line}")
    location = f"{one_line(path)}:{line}"
    kind = node.tag.removeprefix(_STANDARD)
    # A tag could change the type of a value, such as !!binary.
    if kind not in _TAGS:
        raise LimitsError(
            f"{location}: the tag {one_line(node.tag)} is not supported; write the plain value"
        )
    if node.id == "mapping":
        return Value(data=_mapping(node, path), location=location)
    if node.id == "sequence":
        return Value(
            data=tuple(_value(item, path, _line(item)) for item in node.value), location=location
        )
    return Value(data=_scalar(kind, node.value), location=location)


def _mapping(node: Any, path: Path) -> Mapping[str, Value]:
    values: dict[str, Value] = {}
    for key, item in node.value:
        location = f"{one_line(path)}:{_line(key)}"
        # YAML allows lists and mappings as keys.
        if key.id != "scalar":
            raise LimitsError(f"{location}: expected a word as key, found a {key.id}")
        # PyYAML silently keeps the last of two equal keys.
        if key.value in values:
            raise LimitsError(f"{location}: {one_line(key.value)} is given twice; keep one")
        values[key.value] = _value(item, path, _line(key))
    return values


def _scalar(kind: str, text: str) -> bool | str | None:
    if kind == "null":
        return None
    # Numbers stay text: YAML 1.1 reads 1:30 as 90, and our own parser reports it as an error.
    return text.lower() in ("yes", "true", "on") if kind == "bool" else text


def _line(node: Any) -> int:
    line: int = node.start_mark.line
    return line + 1
