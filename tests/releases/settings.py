"""This machine's package sources: apt's mirror and pip's settings, for a root file system to use.

Standard library only. Nothing here is written into the repository: a root gets the settings that
this machine has when the root is made.
"""

from __future__ import annotations

import configparser
import os
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

PIP_SECTIONS = ("global", "install")
PIP_LISTS = frozenset({"extra-index-url", "find-links", "trusted-host"})
PIP_FILES = frozenset({"cert", "client-cert", "constraint"})
PIP_KEYS = PIP_LISTS | PIP_FILES | {"index-url", "no-index", "proxy", "retries", "timeout"}
"""What decides where packages come from; the rest (user installs, formats) is taste."""
APT_KEYS = (
    "Acquire::http",
    "Acquire::https",
    "Acquire::Check-Valid-Until",
    "Acquire::Check-Date",
    "Acquire::Retries",
)


@dataclass(frozen=True, kw_only=True)
class PipSettings:
    """pip's settings for a root: ``values`` for its pip.conf, and what they refer to.

    ``files``: a path in the root -> the file of this machine to copy there. ``folders``: folders of
    packages, which the root sees under the same path, read-only.
    """

    values: Mapping[str, str]
    files: Mapping[str, Path] = field(default_factory=dict)
    folders: tuple[Path, ...] = ()

    def text(self) -> str:
        """The root's pip.conf."""
        rows = {"root-user-action": "ignore", **self.values}
        return "[global]\n" + "".join(f"{key} = {value}\n" for key, value in sorted(rows.items()))


def pip_settings(
    files: Iterable[Path] | None = None, environ: Mapping[str, str] = os.environ
) -> PipSettings:
    """Collect the settings of pip's configuration files, later ones over earlier ones, and of PIP_*."""
    values: dict[str, str] = {}
    for path in _pip_files(environ) if files is None else files:
        parser = configparser.RawConfigParser()
        parser.read(path)  # one that is not there is left out
        for section in PIP_SECTIONS:
            if parser.has_section(section):
                values |= {key.replace("_", "-"): value for key, value in parser.items(section)}
    for name, value in environ.items():
        if name.startswith("PIP_") and value:
            values[name.removeprefix("PIP_").lower().replace("_", "-")] = value
    if "default-timeout" in values:
        values["timeout"] = values.pop("default-timeout")
    return _portable({key: value for key, value in values.items() if key in PIP_KEYS})


def _pip_files(environ: Mapping[str, str]) -> list[Path]:
    """In pip's own order (its documentation, "Configuration Files")."""
    home = Path(environ.get("HOME", "/root"))
    own = environ.get("PIP_CONFIG_FILE")
    folders = environ.get("XDG_CONFIG_DIRS") or "/etc/xdg"
    config = Path(environ.get("XDG_CONFIG_HOME") or home / ".config")
    return [
        *(Path(folder) / "pip" / "pip.conf" for folder in folders.split(":")),
        Path("/etc/pip.conf"),
        home / ".pip" / "pip.conf",
        config / "pip" / "pip.conf",
        *([Path(own)] if own else []),
    ]


def _portable(values: Mapping[str, str]) -> PipSettings:
    kept: dict[str, str] = {}
    files: dict[str, Path] = {}
    folders: list[Path] = []
    for key, value in values.items():
        words: list[str] = []
        for word in value.split() if key in PIP_LISTS | PIP_FILES else [value]:
            path = _local_path(word) if key != "trusted-host" else None
            if path is None:
                words.append(word)
            elif path.is_dir():
                folders.append(path)
                words.append(word)
            elif path.is_file():
                copy = f"/etc/pip-{key}-{len(files)}{path.suffix}"
                files[copy] = path
                words.append(copy)
        if words:
            kept[key] = " ".join(words)
    return PipSettings(values=kept, files=files, folders=tuple(_roots(folders)))


def _local_path(word: str) -> Path | None:
    url = urlsplit(word)
    if url.scheme == "file":
        return Path(unquote(url.path))
    return Path(word) if word.startswith("/") else None


def _roots(folders: Iterable[Path]) -> list[Path]:
    """The folders to bind. An index of files links to a folder beside it, so its parent is bound."""
    tops = {folder.parent if folder.name == "simple" else folder for folder in folders}
    return sorted(top for top in tops if not any(other in top.parents for other in tops))


def debian_mirror() -> str:
    """The archive that this machine's apt has Debian from. Raises SystemExit."""
    release = os_release()
    targets = command_output(
        "apt-get", "indextargets", "--format", "$(SITE) $(CODENAME) $(ARCHITECTURE)"
    )
    for line in targets.splitlines():
        site, _, rest = line.partition(" ")
        if release.get("ID") == "debian" and rest.split()[:1] == [release.get("VERSION_CODENAME")]:
            return site
    raise SystemExit(
        "apt on this machine has no Debian archive configured; name one with MIRROR=URL"
    )


def apt_text() -> str:
    """This machine's settings of apt's downloads, as a file of apt.conf.d."""
    lines = command_output("apt-config", "dump", *APT_KEYS).splitlines()
    return "".join(f"{line}\n" for line in lines if not line.endswith('"";'))


def os_release(path: Path = Path("/etc/os-release")) -> dict[str, str]:
    """The rows of an os-release file."""
    rows = (line.split("=", 1) for line in path.read_text().splitlines() if "=" in line)
    return {key: value.strip("\"'") for key, value in rows}


def command_output(*argv: str) -> str:
    """What a command prints. Raises CalledProcessError."""
    return subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout
