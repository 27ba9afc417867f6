"""Keeps the answers of trials in the cache, under everything that they depend on.

So entries never become stale.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct
from msgspec.structs import asdict

from safe_exec._version import __version__
from safe_exec.cache import key_of
from safe_exec.experiments.culprits.oracle.subject import Subject
from safe_exec.experiments.culprits.protocol import Outcome, Query, Reply
from safe_exec.experiments.trial_cache import TrialCache


class CachedAnswer(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An answer as stored in the cache; ``seconds`` is the cost of its trial."""

    answer: Outcome
    seconds: float
    stopped_at: int | None
    names: tuple[str, ...]
    peak: float | None
    another_form: bool
    ended: str
    line: int | None
    exact_line: bool


class CachedAnswers:
    """The answers of earlier trials of a subject. ``folder`` is the fingerprint of its folder."""

    def __init__(self, subject: Subject, folder: str, cache: TrialCache | None) -> None:
        self._subject, self._folder, self._cache = subject, folder, cache

    def get(self, query: Query, node: Any | None) -> Reply | None:
        """Return the known answer to a query, or ``None``.

        ``node`` is the notebook that runs, if it is not the subject's own.
        """
        if query.fresh or self._cache is None:
            return None
        entry = self._cache.get(self._key(query, node), CachedAnswer)
        return None if entry is None else _reply_of(entry)

    def put(self, query: Query, node: Any | None, reply: Reply) -> None:
        """Store the answer of a trial."""
        if self._cache is not None:
            self._cache.put(self._key(query, node), _entry_of(reply))

    def _key(self, query: Query, node: Any | None) -> str:
        of = self._subject.node if node is None else node
        chosen = set(query.cells)
        cells = [
            (
                index,
                cell.source,
                cell.metadata.get("tags", []),
                cell.metadata.get("safe_exec", {}).get("limits"),
            )
            for index, cell in enumerate(of.cells)
            if cell.cell_type == "code" and (node is not None or index in chosen)
        ]
        request = self._subject.request
        return key_of(
            {
                "safe_exec": __version__,
                "cells": cells,
                "limits": request.limits.as_dict(),
                "isolation": asdict(request.plan.isolation),
                "allow_errors": request.allow_errors,
                "folder": self._folder,
                "cwd": str(request.cwd),
                "failure": str(self._subject.failure),
                "environment": self._subject.environment,
            }
        )


def _entry_of(reply: Reply) -> CachedAnswer:
    return CachedAnswer(
        answer=reply.answer,
        seconds=reply.seconds,
        stopped_at=reply.stopped_at,
        names=tuple(sorted(reply.names)),
        peak=reply.peak,
        another_form=reply.another_form,
        ended=reply.ended,
        line=reply.line,
        exact_line=reply.exact_line,
    )


def _reply_of(entry: CachedAnswer) -> Reply:
    """Convert a cache entry; its reply costs no seconds."""
    return Reply(
        answer=entry.answer,
        seconds=0.0,
        stopped_at=entry.stopped_at,
        names=frozenset(entry.names),
        peak=entry.peak,
        another_form=entry.another_form,
        ended=entry.ended,
        line=entry.line,
        exact_line=entry.exact_line,
    )
