"""Measurements of a running sandbox."""
