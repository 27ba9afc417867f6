"""``dataclass`` as the standard library has it, without the time that it takes: classes are made without compiling source text.

The standard decorator writes the source of up to six methods for each class and compiles it, 0.4 ms a class: a tenth of what a small
notebook takes is spent on that, before its kernel can be started. Here the methods are functions that all classes share. What a type
checker sees is the standard decorator; what ``dataclasses.fields``, ``replace`` and ``asdict`` need is made when they first ask.
Understood are the options that are used here, and ``field`` with a default, a factory or ``repr=False``. Imports nothing of ours.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from dataclasses import asdict, dataclass, field, fields, replace
    from typing import Any
else:

    def dataclass(*, frozen: bool = False, kw_only: bool = False, slots: bool = False) -> Any:
        """Make a class a record of what it annotates: ``__init__``, ``==``, ``repr``, and a hash if it is frozen."""

        def made(cls: Any) -> Any:
            return _record(cls, frozen=frozen, kw_only=kw_only, slots=slots)

        return made

    def field(*, default: Any = None, default_factory: Any = None, repr: bool = True) -> Any:  # noqa: A002 - as dataclasses calls it
        """What stands for an attribute where its default alone does not say enough."""
        given = _Factory(default_factory) if default_factory is not None else default
        return _Told(default=given, shown=repr)

    def fields(record: Any) -> Any:
        """The attributes of a record or its class, in their order, each with its ``name``."""
        return record.__record_fields__

    def replace(record: Any, /, **changes: Any) -> Any:
        """A record like this one but for the changes."""
        for attribute in record.__record_fields__:
            if attribute.name not in changes:
                changes[attribute.name] = getattr(record, attribute.name)
        return record.__class__(**changes)

    def asdict(record: Any) -> Any:
        """A record as a dict, and the records in it too."""
        return {
            attribute.name: _plain(getattr(record, attribute.name))
            for attribute in record.__record_fields__
        }


__all__ = ["asdict", "dataclass", "field", "fields", "replace"]


def _plain(value: Any) -> Any:
    if hasattr(type(value), "__record_fields__"):
        return asdict(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value


class _Missing:
    """There is no default."""


class _Factory:
    """What makes a default."""

    def __init__(self, make: Any) -> None:
        self.make = make


class _Told:
    """What ``field`` was told."""

    def __init__(self, *, default: Any, shown: bool) -> None:
        self.default, self.shown = default, shown


class _Attribute:
    """An attribute of a record."""

    def __init__(self, *, name: str, annotation: Any, default: Any, shown: bool) -> None:
        self.name, self.annotation, self.default, self.shown = name, annotation, default, shown


class _Lazy:
    """An attribute of a class that is made when somebody first asks for it."""

    def __init__(self, name: str, make: Any) -> None:
        self.name, self.make = name, make

    def __get__(self, _instance: Any, owner: Any) -> Any:
        made = self.make(owner)
        setattr(owner, self.name, made)
        return made


def _record(made: Any, *, frozen: bool, kw_only: bool, slots: bool) -> Any:
    cls: Any = made
    known = {
        a.name: a
        for base in reversed(cls.__mro__[1:])
        for a in base.__dict__.get("__record_fields__", ())
    }
    own = _own_attributes(cls)
    attributes = tuple({**known, **own}.values())
    if slots:
        cls = _with_slots(cls, own, [name for name in own if name not in known])
    else:
        for name, attribute in own.items():
            _put_default(cls, name, attribute.default)
    body = {
        "__record_fields__": attributes,
        "__match_args__": () if kw_only else tuple(a.name for a in attributes),
        "__dataclass_fields__": _Lazy("__dataclass_fields__", _dataclass_fields),
        "__signature__": _Lazy("__signature__", lambda owner: _signature(owner, kw_only=kw_only)),
        "__init__": _init(cls, attributes, kw_only=kw_only),
        **(_FROZEN if frozen else {}),
    }
    for name, value in body.items():
        setattr(cls, name, value)
    for name, value in {
        "__repr__": _repr,
        "__eq__": _eq,
        "__hash__": _hash if frozen else None,
    }.items():
        if cls.__dict__.get(name) is None:
            setattr(cls, name, value)
    return cls


def _own_attributes(cls: Any) -> dict[str, _Attribute]:
    """What the class itself annotates."""
    found = {}
    for name, annotation in cls.__annotations__.items():
        if str(annotation).startswith("ClassVar"):
            continue
        told = cls.__dict__.get(name, _Missing)
        shown = told.shown if isinstance(told, _Told) else True
        default = told.default if isinstance(told, _Told) else told
        found[name] = _Attribute(name=name, annotation=annotation, default=default, shown=shown)
    return found


def _with_slots(cls: Any, own: dict[str, _Attribute], fresh: list[str]) -> Any:
    """The class once more, with slots: they are made with a class or not at all."""
    body = {
        name: value
        for name, value in cls.__dict__.items()
        if name not in own and name not in ("__dict__", "__weakref__")
    }
    return type(cls)(
        cls.__name__,
        cls.__bases__,
        {**body, "__slots__": tuple(fresh), "__qualname__": cls.__qualname__},
    )


def _put_default(cls: Any, name: str, default: Any) -> None:
    if default is _Missing or isinstance(default, _Factory):
        if name in cls.__dict__:
            delattr(cls, name)
    else:
        setattr(cls, name, default)


def _init(cls: Any, attributes: tuple[_Attribute, ...], *, kw_only: bool) -> Any:
    put = object.__setattr__
    spec = [(a.name, _setter(cls, a.name), a.default) for a in attributes]
    names = [] if kw_only else [a.name for a in attributes]
    after = hasattr(cls, "__post_init__")

    def __init__(self: Any, *values: Any, **given: Any) -> None:  # noqa: N807 - it is one
        if values:
            _name(cls, values, names, given)
        take = given.pop
        for name, put_slot, default in spec:
            value = take(name, default)
            if value is _Missing:
                raise TypeError(f"{cls.__qualname__}: {name!r} is missing")
            if value.__class__ is _Factory:
                value = value.make()
            if put_slot is None:
                put(self, name, value)
            else:
                put_slot(self, value)
        if given:
            raise TypeError(f"{cls.__qualname__}() knows no {next(iter(given))!r}")
        if after:
            self.__post_init__()

    __init__.__qualname__ = f"{cls.__qualname__}.__init__"
    return __init__


def _name(cls: Any, values: tuple[Any, ...], names: list[str], given: dict[str, Any]) -> None:
    """Put values that came without their names to those that came with them."""
    if len(values) > len(names):
        raise TypeError(
            f"{cls.__qualname__}() takes {len(names)} values without a name, {len(values)} were given"
        )
    for name, value in zip(names, values, strict=False):
        if name in given:
            raise TypeError(f"{cls.__qualname__}() got more than one value for {name!r}")
        given[name] = value


def _setter(cls: Any, name: str) -> Any:
    """How a slot is filled whatever the class says of setting attributes; ``None`` where it is no slot."""
    slot: Any = getattr(cls, name, None)
    return slot.__set__ if type(slot).__name__ == "member_descriptor" else None


def _values(record: Any) -> tuple[Any, ...]:
    return tuple([getattr(record, a.name) for a in record.__record_fields__])


def _repr(self: Any) -> str:
    shown = ", ".join(
        f"{a.name}={getattr(self, a.name)!r}" for a in self.__record_fields__ if a.shown
    )
    return f"{type(self).__qualname__}({shown})"


def _eq(self: Any, other: object) -> Any:
    return _values(self) == _values(other) if other.__class__ is self.__class__ else NotImplemented


def _hash(self: Any) -> int:
    return hash(_values(self))


def _refuse(self: Any, name: str, *_: object) -> None:
    from dataclasses import FrozenInstanceError

    raise FrozenInstanceError(
        f"{type(self).__qualname__}.{name} cannot be changed: replace() makes another record"
    )


def _state(self: Any) -> list[Any]:
    return list(_values(self))


def _restore(self: Any, state: list[Any]) -> None:
    for attribute, value in zip(self.__record_fields__, state, strict=True):
        object.__setattr__(self, attribute.name, value)


_FROZEN = {
    "__setattr__": _refuse,
    "__delattr__": _refuse,
    "__getstate__": _state,
    "__setstate__": _restore,
}


def _dataclass_fields(cls: Any) -> dict[str, Any]:
    """What the functions of ``dataclasses`` look at."""
    import dataclasses

    found = {}
    for attribute in cls.__record_fields__:
        default = attribute.default
        if default is _Missing:
            made = dataclasses.field(repr=attribute.shown)
        elif isinstance(default, _Factory):
            made = dataclasses.field(default_factory=default.make, repr=attribute.shown)
        else:
            made = dataclasses.field(default=default, repr=attribute.shown)
        made.name, made.type = attribute.name, attribute.annotation
        made._field_type = dataclasses._FIELD  # type: ignore[attr-defined]  # noqa: SLF001 - fields() looks for it
        found[attribute.name] = made
    return found


def _signature(cls: Any, *, kw_only: bool) -> Any:
    """For help, editors and whoever else asks what a class takes."""
    import inspect

    kind = inspect.Parameter.KEYWORD_ONLY if kw_only else inspect.Parameter.POSITIONAL_OR_KEYWORD
    empty = inspect.Parameter.empty
    parameters = []
    for a in cls.__record_fields__:
        default = (
            empty
            if a.default is _Missing
            else a.default.make
            if isinstance(a.default, _Factory)
            else a.default
        )
        parameters.append(inspect.Parameter(a.name, kind, default=default, annotation=a.annotation))
    return inspect.Signature(parameters)
