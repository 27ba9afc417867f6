"""``python -m safe_exec`` and the ``safe-exec`` command. The only place that exits."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; exits with its code."""
    if sys.argv[1:2] == ["run"] and not {"-h", "--help"} & set(sys.argv):
        from safe_exec import early

        early.begin()
    from safe_exec.commands import cli

    sys.exit(cli.call(sys.argv[1:]))


if __name__ == "__main__":
    main()
