"""Help texts with the options in groups; each option takes one line if possible."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from safe_exec.limits import spec

WIDTH = 100
# The width of an option with its placeholder. The rest of 80 columns is enough for each help text,
# so that all options fit on two screens. A longer option has its text on the next line.
LONGEST_OPTION = 26

LIMITS = ("limits", *(row.name for row in spec.OPTIONS), "require", "mechanisms")
ISOLATION = ("network", "read_only", "show", "writable", "hide", "env_names", "devices")
OUTPUT = (
    "out", "verdict", "in_place", "on_failure", "clean_metadata", "no_output", "keep_files", "coverage",
    "events", "follow", "as_json", "github", "gitlab", "quiet", "help",
)  # fmt: skip
SEARCH = ("bisect", "no_bisect", "bisect_budget", "retries", "retry_on", "repeat")
BATCH = ("jobs", "cluster", "exclude", "resume", "only_changed", "fail_fast", "shard", "timings")

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
            if isinstance(parameter, click.Option) and not parameter.hidden:
                # Depending on its version, click gives its own option another name.
                name = "help" if "--help" in parameter.opts else parameter.name or ""
                rows[_GROUP_OF.get(name, "Cells")].append(_row(parameter, ctx))
        for title, records in rows.items():
            if records:
                with formatter.section(title):
                    # The same column in all groups, so that the eye finds it.
                    padded = [(name.ljust(LONGEST_OPTION), text) for name, text in records]
                    formatter.write_dl(padded, col_max=LONGEST_OPTION)


def _row(option: click.Option, ctx: click.Context) -> tuple[str, str]:
    """Return an option with its placeholder, and its help.

    The range of a number, which click adds, is left out; the error about a wrong number names it.
    """
    record = option.get_help_record(ctx)
    return (record[0] if record is not None else "", option.help or "")
