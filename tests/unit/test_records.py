"""Records are what the standard library's dataclasses are: each is made both ways and compared."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import sys
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safe_exec import records

Make = Callable[..., Any]
BOTH = (dataclasses, records)
OPTIONS = [
    {"frozen": True, "kw_only": True, "slots": True},
    {"frozen": True, "kw_only": True},
    {"frozen": True, "slots": True},
    {"slots": True},
    {"kw_only": True},
    {},
]


def made(tools: Any, options: Mapping[str, bool]) -> Any:
    """One class, by the tools given."""

    @tools.dataclass(**options)
    class Thing:
        """A thing."""

        count: int
        name: str = "x"
        items: list[int] = tools.field(default_factory=list)
        secret: str = tools.field(default="s", repr=False)
        kinds: ClassVar[int] = 3

        @property
        def twice(self) -> int:
            return self.count * 2

    Thing.__qualname__ = "Thing"
    return Thing


def heir(tools: Any, options: Mapping[str, bool]) -> Any:
    """A class that has more than the one it comes from, and changes a default."""

    @tools.dataclass(**options)
    class Heir(made(tools, options)):  # type: ignore[misc]
        name: str = "y"
        more: tuple[int, ...] = ()

    Heir.__qualname__ = "Heir"
    return Heir


def _both(make: Make, options: Mapping[str, bool]) -> tuple[Any, Any]:
    return make(dataclasses, options), make(records, options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("make", [made, heir])
def test_a_record_is_a_dataclass(make: Make, options: Mapping[str, bool]) -> None:
    theirs, ours = _both(make, options)
    given_both: list[dict[str, Any]] = [
        {"count": 1},
        {"count": 2, "name": "n"},
        {"count": 2, "items": [1]},
        {"count": 2, "secret": "t"},
    ]
    for values in given_both:
        a, b = theirs(**values), ours(**values)
        assert repr(a) == repr(b)
        assert dataclasses.asdict(a) == dataclasses.asdict(b)
        assert dataclasses.astuple(a) == dataclasses.astuple(b)
        assert b == ours(**values)
        assert b != ours(**{**values, "count": 9}) and b != object() and b != a
        assert b.twice == a.twice and b.kinds == 3
        for changed in (
            dataclasses.replace(b, count=7),
            records.replace(b, count=7),
            records.replace(b, name="z"),
        ):
            assert type(changed) is ours
        assert repr(records.replace(b, count=7)) == repr(dataclasses.replace(a, count=7))
    assert [f.name for f in dataclasses.fields(ours)] == [
        f.name for f in dataclasses.fields(theirs)
    ]
    assert [f.name for f in records.fields(ours)] == [f.name for f in dataclasses.fields(theirs)]
    assert ours.__match_args__ == theirs.__match_args__
    assert get_type_hints(ours) == get_type_hints(theirs)
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)
    assert {p.kind for p in inspect.signature(ours).parameters.values()} == {
        p.kind for p in inspect.signature(theirs).parameters.values()
    }
    assert hasattr(ours(count=1), "__dict__") == hasattr(theirs(count=1), "__dict__")
    assert dataclasses.is_dataclass(ours(count=1)) and dataclasses.is_dataclass(ours)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("make", [made, heir])
def test_what_a_dataclass_refuses_a_record_refuses(make: Make, options: Mapping[str, bool]) -> None:
    for tools in BOTH:
        cls = make(tools, options)
        for values, named in [
            ((), {}),
            ((), {"count": 1, "none": 2}),
            ((1,) * 9, {}),
            ((1,), {"count": 1}),
        ]:
            with pytest.raises(TypeError):
                cls(*values, **named)
        record = cls(count=1)
        if options.get("frozen"):
            with pytest.raises(dataclasses.FrozenInstanceError):
                record.count = 2
            with pytest.raises(dataclasses.FrozenInstanceError):
                del record.count
            assert record.count == 1
        else:
            record.count = 2
            assert record.count == 2
            with pytest.raises(TypeError):
                hash(record)


@pytest.mark.parametrize("options", [o for o in OPTIONS if not o.get("kw_only")], ids=str)
def test_values_without_names_are_taken_in_order(options: Mapping[str, bool]) -> None:
    theirs, ours = _both(made, options)
    assert repr(ours(1, "b", [2])) == repr(theirs(1, "b", [2]))
    assert repr(ours(1, items=[2])) == repr(theirs(1, items=[2]))


def test_defaults_are_each_records_own() -> None:
    cls = made(records, {"frozen": True, "kw_only": True, "slots": True})
    first, second = cls(count=1), cls(count=1)
    first.items.append(1)
    assert second.items == []


@records.dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """One that pickle finds."""

    count: int
    names: tuple[str, ...] = ()


@given(st.integers(), st.lists(st.text()))
def test_copies_and_hashes(count: int, names: list[str]) -> None:
    record = Kept(count=count, names=tuple(names))
    for copied in (copy.copy(record), copy.deepcopy(record), pickle.loads(pickle.dumps(record))):
        assert copied == record and hash(copied) == hash(record) and type(copied) is Kept
    assert len({record, Kept(count=count, names=tuple(names)), Kept(count=count + 1)}) == 2


def test_a_check_of_its_own_runs_and_may_be_seen_by_heirs() -> None:
    @records.dataclass(frozen=True, kw_only=True)
    class Positive:
        number: int

        def __post_init__(self) -> None:
            if self.number < 0:
                raise ValueError("negative")

    assert Positive(number=1).number == 1
    with pytest.raises(ValueError, match="negative"):
        records.replace(Positive(number=1), number=-1)


def test_what_a_class_says_of_itself_stays() -> None:
    @records.dataclass(frozen=True, kw_only=True, slots=True)
    class Own:
        number: int

        def __repr__(self) -> str:
            return "own"

        def __eq__(self, other: object) -> bool:
            return True

        def __hash__(self) -> int:
            return 5

    assert (repr(Own(number=1)), Own(number=1) == Own(number=2), hash(Own(number=1))) == (
        "own",
        True,
        5,
    )


def test_no_source_is_compiled() -> None:
    """What the module is for: nothing of dataclasses is imported until somebody asks for what only they have."""
    import subprocess

    code = (
        "import sys\nfrom safe_exec.records import dataclass\n@dataclass(frozen=True, kw_only=True, slots=True)\nclass A:\n    a: int\n"
        "A(a=1)\nprint('dataclasses' in sys.modules, 'inspect' in sys.modules)"
    )
    said = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True
    )
    assert said.stdout.split() == ["False", "False"]
