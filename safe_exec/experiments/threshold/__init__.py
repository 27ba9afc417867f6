"""The search for the smallest value of a limit with which a notebook passes."""
