"""The search for the cells that caused a failure."""
