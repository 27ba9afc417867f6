"""Reports for CI systems, one module per system. ``batch/ci.py`` detects the system and calls it."""
