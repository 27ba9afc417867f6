"""The types that all stages share. They import nothing else of safe-exec."""
