"""The keeper: a small process per sandbox. Standard library only."""
