"""The command line: a file per sub-command, of the same name; ``main`` lists them in ``COMMANDS``.

Options that several commands share are in ``options``, the jobs of the commands in ``workflows``.
``tables``, ``grouped_help``, ``usage_errors``, ``batch_result``, ``probe_report`` and
``doctor_cluster`` are parts of commands.
"""
