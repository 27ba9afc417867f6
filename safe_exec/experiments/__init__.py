"""Further runs of a notebook: culprit search, threshold of a limit, comparison of two runs."""
