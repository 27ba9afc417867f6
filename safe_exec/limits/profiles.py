"""Resolve the limits of a run from profiles, project file, own file, notebook and options.

Pure except for reading the named files. PyYAML is imported for the first file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from msgspec import Struct, field

from safe_exec.errors import LimitsError
from safe_exec.files import one_line
from safe_exec.limits import isolation
from safe_exec.limits.project_file import PROJECT_FILE, ProjectLimits, find_project_file
from safe_exec.limits.project_file import project_overrides as _project_overrides
from safe_exec.limits.spec import ROWS
from safe_exec.limits.values import (
    LIMIT_NAMES,
    Figure,
    Layer,
    apply,
    format_limit,
    ignored_warning,
    merge_notebook_limits,
    nearest,
    parse_layer,
    parse_overrides,
    tighten,
)
from safe_exec.limits.yaml_source import Value, load
from safe_exec.model.limits import Isolation, Limits

__all__ = [
    "CELL_LIMITS",
    "DEFAULT_PROFILE",
    "LIMIT_NAMES",
    "PROJECT_FILE",
    "Figure",
    "Layer",
    "Profile",
    "ProjectLimits",
    "Resolved",
    "apply",
    "cell_limits",
    "find_project_file",
    "format_limit",
    "load_profile",
    "merge_notebook_limits",
    "parse_overrides",
    "profile_dir",
    "project_overrides",
    "resolve",
    "resolve_simple",
    "shipped_profiles",
    "tighten",
]

DEFAULT_PROFILE = "default"

# The limits that a single cell may set; the others apply to a process or to the whole run.
CELL_LIMITS = frozenset(row.name for row in ROWS if row.of_cell)


class Profile(Struct, frozen=True, kw_only=True):
    """A named set of limits."""

    name: str
    limits: Limits
    # The notebook's own metadata may loosen the limits.
    loosenable: bool
    # A safe-exec.yaml may not loosen the limits if the user has named this profile.
    firm: bool
    path: Path
    description: str
    isolation: Isolation = field(default_factory=Isolation)


class Resolved(Struct, frozen=True, kw_only=True):
    """The limits of one run."""

    limits: Limits
    profile: str
    warnings: tuple[str, ...]
    # The origin of each limit, for reports.
    sources: Mapping[str, str]
    # Cells may loosen their own limits, except those in ``fixed``, which options have set.
    loosenable: bool
    fixed: frozenset[str]
    # Up to this, in seconds, notebook and cells may set a cell timeout under every profile.
    longest_cell_timeout: float | None = None
    isolation: Isolation = field(default_factory=Isolation)


class _Document(Struct, frozen=True, kw_only=True):
    """One limits file, without the file that it extends."""

    name: str
    path: Path
    shipped: bool
    description: str
    extends: str | None
    firm: bool
    layer: Layer
    isolation: Mapping[str, Any]


_SECTIONS = ("description", "extends", "firm", "limits", "isolation")


# --- profiles -------------------------------------------------------------------------------------


@cache
def profile_dir() -> Path:
    """Return the directory of the profiles that ship. Raises LimitsError."""
    package = Path(__file__).resolve().parents[1]
    # A wheel has the profiles inside the package. A checkout, which an editable install uses too,
    # has them beside it.
    for directory in (package / "_limits", package.parent / "limits"):
        if (directory / f"{DEFAULT_PROFILE}.yaml").is_file():
            return directory
    raise LimitsError(
        f"{one_line(package / '_limits')}: the profiles that ship are missing; install safe-exec again"
    )


def shipped_profiles() -> tuple[str, ...]:
    """Return the names of the profiles that ship, sorted."""
    return tuple(sorted(path.stem for path in profile_dir().glob("*.yaml")))


def load_profile(name_or_path: str, *, machine_memory: int | None) -> Profile:
    """Load the profile of that name, or the file at that path. Raises LimitsError.

    ``machine_memory`` is the reference in bytes for a memory limit such as ``"75%"``.
    """
    documents = _documents(name_or_path, machine_memory)
    if not documents[0].shipped:
        # A file that extends no profile overrides ``default``.
        documents = _documents(DEFAULT_PROFILE, machine_memory) + documents
    limits = Limits()
    for document in documents:
        limits = apply(limits, document.layer.values)
    last = documents[-1]
    return Profile(
        name=last.name,
        limits=limits,
        loosenable=_is_default(last),
        firm=any(document.firm for document in documents),
        path=last.path,
        description=last.description,
        isolation=_walls(documents, {}, "", {}),
    )


def project_overrides(
    file: Path, notebook_path: Path | str, *, machine_memory: int | None
) -> ProjectLimits | None:
    """Return the notebook's entry in ``file``; ``None`` if there is none. Raises LimitsError."""
    return _project_overrides(
        file, notebook_path, profiles=shipped_profiles(), machine_memory=machine_memory
    )


# --- the limits of one run ------------------------------------------------------------------------


def resolve(
    *,
    chosen: str | None = None,
    project: ProjectLimits | None = None,
    metadata: Mapping[str, object] | None = None,
    options: Mapping[str, object] | None = None,
    machine_memory: int | None,
    notebook: str = "notebook",
    walls: Mapping[str, Any] | None = None,
) -> Resolved:
    """Resolve the limits of one run.

    From the weakest source to the strongest:

    1. a profile that ships: ``chosen`` by name, or extended by a chosen file; else the project's,
       else ``default``;
    2. the project's ``safe-exec.yaml``, which may not loosen a firm profile that was chosen;
    3. the user's own file, if ``chosen`` names one;
    4. the notebook's ``metadata`` (``execution.timeout``, then ``safe_exec.limits``), which may
       always tighten, and loosen under the profile ``default`` only;
    5. ``options``, by limit name, which may loosen and tighten.

    Isolation follows the same order, with ``walls`` as its options; a notebook may only add walls.
    ``notebook`` names the notebook in errors and warnings. Raises LimitsError.
    """
    explicit_documents = _documents(chosen, machine_memory) if chosen else []
    # The chain of an own file ends in the profile that it extends.
    base = [document for document in explicit_documents if document.shipped]
    # Only a profile that the user has chosen is firm: the project may override its own choice.
    firm = any(document.firm for document in base)
    if not base:
        # Neither a profile nor a file based on one was chosen.
        base = _documents((project and project.profile) or DEFAULT_PROFILE, machine_memory)
    own = [document for document in explicit_documents if not document.shipped]
    top = (own or base)[-1]

    # Each later layer overrides the earlier ones.
    stack = _Stack()
    for document in base:
        stack.lay(document.layer)
    if project:
        stack.lay(project.layer, refuse=f"profile {base[-1].name} is firm" if firm else "")
    # The user has chosen this file for this run, so it overrides the project's.
    for document in own:
        stack.lay(document.layer)
    # A file based on ``default`` is somebody's decision, which a notebook must not undo.
    only_default = f"profile {top.name} does not let a notebook loosen limits"
    notebook_layer = _notebook_layer(metadata or {}, notebook, machine_memory)
    longest = project.longest_cell_timeout if project is not None else None
    timeout = notebook_layer.values.get("cell_timeout")
    if _is_within(timeout, longest):
        # The project allows this one value under every profile.
        sources = {"cell_timeout": notebook_layer.sources["cell_timeout"]}
        stack.lay(Layer(values={"cell_timeout": timeout}, sources=sources))
    stack.lay(notebook_layer, refuse="" if _is_default(top) else only_default)
    # The command line has the last word.
    option_values = parse_overrides(options or {}, error_prefix="--", machine_memory=machine_memory)
    stack.lay(
        Layer(
            values=option_values,
            sources={name: f"--{name.replace('_', '-')}" for name in option_values},
        )
    )
    return Resolved(
        limits=stack.limits,
        profile=top.name,
        warnings=tuple(stack.warnings),
        sources=stack.sources,
        loosenable=_is_default(top),
        fixed=frozenset(option_values),
        longest_cell_timeout=longest,
        isolation=_walls([*base, *own], metadata or {}, notebook, walls or {}),
    )


def _walls(
    documents: Sequence[_Document],
    metadata: Mapping[str, object],
    notebook: str,
    options: Mapping[str, Any],
) -> Isolation:
    """Merge the isolation of one run: the files, then the notebook, then the options."""
    merged = Isolation()
    for document in documents:
        merged = isolation.apply(merged, document.isolation)
    # Before the options, so that a notebook cannot override the user.
    merged = isolation.tighten(merged, isolation.of_metadata(metadata, notebook))
    return isolation.apply(merged, options)


def resolve_simple(
    config: Mapping[str, object], profile: str | None, *, machine_memory: int | None
) -> Limits:
    """Resolve the limits of a kernel that another Jupyter tool starts. Raises LimitsError.

    ``config`` is the kernel provisioner's: ``limits`` names a profile or a file, and any other key
    is a limit, as text with units, which overrides it. ``profile``, from the environment, applies
    if ``config`` names none.
    """
    chosen = config.get("limits") or profile or None
    # The configuration is JSON that users write by hand.
    if chosen is not None and not isinstance(chosen, str):
        raise LimitsError(
            f"{_PROVISIONER}: limits: expected the name of a profile or a file, found {chosen!r:.60}"
        )
    own = {key: value for key, value in config.items() if key != "limits"}
    figures = parse_overrides(own, error_prefix=_PROVISIONER, machine_memory=machine_memory)
    return apply(resolve(chosen=chosen, machine_memory=machine_memory).limits, figures)


_PROVISIONER = "kernel provisioner"


def cell_limits(
    resolved: Resolved, cell_metadata: Mapping[str, object], *, error_prefix: str
) -> tuple[Limits, tuple[str, ...]]:
    """Return the limits of one cell, with a warning for each ignored value. Raises LimitsError.

    A cell may tighten :data:`CELL_LIMITS`. Under the profile ``default`` it may loosen them too,
    and where ``safe-exec.yaml`` allows it, its timeout. It never overrides an option.
    ``error_prefix`` names notebook and cell.
    """
    cell_settings = _own_limits(cell_metadata, error_prefix)
    # Nearly every cell has none.
    if not cell_settings:
        return resolved.limits, ()
    own = parse_overrides(
        cell_settings,
        error_prefix=f"{error_prefix}: metadata.safe_exec.limits",
        machine_memory=None,
    )
    # The mechanisms of the other limits are fixed before the first cell runs.
    for name in sorted(own.keys() - CELL_LIMITS):
        allowed = " and ".join(sorted(CELL_LIMITS))
        raise LimitsError(
            f"{one_line(error_prefix)}: {name}: a cell may carry {allowed} only; set it for the notebook"
        )
    # An option applies to every cell, because the user has typed it for this run.
    free = {
        name: value
        for name, value in own.items()
        if name not in resolved.fixed
        and (
            resolved.loosenable
            or (name == "cell_timeout" and _is_within(value, resolved.longest_cell_timeout))
        )
    }
    tightened = {name: value for name, value in own.items() if name not in free}
    reason = f"profile {resolved.profile} or an option allows no more"
    return merge_notebook_limits(
        apply(resolved.limits, free),
        tightened,
        loosenable=False,
        error_prefix=error_prefix,
        reason=reason,
    )


def _is_within(seconds: Figure, longest: float | None) -> bool:
    """Tell whether the project allows a notebook to set this cell timeout."""
    return seconds is not None and longest is not None and seconds <= longest


class _Stack:
    """Merges layers, and records the origin of each limit."""

    def __init__(self) -> None:
        self.limits = Limits()
        self.sources = dict.fromkeys(LIMIT_NAMES, "built in")
        self.warnings: list[str] = []

    def lay(self, layer: Layer, *, refuse: str = "") -> None:
        """Merge ``layer`` over the lower ones.

        If ``refuse`` gives a reason, looser values are ignored, with a warning that names the
        reason.
        """
        ignored: list[str] = []
        previous = self.limits
        if refuse:
            self.limits, ignored = tighten(previous, layer.values)
        else:
            self.limits = apply(previous, layer.values)
        for name in layer.values:
            source = layer.sources[name]
            # An ignored value is a warning, and the earlier origin stays.
            if name in ignored:
                self.warnings.append(
                    ignored_warning(
                        source, name, layer.values[name], getattr(previous, name), refuse
                    )
                )
            else:
                self.sources[name] = source


def _notebook_layer(
    metadata: Mapping[str, object], notebook: str, machine_memory: int | None
) -> Layer:
    values: dict[str, Figure] = {}
    sources: dict[str, str] = {}
    execution = metadata.get("execution")
    # nbclient's own key, which many notebooks already have.
    if isinstance(execution, Mapping) and "timeout" in execution:
        error_prefix = f"{notebook}: metadata.execution.timeout"
        timeout = _nbclient_timeout(execution["timeout"])
        values |= parse_overrides(
            {"cell_timeout": timeout}, error_prefix=error_prefix, machine_memory=None
        )
        sources["cell_timeout"] = "metadata.execution.timeout"
    own = parse_overrides(
        _own_limits(metadata, notebook),
        error_prefix=f"{notebook}: metadata.safe_exec.limits",
        machine_memory=machine_memory,
    )
    return Layer(
        # Our own key is the more specific one, so it overrides nbclient's.
        values=values | own,
        sources=sources | dict.fromkeys(own, "metadata.safe_exec.limits"),
    )


def _nbclient_timeout(timeout: object) -> object:
    """Translate nbclient's timeout: 0 and negative numbers mean no timeout there."""
    # bool is a subclass of int, and ``true`` must stay an error.
    unlimited = isinstance(timeout, int | float) and not isinstance(timeout, bool) and timeout <= 0
    return None if unlimited else timeout


def _own_limits(metadata: Mapping[str, object], error_prefix: str) -> Mapping[str, object]:
    """Return ``safe_exec.limits`` of a notebook's or a cell's metadata. Raises LimitsError."""
    section = metadata
    # Metadata may contain anything; the error names the level that is wrong.
    for path in ("safe_exec", "safe_exec.limits"):
        inner = section.get(path.rpartition(".")[2])
        if inner is None:
            return {}
        if not isinstance(inner, Mapping):
            raise LimitsError(
                f"{one_line(error_prefix)}: metadata.{path}: expected an object of keys and values"
            )
        section = inner
    return section


# --- files ----------------------------------------------------------------------------------------


def _documents(text: str, machine_memory: int | None) -> list[_Document]:
    """Return the file that ``text`` names and the files that it extends, the base first."""
    documents: list[_Document] = []
    next_name: str | None = text
    folder, error_prefix = Path(), ""
    while next_name is not None:
        path, shipped = _locate(next_name, folder, error_prefix)
        document = _read(next_name, path, shipped=shipped, machine_memory=machine_memory)
        # Compared by inode, because one file may have several paths.
        if any(path.samefile(document_above.path) for document_above in documents):
            raise LimitsError(
                f"{one_line(path)}: extends itself, by way of {one_line(documents[-1].path)}"
            )
        documents.append(document)
        # A relative path in ``extends`` starts at the file that contains it.
        next_name, folder, error_prefix = (
            document.extends,
            path.parent,
            f"{one_line(path)}: extends: ",
        )
    return documents[::-1]


def _locate(text: str, folder: Path, error_prefix: str) -> tuple[Path, bool]:
    """Return the file that ``text`` names, relative to ``folder``, and whether it ships."""
    # Always a path, even if a profile has the same name.
    if "/" in text or text.endswith((".yaml", ".yml")):
        return folder / text, False
    if text in shipped_profiles():
        return profile_dir() / f"{text}.yaml", True
    # Tried last, so that a file named ``ci`` cannot replace the profile ``ci``.
    if (folder / text).is_file():
        return folder / text, False
    if (folder / text).is_dir():
        raise LimitsError(f"{error_prefix}{one_line(text)}: is a directory; name a file in it")
    advice = nearest(text, shipped_profiles())
    raise LimitsError(
        f"{error_prefix}unknown profile {one_line(text)!r}; {advice}, or a file (its name with / or .yaml)"
    )


def _read(name: str, path: Path, *, shipped: bool, machine_memory: int | None) -> _Document:
    sections = load(path).mapping("the document")
    for key, value in sections.items():
        _demand_section(key, value)
    extends = sections["extends"].text("extends") if "extends" in sections else None
    entries = sections["limits"].mapping("limits") if "limits" in sections else {}
    return _Document(
        name=name,
        path=path,
        shipped=shipped,
        description=sections["description"].text("description")
        if "description" in sections
        else "",
        extends=extends,
        firm="firm" in sections and sections["firm"].flag("firm"),
        layer=parse_layer(
            entries, source=f"profile {name}" if shipped else "", machine_memory=machine_memory
        ),
        isolation=isolation.parse(sections["isolation"].mapping("isolation"))
        if "isolation" in sections
        else {},
    )


def _demand_section(key: str, value: Value) -> None:
    if key in _SECTIONS:
        return
    # A frequent mistake, which deserves its own advice.
    if key.replace("-", "_") in LIMIT_NAMES:
        raise LimitsError(f"{value.location}: {key} stands at the top level; put it under limits:")
    raise LimitsError(
        f"{value.location}: unknown section {one_line(key)!r}; {nearest(key, _SECTIONS)}"
    )


def _is_default(document: _Document) -> bool:
    return document.shipped and document.name == DEFAULT_PROFILE
