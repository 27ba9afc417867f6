"""``safe-exec kernelspec``: install a kernel for Jupyter tools that always runs inside limits.

Its command is `safe-exec kernel`. With --provisioner it keeps its own command, and jupyter_client
starts it through safe-exec's provisioner.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from msgspec import Struct

from safe_exec.cli.options.group import option_group
from safe_exec.cli.options.limits import (
    Figures,
    WallOptions,
    figure_arguments,
    limit_options,
    wall_options,
    walls_of,
)
from safe_exec.errors import OutputPathError, UsageError
from safe_exec.limits import spec
from safe_exec.model.limits import LimitName, Limits

if TYPE_CHECKING:
    from jupyter_client.kernelspec import KernelSpecManager

PROVISIONER = "safe-exec"

# The key of the metadata that marks a kernelspec of ours, with the name of the inner kernel.
METADATA_KEY = "safe_exec"

OF_SESSION = tuple(row for row in spec.OPTIONS if row.of_session)
BY_PROVISIONER = tuple(row for row in spec.OPTIONS if row.by_provisioner)
# jupyter_client's rule for names, in the lower case in which it stores them.
_NAME = re.compile(r"[a-z0-9._-]+")

# The end of a display name that describes the kernel, not the language.
_ADDED = re.compile(r"\s*\((?:ipykernel|safe-exec: [^()]*)\)$")


@click.group(
    "kernelspec", short_help="Install a kernel that always runs inside limits, for Jupyter clients."
)
def command() -> None:
    """Install a kernel for JupyterLab, VS Code and others that always runs inside limits."""


class SessionOptions(Struct, frozen=True, kw_only=True):
    """The options that the kernelspec passes on to `safe-exec kernel`, besides the limits."""

    require: str | None = None
    on_death: str | None = None
    restore: bool = False
    no_history: bool = False

    def arguments(self) -> list[str]:
        """Return the arguments of `safe-exec kernel` with the same effect."""
        argv = ["--require", self.require] if self.require else []
        argv += ["--on-death", self.on_death] if self.on_death else []
        argv += ["--restore"] if self.restore else []
        return [*argv, *(["--no-history"] if self.no_history else [])]


session_options = option_group(
    "session",
    SessionOptions,
    (
        click.option(
            "--require", metavar="LIMIT,...", help="Refuse to start unless these are enforced."
        ),
        click.option(
            "--on-death",
            type=click.Choice(["exit", "restart"]),
            help="After the kernel died: end, or start a fresh one at once [exit].",
        ),
        click.option(
            "--restore",
            is_flag=True,
            help="After the kernel died, go on with the variables from before the cell, if possible.",
        ),
        click.option("--no-history", is_flag=True, help="Do not record sessions."),
    ),
)


@command.command("install", short_help="Install a kernelspec that carries limits.")
@click.option(
    "--limits",
    default="default",
    metavar="NAME|FILE",
    help="A profile or a YAML file of your own [default].",
)
@limit_options(OF_SESSION)
@wall_options
@session_options
@click.option(
    "--provisioner",
    is_flag=True,
    help="Limits by jupyter_client's provisioner alone: no isolation, cell times, or diagnosis.",
)
@click.option(
    "--kernel",
    default="python3",
    metavar="NAME",
    help="The kernel that is to run inside limits [python3].",
)
@click.option("--name", metavar="NAME", help="What tools call it [KERNEL-safe-exec-LIMITS].")
@click.option(
    "--display-name", metavar="TEXT", help="What people see [Python 3 (safe-exec: LIMITS)]."
)
@click.option(
    "--user",
    is_flag=True,
    help="For this user, in every environment [outside of virtual environments].",
)
@click.option("--sys-prefix", is_flag=True, help="For this virtual environment [inside of one].")
@click.option("--prefix", type=click.Path(path_type=Path), help="Below PREFIX/share/jupyter.")
def install(
    *,
    limits: str,
    figures: Figures,
    walls: WallOptions,
    session: SessionOptions,
    provisioner: bool,
    kernel: str,
    name: str | None,
    display_name: str | None,
    user: bool,
    sys_prefix: bool,
    prefix: Path | None,
) -> int:
    """Install a copy of a kernelspec whose kernels run inside limits, whatever starts them.

    Its command starts `safe-exec kernel` from this environment; the environment of the kernel needs
    no safe-exec. An existing kernelspec of this name is replaced if safe-exec wrote it. `jupyter
    kernelspec remove NAME` removes it.
    """
    # Paths that do not exist are an error here, and not when a client starts the kernel.
    changes_of_walls = walls_of(walls)
    if provisioner:
        _refuse_beside_provisioner(figures, changes_of_walls, session)
    config, effective = _configured(limits, figures)
    from jupyter_client.kernelspec import KernelSpecManager

    # Imported late: jupyter_client takes longer than the whole help text.
    manager = KernelSpecManager()
    folder, document = _of_kernel(manager, kernel)
    # People choose by this name, so it shows the profile and the limits that differ from it.
    changes = [Path(limits).stem, *(f"{key.replace('_', '-')} {figures[key]}" for key in figures)]
    document["display_name"] = (
        display_name
        or f"{_ADDED.sub('', document['display_name'])} (safe-exec: {', '.join(changes)})"
    )
    metadata = document["metadata"] = dict(document.get("metadata") or {})
    if provisioner:
        metadata["kernel_provisioner"] = {"provisioner_name": PROVISIONER, "config": config}
    else:
        # Our command is a plain process without CurveZMQ, whatever the original kernel needs.
        for key in ("kernel_provisioner", "supported_encryption"):
            metadata.pop(key, None)
        metadata[METADATA_KEY] = {"kernel": kernel}
        document["argv"] = _command(kernel, config, walls, session)
    chosen = _checked_name(
        name or f"{kernel}-safe-exec-{re.sub('[^a-z0-9._-]+', '-', Path(limits).stem.lower())}"
    )
    place = _place(user, sys_prefix, prefix)
    # Checked before anything is written.
    _refuse_to_replace(place / chosen)
    try:
        _install(manager, folder, document, chosen, place)
    except OSError as error:
        raise OutputPathError(
            f"{place / chosen}: cannot be written: {error.strerror}; choose with --user or --prefix"
        ) from None
    _print_summary(
        document["display_name"],
        chosen,
        place / chosen,
        effective,
        all_of=not provisioner,
    )
    return 0


def _refuse_beside_provisioner(
    figures: Figures, walls: Mapping[str, object], session: SessionOptions
) -> None:
    """Raise UsageError for options that the provisioner alone cannot enforce."""
    wrong = [name for name in figures if not spec.SPECS[name].by_provisioner] + list(walls)
    names = [f"--{name.replace('_', '-')}" for name in wrong]
    names += [word for word in session.arguments() if word.startswith("--")]
    if names:
        raise UsageError(
            f"--provisioner: it cannot enforce {', '.join(names)}; leave --provisioner out"
        )


def _command(
    kernel: str, config: Mapping[str, str], walls: WallOptions, session: SessionOptions
) -> list[str]:
    """Return the command of the kernelspec."""
    return [
        # -P: the client starts it in the notebook's folder, whose modules must not replace ours.
        *(sys.executable, "-P", "-m", "safe_exec", "kernel"),
        # The client substitutes the connection file in every argument list.
        *("-f", "{connection_file}", "--kernel", kernel),
        *figure_arguments(config),
        # The client may start it in any directory.
        *walls.absolute().arguments(),
        *session.arguments(),
    ]


def _configured(limits: str, own: Mapping[str, str]) -> tuple[dict[str, str], Limits]:
    """Return the provisioner's configuration and the resulting limits. Raises LimitsError."""
    from safe_exec.limits import profiles
    from safe_exec.sandbox.host.capabilities import detect

    memory = detect().memory_total
    profile = profiles.load_profile(limits, machine_memory=memory)
    shipped = profile.path.parent == profiles.profile_dir()
    # A server may read the file from any directory.
    config = {"limits": limits if shipped else str(profile.path.absolute()), **own}
    # Read exactly as the provisioner will, so that errors appear now.
    return config, profiles.resolve_simple(config, None, machine_memory=memory)


def _of_kernel(manager: KernelSpecManager, kernel: str) -> tuple[Path, dict[str, Any]]:
    """Return the folder and the document of an installed kernelspec. Raises UsageError."""
    from jupyter_client.kernelspec import NoSuchKernel

    try:
        spec = manager.get_kernel_spec(kernel)
    except NoSuchKernel:
        names = sorted(manager.find_kernel_specs())
        raise UsageError(
            f"no kernel named {kernel!r} is installed; installed: {', '.join(names) or 'none'} (choose with --kernel)"
        ) from None
    return Path(spec.resource_dir), spec.to_dict()


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"--name {name!r}: a kernel's name has a-z, 0-9, dot, dash and underscore only"
        )
    return name


def _place(user: bool, sys_prefix: bool, prefix: Path | None) -> Path:
    """Return the directory for the kernelspec. Raises UsageError."""
    from jupyter_core.paths import jupyter_data_dir

    # Three switches for one place would contradict each other silently.
    if user + sys_prefix + (prefix is not None) > 1:
        raise UsageError(
            "--user, --sys-prefix and --prefix exclude each other: a kernelspec goes to one place"
        )
    # In a virtual environment, tools of the same environment find the kernel.
    in_environment = sys.prefix != sys.base_prefix
    if user or (not sys_prefix and prefix is None and not in_environment):
        return Path(jupyter_data_dir()) / "kernels"
    return (prefix or Path(sys.prefix)).absolute() / "share" / "jupyter" / "kernels"


def _refuse_to_replace(path: Path) -> None:
    """Raise OutputPathError if safe-exec did not write an existing kernelspec of this name."""
    try:
        document = json.loads((path / "kernel.json").read_bytes())
        metadata = document["metadata"]
        ours = (
            METADATA_KEY in metadata
            or metadata["kernel_provisioner"]["provisioner_name"] == PROVISIONER
        )
    except FileNotFoundError:
        ours = not path.exists()
    except (OSError, ValueError, KeyError, TypeError):
        # An unreadable kernelspec may be somebody's work: it is not replaced.
        ours = False
    if not ours:
        raise OutputPathError(
            f"{path}: there is another kernelspec of this name; choose another --name, or remove it first"
        )


def _install(
    manager: KernelSpecManager, folder: Path, document: Mapping[str, Any], name: str, place: Path
) -> None:
    import shutil

    # jupyter_client installs whole folders. The copy keeps the logos of the original.
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / name
        if folder.is_dir():
            shutil.copytree(folder, copy)
        else:
            copy.mkdir()
        (copy / "kernel.json").write_text(json.dumps(document, indent=1) + "\n")
        # jupyter_client takes PREFIX, and appends share/jupyter/kernels.
        prefix = place.parent.parent.parent
        if place == prefix / "share" / "jupyter" / "kernels":
            manager.install_kernel_spec(str(copy), name, prefix=str(prefix))
        else:
            manager.install_kernel_spec(str(copy), name, user=True)


def _print_summary(
    display_name: str, name: str, path: Path, limits: Limits, *, all_of: bool
) -> None:
    from safe_exec.limits.profiles import format_limit

    figures = [
        f"{row.name.replace('_', ' ')} {format_limit(row.name, value)}"
        for row in (OF_SESSION if all_of else BY_PROVISIONER)
        if (value := limits.of(LimitName(row.name))) is not None
    ]
    click.echo(f"{display_name}: installed as {name}")
    click.echo(f"  in        {path}")
    click.echo(f"  limits    {', '.join(figures) or 'none of these is set'}")
    if all_of:
        click.echo("  started   by its command: JupyterLab, VS Code, consoles, nbclient, papermill")
    else:
        click.echo("  not here  cell times, output, disk, isolation, diagnosis (--provisioner)")
    click.echo(f"  remove    jupyter kernelspec remove {name}")
