"""Help with the options in groups, one line for each where possible."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from safe_exec.limits import spec

# Two screens of an ordinary terminal.
WIDTH = 100

LIMITS = ("limits", *(row.name for row in spec.OPTIONS), "require", "mechanisms")
ISOLATION = ("network", "read_only", "show", "writable", "hide", "env_names", "devices")
OUTPUT = (
    "out", "verdict", "in_place", "on_failure", "clean_metadata", "no_output", "keep_files", "coverage",
    "events", "follow", "as_json", "github", "gitlab", "quiet", "help",
)  # fmt: skip
SEARCH = ("bisect", "no_bisect", "bisect_budget", "retries", "retry_on", "repeat")
BATCH = ("jobs", "exclude", "resume", "only_changed", "fail_fast", "shard", "timings")

GROUPS: Mapping[str, tuple[str, ...]] = {
    "Limits": LIMITS,
    "Isolation": ISOLATION,
    "Choice of notebooks": BATCH,
    # All others: what runs, and with which values.
    "Cells": (),
    "Output": OUTPUT,
    "Search for culprits, and retries": SEARCH,
}
_GROUP_OF = {name: title for title, names in GROUPS.items() for name in names}


class GroupedCommand(click.Command):
    """A command whose help lists the options by group."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.context_settings.setdefault("max_content_width", WIDTH)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options."""
        rows: dict[str, list[tuple[str, str]]] = {title: [] for title in GROUPS}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                # Depending on its version, click gives its own option another name.
                name = "help" if "--help" in parameter.opts else parameter.name or ""
                rows[_GROUP_OF.get(name, "Cells")].append(record)
        # The same column in all groups, so that the eye finds it.
        width = max(len(name) for records in rows.values() for name, _ in records)
        for title, records in rows.items():
            if records:
                with formatter.section(title):
                    padded = [(name.ljust(width), text) for name, text in records]
                    formatter.write_dl(padded, col_max=width)
