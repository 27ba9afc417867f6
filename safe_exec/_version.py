"""The version of safe-exec, apart from the package so that nothing imports upwards for it."""

__version__ = "0.1.0"
