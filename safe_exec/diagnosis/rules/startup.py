"""Kernels that never became ready, and runs that safe-exec itself could not finish."""

from __future__ import annotations

from collections.abc import Mapping

from safe_exec.diagnosis.context import Context, inside, make, outside
from safe_exec.model.ending import InternalError, StartFailed, TerminationReason
from safe_exec.model.limits import LimitName, Mechanism
from safe_exec.model.patterns import lazy_pattern
from safe_exec.model.verdict import Cause, CauseKind, Confidence, Fact
from safe_exec.notebook.kernel_choice import kernels_of_language

# How programs say that they were refused memory.
MEMORY = lazy_pattern("out of memory|annot allocate|bad_alloc|MemoryError|virtual memory")
# Limits for which we end a kernel that is still starting.
WATCHED = {
    TerminationReason.MEMORY: LimitName.MEMORY,
    TerminationReason.PROCESSES: LimitName.PROCESSES,
    TerminationReason.CPU_TIME: LimitName.CPU_TIME,
    TerminationReason.DISK: LimitName.DISK,
}
# RLIMIT_DATA counts reserved memory too, and some runtimes reserve gigabytes at the start.
TOO_LITTLE = (
    "It asks for more memory at its start than RLIMIT_DATA allows, which stands in for --memory "
    "here and counts what is reserved, too:"
    " raise --memory, or leave memory to the watchdog (--mechanisms watchdog)."
)


# Begins the line with which our own part of the kernel declines to start: reason, colon, remedy.
DECLINED = "safe-exec: "
MOST_CHARACTERS = 500


def _is_held_by_rlimit(context: Context) -> bool:
    enforcement = context.enforcement.get(LimitName.MEMORY)
    return enforcement is not None and enforcement.by is Mechanism.RLIMIT


def start_failed(context: Context) -> Cause | None:
    """Recognise a kernel that never answered."""
    ending = context.ending
    if not isinstance(ending, StartFailed):
        return None
    # A kernel that is not installed was never started.
    was_started = ending.waited is not None or ending.exit is not None
    facts: list[Fact] = [
        outside("answered", False, "no reply to a request for the kernel's info")
        if was_started
        else outside("started", False, "the reason was known before")
    ]
    if ending.exit is not None:
        facts.append(outside("ended with", str(ending.exit), "wait status of the kernel process"))
    if ending.waited is not None:
        facts.append(outside("seconds waited", round(ending.waited, 1), "runner's clock"))
    # Kernels print the reason last, after their warnings.
    last = [line.strip() for line in context.evidence.stderr_tail.splitlines() if line.strip()]
    if last:
        facts.append(inside("last line on stderr", last[-1][:300], "stderr of the kernel process"))
    asks_too_much = (
        _is_held_by_rlimit(context) and MEMORY.search(context.evidence.stderr_tail) is not None
    )
    advice = (
        TOO_LITTLE
        if asks_too_much
        else _advice_for_missing_kernel(ending.installed, context.language)
        if ending.installed is not None
        else (
            "Start the kernel by hand with the same environment; look at IPython start-up "
            "files and what they import."
        )
    )
    reason = ending.reason
    if last and last[-1].startswith(DECLINED):
        reason, _, advice = last[-1][len(DECLINED) : MOST_CHARACTERS].partition(": ")
        advice = f"{advice[:1].upper()}{advice[1:]}."
    # We may have ended the kernel ourselves while it was starting.
    limit = (
        WATCHED.get(context.evidence.termination)
        if context.evidence.termination is not None
        else None
    )
    if limit is not None:
        facts.append(
            outside("killed by safe-exec for", limit.value, "recorded before the signal was sent")
        )
        name = limit.value.replace("_", " ")
        reason = (
            f"the kernel passed its limit of {name} before it was ready, and was ended by safe-exec"
        )
        raise_it = context.if_limited(limit, f"Raise --{limit.value.replace('_', '-')}, or look")
        # A group above the sandbox may allow fewer processes than our limit does.
        if limit is LimitName.PROCESSES and context.evidence.process_bound is not None:
            raise_it = ""
        advice = f"{raise_it or 'Look'} at IPython start-up files and what they import."
    return make(
        context, CauseKind.KERNEL_START_FAILED, reason, Confidence.CERTAIN, tuple(facts), advice
    )


def _advice_for_missing_kernel(installed: Mapping[str, str], language: str | None) -> str:
    """Return advice for a missing kernel; it names the installed kernels of its language."""
    # A kernel of the same language is the most likely to run the notebook.
    alike = kernels_of_language(installed, language)
    if alike:
        preferred = alike[0]
        others = f" ({', '.join(alike[1:])} too)" if len(alike) > 1 else ""
        return (
            f"Run it with an installed kernel of the same language: --kernel {preferred}{others}."
            " Or install the kernel that the notebook names, in the environment that safe-exec "
            "runs in."
        )
    if language is not None and language.lower() == "python":
        return (
            "No Python kernel is installed: pip install ipykernel, then run it with --kernel "
            "python3."
        )
    if language is not None:
        return (
            f"None of the installed kernels is for {language}: install one that is; see "
            "`jupyter kernelspec list`."
        )
    return (
        "Choose an installed kernel with --kernel NAME, or install the one that the notebook names."
    )


def internal(context: Context) -> Cause | None:
    """Recognise a failure or a refusal of safe-exec itself, which tells nothing of the notebook."""
    ending = context.ending
    if not isinstance(ending, InternalError):
        return None
    checked = (
        [outside("started", False, "checked before anything was run")]
        if ending.refused or ending.unfit
        else []
    )
    facts = (
        *checked,
        *(
            outside(
                f"{name.value.replace('_', ' ')} held by",
                enforcement.by.value,
                enforcement.note or "enforcement",
            )
            for name, enforcement in context.enforcement.items()
            if not enforcement.hard and f"--require {name.value}:" in ending.message
        ),
    )
    if ending.refused:
        advice = (
            "Nothing was run. Fix the machine as `safe-exec doctor` suggests, or require less "
            "(--require)."
        )
        return make(context, CauseKind.UNKNOWN, ending.message, Confidence.CERTAIN, facts, advice)
    if ending.unfit:
        advice = (
            "Nothing was run. Move the notebook into a folder of its own or correct the path, or "
            "run it with less isolation, such as --limits default."
        )
        return make(context, CauseKind.UNKNOWN, ending.message, Confidence.CERTAIN, facts, advice)
    advice = (
        "This is a fault of safe-exec or of the machine's set-up: see `safe-exec doctor`, "
        "and please report it."
    )
    return make(
        context,
        CauseKind.UNKNOWN,
        ending.message.strip() or "safe-exec failed",
        Confidence.GUESS,
        facts,
        advice,
    )
