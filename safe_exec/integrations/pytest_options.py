"""The options of the pytest plugin, and their values for one run of pytest.

pytest imports this module at every start, so costly imports happen inside functions.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from safe_exec.limits.spec import OPTIONS

if TYPE_CHECKING:
    from safe_exec.cli.options.inputs import InputOptions
    from safe_exec.cli.options.limits import WallOptions
    from safe_exec.cli.options.outputs import OutputOptions
    from safe_exec.notebook.comparison import ComparisonRules
    from safe_exec.notebook.inputs import NotebookInputs
    from safe_exec.notebook.output_form import OutputForm
    from safe_exec.workflows.library_coverage import CoverageRequest
    from safe_exec.workflows.retry import RetryPolicy

# Options of isolation that may be repeated; each has its counterpart in ``safe-exec run``.
ISOLATION = (
    ("env", "NAME"), ("show", "PATH"), ("writable", "PATH"), ("hide", "PATH"), ("device", "PATH"),
)  # fmt: skip
# Options that change notebooks before they run; each is that of `safe-exec run`.
INPUTS = (
    ("parameters", "FILE"), ("set-env", "NAME=VALUE"), ("env-file", "FILE"), ("skip-tag", "TAG"),
    ("only-tag", "TAG"), ("sanitize-with", "FILE"), ("keep-files", "PATTERN"),
)  # fmt: skip


def _number(
    kind: Callable[[str], float], least: float, most: float | None = None
) -> Callable[[str], float]:
    """Return a parser of a number within bounds, for argparse."""
    bounds = f"from {least}" if most is None else f"from {least} to {most}"
    expected = f"expected {'a whole number' if kind is int else 'a number'} {bounds}"

    def parse(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{expected}, found {text!r}") from None
        # Written so that NaN is refused.
        if not least <= number <= (number if most is None else most):
            raise argparse.ArgumentTypeError(f"{expected}, found {text}")
        return number

    return parse


def add_options(parser: pytest.Parser) -> None:
    """Register the options; they cost nothing without ``--safe-exec``."""
    group = parser.getgroup("safe-exec", "notebooks inside limits (safe-exec)")
    group.addoption(
        "--safe-exec", action="store_true", help="Run each notebook as a test, inside limits."
    )
    group.addoption(
        "--safe-exec-limits",
        metavar="NAME|FILE",
        help="A profile (default, ci, strict, untrusted) or a YAML file of your own.",
    )
    for row in OPTIONS:
        group.addoption(
            f"--safe-exec-{row.option}",
            dest=f"safe_exec_limit_{row.name}",
            metavar=row.metavar,
            help=f"As `safe-exec run --{row.option}`.",
        )
    for name, metavar in ISOLATION:
        group.addoption(
            f"--safe-exec-{name}",
            action="append",
            default=[],
            metavar=metavar,
            help=f"As `safe-exec run --{name}`; may be repeated.",
        )
    for name in ("parameter", "raw-parameter"):
        group.addoption(
            f"--safe-exec-{name}",
            action="append",
            nargs=2,
            default=[],
            metavar=("NAME", "VALUE"),
            help=f"As `safe-exec run --{name}`; may be repeated.",
        )
    for name, metavar in INPUTS:
        group.addoption(
            f"--safe-exec-{name}",
            action="append",
            default=[],
            metavar=metavar,
            help=f"As `safe-exec run --{name}`; may be repeated.",
        )
    for name in ("compare", "compare-lax"):
        group.addoption(
            f"--safe-exec-{name}", action="store_true", help=f"As `safe-exec run --{name}`."
        )
    group.addoption(
        "--safe-exec-compare-tolerance",
        type=_number(float, 0),
        metavar="X",
        help="As `safe-exec run --compare-tolerance`.",
    )
    group.addoption(
        "--safe-exec-compare-images",
        type=_number(int, 0, 64),
        metavar="N",
        help="As `safe-exec run --compare-images`.",
    )
    group.addoption("--safe-exec-until", metavar="CELL", help="As `safe-exec run --until`.")
    group.addoption(
        "--safe-exec-exit-is",
        choices=("success", "error"),
        default="success",
        help="The result of a notebook that calls sys.exit(0) [success].",
    )
    group.addoption(
        "--safe-exec-strict-shell",
        action="store_true",
        help="As `safe-exec run --strict-shell`.",
    )
    group.addoption("--safe-exec-stdin", metavar="FILE", help="As `safe-exec run --stdin`.")
    for name in ("in-place", "clean-metadata", "no-output"):
        group.addoption(
            f"--safe-exec-{name}", action="store_true", help=f"As `safe-exec run --{name}`."
        )
    group.addoption(
        "--safe-exec-coverage",
        action="store_true",
        help="As `safe-exec run --coverage`; pytest-cov includes the data in its report.",
    )
    group.addoption(
        "--safe-exec-repeat",
        type=_number(int, 1, 1000),
        default=1,
        metavar="N",
        help="As `safe-exec run --repeat`.",
    )
    group.addoption(
        "--safe-exec-retries",
        type=_number(int, 0, 10),
        metavar="N",
        help="As `safe-exec run --retries`.",
    )
    group.addoption("--safe-exec-retry-on", metavar="REGEX", help="As `safe-exec run --retry-on`.")
    group.addoption(
        "--safe-exec-follow",
        action="store_true",
        help="Print the output of cells while they run; pytest shows it with -s, or if they fail.",
    )
    group.addoption(
        "--safe-exec-on-failure",
        choices=("keep", "write"),
        help="As `safe-exec run --on-failure` [keep].",
    )
    group.addoption(
        "--safe-exec-network",
        action="store_true",
        default=None,
        help="As `safe-exec run --network`.",
    )
    group.addoption(
        "--safe-exec-no-network",
        dest="safe_exec_network",
        action="store_false",
        help="As `safe-exec run --no-network`.",
    )
    group.addoption(
        "--safe-exec-read-only", action="store_true", help="As `safe-exec run --read-only`."
    )
    group.addoption(
        "--safe-exec-cwd", metavar="DIR", help="Run in this directory [each notebook's own]."
    )
    group.addoption(
        "--safe-exec-kernel",
        metavar="NAME",
        help="Run the notebooks of its language with this kernel instead of their own.",
    )
    group.addoption(
        "--safe-exec-kernel-fallback",
        choices=("language", "never"),
        default="language",
        help="As `safe-exec run --kernel-fallback` [language].",
    )
    group.addoption(
        "--safe-exec-require", metavar="LIMIT,...", help="As `safe-exec run --require`."
    )
    group.addoption(
        "--safe-exec-keep-going", action="store_true", help="As `safe-exec run --keep-going`."
    )
    group.addoption("--safe-exec-locals", action="store_true", help="As `safe-exec run --locals`.")
    group.addoption(
        "--safe-exec-no-bisect",
        action="store_true",
        help="Do not search for the culprits of a failure.",
    )
    group.addoption(
        "--safe-exec-bisect-budget", metavar="T", help="Time that the search may take (60s)."
    )
    group.addoption(
        "--safe-exec-out",
        metavar="DIR",
        help="Keep annotated notebook and verdict of every notebook here [of those that fail, in pytest's cache directory].",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The values of the options."""

    out: Path
    # Documents of passed notebooks are kept too.
    keeps: bool
    limits: str | None = None
    options: dict[str, str] = field(default_factory=dict)
    walls: dict[str, Any] = field(default_factory=dict)
    inputs: NotebookInputs
    form: OutputForm
    retry: RetryPolicy
    comparison: ComparisonRules | None = None
    repeat: int = 1
    keep_files: tuple[str, ...] = ()
    coverage: CoverageRequest | None = None
    follow: bool = False
    variables: dict[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    kernel: str | None = None
    kernel_fallback: str = "language"
    require: str | None = None
    keep_going: bool = False
    with_locals: bool = False
    bisect: str = "auto"
    bisect_budget: float | None = None


def settings_of(config: pytest.Config) -> Settings:
    """Read the options. Raises UsageError, LimitsError and PlatformError."""
    from safe_exec.platforms import refuse_elsewhere

    # Before the imports below, which fail on other systems.
    refuse_elsewhere()
    from safe_exec.cli.options.inputs import comparison_of, inputs_of, variables_of, walls_with
    from safe_exec.cli.options.job import parse_budget
    from safe_exec.cli.options.limits import walls_of
    from safe_exec.cli.options.outputs import form_of
    from safe_exec.cli.options.retries import RetryOptions, retry_of

    values = {row.name: config.getoption(f"safe_exec_limit_{row.name}") for row in OPTIONS}
    options = {name: value for name, value in values.items() if value is not None}
    if "output" in options:
        # The command applies the same rule.
        options.setdefault("cell_output", options["output"])
    out = config.getoption("safe_exec_out")
    input_options, output_options = _input_options(config), _output_options(config)
    variables = variables_of(input_options)
    return Settings(
        out=_directory(config, out),
        keeps=out is not None,
        limits=_checked(
            config.getoption("safe_exec_limits"), options, config.getoption("safe_exec_require")
        ),
        options=options,
        walls=walls_with(walls_of(_isolation_options(config), prefix="--safe-exec-"), variables),
        # Lenient: in a folder of notebooks, some have no cell with a given tag.
        inputs=inputs_of(input_options, lenient=True),
        comparison=comparison_of(input_options, "--safe-exec-"),
        retry=retry_of(
            RetryOptions(
                retries=config.getoption("safe_exec_retries"),
                retry_on=config.getoption("safe_exec_retry_on"),
            ),
            "--safe-exec-",
        ),
        repeat=config.getoption("safe_exec_repeat"),
        keep_files=tuple(output_options.keep_files),
        coverage=_coverage(config),
        follow=config.getoption("safe_exec_follow"),
        form=form_of(output_options, "--safe-exec-"),
        variables=variables,
        cwd=_working_directory(config.getoption("safe_exec_cwd"), config.invocation_params.dir),
        kernel=config.getoption("safe_exec_kernel"),
        kernel_fallback=config.getoption("safe_exec_kernel_fallback"),
        require=config.getoption("safe_exec_require"),
        keep_going=config.getoption("safe_exec_keep_going"),
        with_locals=config.getoption("safe_exec_locals"),
        bisect="never" if config.getoption("safe_exec_no_bisect") else "auto",
        bisect_budget=parse_budget(
            config.getoption("safe_exec_bisect_budget"), "--safe-exec-bisect-budget"
        ),
    )


def _coverage(config: pytest.Config) -> CoverageRequest | None:
    """Return the request to measure coverage, or ``None`` if the user made none.

    Raises UsageError if the package coverage is not installed.
    """
    if not config.getoption("safe_exec_coverage"):
        return None
    from safe_exec.workflows.library_coverage import CoverageRequest, config_in, demand_coverage

    demand_coverage("--safe-exec-coverage")
    folder = config.invocation_params.dir
    if not config.pluginmanager.hasplugin("_cov"):
        return CoverageRequest(folder=folder)
    # pytest-cov combines all data files beside its own, which have to be of the same kind.
    source = [part for part in config.getoption("cov_source", None) or () if part is not True]
    own_config = folder / str(config.getoption("cov_config", None) or ".coveragerc")
    return CoverageRequest(
        folder=folder,
        config=own_config if own_config.is_file() else config_in(folder),
        searches=False,
        source=tuple(source) or None,
        branch=config.getoption("cov_branch", None) or None,
    )


def _isolation_options(config: pytest.Config) -> WallOptions:
    from safe_exec.cli.options.limits import WallOptions

    def paths(name: str) -> tuple[str, ...]:
        return tuple(config.getoption(f"safe_exec_{name}"))

    return WallOptions(
        network=config.getoption("safe_exec_network"),
        read_only=config.getoption("safe_exec_read_only"),
        show=paths("show"),
        writable=paths("writable"),
        hide=paths("hide"),
        env_names=paths("env"),
        devices=paths("device"),
    )


def _input_options(config: pytest.Config) -> InputOptions:
    from safe_exec.cli.options.inputs import InputOptions

    # Relative to the directory of the command, not to pytest's root directory.
    base = config.invocation_params.dir

    def files(name: str) -> list[Path]:
        return [base / path for path in config.getoption(f"safe_exec_{name}")]

    stdin = config.getoption("safe_exec_stdin")
    return InputOptions(
        parameters=config.getoption("safe_exec_parameter"),
        raw_parameters=config.getoption("safe_exec_raw_parameter"),
        parameter_files=files("parameters"),
        set_env=config.getoption("safe_exec_set_env"),
        env_files=files("env_file"),
        skip_tags=config.getoption("safe_exec_skip_tag"),
        only_tags=config.getoption("safe_exec_only_tag"),
        until=config.getoption("safe_exec_until"),
        compare=config.getoption("safe_exec_compare"),
        compare_lax=config.getoption("safe_exec_compare_lax"),
        sanitizers=files("sanitize_with"),
        tolerance=config.getoption("safe_exec_compare_tolerance"),
        image_distance=config.getoption("safe_exec_compare_images"),
        exit_is=config.getoption("safe_exec_exit_is"),
        strict_shell=config.getoption("safe_exec_strict_shell"),
        stdin=base / stdin if stdin is not None else None,
    )


def _output_options(config: pytest.Config) -> OutputOptions:
    from safe_exec.cli.options.outputs import OutputOptions

    return OutputOptions(
        in_place=config.getoption("safe_exec_in_place"),
        on_failure=config.getoption("safe_exec_on_failure"),
        clean_metadata=config.getoption("safe_exec_clean_metadata"),
        no_output=config.getoption("safe_exec_no_output"),
        keep_files=config.getoption("safe_exec_keep_files"),
    )


def _working_directory(text: str | None, base: Path) -> Path | None:
    """Return the working directory for all notebooks. Raises UsageError."""
    from safe_exec.errors import UsageError

    if text is None:
        return None
    directory = base / text
    if not directory.is_dir():
        raise UsageError(f"{directory}: no such directory to run in (--safe-exec-cwd)")
    return directory


def _checked(limits: str | None, options: dict[str, str], require: str | None) -> str | None:
    """Check the limits, and return the profile or an absolute path. Raises LimitsError."""
    # Absolute, because other tests may change the working directory.
    from safe_exec.cli.options.job import check_limits
    from safe_exec.limits import profiles

    profile = check_limits(limits, options, require, "--safe-exec-")
    if profile is None:
        return None
    # A name stays a name, so that errors and the header show the user's own word.
    return limits if profile.path.parent == profiles.profile_dir() else str(profile.path.absolute())


def _directory(config: pytest.Config, out: str | None) -> Path:
    """Return the directory for documents."""
    # Never beside the notebooks, where the next commit would include them.
    if out is not None:
        return config.invocation_params.dir / out
    if config.pluginmanager.hasplugin("cacheprovider") and config.cache is not None:
        return config.cache.mkdir("safe-exec")
    import tempfile

    return Path(tempfile.gettempdir()) / f"safe-exec-pytest-{os.getuid()}"
