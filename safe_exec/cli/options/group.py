"""Make a typed group of options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeAlias

from msgspec import Struct

Decorator: TypeAlias = Callable[[Any], Any]


def option_group(name: str, group: type[Struct], options: Sequence[Decorator]) -> Decorator:
    """Return a decorator that adds the options and passes them on as one value.

    The command gets a ``group`` as its argument ``name``; each field has the value of the option of
    this name. A group may contain other groups.
    """
    return collected(name, options, group.__struct_fields__, lambda values: group(**values))


def collected(
    name: str,
    options: Sequence[Decorator],
    fields: Sequence[str],
    collect: Callable[[dict[str, Any]], object],
) -> Decorator:
    """Return a decorator that adds the options and passes ``collect(values)`` as ``name``."""

    def decorate(function: Any) -> Any:
        # The copy keeps the help text and click's list of the options so far.
        @wraps(function)
        def call(**values: Any) -> Any:
            own = {field: values.pop(field) for field in fields}
            return function(**values, **{name: collect(own)})

        decorated: Any = call
        # Decorators apply from the inside out, so the last option is added first.
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return decorate
