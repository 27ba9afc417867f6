"""jupyter_kernel_test, the suite by which kernels are tested, on bare kernels and on the same kernels behind ``safe-exec kernel``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import jupyter_kernel_test
import pytest

from tests.support import private_directory, safe_exec

pytestmark = pytest.mark.kills
NAMES = {
    "python-ci": ("--limits", "ci", "--kernel", "python3"),
    "python-strict": ("--limits", "strict", "--kernel", "python3"),
    "bash-strict": ("--limits", "strict", "--kernel", "bash"),
}


@pytest.fixture(scope="module", autouse=True)
def kernelspecs() -> Iterator[None]:
    """The kernelspecs of this module, in a place of their own."""
    with private_directory() as folder, pytest.MonkeyPatch.context() as patch:
        for name, options in NAMES.items():
            done = safe_exec("kernelspec", "install", "--name", name, "--prefix", folder, *options)
            assert done.returncode == 0, done.stderr
        known = os.environ.get("JUPYTER_PATH", "")
        patch.setenv("JUPYTER_PATH", f"{folder / 'share' / 'jupyter'}:{known}")
        patch.setenv("XDG_STATE_HOME", str(folder))
        patch.delenv("PYTEST_CURRENT_TEST", raising=False)
        yield


class Python(jupyter_kernel_test.KernelTests):  # type: ignore[misc]
    """Samples in Python; each test of the suite uses some."""

    __test__ = False
    kernel_name = "python3"
    language_name = "python"
    file_extension = ".py"
    code_hello_world = "print('hello, world')"
    code_stderr = "import sys; print('test', file=sys.stderr)"
    completion_samples: ClassVar[list[dict[str, Any]]] = [
        {"text": "zi", "matches": {"zip"}},
        {"text": "print(sorte", "matches": {"sorted"}},
    ]
    complete_code_samples: ClassVar[list[str]] = ["1", "print('hello')", "def f(x):\n  x*2\n\n"]
    incomplete_code_samples: ClassVar[list[str]] = ["print('''hello", "def f(x):\n  x*2"]
    invalid_code_samples: ClassVar[list[str]] = ["import = 7q"]
    code_page_something = "zip?"
    code_generate_error = "raise Exception"
    code_execute_result: ClassVar[list[dict[str, str]]] = [
        {"code": "1+2+3", "result": "6"},
        {"code": "[n * n for n in range(1, 4)]", "result": "[1, 4, 9]"},
    ]
    code_display_data: ClassVar[list[dict[str, str]]] = [
        {
            "code": "from IPython.display import HTML, display; display(HTML('<b>x</b>'))",
            "mime": "text/html",
        }
    ]
    code_history_pattern = "1?2*"
    supported_history_operations = ("tail", "search")
    code_inspect_sample = "zip"
    code_clear_output = "from IPython.display import clear_output; clear_output()"


class Bash(jupyter_kernel_test.KernelTests):  # type: ignore[misc]
    """Samples in bash."""

    __test__ = False
    kernel_name = "bash"
    language_name = "bash"
    file_extension = ".sh"
    code_hello_world = "echo 'hello, world'"
    completion_samples: ClassVar[list[dict[str, Any]]] = [{"text": "enab", "matches": {"enable"}}]


class TestBarePython(Python):
    __test__ = True


class TestPythonCi(Python):
    __test__ = True
    kernel_name = "python-ci"


class TestPythonStrict(Python):
    __test__ = True
    kernel_name = "python-strict"


class TestBareBash(Bash):
    __test__ = True


class TestBashCi(Bash):
    __test__ = True
    kernel_name = "bash-strict"


def test_the_names_are_those_of_the_classes() -> None:
    used = {cls.kernel_name for cls in (TestPythonCi, TestPythonStrict, TestBashCi)}
    assert used == set(NAMES)
    with contextlib.suppress(FileNotFoundError):
        assert not Path("kernel.json").exists()
