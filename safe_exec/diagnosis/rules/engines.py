"""Limits that an engine sets and reports itself: databases, graphics cards, the JVM, R.

Measurements outside the kernel tell whose limit it was: the engine's message counts only if this
run's own memory limit was not reached.
"""

from __future__ import annotations

import re
import signal

from msgspec import Struct

from safe_exec.diagnosis.context import (
    Context,
    exit_facts,
    inside,
    leaves_reason_to_output,
    make,
    outside,
)
from safe_exec.model.ending import CellFailed, Died
from safe_exec.model.patterns import lazy_pattern
from safe_exec.model.verdict import Cause, CauseKind, Confidence, Fact
from safe_exec.units import format_size

# From this share of the run's own memory limit on it cannot be told whose limit it was.
REACHED = 0.95


class Engine(Struct, frozen=True, kw_only=True):
    """An engine, the text with which it reports its own limit, and advice.

    The pattern's group ``limit`` is the limit. ``noun`` names the exhausted resource, and
    ``setting`` the parameter with which a notebook sets it.
    """

    pattern: re.Pattern[str]
    # The exhausted resource.
    noun: str
    advice: str
    # The parameter with which a notebook sets the limit.
    setting: str = ""
    kind: CauseKind = CauseKind.MEMORY_ERROR


# Advice for every engine that computes on a graphics card.
CARD = (
    "Process less at a time (a smaller batch), and free the objects of earlier cells on the card; "
    "other programs may use it, too (nvidia-smi)."
    " --memory is no limit of the card's."
)

ENGINES: tuple[Engine, ...] = (
    # DuckDB: src/storage/standard_buffer_manager.cpp and temporary_memory_manager.
    Engine(
        pattern=lazy_pattern(r"failed to offload data block.*\([^()]*/(?P<limit>[^()/]+) used\)"),
        noun="DuckDB's own limit for temporary files (max_temp_directory_size)",
        setting="max_temp_directory_size",
        advice="Raise it with SET max_temp_directory_size = '...', or write less: fewer threads "
        "(SET threads), a smaller join or sort.",
        kind=CauseKind.DISK_FULL,
    ),
    Engine(
        pattern=lazy_pattern(
            r"Out of Memory Error: (?:could not|[Ff]ailed to) "
            r"allocate[^()]*\([^()]*/(?P<limit>[^()/]+) used\)"
            r"|Out of Memory Error: (?:could not|[Ff]ailed to) allocate block of \S+ bytes(?! "
            r"\(bad allocation\))"
            r"|could not free up enough memory for the new limit"
        ),
        noun="DuckDB's own memory_limit",
        setting="memory_limit",
        advice=(
            "Raise it with SET memory_limit = '...' (below --memory), give it a directory to "
            "spill to (SET temp_directory = '...'), or have it"
            " use less (SET threads = 1)."
        ),
    ),
    # polars: crates/polars-ooc.
    Engine(
        pattern=lazy_pattern(r"exceeded the out-of-core disk budget"),
        noun="the disk budget of polars (POLARS_OOC_DISK_BUDGET_MB)",
        setting="POLARS_OOC_DISK_BUDGET_MB",
        advice="Raise POLARS_OOC_DISK_BUDGET_MB before polars is imported, or give the query "
        "less to do.",
        kind=CauseKind.DISK_FULL,
    ),
    # PyTorch: c10/cuda/CUDACachingAllocator.cpp, and the same for ROCm and MPS.
    Engine(
        pattern=lazy_pattern(
            r"(?:CUDA|HIP|XPU|MPS backend) out of memory(?:.*?total capacity of "
            r"(?P<limit>[\d.]+ [KMGT]iB))?",
            re.DOTALL,
        ),
        noun="the memory of the graphics card",
        advice=CARD,
    ),
    # CuPy: cupy/cuda/memory.pyx.
    Engine(
        pattern=lazy_pattern(
            r"[Oo]ut of memory allocating [\d,]+ bytes \(allocated so far: [\d,]+ bytes, limit "
            r"set to: (?P<limit>[\d,]+ bytes)\)"
        ),
        noun="CuPy's own memory limit",
        setting="set_limit",
        advice="Raise it with set_limit() of the memory pool or CUPY_GPU_MEMORY_LIMIT, or free "
        "blocks of the pool (free_all_blocks()).",
    ),
    Engine(
        pattern=lazy_pattern(
            r"[Oo]ut of memory allocating [\d,]+ bytes \(allocated so far|out of memory to "
            r"allocate \d+ bytes"
        ),
        noun="the memory of the graphics card",
        advice=CARD,
    ),
    # CUDA's own names: cudaError_t and CUresult, as numba, CuPy, RAPIDS and others show them.
    Engine(
        pattern=lazy_pattern(
            r"cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY|CUBLAS_STATUS_ALLOC_FAILED"
            r"|std::bad_alloc: out_of_memory: CUDA"
        ),
        noun="the memory of the graphics card",
        advice=CARD,
    ),
    # TensorFlow and JAX: the allocator of a device (BFC); that of the processor is the system's.
    Engine(
        pattern=lazy_pattern(
            r"(?:RESOURCE_EXHAUSTED|ResourceExhaustedError)(?!.*(?:device:CPU|allocator "
            r"cpu)).*(?:[Oo]ut of memory|OOM|allocat)",
            re.DOTALL,
        ),
        noun="the memory of the device that TensorFlow or JAX computes on",
        advice=CARD,
    ),
    # The JVM: java.lang.OutOfMemoryError (Java SE, Troubleshooting Guide), through py4j, JPype or a
    # program's output.
    Engine(
        pattern=lazy_pattern(
            r"java\.lang\.OutOfMemoryError: (?:Java heap space|GC overhead limit exceeded"
            r"|Metaspace|PermGen space|Direct buffer memory"
            r"|Requested array size exceeds VM limit)"
        ),
        noun="the heap of the Java virtual machine",
        advice=(
            "Raise its own limit before it starts (java -Xmx; spark.driver.memory or "
            "spark.executor.memory for Spark), below --memory; or collect"
            " less at once."
        ),
    ),
    Engine(
        pattern=lazy_pattern(
            r"is bigger than (?:local maxResultSize|spark\.driver\.maxResultSize)(?: "
            r"\(?(?P<limit>[\d.]+ [KMGT]iB)\)?)?"
        ),
        noun="Spark's own limit of a result (spark.driver.maxResultSize)",
        setting="maxResultSize",
        advice="Collect less at once, or raise spark.driver.maxResultSize before the session "
        "starts.",
    ),
    # R: src/main/memory.c, R_MaxVSize.
    Engine(
        pattern=lazy_pattern(
            r"vector memory (?:exhausted|limit of (?P<limit>[\d.]+ [KMGT]b) reached)"
        ),
        noun="R's own limit for vectors",
        setting="mem.maxVSize",
        advice="Raise it with mem.maxVSize(), or R_MAX_VSIZE in the environment of the kernel; "
        "or hold less at once.",
    ),
    # DataFusion, and Lance and others on it: datafusion/execution/src/memory_pool.
    Engine(
        pattern=lazy_pattern(r"Resources exhausted: .*[Ff]ailed to allocate additional", re.DOTALL),
        noun="the memory pool of DataFusion",
        advice="Raise the limit of its memory pool (with_fair_spill_pool, "
        "with_greedy_memory_pool), or let it spill to disk.",
    ),
    # ClickHouse and chDB: src/Common/MemoryTracker.cpp.
    Engine(
        pattern=lazy_pattern(
            r"Memory limit \((?:total|for query|for user)\) exceeded.*?maximum: "
            r"(?P<limit>[\d.]+ [KMGT]?i?B)",
            re.DOTALL,
        ),
        noun="ClickHouse's own memory limit",
        setting="max_memory_usage",
        advice="Raise max_memory_usage (or max_server_memory_usage), below --memory.",
    ),
    # Dask: distributed/worker_memory.py, which prints it and has the task fail with KilledWorker
    # later. Which of these lines are shown depends on the levels of its logs.
    Engine(
        pattern=lazy_pattern(
            r"exceeded \d+% memory budget"
            r"|(?:at \d+% memory usage|Unmanaged memory use is high)"
            r"(?:.*?Worker memory limit: (?P<limit>[\d.]+ [KMGT]iB))?"
        ),
        noun="the memory limit of a Dask worker",
        setting="memory_limit",
        advice="Raise memory_limit of the workers, or have fewer of them; all together must "
        "stay below --memory.",
    ),
    # Ray: src/ray/common/memory_monitor.
    Engine(
        pattern=lazy_pattern(r"due to the node running low on memory|memory usage threshold"),
        noun="the memory threshold of Ray",
        setting="RAY_memory_usage_threshold",
        advice="Raise RAY_memory_usage_threshold, or run fewer tasks at a time (num_cpus of a "
        "task).",
    ),
)

# The fact that names the setting: the cell in which it stands is the one to read first.
SETTING = "set by"
# What polars writes to stderr before it aborts the process (crates/polars-ooc, global_alloc).
POLARS_ABORTS = lazy_pattern(r"memory usage exceeded POLARS_OOMKILL_THRESHOLD")


def own_limit(context: Context) -> Cause | None:
    """Recognise a cell error in which an engine reports that its own limit was reached."""
    error = context.evidence.error
    if not isinstance(context.ending, CellFailed) or error is None:
        return None
    texts = [(f"{error.ename}: {error.evalue}", "the cell's error")]
    # Dask raises KilledWorker long after the worker printed the reason.
    if leaves_reason_to_output(context) or error.ename.endswith("KilledWorker"):
        texts.append((context.evidence.last_words, "output of the cell"))
    for text, source in texts:
        for engine in ENGINES:
            match = engine.pattern.search(text)
            if match is not None:
                return _cause(context, engine, match, source)
    return None


def _cause(context: Context, engine: Engine, match: re.Match[str], source: str) -> Cause:
    limit = match.groupdict().get("limit")
    summary = (
        f"{engine.noun}{f' ({limit.strip()})' if limit else ''} was reached: it is a "
        "limit of its own, not one of this run"
    )
    # Engines break their messages into lines of different lengths.
    quoted = " ".join(match[0].split())
    quote_fact = inside(
        "raised" if source == "the cell's error" else "printed", quoted[:300], source
    )
    setting = (
        (inside(SETTING, engine.setting, "the word by which a notebook sets this limit"),)
        if engine.setting
        else ()
    )
    facts = (quote_fact, *_own_figures(context), *setting)
    return make(
        context, engine.kind, summary, _confidence(context), facts, _advice(context, engine)
    )


BELOW = lazy_pattern(r" \(below --memory\)|[,;][^,;]* below --memory(?=[.;])")


def _advice(context: Context, engine: Engine) -> str:
    """Return the engine's advice, without references to --memory if the run has no memory limit."""
    return engine.advice if context.limits.memory is not None else BELOW.sub("", engine.advice)


def _own_figures(context: Context) -> tuple[Fact, ...]:
    """Return the run's own memory peak and limit for comparison."""
    peak, limit = context.evidence.memory_peak, context.limits.memory
    facts = []
    if peak is not None:
        facts.append(outside("memory peak", peak, "control group or sum over processes"))
    if limit is not None:
        facts.append(outside("memory limit of this run", limit, "limits of this run"))
    return tuple(facts)


def _confidence(context: Context) -> Confidence:
    """Return ``CERTAIN`` if the run's own memory use was measured and stayed below its limit.

    Otherwise return ``LIKELY``.
    """
    peak, limit = context.evidence.memory_peak, context.limits.memory
    # Near the run's own limit, both limits are possible reasons.
    if peak is None or (limit is not None and peak >= REACHED * limit):
        return Confidence.LIKELY
    return Confidence.CERTAIN


def aborted(context: Context) -> Cause | None:
    """Recognise an abort by Polars, which reports first that its memory threshold was exceeded."""
    evidence = context.evidence
    status = evidence.exit
    # abort() is the only way in which polars ends the process.
    if not isinstance(context.ending, Died) or status is None or status.signal != signal.SIGABRT:
        return None
    match = POLARS_ABORTS.search(f"{evidence.stderr_tail}\n{evidence.last_words}")
    if match is None:
        return None
    peak = "" if evidence.memory_peak is None else f" (peak {format_size(evidence.memory_peak)})"
    summary = (
        f"abort: polars ended the kernel as its own memory threshold was passed{peak}; it "
        "is a limit of its own, not one of this run"
    )
    advice = (
        "Raise POLARS_OOMKILL_THRESHOLD_MB or POLARS_OOMKILL_THRESHOLD_FRACTION before "
        "polars is imported, or load and keep less."
    )
    facts = (
        *exit_facts(evidence),
        inside("last message", match[0], "stderr of the kernel process"),
        *_own_figures(context),
    )
    facts = (
        *facts,
        inside(SETTING, "POLARS_OOMKILL_THRESHOLD", "the word by which a notebook sets this limit"),
    )
    return make(context, CauseKind.ABORT, summary, Confidence.CERTAIN, facts, advice)
