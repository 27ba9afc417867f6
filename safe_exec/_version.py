"""The version of safe-exec.

A module of its own lets every layer import the version without importing the whole package.
"""

__version__ = "0.1.0"
