"""The kinds of attacks that the hostile suite must have, each as root and as an ordinary user: none gets lost when tests are put in order.

Names are those of tests in ``tests/hostile``: rows of its tables (``Attack``), or a function and what it is given.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support import ROOT

KINDS: dict[str, tuple[str, ...]] = {
    "allocate past the cap": ("allocate",),
    "leak over cells": ("leak",),
    "a worker is killed": ("worker",),
    "ten times the cap through the page cache": ("page-cache",),
    "fill /dev/shm": ("shm-limit",),
    "memfd": ("memfd",),
    "shared anonymous memory": ("shared",),
    "reserve 1 TB untouched": ("reserve",),
    "a double-forked daemon that holds memory": ("daemon-holds",),
    "fork bomb": ("forks", "forks-of-shell"),
    "10000 threads": ("threads",),
    "descriptors run out": ("descriptors",),
    "fill the disk": ("disk", "disk-of-tmp", "disk-everywhere", "disk-of-sockets"),
    "a million small files": ("inodes",),
    "endless print": ("print", "print-past-python"),
    "a display of 500 MB": ("test_half_a_gigabyte_at_once_is_cut display",),
    "deep JSON": ("test_what_is_nested_too_deeply_is_left_out",),
    "NaN and lone surrogates": ("test_no_numbers_and_half_characters_are_made_harmless",),
    "bad MIME bundles": ("test_wrong_mime_bundles_and_types_are_left_out",),
    "a flood of comms": ("test_a_flood_of_small_messages_ends_by_the_cells_time comms",),
    "a flood of updates": ("test_a_flood_of_small_messages_ends_by_the_cells_time updates",),
    "forged signed replies": (
        "test_a_kernel_that_says_it_is_done_and_dies_died_in_that_cell ok and idle",
        "test_a_reply_forged_from_a_thread_for_a_later_cell_is_not_believed",
    ),
    "the connection file rewritten": ("test_the_connection_file_is_not_read_again",),
    "a socket replaced by a link": (
        "test_a_socket_put_in_the_place_of_the_kernels_is_never_reached",
    ),
    "all sockets closed, and alive": ("test_a_kernel_without_sockets_is_out_of_time",),
    "os._exit(0)": ("exit-0",),
    "quit()": ("quit",),
    "os._exit(137)": ("exit-137",),
    "SIGKILL to itself": ("killed",),
    "null dereference": ("null",),
    "C stack overflow": ("stack-overflow",),
    "heap corruption": ("heap",),
    "SIGILL": ("illegal",),
    "a mapping cut off against a full tmpfs": ("full-tmpfs-mapped",),
    "SIGSTOP to itself": ("stopped",),
    "sleep": ("sleep",),
    "SIGINT and SIGTERM ignored": ("deaf",),
    "a loop in C that holds the interpreter": ("holds-interpreter",),
    "processor time over children": ("processor-time",),
    "a hanging exit hook": ("exit-hook",),
    "limits raised": ("rights",),
    "the control group of the parent": ("groups",),
    "unshare, mount, ptrace": ("calls",),
    "the runner killed, traced, read, written": ("processes", "kill-all-seen", "kill-by-number"),
    "abstract sockets, metadata address, names of hosts": ("network-off",),
    "keys in the home, secrets in the environment": ("secrets",),
    "a link in the place of a document": (
        "test_what_is_put_in_the_place_of_a_document_is_replaced symlink",
    ),
    "a pipe in the place of a document": (
        "test_what_is_put_in_the_place_of_a_document_is_replaced fifo",
    ),
    "a hard link in the place of a document": (
        "test_what_is_put_in_the_place_of_a_document_is_replaced hard link",
    ),
    "the notebook swapped under the run": ("test_the_notebook_is_read_once swapped",),
    "escape sequences for the terminal": ("test_no_escape_reaches_the_terminal death",),
    "zombies": ("zombies-left",),
    "a process that cannot be killed at once": ("vfork",),
}
WHO = {"root": ("root", "root-default"), "user": ("user", "user-ci")}


@pytest.fixture(scope="module")
def collected() -> frozenset[str]:
    argv = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "tests/hostile",
    ]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return frozenset(line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line)


@pytest.mark.parametrize("kind", list(KINDS))
def test_each_kind_is_tried_as_root_and_as_an_ordinary_user(
    kind: str, collected: frozenset[str]
) -> None:
    for name in KINDS[kind]:
        function, _, given = name.partition(" ")
        for who, places in WHO.items():
            if function.startswith("test_"):
                wanted = {f"{function}[{place}{'-' * bool(given)}{given}]" for place in places}
            else:
                wanted = {f"test_attack[{name}-{who}]"}
            assert wanted & collected, f"{kind}: {name} is not tried as {who}"
