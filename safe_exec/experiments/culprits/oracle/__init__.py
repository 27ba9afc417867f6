"""Answers the culprit search's queries: by trials, in forks of a live kernel, or from the cache."""
