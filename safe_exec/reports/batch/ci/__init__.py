"""Reports in the formats of CI systems, one module each; ``batch/ci.py`` chooses and calls them."""
