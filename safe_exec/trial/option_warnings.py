"""Warnings about shell commands that failed and about input that was missing."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from safe_exec.model.ending import Ending, Passed

if TYPE_CHECKING:
    from safe_exec.kernel.agent_facts import FailedCommand
    from safe_exec.trial.state import TrialState

LONGEST_COMMAND = 80


def option_warnings(state: TrialState, ending: Ending) -> list[str]:
    """Return the warnings of a finished trial."""
    session, request = state.session, state.request
    facts = session.agent_facts
    warnings = [_failure(state, command) for command in facts.failed_commands]
    if warnings:
        warnings[-1] += " (--strict-shell makes this an error)"
    more = facts.failed_command_count - len(facts.failed_commands)
    if more > 0:
        warnings.append(f"{more} more shell commands failed")
    if request.strict_shell and not session.instrumented:
        warnings.append(
            f"--strict-shell has no effect: kernel {request.kernel_name} is not ipykernel"
        )
    answers = session.answers
    # A notebook that reads to the end of its input and passes is in order.
    missing = answers.missing if answers is not None and not isinstance(ending, Passed) else 0
    if answers is not None and request.stdin_lines is not None and missing:
        warnings.append(
            f"the notebook asked for input {answers.requests} times, and --stdin has "
            f"{len(request.stdin_lines)} line{'s' * (len(request.stdin_lines) != 1)}"
        )
    return warnings


def _failure(state: TrialState, command: FailedCommand) -> str:
    place = "a cell"
    if command.cell is not None and command.cell in state.metrics.records:
        place = f"code cell {state.metrics.code_index(command.cell) + 1}"
    if command.line is not None:
        place += f", line {command.line}"
    text = command.text if len(command.text) <= LONGEST_COMMAND else command.text[:77] + "..."
    return f"{place}: !{text.strip()} {_result(command.status)}"


def _result(status: int) -> str:
    if status < 0:
        try:
            return f"was ended by {signal.Signals(-status).name}"
        except ValueError:
            return f"was ended by signal {-status}"
    return f"failed with status {status}"
