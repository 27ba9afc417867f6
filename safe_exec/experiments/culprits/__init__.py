"""The search for the cells that cause a failure."""
