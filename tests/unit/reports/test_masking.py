"""What counts as a secret of the environment, and what is left of it in a report."""

from __future__ import annotations

import pytest

from safe_exec.model import events
from safe_exec.model.verdict import Status
from safe_exec.reports.masking import MASK, Mask, is_secret_name, mask_for
from tests.unit.builders import make_verdict


@pytest.mark.parametrize(
    "name",
    [
        "TOKEN", "GITHUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "MYSQL_PASSWD", "OPENAI_API_KEY", "apikey", "my_Secret",
        "GOOGLE_CREDENTIALS", "BASIC_AUTH", "AUTHORIZATION", "DB_PASS", "DATABASE_URL", "SESSION_COOKIE", "SSH_PRIVATE",
    ],
)  # fmt: skip
def test_names_that_look_secret(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "PATH",
        "HOME",
        "PWD",
        "OLDPWD",
        "GIT_AUTHOR_NAME",
        "KEYBOARD",
        "COMPASS_DIR",
        "LANG",
        "PASSENGERS",
    ],
)
def test_names_that_do_not(name: str) -> None:
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    "value",
    [
        "hunter22",
        "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        "/AbCdEf012345+/xyz=",
        "correct horse",
        "ghp_0123456789",
        "p$[x]*(y)",
    ],
)
def test_values_that_are_masked(value: str) -> None:
    assert mask_for({"A_TOKEN": value})(f"before {value} after {value!r}").count(MASK) == 2


@pytest.mark.parametrize(
    "value",
    [
        "",
        "short",
        "true",
        "enabled",
        "python3",
        "/run/user/1000/agent.sock",
        "~/.netrc",
        "100000",
        "out_of_memory",
    ],
)
def test_values_that_are_not(value: str) -> None:
    assert mask_for({"A_TOKEN": value})(f"before {value} after") == f"before {value} after"


def test_a_number_is_a_password_and_no_token() -> None:
    assert mask_for({"DB_PASSWORD": "12345678"})("12345678") == MASK
    assert mask_for({"MAX_TOKENS": "12345678"})("12345678") == "12345678"


def test_other_names_are_left_alone() -> None:
    assert (
        mask_for({"EDITOR": "some-editor-of-mine"})("some-editor-of-mine") == "some-editor-of-mine"
    )


def test_the_longest_goes_first() -> None:
    mask = mask_for({"A_KEY": "abcdef", "B_KEY": "abcdefghi"})
    assert mask("abcdefghi abcdef") == f"{MASK} {MASK}"


def test_the_password_of_a_url_and_the_lines_of_a_key() -> None:
    key = "-----BEGIN KEY-----\nMIIEvQIBADANBgkqhkiG\nshort\n-----END KEY-----"
    mask = mask_for({"DATABASE_URL": "postgres://me:s3cr%2Fet9@host/db", "PRIVATE_KEY": key})
    assert mask("login s3cr/et9 failed") == f"login {MASK} failed"
    assert "MIIE" not in mask("seen MIIEvQIBADANBgkqhkiG short")
    assert (
        "MIIE" not in mask(repr(key))
        and "MIIE" not in mask(key)
        and "MIIE" not in mask(" ".join(key.split()))
    )


def test_everywhere_in_a_verdict_but_not_in_the_names_of_files() -> None:
    verdict = make_verdict(
        stderr_tail="hunter22 said",
        command=("safe-exec", "hunter22"),
        cwd="/home/hunter22",
        warnings=("x hunter22",),
    )
    masked = Mask(("hunter22",)).everywhere(verdict)
    assert (masked.stderr_tail, masked.command, masked.warnings) == (
        f"{MASK} said",
        ("safe-exec", MASK),
        (f"x {MASK}",),
    )
    assert (
        masked.cwd == verdict.cwd
        and masked.status is verdict.status
        and masked.timeline == verdict.timeline
    )
    assert Mask(("nothing",)).everywhere(verdict) == verdict
    assert Mask().everywhere(verdict) is verdict


def test_everywhere_in_an_event() -> None:
    event = events.CellStarted(time=1.0, index=0, code_index=0, source="key = 'hunter22'")
    assert Mask(("hunter22",)).everywhere(event).source == f"key = '{MASK}'"
    done = events.RunFinished(time=1.0, status=Status.PASSED, cause=None)
    assert Mask(("passed",)).everywhere(done) == done
