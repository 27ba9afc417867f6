"""Hide secrets of the environment in reports: a secret is written as ``***``.

The last message of a kernel, an exception or a line of source may contain a token, and verdicts end
up in logs and artifacts that others read. A variable is secret by its name; its value is masked
unless it is short, an ordinary word, a number or a path, because masking those would make reports
unreadable. Outputs of cells belong to the notebook and are never masked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

from msgspec import Struct
from msgspec.structs import replace

from safe_exec.model.ending import TerminationReason
from safe_exec.model.limits import LimitName, Mechanism
from safe_exec.model.patterns import lazy_pattern
from safe_exec.model.verdict import Activity, CauseKind, CellStatus, Confidence, Role, Status

MASK = "***"
SHORTEST = 6
LONGEST_NUMBER = 9
SHORTEST_LINE = 16
"""The length from which a single line of a longer secret, such as a private key, is masked too."""

_NAME = re.compile(
    r"TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|PASSCODE|CREDENTIAL|PRIVATE|APIKEY|KEY(?!BOARD|MAP|RING|SERVER)|AUTH(?!OR)|AUTHORIZATION"
    r"|COOKIE|SIGNATURE|BEARER|(?:^|_)(?:PASS|PWD|PIN|SAS|DSN|PAT)(?:$|_)|(?:DATABASE|CONNECTION|WEBHOOK|MONGO|REDIS|POSTGRES).*(?:URL|URI|STRING)$",
    re.IGNORECASE,
)
# With these names even a number or a common word is masked.
_SURE_NAME = lazy_pattern(r"PASS|SECRET|CREDENTIAL|(?:^|_)(?:PWD|PIN)(?:$|_)", re.IGNORECASE)
# PWD is the working directory, which the shell exports.
_NEVER = frozenset({"PWD", "OLDPWD"})
# A path is only recognised below a usual top directory: a base64 secret may contain slashes.
_ROOT_NAMES = (
    "app bin boot content data dev etc home kaggle lib lib64 media mnt nix opt private proc root run sbin snap srv sys tmp usr var "
    "work workspace workspaces builds github Users Library Applications"
)
_PATH = lazy_pattern(
    rf"(?:~|\.{{1,2}})(?:/[^\0\n:]*)?|/(?:{_ROOT_NAMES.replace(' ', '|')})(?:/[^\0\n:]*)?"
)
_NUMBER = lazy_pattern(
    rf"[+-]?\d{{1,{LONGEST_NUMBER}}}(?:\.\d{{1,{LONGEST_NUMBER}}})?[a-zA-Z%]{{0,2}}"
)
_SETTINGS = (
    "enabled disabled enable disable default required optional always never automatic manual development production staging testing "
    "localhost keyring keychain password passwd secret token tokens private public basic bearer digest negotiate oauth oauth2 openid "
    "plaintext pkcs11 softhsm string number object unknown undefined notset python python3 ipython jupyter notebook kernel kernels memory "
    "limits system output outputs process processes import module modules safe-exec safe_exec strict standard library values source "
    "github gitlab google amazon azure aws-sdk vagrant docker ubuntu debian nobody runner administrator"
)
_WORDS = frozenset(_SETTINGS.split())
_KINDS: tuple[type[Enum], ...] = (
    Activity, CauseKind, CellStatus, Confidence, LimitName, Mechanism, Role, Status, TerminationReason,
)  # fmt: skip
_OURS = frozenset(str(item.value) for kind in _KINDS for item in kind)
"""Words that reports use themselves, which are never masked."""

_KEPT = frozenset(
    {
        "run_id",
        "started",
        "finished",
        "safe_exec_version",
        "sha256",
        "cwd",
        "outputs",
        "path",
        "repro_notebook",
        "id",
    }
)
"""Fields that are never masked: they come from the command line, and commands need them."""

T = TypeVar("T")


class Mask:
    """Masks secrets in a text, or in all texts of a value from ``model``."""

    def __init__(self, secrets: tuple[str, ...] = ()) -> None:
        # Longer forms first, so that no secret is masked in part only.
        forms = sorted(
            {form for secret in secrets for form in _forms(secret)},
            key=lambda form: (-len(form), form),
        )
        self._pattern = re.compile("|".join(map(re.escape, forms))) if forms else None

    def __call__(self, text: str) -> str:
        """Return ``text`` with its secrets masked."""
        return self._pattern.sub(MASK, text) if self._pattern else text

    def everywhere(self, value: T) -> T:
        """Return ``value`` with its secrets masked, as a copy if there are any."""
        return value if self._pattern is None else self._masked(value)

    def _masked(self, value: Any) -> Any:
        if isinstance(value, Enum) or value is None or isinstance(value, int | float):
            return value
        if isinstance(value, str):
            return self(value)
        if isinstance(value, tuple | list):
            return type(value)(map(self._masked, value))
        if isinstance(value, Mapping):
            return {key: self._masked(item) for key, item in value.items()}
        if isinstance(value, Struct):
            pairs = [
                (name, getattr(value, name))
                for name in value.__struct_fields__
                if name not in _KEPT
            ]
            # An unchanged value is returned itself: most events contain no secret.
            changed = {name: new for name, old in pairs if (new := self._masked(old)) != old}
            return replace(value, **changed) if changed else value
        return value


def mask_for(environment: Mapping[str, str]) -> Mask:
    """Return the mask for the secrets in an environment."""
    secrets = [
        secret
        for name, value in environment.items()
        if is_secret_name(name)
        for secret in secrets_in(name, value)
    ]
    return Mask(tuple(secrets))


def is_secret_name(name: str) -> bool:
    """Return whether a variable of this name may hold a secret."""
    return name not in _NEVER and _NAME.search(name) is not None


def secrets_in(name: str, value: str) -> Iterator[str]:
    """Yield the secrets in a value: the value, its longer lines, the password of a URL."""
    value = value.strip()
    # MAX_TOKENS=100000 is a setting, but PASSWORD=100000 is a secret: the name decides for numbers.
    if is_ordinary(value) or (_NUMBER.fullmatch(value) and not _SURE_NAME.search(name)):
        return
    yield value
    lines = value.splitlines()
    # The kernel may print only one line of a private key.
    if len(lines) > 1:
        yield from (line.strip() for line in lines if len(line.strip()) >= SHORTEST_LINE)
    if "://" in value:
        password = _password_of(value)
        if password and not is_ordinary(password):
            yield password


def _password_of(url: str) -> str | None:
    try:
        password = urlsplit(url).password
    except ValueError:
        return None
    return unquote(password) if password else None


def is_ordinary(value: str) -> bool:
    """Return whether a value is too short or too common to be a secret."""
    word = value.casefold()
    return (
        len(value) < SHORTEST
        or word in _WORDS
        or word in _OURS
        or _PATH.fullmatch(value) is not None
    )


def _forms(secret: str) -> Iterator[str]:
    """Yield the forms of a secret: plain, as Python or JSON, on one line, in a URL."""
    yield secret
    yield repr(secret)[1:-1]
    yield secret.encode("unicode_escape", "replace").decode()
    yield secret.replace("\\", "\\\\").replace('"', '\\"')
    yield " ".join(secret.split())
    # A token in a URL appears percent-encoded in error messages.
    yield quote(secret, safe="", errors="replace")
