"""What is known of the workers of a cluster, with a client that answers as told."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from safe_exec.batch.cluster.connection import parse_cluster
from safe_exec.batch.cluster.messages import WorkerFacts
from safe_exec.batch.cluster.workers import ClusterWorkers


class Client:
    """Answers a call with the next of its answers, or raises it."""

    def __init__(self, *answers: dict[str, str] | Exception) -> None:
        self.answers = list(answers)

    async def run(self, *_args: Any, **_options: Any) -> dict[str, str]:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def workers_of(client: Any, notes: list[str]) -> ClusterWorkers:
    workers = ClusterWorkers(
        client, parse_cluster("tcp://host:8786"), mechanisms=None, memory=None, note=notes.append
    )
    for address, machine in (("tcp://a:1", "a"), ("tcp://b:1", "b")):
        workers.usable[address] = WorkerFacts(
            address=address, name=machine, machine=machine, threads=2, memory=1 << 30, cpus=2.0,
            enforced=frozenset(), version="0", python="3.11",
        )  # fmt: skip
    return workers


def test_packages_are_asked_for_once() -> None:
    notes: list[str] = []
    workers = workers_of(Client({"tcp://a:1": "x", "tcp://b:1": "x"}), notes)

    async def ask() -> list[str | None]:
        return list(await asyncio.gather(workers.environment("k"), workers.environment("k")))

    assert asyncio.run(ask()) == ["x", "x"] and notes == []


def test_a_lost_scheduler_is_no_description_and_is_asked_again() -> None:
    lost = OSError("in <TCP (closed)>: Stream is closed")
    workers = workers_of(Client(lost, {"tcp://a:1": "x"}), [])

    async def ask_twice() -> list[str | None]:
        return [await workers.environment("k"), await workers.environment("k")]

    assert asyncio.run(ask_twice()) == [None, "x"]


def test_different_packages_are_told_and_part_of_the_description() -> None:
    notes: list[str] = []
    packages = {n: json.dumps([[], {}, json.dumps(["3.11", [], [["numpy", n]]])]) for n in "12"}
    workers = workers_of(Client({"tcp://a:1": packages["1"], "tcp://b:1": packages["2"]}), notes)
    described = asyncio.run(workers.environment("k"))
    assert described == json.dumps([packages["1"], packages["2"]])
    assert len(notes) == 1 and notes[0].startswith("kernel k differs between workers")
