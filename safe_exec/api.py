"""The Python interface: run one notebook and return its verdict, like the command line."""

from __future__ import annotations

import asyncio
import difflib
import inspect
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

from safe_exec.errors import UsageError
from safe_exec.limits import isolation
from safe_exec.limits.spec import SPECS
from safe_exec.model.events import EventSink
from safe_exec.model.limits import Limits
from safe_exec.model.verdict import Verdict
from safe_exec.notebook import kernel_choice, output_form
from safe_exec.notebook.inputs import CellSelection, NotebookInputs, exit_meaning, read_stdin
from safe_exec.notebook.output_form import OutputForm
from safe_exec.workflows.job import Bisect, Job
from safe_exec.workflows.library_coverage import CoverageRequest
from safe_exec.workflows.retry import retry_policy, run_with_retries
from safe_exec.workflows.run import OutputListener

if TYPE_CHECKING:
    from safe_exec.notebook.comparison import ComparisonRules
    from safe_exec.notebook.literals import Value

P = ParamSpec("P")


async def run_async(
    path: str | os.PathLike[str],
    *,
    limits: str | Limits | None = None,
    options: Mapping[str, object] | None = None,
    output: str | os.PathLike[str] | None = None,
    verdict: str | os.PathLike[str] | None = None,
    repro: str | os.PathLike[str] | None = None,
    kernel: str | None = None,
    kernel_fallback: str = "language",
    cwd: str | os.PathLike[str] | None = None,
    allow_errors: bool = False,
    keep_going: bool = False,
    with_locals: bool = False,
    require: str | None = None,
    mechanisms: Sequence[str] | None = None,
    env: Mapping[str, str] | None = None,
    walls: Mapping[str, object] | None = None,
    parameters: Mapping[str, Value] | None = None,
    skip_tags: Sequence[str] = (),
    only_tags: Sequence[str] = (),
    until: str | int | None = None,
    exit_is: str = "success",
    strict_shell: bool = False,
    stdin: str | os.PathLike[str] | None = None,
    comparison: ComparisonRules | None = None,
    in_place: bool = False,
    on_failure: str = "keep",
    clean_metadata: bool = False,
    no_output: bool = False,
    keep_files: Sequence[str] = (),
    coverage: bool = False,
    repeat: int = 1,
    retries: int | None = None,
    retry_on: str | None = None,
    bisect: str = "auto",
    bisect_budget: float | None = None,
    on_event: EventSink | None = None,
    on_output: OutputListener | None = None,
) -> Verdict:
    """Run one notebook inside its limits, write its documents, and return the verdict.

    ``limits`` is the name of a profile, the path of a limits file, or a :class:`Limits` (instead of
    any profile). ``options`` are single limits by name (``{"memory": "512M", "cell_timeout":
    30}``), which override everything else. ``output``, ``verdict`` and ``repro`` default to
    ``NB.out.ipynb``, ``NB.verdict.json`` and ``NB.repro.ipynb`` (written if culprits were found)
    beside the notebook. ``kernel`` overrides the notebook's own; if that is not installed, one of the
    same language runs the notebook, unless ``kernel_fallback`` is ``"never"``. ``cwd``
    overrides its folder as working directory. ``require`` names limits that the operating system must enforce
    (``"memory,processes"`` or ``"all"``). ``mechanisms`` allows only some of ``cgroup-v2``,
    ``cgroup-v1``, ``rlimit``, ``watchdog``, ``bubblewrap``, ``landlock`` and ``seccomp``. ``walls``
    are the keys of a file's ``isolation`` section (``{"network": False, "hide": ["/srv/data"]}``)
    and override the profile; paths begin with ``/`` or ``~``. ``parameters`` are set in a new cell,
    as papermill does. ``skip_tags``, ``only_tags`` and ``until`` (a number from 1, an id or a tag)
    select the code cells to run. ``keep_going`` continues behind each failure and lists all of them
    in ``failures``. ``with_locals`` adds local variables, masked, to the native stack of a crash.
    ``exit_is="error"`` makes ``sys.exit(0)`` an error of its cell;
    otherwise it ends the notebook as passed. ``strict_shell`` makes a failing ``!command`` an error of
    its cell; the lines of the file ``stdin`` answer ``input()``. ``in_place`` writes the executed notebook over the notebook
    itself if it passes, and with ``on_failure="write"`` always; ``clean_metadata`` leaves times and
    figures out of it, ``no_output`` the outputs. Files that match a pattern
    of ``keep_files`` come back from a private copy of the folder. ``coverage`` records which library
    code ran; ``verdict.outputs["coverage"]`` is the data file. A notebook that fails runs
    again up to ``retries`` times if that may help, or if its error matches the regular expression
    ``retry_on`` (then twice by default). ``repeat`` is the number of runs; cells whose
    results differ are in ``verdict.flaky_cells``. ``bisect`` is ``"auto"``, ``"always"`` or ``"never"``:
    whether a culprit search follows a failure; ``bisect_budget`` is its time limit in seconds
    (``None``: 60, or three times the first run). ``on_event`` is called with each event, ``on_output``
    with each text that a cell writes (index of the cell, stream, text).

    A failing notebook yields a verdict, not an exception. Raises UsageError (and its kinds
    NotebookError, LimitsError, OutputPathError) for unusable input, before anything is written.
    ``run`` returns the verdict and must not be called from a running event loop: await
    ``run_async`` there, which has the same arguments.
    """
    _demand_kinds(
        limits=limits,
        options=options,
        parameters=parameters,
        skip_tags=skip_tags,
        only_tags=only_tags,
        keep_files=keep_files,
    )
    job = Job(
        path=Path(path),
        limits=limits,
        options=options or {},
        output=Path(output) if output is not None else None,
        verdict=Path(verdict) if verdict is not None else None,
        repro=Path(repro) if repro is not None else None,
        kernel=kernel,
        kernel_fallback=kernel_choice.kernel_fallback(kernel_fallback),
        cwd=Path(cwd) if cwd is not None else None,
        allow_errors=allow_errors,
        keep_going=keep_going,
        with_locals=with_locals,
        require=require,
        mechanisms=tuple(mechanisms) if mechanisms is not None else None,
        env=env,
        # Checked here, so that errors name the parameter and not a file.
        walls=isolation.of_mapping(walls or {}, "walls"),
        inputs=NotebookInputs(
            parameters=parameters or {},
            selection=CellSelection(
                skip_tags=tuple(skip_tags),
                only_tags=tuple(only_tags),
                # A number is the position of a code cell, as on the command line.
                until=None if until is None else str(until),
            ),
            exit_is=exit_meaning(exit_is),
            strict_shell=strict_shell,
            stdin=None if stdin is None else read_stdin(Path(stdin)),
        ),
        comparison=comparison,
        form=OutputForm(
            in_place=in_place,
            on_failure=output_form.on_failure(on_failure),
            clean_metadata=clean_metadata,
            no_output=no_output,
        ),
        keep_files=tuple(keep_files),
        coverage=CoverageRequest(folder=Path.cwd()) if coverage else None,
        repeat=repeat,
        bisect=_bisect(bisect),
        bisect_budget=bisect_budget,
        sinks=(on_event,) if on_event is not None else (),
    )
    policy = retry_policy(retries, retry_on, "retry_on")
    return await run_with_retries(job, policy, on_output=on_output)


def _blocking(
    function: Callable[P, Coroutine[Any, Any, Verdict]], name: str
) -> Callable[P, Verdict]:
    """Return a function with the same arguments that runs its own event loop."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Verdict:
        _refuse_a_running_loop()
        _refuse_unknown(kwargs)
        return asyncio.run(function(*args, **kwargs))

    call.__name__ = call.__qualname__ = name
    return call


def _refuse_unknown(arguments: Mapping[str, object]) -> None:
    """Raise TypeError for an unknown argument; Python's own message would name ``run_async``."""
    parameters = inspect.signature(run_async).parameters
    for name in arguments:
        if name in SPECS:
            if name not in parameters:
                raise TypeError(f"run() has no argument {name!r}: write options={{{name!r}: ...}}")
        elif name not in parameters:
            near = difflib.get_close_matches(name, (*parameters, *SPECS), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"run() has no argument {name!r}{hint}")


def _refuse_a_running_loop() -> None:
    try:
        asyncio.get_running_loop()
    # asyncio offers no other way to ask; without a loop it raises.
    except RuntimeError:
        return
    raise RuntimeError(
        "safe_exec.run() cannot be called from a running event loop; await safe_exec.run_async() instead"
    )


# Arguments and their documentation stand in one place, above.
run = _blocking(run_async, "run")


def _demand_kinds(
    *,
    limits: object,
    options: object,
    parameters: object,
    skip_tags: object,
    only_tags: object,
    keep_files: object,
) -> None:
    """Raise UsageError for an argument whose type is easily mistaken."""
    if limits is not None and not isinstance(limits, str | Limits):
        raise UsageError(
            f"limits: expected a profile, a file or Limits, found {type(limits).__name__};"
            " single limits are options={'memory': '1G'}"
        )
    for name, value in (("options", options), ("parameters", parameters)):
        if value is not None and not isinstance(value, Mapping):
            raise UsageError(
                f"{name}: expected names with values, such as {{'name': 1}}, found {type(value).__name__}"
            )
    for name, value in (
        ("skip_tags", skip_tags),
        ("only_tags", only_tags),
        ("keep_files", keep_files),
    ):
        # A text is a sequence too, of letters.
        if isinstance(value, str):
            raise UsageError(f"{name}: expected a list of texts, such as [{value!r}]")


def _bisect(word: str) -> Bisect:
    try:
        return Bisect(word)
    except ValueError:
        raise UsageError(f"bisect: {word!r} is none of {', '.join(Bisect)}") from None
