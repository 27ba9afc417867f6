"""Which limits hold: profile, the repository's file, the user's, the notebook and the options, laid over each other.

Imports ``model``, ``errors`` and its own parts (``units``, ``files``, ``limits_yaml``, ``limits_values``,
``project_file``), whose public names it passes on. Pure apart from reading the files it is told of; YAML is imported
when the first file is read.
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

# The limits that a single cell may carry; the others hold for a process or for the whole run.
CELL_LIMITS = frozenset(row.name for row in ROWS if row.of_cell)


class Profile(Struct, frozen=True, kw_only=True):
    """A named set of limits.

    ``loosenable``: a notebook may loosen them. ``firm``: not even a ``safe-exec.yaml`` may, where the profile was asked
    for by name.
    """

    name: str
    limits: Limits
    loosenable: bool
    firm: bool
    path: Path
    description: str
    isolation: Isolation = field(default_factory=Isolation)


class Resolved(Struct, frozen=True, kw_only=True):
    """The limits of one run. ``sources`` says for each limit where its figure was written.

    ``loosenable``: cells may loosen what they may carry, but for the limits in ``fixed``, which options have set.
    """

    limits: Limits
    profile: str
    warnings: tuple[str, ...]
    sources: Mapping[str, str]
    loosenable: bool
    fixed: frozenset[str]
    isolation: Isolation = field(default_factory=Isolation)


class _Document(Struct, frozen=True, kw_only=True):
    """One limits file as it stands, without what it extends."""

    name: str
    path: Path
    shipped: bool
    description: str
    extends: str | None
    firm: bool
    layer: Layer
    isolation: Mapping[str, Any]


_SECTIONS = ("description", "extends", "firm", "limits", "isolation")


# --- profiles ---------------------------------------------------------------------------------------------------


@cache
def profile_dir() -> Path:
    """The directory of the profiles that ship. Raises LimitsError.

    In a wheel it lies inside the package; in a checkout, which an editable install uses too, beside it.
    """
    package = Path(__file__).resolve().parents[1]
    for directory in (package / "_limits", package.parent / "limits"):
        if (directory / f"{DEFAULT_PROFILE}.yaml").is_file():
            return directory
    raise LimitsError(
        f"{one_line(package / '_limits')}: the profiles that ship are missing; install safe-exec again"
    )


def shipped_profiles() -> tuple[str, ...]:
    """The names of the profiles that ship, sorted."""
    return tuple(sorted(path.stem for path in profile_dir().glob("*.yaml")))


def load_profile(name_or_path: str, *, machine_memory: int | None) -> Profile:
    """The profile of that name, or in that file (anything with a path separator or ``.yaml``, or an existing file).

    ``machine_memory`` is the bytes that a memory of ``"75%"`` refers to. Raises LimitsError.
    """
    documents = _documents(name_or_path, machine_memory)
    if not documents[0].shipped:
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
    """What the ``safe-exec.yaml`` in ``file`` says of a notebook; ``None`` if no entry matches. Raises LimitsError."""
    return _project_overrides(
        file, notebook_path, profiles=shipped_profiles(), machine_memory=machine_memory
    )


# --- the limits of one run --------------------------------------------------------------------------------------


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
    """The limits of one run, from the weakest word to the strongest.

    1. a shipped profile: the one ``chosen`` by name or by the ``extends`` of a chosen file, else the project's, else
       ``default``;
    2. the project's ``safe-exec.yaml``, which may not loosen a firm profile that was chosen;
    3. the user's own file, if ``chosen`` names one;
    4. the notebook's ``metadata`` (``execution.timeout``, then ``safe_exec.limits``): it tightens always and loosens
       under the profile ``default`` only;
    5. ``options``, by the names of limits; they win both ways.

    Isolation is laid over likewise; a notebook may only wall itself off further (``safe_exec.limits.isolation``), and ``walls`` are the
    options. ``notebook`` names the notebook in errors and warnings. Raises LimitsError.
    """
    explicit_documents = _documents(chosen, machine_memory) if chosen else []
    base = [document for document in explicit_documents if document.shipped]
    firm = any(document.firm for document in base)
    if not base:
        base = _documents((project and project.profile) or DEFAULT_PROFILE, machine_memory)
    own = [document for document in explicit_documents if not document.shipped]
    top = (own or base)[-1]

    stack = _Stack()
    for document in base:
        stack.lay(document.layer)
    if project:
        stack.lay(project.layer, refuse=f"profile {base[-1].name} is firm" if firm else "")
    for document in own:
        stack.lay(document.layer)
    only_default = f"profile {top.name} does not let a notebook loosen limits"
    stack.lay(
        _notebook_layer(metadata or {}, notebook, machine_memory),
        refuse="" if _is_default(top) else only_default,
    )
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
        isolation=_walls([*base, *own], metadata or {}, notebook, walls or {}),
    )


def _walls(
    documents: Sequence[_Document],
    metadata: Mapping[str, object],
    notebook: str,
    options: Mapping[str, Any],
) -> Isolation:
    """The isolation of one run: the files one over the other, tightened by the notebook, and the options at last."""
    merged = Isolation()
    for document in documents:
        merged = isolation.apply(merged, document.isolation)
    merged = isolation.tighten(merged, isolation.of_metadata(metadata, notebook))
    return isolation.apply(merged, options)


def resolve_simple(
    config: Mapping[str, object], profile: str | None, *, machine_memory: int | None
) -> Limits:
    """The limits of a kernel that another Jupyter tool starts, which knows no notebook and no options.

    ``config`` is the kernel provisioner's: ``limits`` names a profile or a file, any other key is a limit with a figure
    in the units of people, which wins. ``profile`` (of the environment) counts where ``config`` names none. Raises
    LimitsError.
    """
    chosen = config.get("limits") or profile or None
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
    """The limits of one cell, which may carry :data:`CELL_LIMITS`, and a warning for each figure that was ignored.

    A figure tightens always; it loosens under the profile ``default`` only, and never what an option has set.
    ``error_prefix`` names notebook and cell. Raises LimitsError.
    """
    cell_settings = _own_limits(cell_metadata, error_prefix)
    if not cell_settings:
        return resolved.limits, ()
    own = parse_overrides(
        cell_settings,
        error_prefix=f"{error_prefix}: metadata.safe_exec.limits",
        machine_memory=None,
    )
    for name in sorted(own.keys() - CELL_LIMITS):
        allowed = " and ".join(sorted(CELL_LIMITS))
        raise LimitsError(
            f"{one_line(error_prefix)}: {name}: a cell may carry {allowed} only; set it for the notebook"
        )
    free = {
        name: value
        for name, value in own.items()
        if resolved.loosenable and name not in resolved.fixed
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


class _Stack:
    """The limits while layers are laid over each other."""

    def __init__(self) -> None:
        self.limits = Limits()
        self.sources = dict.fromkeys(LIMIT_NAMES, "built in")
        self.warnings: list[str] = []

    def lay(self, layer: Layer, *, refuse: str = "") -> None:
        """Put ``layer`` on top; with ``refuse``, the reason, its figures may only tighten."""
        ignored: list[str] = []
        previous = self.limits
        if refuse:
            self.limits, ignored = tighten(previous, layer.values)
        else:
            self.limits = apply(previous, layer.values)
        for name in layer.values:
            source = layer.sources[name]
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
        values=values | own, sources=sources | dict.fromkeys(own, "metadata.safe_exec.limits")
    )


def _nbclient_timeout(timeout: object) -> object:
    """To nbclient, 0 and what is below are "no timeout"; everything else is as ours."""
    unlimited = isinstance(timeout, int | float) and not isinstance(timeout, bool) and timeout <= 0
    return None if unlimited else timeout


def _own_limits(metadata: Mapping[str, object], error_prefix: str) -> Mapping[str, object]:
    """``safe_exec.limits`` of a notebook's or a cell's metadata."""
    section = metadata
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


# --- files ------------------------------------------------------------------------------------------------------


def _documents(text: str, machine_memory: int | None) -> list[_Document]:
    """The file that ``text`` names and all that it extends, the lowest first. Raises LimitsError."""
    documents: list[_Document] = []
    next_name: str | None = text
    folder, error_prefix = Path(), ""
    while next_name is not None:
        path, shipped = _locate(next_name, folder, error_prefix)
        document = _read(next_name, path, shipped=shipped, machine_memory=machine_memory)
        if any(path.samefile(document_above.path) for document_above in documents):
            raise LimitsError(
                f"{one_line(path)}: extends itself, by way of {one_line(documents[-1].path)}"
            )
        documents.append(document)
        next_name, folder, error_prefix = (
            document.extends,
            path.parent,
            f"{one_line(path)}: extends: ",
        )
    return documents[::-1]


def _locate(text: str, folder: Path, error_prefix: str) -> tuple[Path, bool]:
    """The file that ``text`` names, and whether it is one that ships. ``folder`` is where relative paths start."""
    if "/" in text or text.endswith((".yaml", ".yml")):
        return folder / text, False
    if text in shipped_profiles():
        return profile_dir() / f"{text}.yaml", True
    if (folder / text).is_file():
        return folder / text, False
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
    if key.replace("-", "_") in LIMIT_NAMES:
        raise LimitsError(f"{value.location}: {key} stands at the top level; put it under limits:")
    raise LimitsError(
        f"{value.location}: unknown section {one_line(key)!r}; {nearest(key, _SECTIONS)}"
    )


def _is_default(document: _Document) -> bool:
    return document.shipped and document.name == DEFAULT_PROFILE
