"""The environment variables that isolation passes to a kernel. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from safe_exec.model.patterns import lazy_pattern

# Variables that are useful and hold no secrets. The URL of a proxy can contain a password; such a
# value is not passed.
LISTED = frozenset(
    {
        "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TERM", "COLUMNS",
        "LINES", "NO_COLOR", "CI", "VIRTUAL_ENV", "CONDA_PREFIX", "CONDA_DEFAULT_ENV",
        "PYTHONPATH", "PYTHONHASHSEED", "PYTHONUTF8", "PYTHONWARNINGS", "PYTHONDONTWRITEBYTECODE",
        "PYTHON_GIL", "PYTHONUNBUFFERED", "PYTHONIOENCODING", "LD_LIBRARY_PATH", "R_HOME",
        "R_LIBS", "R_LIBS_USER", "R_LIBS_SITE", "JULIA_DEPOT_PATH", "JULIA_PROJECT",
        "JULIA_NUM_THREADS", "MPLBACKEND", "MPLCONFIGDIR", "SOURCE_DATE_EPOCH", "JUPYTER_PATH",
        "JUPYTER_DATA_DIR", "CUDA_VISIBLE_DEVICES", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
        "http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR",
        "REQUESTS_CA_BUNDLE",
    }
)  # fmt: skip
LISTED_ENDS = ("_NUM_THREADS",)
LISTED_STARTS = ("LC_",)
_CREDENTIALS = lazy_pattern(r"://[^/@\s]+@")


def listed_environment(env: Mapping[str, str], more: Iterable[str]) -> dict[str, str]:
    """Return the variables of an environment that the list allows, and those in ``more``."""
    names = set(more)
    return {
        key: value
        for key, value in env.items()
        if key in names or (_is_listed(key) and not _CREDENTIALS.search(value))
    }


def _is_listed(key: str) -> bool:
    return key in LISTED or key.startswith(LISTED_STARTS) or key.endswith(LISTED_ENDS)
