"""Sizes of objects: each once, shared buffers once, in bounded time, and by no code of the notebook."""

from __future__ import annotations

import functools
import gc
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from safe_exec.agent import holders, library_objects, object_sizes, summaries

# The agent has no types.
Walk: Any = object_sizes.Walk
Residency: Any = object_sizes.Residency
RESIDENCY = Residency()
# Without stubs.
pd: Any = importlib.import_module("pandas")
describe: Any = summaries.describe
library_handlers: Any = library_objects.library_handlers
MIB = 1 << 20


def walk(seconds: float = 5.0) -> Any:
    return Walk(RESIDENCY, seconds, library_handlers())


def size_of(thing: Any) -> int:
    return int(walk().measure(thing))


def filled(size: int) -> np.ndarray[Any, Any]:
    return np.ones(size, dtype=np.uint8)


def generator() -> Iterator[int]:
    block = bytearray(20 * MIB)
    yield len(block)


def running() -> Iterator[int]:
    source = generator()
    next(source)
    return source


@functools.cache
def load(key: int) -> bytearray:
    return bytearray(key)


def closure() -> Callable[[], int]:
    block = bytearray(20 * MIB)
    return lambda: len(block)


class Slots:
    __slots__ = ("block",)

    def __init__(self) -> None:
        self.block = bytearray(20 * MIB)


class Plain:
    def __init__(self) -> None:
        self.block = bytearray(20 * MIB)


def table() -> Any:
    return pd.DataFrame(np.ones((MIB // 2, 5)))


def arrow() -> Any:
    return importlib.import_module("pyarrow").table({"a": np.ones(20 * MIB // 8)})


def polars() -> Any:
    import polars as pl

    return pl.DataFrame({"a": np.ones(20 * MIB // 8)})


def image() -> Any:
    from PIL import Image

    return Image.new("RGB", (1024, 5 * 1024))


def sparse() -> Any:
    scipy: Any = importlib.import_module("scipy.sparse")
    count = 20 * MIB // 16
    rows = np.arange(count, dtype=np.int32)
    return scipy.csr_array((np.ones(count), rows, [0, count]), shape=(1, count))


TWENTY = {
    "bytes": lambda: bytes(20 * MIB).replace(b"\0", b"x"),
    "bytearray": lambda: bytearray(20 * MIB),
    "memoryview": lambda: memoryview(bytearray(20 * MIB))[5:],
    "list": lambda: [bytearray(MIB) for _ in range(20)],
    "dict": lambda: {n: bytearray(MIB) for n in range(20)},
    "text": lambda: "x" * (20 * MIB),
    "array": lambda: filled(20 * MIB),
    "view": lambda: filled(20 * MIB)[:10],
    "object-array": lambda: np.array([bytearray(MIB) for _ in range(20)] + [None], dtype=object),
    "table": table,
    "generator": running,
    "closure": closure,
    "slots": Slots,
    "attributes": Plain,
    "arrow": arrow,
    "polars": polars,
    "image": image,
    "sparse": sparse,
}


@pytest.mark.parametrize("name", TWENTY)
def test_twenty_mebibytes_are_twenty_mebibytes(name: str) -> None:
    size = size_of(TWENTY[name]())
    assert 19.5 * MIB <= size <= 20.8 * MIB


def test_a_cache_of_results_counts() -> None:
    load(3 * MIB)
    load(4 * MIB)
    assert 7 * MIB <= size_of(load) < 7.1 * MIB


def test_shared_buffers_count_once() -> None:
    block = filled(10 * MIB)
    one = walk()
    assert one.measure([block, block[::2], block.reshape(2, -1)]) < 10.1 * MIB
    assert one.measure({"again": block[5:]}) < 0.1 * MIB


def test_the_value_of_another_variable_is_left_to_it() -> None:
    block = bytearray(10 * MIB)
    one = walk()
    one.owners[id(block)] = "block"
    assert one.measure([block], "rows") < 0.1 * MIB
    assert one.measure(block, "block") >= 10 * MIB


def test_memory_that_was_never_written_does_not_exist_yet() -> None:
    assert size_of(np.zeros(1 << 30, dtype=np.uint8)) < MIB


def test_a_file_in_memory_does_not_count(tmp_path: Path) -> None:
    filled(10 * MIB).tofile(tmp_path / "numbers")
    assert size_of(np.memmap(tmp_path / "numbers")) < MIB


def call(*_: object) -> NoReturn:
    raise AssertionError("code of the notebook was called")


class Meta(type):
    __getattribute__ = __instancecheck__ = __subclasscheck__ = __len__ = call
    __hash__ = type.__hash__
    __eq__ = call


class Hostile(dict[str, bytearray], metaclass=Meta):
    __sizeof__ = __repr__ = __len__ = __iter__ = items = values = __getattribute__ = call
    __bool__ = __eq__ = call
    __hash__ = None


class Liar:
    def __init__(self) -> None:
        self.block = bytearray(5 * MIB)

    def __sizeof__(self) -> int:
        return 1 << 60


class Broken(list[bytearray]):
    def __sizeof__(self) -> int:
        raise MemoryError

    __len__ = __getitem__ = __iter__ = call


def test_no_code_of_the_notebook_is_called() -> None:
    hostile = Hostile()
    dict.__setitem__(hostile, "block", bytearray(5 * MIB))
    broken = Broken()
    list.append(broken, bytearray(5 * MIB))
    for thing in (hostile, Liar(), broken):
        assert 5 * MIB <= size_of(thing) < 5.1 * MIB
        describe(thing)


def test_a_cycle_ends() -> None:
    rows: list[Any] = [bytearray(MIB)]
    rows.append(rows)
    assert MIB <= size_of(rows) < 1.1 * MIB


def rings(count: int) -> list[Any]:
    """Two million objects in cycles: the shape of ten million, in a fifth of the time."""
    outer: list[Any] = []
    for _ in range(count):
        ring: list[Any] = [outer]
        ring.append([ring, 0.5])
        outer.append(ring)
    return outer


def test_a_structure_of_millions_stays_in_the_budget_and_is_an_estimate() -> None:
    outer = rings(700_000)
    one = walk(0.02)
    start = time.thread_time()
    try:
        size = one.measure(outer)
    except object_sizes.OutOfTime:
        size = one.partial
    spent = time.thread_time() - start
    assert not one.exact
    # Each ring is two lists of two elements, and a float.
    assert 100 * MIB <= size <= 400 * MIB
    # One step of the walk may take some milliseconds more.
    assert spent < 0.2
    assert len(one.visited) * 100 < 16 * MIB


@pytest.mark.parametrize(
    ("thing", "summary"),
    [
        ({n: bytearray() for n in range(3)}, "dict of 3 bytearray"),
        ([1, "a"], "list of 2 objects"),
        (np.ones((1000, 3)), "ndarray 1,000 x 3 float64"),
        (pd.DataFrame({"a": [1, 2], "b": [3, 4]}), "DataFrame 2 x 2"),
        ("abc", "str of 3 characters"),
        ([], "list of 0"),
    ],
)
def test_summaries(thing: Any, summary: str) -> None:
    assert describe(thing) == (type(thing).__name__, summary)


def test_an_import_is_never_made() -> None:
    assert "torch" not in sys.modules
    library_handlers()
    assert "torch" not in sys.modules


def test_objects_that_only_refer_to_each_other_are_holders(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The tests before may have left millions of objects.
    monkeypatch.setattr(holders, "MOST_BLOCKS", 1 << 40)
    # As in a notebook, whose module is `__main__`.
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(
        "class Node:\n    def __init__(self):\n"
        "        self.me, self.payload = self, bytearray(1 << 20)",
        namespace,
    )
    gc.disable()
    try:
        for _ in range(20):
            namespace["Node"]()
        one, kept = walk(), namespace["Node"]()
        one.measure(kept)
        ((name, nodes),) = holders.unreached(one)  # type: ignore[no-untyped-call]
        size, summary = one.measure(nodes), describe(nodes)
    finally:
        gc.enable()
    assert name == "Node objects without a variable"
    assert 20 * MIB <= size < 21 * MIB
    assert summary == (
        "Node",
        "20 objects that refer to each other, and garbage collection is off",
    )
