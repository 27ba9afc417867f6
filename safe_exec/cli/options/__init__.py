"""Options that several commands share, in typed groups.

A group is a decorator that adds its options to a command, and a frozen type that the command gets
instead of one argument for each option.
"""
