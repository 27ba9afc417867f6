"""Limits and isolation from profiles, files, notebooks and options."""
