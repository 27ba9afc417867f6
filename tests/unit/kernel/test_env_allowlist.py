"""Which variables a kernel may see where only listed ones are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safe_exec.kernel.env_allowlist import LISTED, listed_environment

SECRETS = (
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "GITHUB_TOKEN", "GH_TOKEN", "ACTIONS_RUNTIME_TOKEN", "SSH_AUTH_SOCK", "PGPASSWORD",
    "DBUS_SESSION_BUS_ADDRESS", "XDG_RUNTIME_DIR", "DOCKER_HOST", "KUBECONFIG", "OPENAI_API_KEY", "HF_TOKEN", "NPM_TOKEN", "PIP_INDEX_URL",
    "NETRC", "GPG_AGENT_INFO", "KRB5CCNAME", "GOOGLE_APPLICATION_CREDENTIALS", "AZURE_CLIENT_SECRET", "JUPYTER_TOKEN", "JPY_API_TOKEN",
    "LD_PRELOAD", "LD_AUDIT", "PYTHONSTARTUP", "BASH_ENV", "PROMPT_COMMAND", "DISPLAY", "XAUTHORITY", "OLDPWD", "HISTFILE",
)  # fmt: skip


@pytest.mark.parametrize("name", SECRETS)
def test_what_may_be_a_secret_or_a_way_out_is_not_listed(name: str) -> None:
    assert listed_environment({name: "x"}, ()) == {}


@pytest.mark.parametrize(
    "name",
    [
        "PATH",
        "HOME",
        "LANG",
        "LC_ALL",
        "LC_CTYPE",
        "TZ",
        "VIRTUAL_ENV",
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
    ],
)
def test_what_a_kernel_needs_is_listed(name: str) -> None:
    assert listed_environment({name: "x"}, ()) == {name: "x"}


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        ("http://proxy.example:3128", True),
        ("proxy.example:3128", True),
        ("http://ann:secret@proxy.example:3128", False),
        ("http://token@proxy.example:3128", False),
        ("https://ann:@proxy.example", False),
        ("socks5://ann:secret@127.0.0.1:1080", False),
        ("http://proxy.example/a@b", True),
        ("", True),
    ],
)
@pytest.mark.parametrize("name", ["HTTP_PROXY", "https_proxy", "R_LIBS"])
def test_values_with_a_password_in_them_are_left_out(name: str, value: str, seen: bool) -> None:
    assert listed_environment({name: value}, ()) == ({name: value} if seen else {})


def test_a_variable_that_is_named_is_seen_whatever_it_holds() -> None:
    env = {"TOKEN": "x", "HTTP_PROXY": "http://ann:secret@proxy", "OTHER": "y"}
    assert listed_environment(env, ("TOKEN", "HTTP_PROXY", "MISSING")) == {
        "TOKEN": "x",
        "HTTP_PROXY": "http://ann:secret@proxy",
    }


def test_names_are_whole_names() -> None:
    assert (
        listed_environment(
            {"PATHS": "x", "MY_HOME": "x", "LCX": "x", "lc_all": "x", "_NUM_THREADS_": "x"}, ()
        )
        == {}
    )


@given(
    st.dictionaries(st.text(max_size=12), st.text(max_size=12)),
    st.sets(st.text(max_size=12), max_size=4),
)
def test_nothing_is_added_and_nothing_changed(env: dict[str, str], more: set[str]) -> None:
    found = listed_environment(env, more)
    assert found.items() <= env.items()
    assert {name for name in found if name not in more} <= {
        n for n in env if n in LISTED or n[:3] == "LC_" or n[-12:] == "_NUM_THREADS"
    }
    assert more & env.keys() <= found.keys()
